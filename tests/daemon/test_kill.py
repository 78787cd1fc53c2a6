"""What dies, and what lives on: real daemon, engine and server, over two tiny models, killed without warning."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from vai.daemon import roles
from vai.daemon.stop import stop

LONG = ("tiny-qwen2", 3000)  # a model that does not end its turn early, and tokens for some seconds


@contextlib.contextmanager
def held(pid: int):
    """The process does nothing meanwhile, so that a stream is open for as long as a test needs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def pools(pid: int) -> set[int]:
    """Inodes of the scratchpads that a process has a descriptor of."""
    links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if "memfd:vai-pool" in str(link.readlink())]
    return {link.stat().st_ino for link in links}


def test_a_killed_daemon_disturbs_no_stream_and_the_next_one_adopts(stand) -> None:
    stand.start()
    expected = stand.complete(*LONG)
    engine, server = stand.pid("engine"), stand.pid("server")
    pool = pools(engine)
    pieces = stand.stream(*LONG)
    text = next(pieces)
    for _ in range(3):
        with held(engine):
            stand.kill("daemon")
        text += next(pieces)
        with held(engine):  # the next daemon comes while the stream is open
            stand.start()
            assert {role["adopted"] for name, role in stand.roles().items() if name != "daemon"} == {True}
        text += next(pieces)
    assert stand.requests() == 1  # still: it was open all the time
    assert text + "".join(pieces) == expected
    assert (stand.pid("engine"), stand.pid("server")) == (engine, server)
    assert len(pool) == 1
    assert pools(stand.pid("daemon")) == pool  # had back from the engine, for the engine's successor
    stand.verify()


def test_a_killed_engine_is_replaced_and_without_patience_its_streams_end_with_an_error(stand) -> None:
    stand.start("--patience", "0")
    expected = {model: stand.complete(model, 20) for model in stand.digests}
    pieces, pool = stand.stream(*LONG), pools(stand.pid("engine"))
    next(pieces)
    killed, server = stand.pid("engine"), stand.pid("server")
    with held(killed):
        stand.kill("engine")
        with pytest.raises(RuntimeError, match="engine"):
            "".join(pieces)
        os.kill(stand.pid("daemon"), 0)
    stand.until_replaced("engine", killed)
    assert {model: stand.complete(model, 20) for model in stand.digests} == expected
    assert stand.pid("engine") != killed
    assert stand.pid("server") == server
    assert pools(stand.pid("engine")) == pool
    told = stand.roles()["engine"]
    assert (told["restarts"], told["last_exit"]) == (1, "killed by SIGKILL")
    stand.verify()


def test_a_killed_server_is_replaced(stand) -> None:
    stand.start()
    expected, engine, killed = stand.complete("tiny", 20), stand.pid("engine"), stand.pid("server")
    stand.kill("server")
    stand.until_replaced("server", killed)
    assert stand.complete("tiny", 20) == expected
    assert stand.pid("engine") == engine


def test_after_everything_was_killed_the_weights_are_there_and_stale_files_no_obstacle(stand) -> None:
    stand.start()
    expected = {model: stand.complete(model, 20) for model in stand.digests}
    for role in ("daemon", "server", "engine"):
        stand.kill(role)
    assert roles.lock_path(stand.root, "daemon").read_text() != ""
    assert roles.socket_path(stand.root, "daemon").exists()
    assert roles.socket_path(stand.root, "engine").exists()
    stand.verify()
    stand.start()
    assert {model: stand.complete(model, 20) for model in stand.digests} == expected
    assert stand.call("status")["loads"] == []  # nothing was burned again


def test_an_engine_that_dies_while_no_daemon_lives_is_started_by_the_next_one(stand) -> None:
    stand.start("--patience", "1")
    expected, server = stand.complete("tiny", 20), stand.pid("server")
    stand.kill("daemon")
    stand.kill("engine")
    with pytest.raises(RuntimeError, match="vai serve"):
        stand.complete("tiny", 20)
    stand.start()
    assert stand.complete("tiny", 20) == expected
    assert stand.pid("server") == server


def test_a_second_daemon_is_refused_and_told_who_is_first(stand) -> None:
    stand.start()
    for obstacle in ("as it is", "its lock file deleted"):
        if obstacle == "its lock file deleted":
            roles.lock_path(stand.root, "daemon").unlink()
        second = subprocess.run(stand.argv(), capture_output=True, text=True, timeout=60)
        assert second.returncode == 3, obstacle
        assert f"process {stand.daemon.pid} " in second.stderr
    assert stand.complete("tiny", 5)


def test_sigterm_to_the_daemon_ends_everything_in_order(stand) -> None:
    stand.start()
    pids = [stand.pid("engine"), stand.pid("server")]
    stand.daemon.terminate()
    assert stand.daemon.wait(30) == 0
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False, False]
    assert not roles.socket_path(stand.root, "daemon").exists()
    log = (stand.logs / "daemon.log").read_text()
    assert "engine: ended (exit code 0)" in log
    assert "server: ended (exit code 0)" in log
    stand.verify()


def test_stop_works_with_the_daemon_dead(stand) -> None:
    stand.start()
    stand.kill("daemon")
    pids = [stand.pid("server"), stand.pid("engine")]
    ended = list(stop(stand.root))
    assert [(one.role, one.pid, one.killed) for one in ended] == [
        ("server", pids[0], False),
        ("engine", pids[1], False),
    ]
    assert [roles.holder(stand.root, role) for role in roles.ROLES] == [None, None, None]
    stand.verify()


def test_stop_kills_a_process_that_does_not_answer(stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vai.daemon.stop.PATIENCE", {"daemon": 20.0, "server": 20.0, "engine": 0.2})
    stand.start()
    stand.kill("daemon")
    os.kill(stand.pid("engine"), signal.SIGSTOP)
    assert [(one.role, one.killed) for one in stop(stand.root)] == [("server", False), ("engine", True)]
