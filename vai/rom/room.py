"""How much memory an image may still take: the least of what the filesystem, the machine and every cgroup allow.

tmpfs may promise more than the machine has, and a cgroup kills instead of refusing; so all three are asked first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RESERVE = 512 << 20  # bytes of the machine's memory that stay free for everything else
PROC = Path("/proc")
_NO_LIMIT = 1 << 60  # cgroup v1 says "no limit" with a number near 2^63


class Room(NamedTuple):
    """free: bytes, never negative · limit: what sets it, in words."""

    free: int
    limit: str


def free_room(root: Path, *, reserve: int = RESERVE) -> Room:
    """The least room of the filesystem of `root`, the machine less `reserve`, and every ancestor cgroup (v1 and v2)."""
    free, limit = min(rooms(root, reserve=reserve), key=lambda room: room.free)
    return Room(max(free, 0), limit)


def rooms(root: Path, *, reserve: int = RESERVE) -> list[Room]:
    """Everything that limits an image under `root`, each with the room it leaves, which may be negative here."""
    return [_filesystem(root), _machine(reserve), *_cgroups()]


def _filesystem(root: Path) -> Room:
    while not root.exists() and root != root.parent:
        root = root.parent
    found = os.statvfs(root)
    return Room(found.f_bavail * found.f_frsize, f"the filesystem of {root} has no more")


def _machine(reserve: int) -> Room:
    fields = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    return Room(available - reserve, f"the machine has no more, {reserve >> 20} MiB being kept for other programs")


def _cgroups() -> Iterator[Room]:
    """The room of every cgroup with a limit that this process is in, from its own up to the root of what is visible."""
    for directory, mount in _memory_cgroups():
        while True:
            v2 = (directory / "memory.max").exists()
            limits = ("memory.max", "memory.high") if v2 else ("memory.limit_in_bytes",)
            limit = min((_number(directory / name) for name in limits), default=_NO_LIMIT)
            if limit < _NO_LIMIT:
                used = _number(directory / ("memory.current" if v2 else "memory.usage_in_bytes"))
                used -= _reclaimable(directory, "" if v2 else "total_")
                name = f"/{directory.relative_to(mount)}".removesuffix(".")
                yield Room(limit - used, f"the memory cgroup {name} has a limit of {limit >> 20} MiB")
            if directory == mount:
                break
            directory = directory.parent


def _memory_cgroups() -> Iterator[tuple[Path, Path]]:
    """(own cgroup, mount point) in each mounted hierarchy that limits memory."""
    own = {}  # controllers, "" for v2 -> path in the hierarchy
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    for line in (PROC / "self/mountinfo").read_text().splitlines():
        mounted, _, filesystem = line.partition(" - ")
        root, mount = (_unescaped(field) for field in mounted.split()[3:5])
        kind, _, options = filesystem.split(" ", 2)
        controller = "" if kind == "cgroup2" else "memory"
        if kind not in ("cgroup", "cgroup2") or controller not in own:
            continue
        if kind == "cgroup" and "memory" not in options.split(" ")[-1].split(","):
            continue
        path = os.path.relpath(own[controller], root)
        inside = mount if path.startswith("..") else os.path.normpath(mount + "/" + path)
        yield Path(inside if Path(inside).is_dir() else mount), Path(mount)


def _unescaped(field: str) -> str:
    """A mountinfo field: octal escapes stand for blanks and backslashes."""
    return field.encode().decode("unicode_escape")


def _number(file: Path) -> int:
    try:
        text = file.read_text().strip()
    except OSError:
        return _NO_LIMIT
    return int(text) if text.isdecimal() else _NO_LIMIT


def _reclaimable(directory: Path, prefix: str) -> int:
    """Bytes of file cache in the cgroup, which the kernel gives back before it refuses. tmpfs pages are not in it."""
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counters = dict(line.split(" ", 1) for line in lines if line)
    return sum(int(counters.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
