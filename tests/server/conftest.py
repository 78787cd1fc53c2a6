"""A real uvicorn on a real loopback socket, around a stand-in for the engine side that each test steers.

The stand-in speaks bytes as tokens and answers from a script, so that errors and stalls come when a test wants them.
What needs a real engine is tested in test_end_to_end.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn
import uvloop

from vai.errors import ModelNotFound, Unavailable
from vai.request import SamplingParams, Timing, TokenLogprob
from vai.rom.registry import Name, Registry
from vai.server.app import build
from vai.server.protocol import Protocol
from vai.telemetry import Stages

from .system import System, running_server, start_engine, until

EOG = 255
CONTEXT = 64
END_OF_TURN = "<end>"
ANSWER = "Grüße, wörld! 日本"


@dataclass
class Delta:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    cached_tokens: int = 0
    timing: Timing | None = None
    guessed: int = 0
    accepted: int = 0
    fingerprint: str = "vai-of-the-script"
    stages: Stages | None = None
    reasoning: str = ""
    calls: tuple[Any, ...] = ()


_pids = itertools.count(1)


class Script:
    """What the stand-in does next: an answer, an error before or after some tokens, or a wait without end."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.answer = ANSWER
        self.error: Exception | None = None
        self.error_after = 0
        self.stall_after: int | None = None
        self.chunk = 1
        self.open_streams = 0
        self.seen: list[tuple[list[int], SamplingParams, list[str]]] = []
        self.hows: list[dict[str, Any]] = []
        self.engine_alive = True
        self.ended: list[tuple[str, str]] = []
        self.loaded = False
        self.empty = False
        self.engine_pid = next(_pids)


class Model:
    def __init__(self, card: Any, script: Script) -> None:
        self.card, self._script = card, script
        self.eog = (EOG,)

    async def encode(self, text: str) -> list[int]:
        return list(text.encode())

    async def chat(self, messages: list[dict[str, str]], *beside: Any) -> tuple[list[int], None]:
        return list("|".join(f"{m['role']}:{m['content']}" for m in messages).encode()), None

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < EOG else END_OF_TURN.encode()

    def sampling(self, **given: Any) -> SamplingParams:
        chosen = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**chosen | {"stop_ids": (*self.eog, *chosen["stop_ids"])})

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def speculate(self, kind: str | None = None, most: int | None = None) -> tuple[str | None, int | None]:
        return kind, most

    def choices(
        self, ids: list[int], count: int, sampling: SamplingParams, stop: list[str], **how: Any
    ) -> list[AsyncGenerator[Delta, None]]:
        self._script.hows.append(how)
        return [self.stream(ids, sampling, stop) for _ in range(count)]

    async def stream(self, ids: list[int], sampling: SamplingParams, stop: list[str]) -> AsyncGenerator[Delta, None]:
        script = self._script
        script.seen.append((ids, sampling, stop))
        script.open_streams += 1
        try:
            tokens = [*script.answer.encode(), EOG]
            made, pending = 0, b""
            while True:
                if script.error is not None and made >= script.error_after:
                    raise script.error
                if script.stall_after is not None and made >= script.stall_after:
                    await asyncio.Event().wait()
                step = tokens[made : made + min(script.chunk, sampling.max_tokens - made)]
                made += len(step)
                pending += bytes(token for token in step if token != EOG)
                whole = len(pending.decode(errors="ignore").encode())
                text, pending = pending[:whole].decode(), pending[whole:]
                finish = "stop" if step[-1] == EOG else "length" if made >= sampling.max_tokens else None
                logprobs = []
                if sampling.logprobs is not None:
                    top = list(range(65, 65 + sampling.logprobs))
                    logprobs = [TokenLogprob(-0.5, top, [-1.0] * len(top)) for _ in step]
                timing = Timing(0.25, 0.5, 1.0) if finish else None
                stages = Stages(0.5, 0.0, 0.25, 0.5, 1.0, 0.125) if finish else None
                yield Delta(text, step, logprobs, finish, cached_tokens=2, timing=timing, stages=stages)
                if finish is not None:
                    return
                await asyncio.sleep(0)
        finally:
            script.open_streams -= 1


class Frontend:
    def __init__(self, script: Script) -> None:
        self._cards = [
            SimpleNamespace(name=name, digest=digit * 64, created=1_700_000_000, context=CONTEXT, resident=resident)
            for name, digit, resident in (("tiny", "a", True), ("org/other:Q4_0", "b", True), ("cold", "c", False))
        ]
        self._script = script

    def models(self) -> list[Any]:
        return [] if self._script.empty else self._cards

    async def open(self, name: str) -> Model:
        for card in self._cards:
            if card.name == name:
                if not card.resident and not self._script.loaded:
                    raise Unavailable(f"The model '{name}' is not resident. Load it: vai load x --name {name}")
                return Model(card, self._script)
        raise ModelNotFound("There is no such model. Names: " + ", ".join(card.name for card in self._cards))


