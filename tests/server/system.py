"""An engine process and a server process over a root with real (tiny) models, for tests that need all of it."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai

from vai.engine.client import EngineClient
from vai.engine.port import EngineStatus


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition that another process or thread brings about, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@dataclass
class System:
    """A root with two models, its engine and its server."""

    root: Path
    names: Path
    engine: subprocess.Popen[bytes]
    server: subprocess.Popen[bytes]
    port: int
    http: httpx2.Client  # one, because making one reads all of the machine's certificates

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, http_client=self.http)

    def status(self) -> EngineStatus:
        async def ask() -> EngineStatus:
            client = EngineClient(self.root / "run/engine.sock")
            try:
                return await client.status()
            finally:
                await client.close()

        return asyncio.run(ask())

    def idle(self) -> bool:
        """No request runs or waits, and none of its pages is held."""
        status = self.status()
        return status.pool_used == 0 and not any(model.running or model.waiting for model in status.models)


def start_engine(root: Path, *more: str) -> subprocess.Popen[bytes]:
    path = root / "run/engine.sock"
    argv = [sys.executable, "-m", "vai.engine.service", "--root", str(root), "--socket", str(path)]
    argv += ["--lock", str(root / "run/engine.lock"), "--threads", "1", "--kv-bytes", str(64 << 20), *more]
    with open(root.parent / "engine.log", "ab") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)

    def listening() -> bool:
        assert process.poll() is None, (root.parent / "engine.log").read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    until(listening)
    return process


def server_argv(root: Path, names: Path, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "vai.server", "--root", str(root), "--names", str(names), "--port", "0"]
    return [*argv, "--engine-socket", str(root / "run/engine.sock"), *more]


@contextmanager
def running_server(
    root: Path, names: Path, *more: str, **options: Any
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """(process, port) of a server that answers; ended afterwards."""
    log = root.parent / f"server-{time.monotonic_ns()}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(server_argv(root, names, *more), stdout=output, stderr=output, **options)
    try:
        port = 0

        def answers() -> bool:
            nonlocal port
            assert process.poll() is None, log.read_text()
            found = re.search(r"Listening on http://127\.0\.0\.1:(\d+)", log.read_text())
            port = int(found[1]) if found else 0
            return port > 0 and httpx2.get(f"http://127.0.0.1:{port}/livez").status_code == 200

        until(answers)
        yield process, port
    finally:
        process.kill()
        process.wait()
