"""Roles: who is the daemon, the engine and the server of one root.

A role is held as `flock(LOCK_EX)` on `run/<role>.lock`, close-on-exec, for as long as the process lives. The pid inside
the file is for people; who holds the lock is asked of the kernel (/proc/locks), so a stale file means nothing. Where
somebody deleted a lock file under its living holder, the peer of the role's socket names it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from pathlib import Path
from types import TracebackType

from vai.errors import AlreadyRunning
from vai.rom.holders import holders

ROLES = ("daemon", "engine", "server")
_ATTEMPTS = 10


def lock_path(root: Path, role: str) -> Path:
    """Where the lock of `role` is."""
    return root / "run" / f"{role}.lock"


def socket_path(root: Path, role: str) -> Path:
    """Where the socket of `role` is (the server has none: it speaks HTTP)."""
    return root / "run" / f"{role}.sock"


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end of a Unix socket, as the kernel recorded them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


def arguments(pid: int) -> list[str]:
    """The command line of a process, word by word; empty where it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [word.decode(errors="replace") for word in words[:-1]]


def option(pid: int, name: str) -> str | None:
    """The value of option `name` on a process's command line: what an adopted role was started with."""
    words = arguments(pid)
    return words[words.index(name) + 1] if name in words[:-1] else None


def age(pid: int) -> float:
    """Seconds since a process was started. Raises ProcessLookupError where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(pid) from None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in clock ticks since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def listener(path: Path) -> int | None:
    """The pid that listens on the Unix socket `path`, or None."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        connection.connect(str(path))
        return peer(connection)[0]
    return None


def holder(root: Path, role: str) -> int | None:
    """The pid of the living process that is `role` of this root, or None."""
    for found in holders(lock_path(root, role)):
        return found.pid
    return listener(socket_path(root, role))


def refuse_second(root: Path, role: str) -> None:
    """Raise AlreadyRunning, naming who has `role`, where somebody has it."""
    pid = holder(root, role)
    if pid is not None:
        raise AlreadyRunning(
            f"The {role} of {root} is already running: process {pid} ({' '.join(arguments(pid))}). "
            "`vai status` shows it, `vai stop` ends it."
        )


class RoleLock:
    """The held lock of a role. Closing it (or ending the process) gives the role up; the file stays."""

    def __init__(self, root: Path, role: str) -> None:
        """Take the role, or raise AlreadyRunning naming who has it."""
        self.path = lock_path(root, role)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):  # a holder may end, or another process come first, between question and lock
            refuse_second(root, role)
            descriptor = self._take()
            if descriptor is not None:
                self._descriptor = descriptor
                return
        raise AlreadyRunning(
            f"The {role} of {root} is held by a process that cannot be seen from here; {self.path} should have its pid."
        )

    def _take(self) -> int | None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(descriptor).st_ino == self.path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            taken = False
        if not taken:
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        return descriptor

    def close(self) -> None:
        """Give the role up. Once only."""
        os.close(self._descriptor)

    def __enter__(self) -> RoleLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
