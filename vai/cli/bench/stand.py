"""The stand a benchmark runs on: a private root, a daemon with its engine and server, and the way to kill them.

Nothing here touches the user's own root, names or processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vai.cli.bench.client import Raw
from vai.daemon.client import call
from vai.errors import Unavailable
from vai.rom.registry import Registry

DEADLINE = 120.0  # seconds; a start that takes longer has failed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def warm(file: Path) -> None:
    """Bring a file into the page cache."""
    with open(file, "rb", buffering=0) as source:
        while source.read(16 << 20):
            pass


class Stand:
    """A private VAI. `daemon` is its process while it runs; a context manager that leaves no file and no process."""

    def __init__(self, *, threads: int, kv_bytes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix=f"vai-bench-{os.getuid()}-", dir="/dev/shm"))
        self.state = Path(tempfile.mkdtemp(prefix="vai-bench-"))
        self.names = self.state / "names"
        self.logs = self.state / "logs"
        self.port = free_port()
        self.threads = threads
        self.kv_bytes = kv_bytes
        self.daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def registry(self) -> Registry:
        return Registry(self.root, self.names)

    def start(self) -> None:
        """Start the daemon; returns at once."""
        paths = ["--root", self.root, "--names", self.names, "--logs", self.logs]
        values = ["--host", "127.0.0.1", "--port", self.port, "--threads", self.threads, "--kv-bytes", self.kv_bytes]
        command = [sys.executable, "-m", "vai.daemon", *map(str, paths + values)]
        self.state.mkdir(exist_ok=True)
        with open(self.state / "daemon.out", "ab") as out:
            self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def pids(self) -> dict[str, int]:
        """Role -> pid of its living process."""
        with contextlib.suppress(Unavailable, OSError):
            roles = call(self.root / "run/daemon.sock", "status", timeout=5)["roles"]
            return {role: values["pid"] for role, values in roles.items() if values.get("pid")}
        return {}

    def kill(self, *roles: str) -> None:
        """SIGKILL the processes of these roles, all of them without arguments."""
        pids = self.pids()
        for role in roles or ("daemon", "engine", "server"):
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(pids[role], signal.SIGKILL)
        if self.daemon and (not roles or "daemon" in roles):
            self.daemon.kill()
            self.daemon.wait()

    def stop(self) -> None:
        if self.daemon is None:
            return
        self.daemon.terminate()
        try:
            self.daemon.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        self.daemon = None

    def one_token(self, model: str, prompt: list[int]) -> float:
        """Seconds of a one-token completion, over a connection of its own, retried until the server can answer."""
        deadline = time.monotonic() + DEADLINE
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "cache_prompt": False}
        last: Any = "no answer"
        while time.monotonic() < deadline:
            try:
                raw = Raw("127.0.0.1", self.port)
                try:
                    seconds, status, answer = raw.post("/v1/completions", body)
                finally:
                    raw.close()
                if status == 200:
                    return seconds
                last = json.loads(answer)["error"]["message"]
            except OSError as error:
                last = error
            time.sleep(0.002)
        raise Unavailable(f"The benchmark's server did not answer within {DEADLINE:.0f} s: {last}.")
