"""The daemon as a process: what it loads, answers, refuses and passes on."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vai.daemon import protocol, roles
from vai.errors import BadRequest, MalformedFile, ModelNotFound, NotSupported
from vai.rom import segment
from vai.rom.registry import Name


def refused(stand, *options: str) -> tuple[int, str]:
    """Exit code and last words of a daemon that does not want to start; it must leave no process behind."""
    ended = subprocess.run(stand.argv(*options), capture_output=True, text=True, timeout=60)
    assert [roles.holder(stand.root, role) for role in roles.ROLES] == [None, None, None]
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr.splitlines()[-1]


def test_the_running_daemon_has_nothing_but_the_standard_library_in_it(stand) -> None:
    stand.start()
    mapped = {line.split()[-1] for line in Path(f"/proc/{stand.daemon.pid}/maps").read_text().splitlines()}
    assert [path for path in mapped if "site-packages" in path or "/vai/" in path] == []
    program = (
        "import sys, vai.daemon.__main__, vai.daemon.client\n"
        "import vai.daemon.stop\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    loaded = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    packages = {name for name in loaded.split() if not name.startswith(("_vai_editable", "__main__", "_"))}
    assert packages == {"vai"}


def test_children_outlive_their_parent_in_sessions_of_their_own_with_no_foreign_descriptors(stand) -> None:
    stand.start()
    for role in ("engine", "server"):
        pid = stand.pid(role)
        assert os.getsid(pid) == pid
        assert os.getpgid(pid) != os.getpgid(stand.daemon.pid)
    held = [str(link.readlink()) for link in Path(f"/proc/{stand.pid('server')}/fd").iterdir()]
    assert not any("vai-pool" in link or "daemon" in link for link in held)


def test_what_is_named_and_absent_is_burned_again_when_the_daemon_starts(stand) -> None:
    digest = stand.digests["tiny"]
    segment.remove(stand.root, digest)
    (stand.root / "images" / ".0123456789abcdef.partial").write_bytes(b"of a killed burner")
    stand.registry.put(Name("gone", "/nowhere/gone.gguf", digest="0" * 64))
    stand.start()
    stand.until(lambda: {load["state"] for load in stand.call("status")["loads"]} <= {"done", "failed"})
    assert stand.registry.is_resident(digest)
    assert stand.complete("tiny", 5)
    failed = [load for load in stand.call("status")["loads"] if load["state"] == "failed"]
    assert [load["source"] for load in failed] == ["/nowhere/gone.gguf"]
    assert not list((stand.root / "images").glob(".*.partial"))
    stand.verify()


def test_a_model_is_loaded_under_a_new_name_while_others_answer(stand, checkpoint: Path) -> None:
    stand.start()
    load = stand.call("load", source=str(checkpoint), name="new")
    assert (load["state"], load["digest"]) == ("done", stand.digests["tiny"])
    assert stand.complete("new", 5) == stand.complete("tiny", 5)
    assert stand.call("load", name="new", wait=False)["state"] == "done"


def test_loads_that_cannot_be_answer_with_the_reason(stand, tmp_path: Path) -> None:
    stand.start()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    with pytest.raises(MalformedFile):
        stand.call("load", source=str(tmp_path / "broken.gguf"), name="broken")
    with pytest.raises(ModelNotFound, match="Known: tiny-qwen2, tiny"):
        stand.call("load", name="unknown")
    for fields in ({}, {"name": 7}, {"name": "m", "source": 7}, {"name": "m", "wait": "yes"}):
        with pytest.raises(BadRequest, match="A load needs a name"):
            stand.call("load", **fields)
    with pytest.raises(BadRequest, match="cannot be a model's name"):
        stand.call("load", source="/x.gguf", name="../escape")


def test_hostile_peers_do_not_disturb_the_daemon(stand) -> None:
    stand.start()
    with pytest.raises(NotSupported, match="not 'explode'"):
        stand.call("explode")
    path = str(roles.socket_path(stand.root, "daemon"))
    for message in (b"", b"\x01", struct.pack("<I", 1 << 31), struct.pack("<I", 3) + b"[1]", b"\xff" * 5000):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(path)
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda connection=connection: connection.recv(4096), b""))
            assert answer == b"" or b"invalid_value" in answer
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(path)
    silent.sendall(struct.pack("<I", 100))  # and never the rest
    assert stand.call("ping")["pid"] == stand.daemon.pid
    silent.close()


def test_two_questions_on_one_connection_are_answered_in_order(stand) -> None:
    stand.start()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(roles.socket_path(stand.root, "daemon")))
        connection.sendall(protocol.encode({"op": "ping"}) + protocol.encode({"op": "nonsense"}))
        assert protocol.receive(connection)["pid"] == stand.daemon.pid
        assert protocol.receive(connection)["error"]["code"] == "not_supported"


def test_shutdown_over_the_socket_is_as_good_as_a_signal(stand) -> None:
    stand.start()
    stand.call("shutdown")
    assert stand.daemon.wait(30) == 0
    assert [roles.holder(stand.root, role) for role in roles.ROLES] == [None, None, None]


def test_sigint_and_sighup_end_it_too(stand) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        stand.start()
        stand.daemon.send_signal(number)
        assert stand.daemon.wait(30) == 0
    assert [roles.holder(stand.root, role) for role in roles.ROLES] == [None, None, None]


def test_a_port_in_use_is_refused_at_once(stand) -> None:
    with socket.create_server(("127.0.0.1", stand.port)):
        code, reason = refused(stand)
    assert (code, f"127.0.0.1:{stand.port} is in use by another program" in reason) == (7, True)


def test_a_scratchpad_larger_than_the_memory_is_refused_at_once(stand) -> None:
    code, reason = refused(stand, "--kv-bytes", str(1 << 49))
    assert (code, "choose less with vai serve --kv" in reason) == (8, True)


def test_an_address_that_others_reach_needs_a_key(stand) -> None:
    code, reason = refused(stand, "--host", "0.0.0.0")
    assert (code, "VAI_API_KEY" in reason) == (2, True)


def test_a_refused_server_takes_no_adopted_engine_with_it(stand) -> None:
    stand.start()
    stand.kill("daemon")
    stand.kill("server")
    engine = stand.pid("engine")
    ended = subprocess.run(stand.argv("--host", "0.0.0.0"), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert stand.pid("engine") == engine
    os.kill(engine, 0)


def test_a_root_whose_path_no_socket_can_have_is_refused(stand, tmp_path: Path) -> None:
    code, reason = refused(stand, "--root", str(tmp_path / ("x" * 100)))
    assert (code, "too long a path for sockets" in reason) == (2, True)


def test_a_root_that_others_can_read_is_refused(stand) -> None:
    stand.root.chmod(0o755)
    code, reason = refused(stand)
    assert (code, "chmod 700" in reason) == (7, True)
