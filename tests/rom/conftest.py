"""Roots and processes for the tests of rom."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # rom_toy is also a script; importlib mode does not make it importable

from rom_toy import SCRIPT, Start


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root that does not exist yet."""
    return tmp_path / "root"


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory of the machine's tmpfs, open to other users, gone afterwards."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="vai-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `rom_toy.py ROLE ROOT ARGUMENT` in a process; killed at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def run(role: str, root: Path, argument: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), role, str(root), argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit of 48 MiB, inside this process's own; v1 or v2, whichever limits memory here."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    base = Path("/sys/fs/cgroup") if unified else Path("/sys/fs/cgroup/memory" + own["memory"])
    if unified:
        (base / "cgroup.subtree_control").write_text("+memory")
    directory = base / f"vai-test-{secrets.token_hex(4)}"
    directory.mkdir()
    (directory / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(48 << 20))
    yield directory
    directory.rmdir()
