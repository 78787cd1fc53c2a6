"""Shared mappings of a file at addresses a huge page can serve, through libc.

Python's `mmap` chooses the address itself and keeps a duplicate of the descriptor, and with it the lease; so the
mapping is made here. It lives as long as the last view of it: a view can never point at unmapped memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

from vai.rom.image import DATA_ALIGN, align

MADV_DONTDUMP = 16
MADV_COLLAPSE = 25

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_LOWEST_BIT = bytes(value & 1 for value in range(256))  # the only bit of mincore that has a meaning
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_mprotect = _libc.mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_mincore = _libc.mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def reopen(fd: int) -> int:
    """A descriptor of the same file with a read-only description of its own, which shares no lock. Raises OSError."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


class Mapping:
    """`length` bytes of `fd` from `offset` on, shared, at a 2 MiB aligned address, kept out of core dumps.

    view: a memoryview of bytes, read-only unless `writable`. The memory is unmapped when the last view of it dies.
    A mapping keeps the description of `fd` alive, closed or forked, and every flock on it: give it one without a lock.
    """

    __slots__ = ("address", "length", "view")

    def __init__(self, fd: int, offset: int, length: int, *, writable: bool = False) -> None:
        span = align(length, mmap.PAGESIZE)
        reserved = _mmap(
            None, span + DATA_ALIGN, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0
        )  # address space only: the file goes into its aligned middle
        if reserved == _MAP_FAILED:
            raise _error("mmap")
        address = align(reserved, DATA_ALIGN)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        if _mmap(address, length, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) == _MAP_FAILED:
            failed = _error("mmap")
            _munmap(reserved, span + DATA_ALIGN)
            raise failed
        if address > reserved:
            _munmap(reserved, address - reserved)
        if (tail := reserved + DATA_ALIGN - address) > 0:
            _munmap(address + span, tail)
        _madvise(address, length, MADV_DONTDUMP)
        memory = (ctypes.c_ubyte * length).from_address(address)
        # Not at exit: threads of native code may still be reading when the interpreter ends.
        weakref.finalize(memory, _munmap, address, length).atexit = False
        self.address = address
        self.length = length
        self.view = memoryview(memory).cast("B") if writable else memoryview(memory).cast("B").toreadonly()

    def freeze(self) -> None:
        """Make the memory read-only under every view, those that others kept included. Raises OSError."""
        if _mprotect(self.address, self.length, mmap.PROT_READ):
            raise _error("mprotect")

    def advise(self, advice: int, start: int, length: int) -> None:
        """madvise on a range of the mapping. Raises OSError."""
        if _madvise(self.address + start, length, advice):
            raise _error("madvise")

    def resident_pages(self) -> int:
        """Pages of the mapping that are in memory, mapped by this process or not. Raises OSError."""
        states = ctypes.create_string_buffer(-(-self.length // mmap.PAGESIZE))
        if _mincore(self.address, self.length, states):
            raise _error("mincore")
        return states.raw.translate(_LOWEST_BIT).count(1)
