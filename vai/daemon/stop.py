"""Ending every process of a root, with the daemon alive or dead. Images are not touched."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vai.daemon import roles

# The daemon ends the other two itself, so it gets the time they may take; without one they are ended here.
PATIENCE = {"daemon": 20.0, "server": 10.0, "engine": 5.0}
_KILL_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Stopped:
    """One process that was ended; `killed`: it did not heed SIGTERM in time."""

    role: str
    pid: int
    seconds: float
    killed: bool


def stop(root: Path) -> Iterator[Stopped]:
    """End daemon, server and engine of `root`, in this order, and yield each as it has ended."""
    for role, patience in PATIENCE.items():
        pid = roles.holder(root, role)
        if pid is not None:
            stopped = _end(root, role, pid, patience)
            if stopped is not None:
                yield stopped


def _end(root: Path, role: str, pid: int, patience: float) -> Stopped | None:
    """End the holder of a role; None where it had ended by itself."""
    began = time.monotonic()
    heeded = end(pid, patience, lambda: roles.holder(root, role) == pid)
    return None if heeded is None else Stopped(role, pid, time.monotonic() - began, killed=not heeded)


def end(pid: int, patience: float, still: Callable[[], bool]) -> bool | None:
    """SIGTERM to a process, and SIGKILL after `patience` seconds; whether it heeded the first, None where it was gone.

    `still` is asked once the process is pinned by its pidfd: whether `pid` means what it did when it was looked up.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if not still():
            return None
        if _signalled(pidfd, signal.SIGTERM, patience):
            return True
        _signalled(pidfd, signal.SIGKILL, _KILL_PATIENCE)
        return False
    finally:
        os.close(pidfd)


def _signalled(pidfd: int, number: signal.Signals, patience: float) -> bool:
    """Send a signal; whether the process ended within `patience` seconds."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(patience * 1000))