class Port:
    def __init__(self, script: Script) -> None:
        self._script = script

    async def status(self) -> Any:
        if not self._script.engine_alive:
            await asyncio.Event().wait()
        kinds = {"prompt_exact": 60, "prompt_fast": 300, "cached_exact": 32, "cached_fast": 96}
        models = [SimpleNamespace(image=digit * 64, running=2, waiting=1, preemptions=5, **kinds) for digit in "ab"]
        return SimpleNamespace(
            pid=self._script.engine_pid,
            pool_bytes=200,
            pool_used=50,
            pool_cached=40,
            pool_pinned=30,
            adopted_pages=7,
            native_seconds=9.0,
            host_seconds=0.25,
            models=models,
        )

    async def end_session(self, session: str, cache_salt: str) -> int:
        self._script.ended.append((session, cache_salt))
        return 3

    async def switches(self) -> Any:
        return SimpleNamespace(switched=[0.003])


@dataclass
class Served:
    """A running server: where it is, and what it answers from."""

    port: int
    script: Script
    root: Path
    http: httpx2.Client  # one, because making one reads all of the machine's certificates

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(self.url + path, content=content, headers=headers)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.request("GET", path, **headers)

    def request(self, method: str, path: str, **headers: str) -> httpx2.Response:
        return self.http.request(method, self.url + path, headers=headers)

    def raw_request(self, path: str, body: Any) -> bytes:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode() + content


class _QuickProtocol(Protocol):
    """The real protocol with deadlines that a test can wait for."""

    receive_seconds = 0.5
    write_seconds = 0.5


class _Running:
    """A server in a thread of this process."""

    def __init__(self, root: Path, *, quick: bool = False, **how: Any) -> None:
        script = Script()
        app = build(Frontend(script), Port(script), root=root, **how)
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=_QuickProtocol if quick else Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: uvloop.run(self._server.serve(sockets=[listener])))
        self._thread.start()
        until(lambda: self._server.started)
        self.served = Served(listener.getsockname()[1], script, root, httpx2.Client(timeout=20))

    def ask_to_stop(self) -> None:
        self._server.should_exit = True

    def stop(self) -> None:
        self.ask_to_stop()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.served.http.close()


@pytest.fixture
def stoppable(tmp_path: Path) -> Iterator[tuple[Served, Callable[[], None]]]:
    """(a server of its own, what asks it to stop)."""
    running = _Running(tmp_path, api_key=None, host="127.0.0.1", daemon_socket=None)
    yield running.served, running.ask_to_stop
    running.stop()


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[object, _Running]]:
    """Servers by what they were started with. Nothing of a test stays in one but its port."""
    running: dict[object, _Running] = {}
    yield running
    for server in running.values():
        server.stop()


@pytest.fixture
def serve(servers: dict[object, _Running], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Served]:
    """A server with an unused script: `serve(api_key=..., quick=True, daemon_socket=...)`."""

    def get(
        *,
        api_key: str | None = None,
        host: str = "127.0.0.1",
        quick: bool = False,
        daemon_socket: Path | None = None,
        deterministic: bool = False,
    ) -> Served:
        key = (api_key, host, quick, daemon_socket, deterministic)
        if key not in servers:
            servers[key] = _Running(
                tmp_path_factory.mktemp("root"),
                api_key=api_key,
                host=host,
                quick=quick,
                daemon_socket=daemon_socket,
                deterministic=deterministic,
            )
        served = servers[key].served
        until(lambda: served.script.open_streams == 0)
        served.script.reset()
        return served

    return get


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    return serve()


@pytest.fixture(scope="module")
def place(tiny_root: tuple[Path, Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(root, names) of our own, so that engine and server roles here meet nobody else's."""
    root, names, digests = tiny_root
    base = tmp_path_factory.mktemp("served")
    shutil.copytree(root / "images", base / "root/images")
    (base / "root").chmod(0o700)
    (base / "root/run").mkdir(mode=0o700)
    registry = Registry(base / "root", base / "names")
    for name, digest in digests.items():
        registry.put(Name(name, str(names), digest=digest))
    return base / "root", base / "names"


@pytest.fixture(scope="module")
def processes(place: tuple[Path, Path]) -> Iterator[System]:
    root, names = place
    engine = start_engine(root)
    with running_server(root, names, "--patience", "0") as (server, port), httpx2.Client(timeout=60) as http:
        system = System(root, names, engine, server, port, http)
        yield system
        system.engine.kill()
        system.engine.wait()


@pytest.fixture
def system(processes: System) -> System:
    until(processes.idle)
    return processes
