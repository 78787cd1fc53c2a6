"""Page headers: what a page holds, written beside the pages, so that the next engine can go on with them.

The pool's first slabs have HEADERS bytes for each of the others: a record that says whose pages the slab is cut into,
then one for each page. A page's record is cleared before its first write and written (sealed) after its last row, so
whatever an engine leaves behind when it is killed, a record that is there tells the truth. One that is torn fails its
check, and nothing that stands here is believed beyond its bounds: at worst a page is computed again.

Records, little-endian: cut = magic, image digest, group, bytes of a page. page = key, the key before it, generation,
number in its chain, tokens. Each ends with the first 8 bytes of SHA-256 over the rest of it and its place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.daemon.pool import HEADERS, SLAB, header_slabs
from vai.kernels.program import PAGE_TOKENS

_MAGIC = b"vai cut1"
_CUT = struct.Struct("<8s32sQQ")
_PAGE = struct.Struct("<32s32sQII")
_CHECK = 8
RECORD = 96
PAGES = HEADERS // RECORD - 1  # of a slab that have a record; smaller ones beyond that are never sealed


class Sealed(NamedTuple):
    """A page as its record tells of it: `number` in its chain, after the page with the key `before`."""

    offset: int
    key: bytes
    before: bytes
    number: int
    generation: int


class PageHeaders:
    """The records of a pool. Places are byte offsets into the pool; generations only grow."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        """`memory`: the whole pool, whose first slabs these are."""
        self._bytes = memory.data[: header_slabs(memory.nbytes // SLAB) * SLAB]
        self._first = len(self._bytes) // SLAB
        self._slabs = memory.nbytes // SLAB
        self._generation = 0

    def close(self) -> None:
        """Let go of the memory."""
        self._bytes.release()

    def cut(self, slab: int, slabs: int, image: str, group: int, page_bytes: int) -> None:
        """`slabs` slabs are cut into new pages, none of them sealed."""
        for each in range(slab, slab + slabs):
            self.forget(each)
        digest = bytes.fromhex(image)
        self._write(self._block(slab), _CUT.pack(_MAGIC, digest, group, page_bytes))

    def forget(self, slab: int) -> None:
        """Nothing is known of a slab."""
        block = self._block(slab)
        self._bytes[block : block + HEADERS] = bytes(HEADERS)

    def clear(self, page: int, page_bytes: int) -> None:
        """A page is about to be written."""
        place = self._place(page, page_bytes)
        if place is not None:
            self._bytes[place : place + RECORD] = bytes(RECORD)

    def seal(self, page: int, page_bytes: int, key: bytes, before: bytes, number: int) -> int:
        """The last row of a page is written; its generation."""
        self._generation += 1
        place = self._place(page, page_bytes)
        if place is not None:
            self._write(place, _PAGE.pack(key, before, self._generation, number, PAGE_TOKENS))
        return self._generation

    def says(self, page: int, page_bytes: int, key: bytes, generation: int) -> bool:
        """Whether a page still is what it was when it was sealed."""
        place = self._place(page, page_bytes)
        if place is None:
            return True  # there is no record that could say otherwise
        found = _PAGE.unpack_from(self._bytes, place)
        return bool(found[0] == key and found[2] == generation)

    def cuts(self) -> Iterator[tuple[int, str, int, int]]:
        """(first slab, image, group, bytes of a page) of every cut that can be read."""
        for slab in range(self._first, self._slabs):
            body = self._read(self._block(slab), _CUT.size)
            if body is not None:
                magic, digest, group, page_bytes = _CUT.unpack(body)
                if magic == _MAGIC and page_bytes > 0:
                    yield slab, digest.hex(), group, page_bytes

    def sealed(self, slab: int, page_bytes: int) -> list[Sealed]:
        """The pages of a cut whose records can be read. Later generations are newer than all of them."""
        found = []
        for index in range(min(PAGES, max(1, SLAB // page_bytes))):
            body = self._read(self._block(slab) + (index + 1) * RECORD, _PAGE.size)
            if body is None:
                continue
            key, before, generation, number, tokens = _PAGE.unpack(body)
            if tokens == PAGE_TOKENS and generation < 1 << 63:
                found.append(Sealed(slab * SLAB + index * page_bytes, key, before, number, generation))
                self._generation = max(self._generation, generation)
        return found

    def _block(self, slab: int) -> int:
        return (slab - self._first) * HEADERS

    def _place(self, page: int, page_bytes: int) -> int | None:
        slab, inside = divmod(page, SLAB)
        index = inside // page_bytes
        return self._block(slab) + (index + 1) * RECORD if index < PAGES else None

    def _write(self, place: int, body: bytes) -> None:
        self._bytes[place : place + len(body) + _CHECK] = body + _check(place, body)

    def _read(self, place: int, size: int) -> bytes | None:
        """The body of a record; None where there is none, or its check is wrong."""
        record = bytes(self._bytes[place : place + size + _CHECK])
        body = record[:size]
        return body if any(body) and record[size:] == _check(place, body) else None


def _check(place: int, body: bytes) -> bytes:
    return sha256(place.to_bytes(8, "little") + body).digest()[:_CHECK]
