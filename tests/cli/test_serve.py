"""serve, run, ps, status, logs, stop: the way a person goes, with real processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from vai.daemon import client, roles
from vai.rom import segment
from vai.rom.registry import Name, Registry

Vai = Callable[..., subprocess.CompletedProcess[str]]
GREEDY = ("--temperature", "0", "--max-tokens", "12")


def serve(vai: Vai, port: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return vai("serve", "--detach", "--port", str(port), "--kv", "32M", "--threads", "1", **environment)


def http_status(url: str, key: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_the_whole_way(vai: Vai, registry: Registry, loaded: str, port: int) -> None:
    alone = vai("run", "m", "Hello", *GREEDY)
    assert alone.returncode == 0, alone.stderr
    assert "no engine is running" in alone.stderr

    started = serve(vai, port)
    assert started.returncode == 0, started.stderr
    assert f"VAI is ready at http://127.0.0.1:{port}/v1" in started.stdout
    assert serve(vai, port).returncode == 3

    with_engine = vai("run", "m", "Hello", *GREEDY)
    assert with_engine.stderr == ""
    assert with_engine.stdout == alone.stdout  # bit for bit the same answer

    running = json.loads(vai("ps", "--json").stdout)
    assert set(running["processes"]) == {"daemon", "engine", "server"}
    assert [model["image"] for model in running["models"]] == [loaded]
    assert "m " in vai("ps").stdout

    found = json.loads(vai("status", "--json").stdout)
    assert {told["state"] for told in found["processes"].values()} == {"ready"}
    assert found["scratchpad"]["bytes"] == 32 << 20
    engine = found["processes"]["engine"]["pid"]
    assert [lease["pid"] for lease in found["images"][0]["leases"]] == [engine]
    shown = vai("status").stdout
    assert f"engine ({engine})" in shown
    assert f"http://127.0.0.1:{port}" in shown
    prompts = [line for line in shown.splitlines() if line.startswith("Tokens of prompts: ")]
    assert [line.endswith(" computed") for line in prompts] == [True]

    assert "server: ready" in vai("logs", "daemon").stdout
    stopped = vai("stop")
    assert [line.split()[0] for line in stopped.stdout.splitlines()] == ["daemon", "server", "engine"]
    assert registry.is_resident(loaded)


def test_prompt_tokens_of_the_fast_kind_are_told_with_their_share() -> None:
    told = importlib.import_module("vai.cli.status")._prompts
    counts = {"prompt_exact": 25, "prompt_fast": 75, "cached_exact": 0, "cached_fast": 0}
    assert told([counts, counts]) == ["Tokens of prompts: 200 computed (75% in the fast kind)"]
    cached = told([counts | {"cached_exact": 1024}])
    assert cached == ["Tokens of prompts: 100 computed (75% in the fast kind), 1,024 from the cache"]
    assert told([dict.fromkeys(counts, 0)]) == []


def test_a_model_that_the_engine_holds_is_removed(vai: Vai, registry: Registry, loaded: str, port: int) -> None:
    serve(vai, port)
    assert vai("run", "m", "Hello", *GREEDY).returncode == 0
    removed = vai("rm", "m")
    assert (removed.returncode, removed.stderr) == (0, "")
    assert not registry.is_resident(loaded)
    assert roles.holder(registry.root, "engine") is not None


def test_a_named_model_that_is_not_in_memory_is_loaded_to_answer(vai: Vai, registry: Registry, loaded: str) -> None:
    segment.remove(registry.root, loaded)
    answered = vai("run", "m", *GREEDY, input="Hello")  # the prompt from standard input
    assert answered.returncode == 0, answered.stderr
    assert "m is in memory" in answered.stderr
    assert registry.is_resident(loaded)


def test_the_system_prompt_and_the_seed_reach_the_model(vai: Vai, loaded: str) -> None:
    plain = vai("run", "m", "Hello", *GREEDY).stdout
    assert vai("run", "m", "Hello", *GREEDY, "--system", "Answer in rhymes.").stdout != plain
    drawn = [vai("run", "m", "Hello", "--max-tokens", "12", "--seed", "7").stdout for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != plain


def test_an_answer_satisfies_the_schema_in_a_file(vai: Vai, loaded: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2}')
    answered = vai("run", "m", "Hello", "--max-tokens", "200", "--json-schema", str(tmp_path / "schema.json"))
    assert answered.returncode == 0, answered.stderr
    assert set(json.loads(answered.stdout)) <= {1, 2}
    (tmp_path / "wrong.json").write_text('{"uniqueItems": true}')
    refused = vai("run", "m", "Hello", "--json-schema", str(tmp_path / "wrong.json"))
    assert refused.returncode == 2
    assert "uniqueItems" in refused.stderr


def test_the_key_is_asked_for_and_shown_nowhere(vai: Vai, registry: Registry, loaded: str, port: int) -> None:
    key = "a-key-nobody-guesses"
    assert serve(vai, port, VAI_API_KEY=key).returncode == 0
    url = f"http://127.0.0.1:{port}/v1/models"
    assert (http_status(url), http_status(url, "wrong"), http_status(url, key)) == (401, 401, 200)
    for role in roles.ROLES:
        assert not any(key in word for word in roles.arguments(roles.holder(registry.root, role) or 0))
    server = roles.holder(registry.root, "server")
    os.kill(server or 0, signal.SIGKILL)
    path = roles.socket_path(registry.root, "daemon")
    while True:  # the next server reads the same key
        told = client.call(path, "status")["roles"]["server"]
        if told["state"] == "ready" and told["pid"] != server:
            break
        time.sleep(0.005)
    assert (http_status(url), http_status(url, key)) == (401, 200)


def test_a_start_that_cannot_work_says_why_and_leaves_nothing(vai: Vai, registry: Registry, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        refused = serve(vai, port)
    assert refused.returncode == 7
    assert refused.stderr.count("\n") == 1
    assert "is in use by another program" in refused.stderr
    refused = vai("serve", "--detach", "--host", "0.0.0.0", "--port", str(port), "--kv", "32M")
    assert (refused.returncode, "VAI_API_KEY" in refused.stderr) == (2, True)
    assert vai("serve", "--kv", "lots").returncode == 2
    assert [roles.holder(registry.root, role) for role in roles.ROLES] == [None, None, None]


def test_serve_in_the_foreground_ends_with_ctrl_c(
    registry: Registry, loaded: str, port: int, environment: dict[str, str]
) -> None:
    options = ["--port", str(port), "--kv", "32M", "--threads", "1", "--deterministic"]
    argv = [sys.executable, "-m", "vai", "serve", *options]
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "server: ready" in line:
                break
        assert roles.holder(registry.root, "daemon") == process.pid  # exec: no process of ours beside the daemon
        server = roles.holder(registry.root, "server")
        assert server is not None and "--deterministic" in roles.arguments(server)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 0
    assert "weights stay in memory" in rest
    assert [roles.holder(registry.root, role) for role in roles.ROLES] == [None, None, None]


def test_logs_follow_what_is_written(environment: dict[str, str]) -> None:
    path = Path(environment["XDG_STATE_HOME"], "vai/logs/engine.log")
    path.parent.mkdir(parents=True)
    path.write_text("one\n")
    argv = [sys.executable, "-m", "vai", "logs", "engine", "-f"]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        with open(path, "a") as file:
            file.write("two\nhal")
        assert process.stdout.readline() == "two\n"
        path.replace(path.with_suffix(".log.old"))  # put aside and begun anew, as long logs are
        path.write_text("new\n")
        assert process.stdout.readline() == "new\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_ctrl_c_ends_a_single_answer_and_the_command(
    registry: Registry, loaded: str, environment: dict[str, str]
) -> None:
    """Also on a terminal, where it ends only the answer in a chat."""
    registry.put(Name("m", "/gone", digest=loaded))
    ours, theirs = os.openpty()
    argv = [sys.executable, "-m", "vai", "run", "m", "Hello", "--max-tokens", "4000", "--temperature", "1"]
    with subprocess.Popen(argv, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        os.close(theirs)
        assert one.stdout is not None and one.stderr is not None
        assert one.stdout.read(1)
        one.send_signal(signal.SIGINT)
        one.stdout.read()
        assert b"Traceback" not in one.stderr.read()
    os.close(ours)
    assert one.returncode == 130


def test_a_chat_goes_on_after_a_turn_that_is_too_long(
    registry: Registry, loaded: str, environment: dict[str, str]
) -> None:
    registry.put(Name("m", "/gone", digest=loaded))
    ours, theirs = os.openpty()
    argv = [sys.executable, "-m", "vai", "run", "m", *GREEDY]
    with subprocess.Popen(argv, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as chat:
        os.close(theirs)
        assert chat.stdout is not None and chat.stderr is not None
        for line in ("§" * 1600, "§" * 1600, "Hello"):  # 3,200 tokens of 4,096, and again
            os.write(ours, line.encode() + b"\n")
        os.write(ours, b"\x04")
        output, errors = chat.communicate(timeout=60)
    os.close(ours)
    assert chat.returncode == 0
    assert b"Shorten it" in errors
    answers = output.decode().split(">>> ")[1:4]
    assert answers[0].strip() and not answers[1].strip() and answers[2].strip()


def test_a_chat_remembers_until_its_end(registry: Registry, loaded: str, environment: dict[str, str]) -> None:
    """On a terminal: two turns, then Ctrl-D."""
    registry.put(Name("m", "/gone", digest=loaded))
    ours, theirs = os.openpty()
    argv = [sys.executable, "-m", "vai", "run", "m", *GREEDY]
    with subprocess.Popen(
        argv, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as chat:
        os.close(theirs)
        os.write(ours, b"Hello\nHello\n\x04")
        output, _ = chat.communicate(timeout=60)
    os.close(ours)
    assert chat.returncode == 0
    first, second = output.decode().split(">>> ")[1:3]
    assert first.strip()
    assert second != first  # the same question after the first answer is another prompt
