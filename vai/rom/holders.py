"""Who holds a lease: read from /proc/locks, so nothing has to run and nothing can be stale."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Holder(NamedTuple):
    """A process with a lock. start_time: clock ticks since boot; with the pid it names a process once and for all."""

    pid: int
    start_time: int
    command: str


def holders(path: Path) -> list[Holder]:
    """The processes that hold a flock on the file at `path`; empty if there is no file. Ascending by pid."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    pids = set()
    for line in (PROC / "locks").read_text().splitlines():
        fields = line.split()  # "1: FLOCK ADVISORY READ pid major:minor:inode 0 EOF"; "1: -> ..." only waits
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == wanted:
            pids.add(int(fields[4]))
    holding = {pid for pid in pids if _has_open(pid, found)}
    if holding != pids:  # who took the lock is gone, and left it to a child
        holding = {int(entry.name) for entry in PROC.glob("[0-9]*") if _has_open(int(entry.name), found)}
    return sorted(holder for pid in holding if (holder := _holder(pid)) is not None)


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Whether this process has a descriptor of the file: a pid in /proc/locks may have died and be another's now."""
    with contextlib.suppress(OSError):  # another user's process, or gone
        for descriptor in (PROC / f"{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.path.samestat(descriptor.stat(), file):
                    return True
    return False


def _holder(pid: int) -> Holder | None:
    try:
        start = int((PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()[19])
        line = (PROC / f"{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Any program chooses its own command line, and this one ends on a terminal.
    return Holder(pid, start, "".join(c if c.isprintable() else "?" for c in line[:120]) or "a process")
