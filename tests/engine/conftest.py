"""Engines for the tests of this room: in this process, and as a process behind its socket."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from vai.burn.burn import burn
from vai.burn.synth import SHAPES, synthesize
from vai.daemon.pool import SLAB, whole_bytes
from vai.engine.engine import Engine

DEADLINE = 60.0


def _burn(base: Path, **changes: int) -> tuple[Path, str]:
    shape = replace(SHAPES["tiny"], layers=2, **changes)
    synthesize(base / "model.gguf", shape=shape, type="Q8_0", seed=2)
    return base / "root", burn(base / "model.gguf", base / "root").digest


@pytest.fixture(scope="session")
def wide_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(root, digest) of a model with large pages (1 MiB: 16 in a slab, 512 tokens), so that pools are soon full."""
    return _burn(tmp_path_factory.mktemp("wide"), heads=16, kv_heads=16, head_dim=256, rope_dims=256)


@pytest.fixture(scope="session")
def short_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(root, digest) of a model whose context holds 100 tokens."""
    return _burn(tmp_path_factory.mktemp("short"), context=100)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Engines over pools whose stale bytes are all NaN: `make_engine(root, slabs=1, threads=1, **options)`."""
    with contextlib.ExitStack() as engines:

        def make(root: Path, *, slabs: int = 1, threads: int = 1, **options: object) -> Engine:
            engine = Engine(root, threads=threads, pool=np.full(whole_bytes(slabs * SLAB), 0xFF, np.uint8), **options)
            engines.callback(engine.close)
            return engine

        yield make


@dataclass
class EngineProcess:
    """A running `vai.engine.service`."""

    root: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def socket(self) -> Path:
        return self.root / "run/engine.sock"

    def wait_until_ready(self) -> None:
        """Until it accepts connections; fails with its log if it ended."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(self.socket))
                return
            time.sleep(0.005)  # what asks without a pause takes the core that the engine starts on
        pytest.fail(f"the engine was not ready in {DEADLINE} s: {self.log.read_text()}")


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Engine processes that end with the test: `start_engine(root, *more_arguments, wait=True, pass_fds=())`."""
    with contextlib.ExitStack() as processes:

        def start(root: Path, *more: str, wait: bool = True, pass_fds: tuple[int, ...] = ()) -> EngineProcess:
            run, log = root / "run", tmp_path / "engine.log"
            argv = [sys.executable, "-m", "vai.engine.service", "--root", root, "--socket", run / "engine.sock"]
            argv += ["--lock", run / "engine.lock", "--threads", "1", "--kv-bytes", str(4 * SLAB), *more]
            with log.open("ab") as output:
                process = subprocess.Popen(argv, stdout=output, stderr=output, pass_fds=pass_fds)
            processes.callback(process.wait, DEADLINE)
            processes.callback(process.kill)
            engine = EngineProcess(root, process, log)
            if wait:
                engine.wait_until_ready()
            return engine

        yield start
