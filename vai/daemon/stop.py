"""Ending every process of a root, with the daemon alive or dead. Images are not touched."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vai.daemon import roles

# The daemon ends the other two itself, so it gets the time they may take; without one they are ended here.
PATIENCE = {"daemon": 20.0, "server": 10.0, "engine": 5.0}
_KILL_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Stopped:
    """One process that was ended, `seconds` after the beginning; `killed`: it did not heed SIGTERM in time."""

    role: str
    pid: int
    seconds: float
    killed: bool


def stop(root: Path) -> Iterator[Stopped]:
    """End daemon, server and engine of `root`, in this order, and yield each as it has ended."""
    began = time.monotonic()
    living = {role: roles.holder(root, role) for role in PATIENCE}
    for role, patience in PATIENCE.items():
        pid = roles.holder(root, role) or living[role]  # the daemon may have started another meanwhile, or ended it
        if pid is not None:
            heeded = end(pid, patience, partial(_holds, root, role, pid))
            yield Stopped(role, pid, time.monotonic() - began, killed=heeded is False)


def _holds(root: Path, role: str, pid: int) -> bool:
    return roles.holder(root, role) == pid


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
