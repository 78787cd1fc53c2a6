"""An attached image: a read-only view of one ROM file, held by a lease.

Zero copy: `data` and what `tensor` returns are the file's own pages. Metadata sections are copies, checked when read.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path
from types import TracebackType

from vai.errors import CorruptImage, Unavailable
from vai.rom.image import Header, Part, StoredTensor, TensorTable
from vai.rom.mapping import Mapping, reopen

_attached: weakref.WeakSet[Image] = weakref.WeakSet()


class Image:
    """A published image, made by `segment.attach`. A context manager; closing it gives the lease back.

    Views taken from it stay readable after `close`, but without a lease `vai rm` no longer knows of them.
    """

    def __init__(self, fd: int, path: Path, header: Header, table: TensorTable, spec: bytes) -> None:
        """Takes over `fd`, a description of its own that holds LOCK_SH. Raises OSError."""
        self.path = path
        self.header = header
        self.table = table
        self.spec = spec
        self._pid = os.getpid()
        self._fd = fd
        self._sections = {"spec": spec}
        self._mapping = map_data(fd, header)
        _attached.add(self)

    @property
    def digest(self) -> str:
        """SHA-256 over the section table, 64 hex digits: the file's name."""
        return self.header.digest

    @property
    def weights(self) -> str:
        """SHA-256 over tensors and spec, 64 hex digits: the key of Program and KV."""
        return self.header.weights

    @property
    def closed(self) -> bool:
        """Whether the lease was given back."""
        return self._fd < 0

    @property
    def mapping(self) -> Mapping:
        """The memory of the data area. Raises Unavailable when closed or in a fork."""
        self._check_open()
        return self._mapping

    @property
    def data(self) -> memoryview:
        """The whole data area, read-only, at a 2 MiB aligned address. Raises Unavailable when closed or in a fork."""
        return self.mapping.view

    def tensor(self, name: str) -> tuple[StoredTensor, Part, memoryview]:
        """Where a logical tensor is stored, its part there, and the bytes of the *whole* stored tensor, zero copy.

        Raises BadRequest for a name the image does not have, Unavailable when closed or in a fork.
        """
        stored, part = self.table.find(name)
        return stored, part, self.data[stored.offset : stored.offset + stored.bytes]

    def fileno(self) -> int:
        """The descriptor that carries the lease. Raises Unavailable when closed or in a fork."""
        self._check_open()
        return self._fd

    def section(self, name: str) -> bytes:
        """A metadata section, checked against its hash at first read. Raises CorruptImage, KeyError, Unavailable."""
        self._check_open()
        if name not in self._sections:
            self._sections[name] = read_section(self._fd, self.header, name)
        return self._sections[name]

    def close(self) -> None:
        """Give the lease back. The memory goes when the last view of it does."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        _attached.discard(self)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise Unavailable(
                f"This image was attached by process {self._pid} and its lease does not cover a fork; "
                "attach it again in this process."
            )
        if self.closed:
            raise Unavailable(f"The image {self.digest[:12]} was closed; attach it again.")


def map_data(fd: int, header: Header) -> Mapping:
    """The data area of the file behind `fd`, read-only, through a description of its own. Raises OSError."""
    unlocked = reopen(fd)
    try:
        return Mapping(unlocked, header.data_offset, header.data_bytes)
    finally:
        os.close(unlocked)


def read_section(fd: int, header: Header, name: str) -> bytes:
    """One metadata section of the file behind `fd`, checked against its hash. Raises CorruptImage, KeyError."""
    offset, length, sha256 = header.sections[name]
    section = b""
    while len(section) < length and (piece := os.pread(fd, length - len(section), offset + len(section))):
        section += piece
    if hashlib.sha256(section).digest() != sha256:
        raise CorruptImage(
            f"The section '{name}' of image {header.digest[:12]} does not have its hash; "
            "remove the image and burn the model again."
        )
    return section


def _close_in_child() -> None:
    # flock belongs to the description a fork shares: unlocking here would unlock the parent, closing does not.
    for image in list(_attached):
        image.close()


os.register_at_fork(after_in_child=_close_in_child)
