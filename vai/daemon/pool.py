"""The scratchpad's memory: a memfd of which the daemon keeps a descriptor, so that it outlives the engine."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

SLAB = 16 << 20
HEADERS = 64 << 10  # bytes of headers for each slab of pages; the pool's first slabs hold them
MOST_BY_DEFAULT = 4 << 30
_NAME = "vai-pool"


def default_bytes(free: int) -> int:
    """A quarter of the free memory, at most 4 GiB, in whole slabs."""
    return max(SLAB, min(free // 4, MOST_BY_DEFAULT) // SLAB * SLAB)


def header_slabs(slabs: int) -> int:
    """How many of the `slabs` of a pool hold headers."""
    return -(-slabs // (SLAB // HEADERS + 1))


def page_bytes(size: int) -> int:
    """How many of the `size` bytes of a pool are for pages."""
    return size - header_slabs(size // SLAB) * SLAB


def whole_bytes(pages: int) -> int:
    """How many bytes a pool has with `pages` bytes for pages, both rounded up to slabs. Headers are 0.4 % of it."""
    slabs = -(-pages // SLAB)
    return (slabs + -(-slabs * HEADERS // SLAB)) * SLAB


def create(size: int) -> int:
    """A descriptor of new zeroed memory with `size` bytes for pages. Memory comes into being when touched.

    Its size is sealed: nobody can shrink it under a reader (that would be SIGBUS).
    """
    size = whole_bytes(size)
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def reopen(pid: int) -> int | None:
    """A descriptor of the pool that process `pid` holds, or None: a new daemon gets it back from a living engine."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith(f"/memfd:{_NAME}"):
                    return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    return None
