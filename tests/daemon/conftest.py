"""A private VAI, as real processes, and a client that speaks to it over raw HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vai.daemon import client, roles
from vai.daemon.stop import stop
from vai.errors import Unavailable
from vai.llm import connect
from vai.rom import segment
from vai.rom.registry import Name, Registry

TinyRoot = tuple[Path, Path, dict[str, str]]
DEADLINE = 60.0


@pytest.fixture(scope="session")
def checkpoint(tiny_root: TinyRoot) -> Path:
    """A GGUF file of the shape `tiny`."""
    root, names, _ = tiny_root
    return Path(Registry(root, names).get("tiny").source)


class Stand:
    """A root with two tiny models, and the processes over it."""

    def __init__(self, base: Path, tiny: TinyRoot, port: int) -> None:
        self.root, self.names, self.logs = base / "root", base / "names", base / "logs"
        self.digests = tiny[2]
        self.registry = Registry(self.root, self.names)
        segment.prepare(self.root)
        for name, digest in self.digests.items():
            shutil.copy(segment.image_path(tiny[0], digest), segment.image_path(self.root, digest))
            self.registry.put(Name(name, Registry(*tiny[:2]).get(name).source, digest=digest))
        self.port = port
        self.daemon: subprocess.Popen[bytes] | None = None

    def argv(self, *options: str) -> list[str]:
        argv = [sys.executable, "-m", "vai.daemon", "--root", str(self.root), "--names", str(self.names)]
        argv += ["--logs", str(self.logs), "--host", "127.0.0.1", "--port", str(self.port), "--threads", "1"]
        return [*argv, "--kv-bytes", str(32 << 20), *options]

    def start(self, *options: str) -> None:
        """Start a daemon and wait until engine and server are ready."""
        self.logs.mkdir(exist_ok=True)
        with open(self.logs / "stderr", "ab") as output:
            self.daemon = subprocess.Popen(self.argv(*options), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.until(lambda: {role["state"] for role in self.roles().values()} == {"ready"})

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition that real processes bring about."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f"waited {DEADLINE} s in vain; logs in {self.logs}"
            time.sleep(0.005)

    def roles(self) -> dict[str, Any]:
        with contextlib.suppress(Unavailable):
            found: dict[str, Any] = self.call("status")["roles"]
            return found
        return {}

    def call(self, op: str, **fields: object) -> dict[str, Any]:
        return client.call(roles.socket_path(self.root, "daemon"), op, timeout=DEADLINE, **fields)

    def pid(self, role: str) -> int:
        pid = roles.holder(self.root, role)
        assert pid is not None, f"no {role} is running"
        return pid

    def until_replaced(self, role: str, killed: int) -> None:
        """Wait for the role's next process to be ready: right after a kill the daemon still tells of the last one."""
        self.until(lambda: (told := self.roles()[role])["state"] == "ready" and told["pid"] != killed)

    def kill(self, role: str) -> None:
        """SIGKILL, and wait for the end."""
        pid = self.pid(role)
        os.kill(pid, signal.SIGKILL)
        if role == "daemon" and self.daemon is not None:
            self.daemon.wait()
        self.until(lambda: roles.holder(self.root, role) != pid)

    def stream(self, model: str, tokens: int) -> Iterator[str]:
        """Pieces of a greedy completion as they arrive. Raises RuntimeError for an error in or instead of them."""
        body = {"model": model, "prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(response.read().decode())
            for line in response:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    message = json.loads(line[6:])
                    if "error" in message:
                        raise RuntimeError(message["error"]["message"])
                    yield message["choices"][0]["text"]
        finally:
            connection.close()

    def complete(self, model: str, tokens: int) -> str:
        return "".join(self.stream(model, tokens))

    def requests(self) -> int:
        """How many the engine works on."""

        async def ask() -> int:
            engine = connect(roles.socket_path(self.root, "engine"))
            try:
                return sum(model.running + model.waiting for model in (await engine.status()).models)
            finally:
                await engine.close()

        return asyncio.run(ask())

    def verify(self) -> None:
        """Every image is there, with every byte it was burned with."""
        for digest in self.digests.values():
            with segment.attach(self.root, digest) as image:
                segment.verify(image)

    def close(self) -> None:
        list(stop(self.root))
        if self.daemon is not None:
            self.daemon.wait()


@pytest.fixture
def stand(tmp_path: Path, tiny_root: TinyRoot, port: int) -> Iterator[Stand]:
    """Two tiny models in a root of their own, nothing running yet; everything is ended afterwards."""
    stand = Stand(tmp_path, tiny_root, port)
    yield stand
    stand.close()
