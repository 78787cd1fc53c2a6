"""Page headers: what a page holds, written beside the pages, so that the next engine can go on with them.

The pool's first slabs have HEADERS bytes for each of the others: a record that says whose pages the slab is cut into,
then one for each page, then room for what was learned of one image. A page's record is cleared before its first write
and written (sealed) after its last row, so whatever an engine leaves behind when it is killed, a record that is there
tells the truth. One that is torn fails its check, and nothing that stands here is believed beyond its bounds: at worst
a page is computed again.

Records, little-endian: cut = magic, image digest, group, bytes of a page. page = key, the key before it, generation,
number in its chain, tokens, kind (1: fast). pin, right behind the page's = until when by the clock, digests of tenant
and session. learned = magic, image digest, length, what only retention.py reads. Each ends with the first 8 bytes of
SHA-256 over its place and the rest of it, a pin's also over the record of its page: it holds for no other.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.daemon.pool import HEADERS, SLAB, header_slabs
from vai.kernels.program import PAGE_TOKENS

_MAGIC = b"vai cut2"
_CUT = struct.Struct("<8s32sQQ")
_PAGE = struct.Struct("<32s32sQIHH")
_PIN = struct.Struct("<d16s16s")
_LEARNED_MAGIC = b"vai wont"
_LEARNED = struct.Struct("<8s32sI")
_CHECK = 8
_PIN_AT = _PAGE.size + _CHECK
RECORD = _PIN_AT + _PIN.size + _CHECK
LEARNED = 1024  # bytes at the end of the headers of a slab
_LEARNED_AT = HEADERS - LEARNED
MOST_LEARNED = LEARNED - _LEARNED.size - _CHECK
PAGES = _LEARNED_AT // RECORD - 1  # of a slab that have a record; smaller ones beyond that are never sealed


class Pin(NamedTuple):
    """A page is kept until `until`, seconds of the engine's clock; `tenant` and `session`: 16 bytes that tell whose."""

    until: float
    tenant: bytes
    session: bytes


class Sealed(NamedTuple):
    """A page as its record tells of it: `number` in its chain, after the page with the key `before`, of a kind."""

    offset: int
    key: bytes
    before: bytes
    number: int
    generation: int
    fast: bool
    pin: Pin | None


class PageHeaders:
    """The records of a pool. Places are byte offsets into the pool; generations only grow."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        """`memory`: the whole pool, whose first slabs these are."""
        self._bytes = memory.data[: header_slabs(memory.nbytes // SLAB) * SLAB]
        self._first = len(self._bytes) // SLAB
        self._slabs = memory.nbytes // SLAB
        self._generation = 0
        self._learned: dict[str, int] = {}  # image -> the slab whose headers have the room for what was learned of it

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
        self._bytes[block : block + _LEARNED_AT] = bytes(_LEARNED_AT)

    def clear(self, page: int, page_bytes: int) -> None:
        """A page is about to be written."""
        place = self._place(page, page_bytes)
        if place is not None:
            self._bytes[place : place + RECORD] = bytes(RECORD)

    def seal(self, page: int, page_bytes: int, key: bytes, before: bytes, number: int, *, fast: bool = False) -> int:
        """The last row of a page is written; its generation."""
        self._generation += 1
        place = self._place(page, page_bytes)
        if place is not None:
            self._write(place, _PAGE.pack(key, before, self._generation, number, PAGE_TOKENS, fast))
        return self._generation

    def pin(self, page: int, page_bytes: int, pin: Pin | None) -> None:
        """A sealed page is pinned from now on, or not any more."""
        place = self._place(page, page_bytes)
        if place is None:
            return
        body = bytes(_PIN.size) if pin is None else _PIN.pack(*pin)
        self._write(place + _PIN_AT, body, bytes(self._bytes[place : place + _PAGE.size]))

    def learn(self, image: str, body: bytes) -> None:
        """Keep what was learned of an image, at most MOST_LEARNED bytes; of the images beyond one a slab, nothing."""
        slab = self._learned.get(image)
        if slab is None:
            taken = {*self._learned.values()}
            slab = next((slab for slab in range(self._first, self._slabs) if slab not in taken), None)
            if slab is None:
                return
            self._learned[image] = slab
        head = _LEARNED.pack(_LEARNED_MAGIC, bytes.fromhex(image), len(body))
        self._write(self._block(slab) + _LEARNED_AT, head + body.ljust(MOST_LEARNED, b"\0"))

    def learned(self, images: Collection[str]) -> dict[str, bytes]:
        """What an engine before this one has learned of these images, as far as it can be read."""
        found: dict[str, bytes] = {}
        for slab in range(self._first, self._slabs):
            body = self._read(self._block(slab) + _LEARNED_AT, LEARNED - _CHECK)
            if body is None:
                continue
            magic, digest, size = _LEARNED.unpack_from(body)
            image = digest.hex()
            if magic == _LEARNED_MAGIC and image in images and image not in found and size <= MOST_LEARNED:
                found[image] = body[_LEARNED.size : _LEARNED.size + size]
                self._learned[image] = slab
        return found

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
            key, before, generation, number, tokens, fast = _PAGE.unpack(body)
            if tokens == PAGE_TOKENS and generation < 1 << 63 and fast <= 1:
                pin = self._read(self._block(slab) + (index + 1) * RECORD + _PIN_AT, _PIN.size, body)
                found.append(
                    Sealed(
                        slab * SLAB + index * page_bytes,
                        key,
                        before,
                        number,
                        generation,
                        fast == 1,
                        None if pin is None else Pin(*_PIN.unpack(pin)),
                    )
                )
                self._generation = max(self._generation, generation)
        return found

    def _block(self, slab: int) -> int:
        return (slab - self._first) * HEADERS

    def _place(self, page: int, page_bytes: int) -> int | None:
        slab, inside = divmod(page, SLAB)
        index = inside // page_bytes
        return self._block(slab) + (index + 1) * RECORD if index < PAGES else None

    def _write(self, place: int, body: bytes, of: bytes = b"") -> None:
        """`of`: the body of the record that this one belongs to."""
        self._bytes[place : place + len(body) + _CHECK] = body + _check(place, of + body)

    def _read(self, place: int, size: int, of: bytes = b"") -> bytes | None:
        """The body of a record; None where there is none, or its check is wrong."""
        record = bytes(self._bytes[place : place + size + _CHECK])
        body = record[:size]
        return body if any(body) and record[size:] == _check(place, of + body) else None


def _check(place: int, body: bytes) -> bytes:
    return sha256(place.to_bytes(8, "little") + body).digest()[:_CHECK]
