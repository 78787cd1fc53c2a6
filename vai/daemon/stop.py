"""Ending every process of a root, with the daemon alive or dead. Images are not touched."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
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
    """SIGTERM, and SIGKILL after `patience` seconds; None where the process had ended by itself."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if roles.holder(root, role) != pid:  # ended between question and pidfd: the number may be another's
            return None
        began = time.monotonic()
        killed = not _signalled(pidfd, signal.SIGTERM, patience)
        if killed:
            _signalled(pidfd, signal.SIGKILL, _KILL_PATIENCE)
        return Stopped(role, pid, time.monotonic() - began, killed)
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
