"""The page pool: one memory for the KV pages of all models, and the exact account of who holds which page.

The memory is cut into slabs of 16 MiB. A slab is lent to one owner (a cache group of a model), which cuts it into its
pages; a page larger than a slab takes consecutive slabs. When the last page of a slab is free the slab goes back, so
nothing is reserved per model. What is not there is not promised: `allocate` gives all or None.

A page that the prefix cache keeps for nobody in particular is handed out, but not in use: it counts as free for whoever
can have it evicted. The first slabs hold the headers of all pages (headers.py).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.daemon.pool import SLAB, page_bytes
from vai.errors import BadRequest
from vai.rom.mapping import Mapping
from vai.scratchpad.headers import PageHeaders

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def map_pool(descriptor: int) -> NDArray[np.uint8]:
    """The pool behind a memfd as flat bytes: shared, writable, at a 2 MiB aligned address, kept out of core dumps.

    Raises BadRequest where the descriptor is not a pool: its size must be whole slabs, and sealed (memory that somebody
    shrinks under a reader kills the reader).
    """
    try:
        seals, size = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS), os.fstat(descriptor).st_size
    except OSError as error:
        raise BadRequest(f"File descriptor {descriptor} is not a scratchpad pool: {error.strerror}.") from None
    if page_bytes(size) <= 0 or size % SLAB or seals & _SIZE_SEALS != _SIZE_SEALS:
        raise BadRequest(
            f"File descriptor {descriptor} is not a scratchpad pool: {size} bytes, seals {seals:#x}; "
            f"a pool has at least two whole slabs of {SLAB} bytes and a sealed size."
        )
    return np.frombuffer(Mapping(descriptor, 0, size, writable=True).view, dtype=np.uint8)


class Owner(NamedTuple):
    """Whose pages: cache group `group` of the image with digest `image`, `page_bytes` each."""

    image: str
    group: int
    page_bytes: int

    @property
    def slabs_per_page(self) -> int:
        """Consecutive slabs that one page takes; 1 also where many pages share one."""
        return -(-self.page_bytes // SLAB)

    @property
    def pages_per_cut(self) -> int:
        """Pages in one slab, or 1 in the consecutive slabs of a large page."""
        return max(1, SLAB // self.page_bytes)


class _Cut:
    """One slab (or run of slabs) of an owner: pages [fresh, end) were never handed out, `returned` came back."""

    __slots__ = ("end", "fresh", "owner", "returned")

    def __init__(self, owner: Owner, slab: int) -> None:
        self.owner = owner
        self.fresh = slab * SLAB
        self.end = self.fresh + owner.pages_per_cut * owner.page_bytes
        self.returned: set[int] = set()

    def __len__(self) -> int:
        """Free pages."""
        return len(self.returned) + (self.end - self.fresh) // self.owner.page_bytes

    def take(self) -> int:
        """A free page; there must be one."""
        if self.returned:
            return self.returned.pop()
        self.fresh += self.owner.page_bytes
        return self.fresh - self.owner.page_bytes

    def restore(self, pages: Collection[int]) -> None:
        """Hand out exactly these pages."""
        every = range(self.fresh, self.end, self.owner.page_bytes)
        self.returned = set(every).difference(pages)
        self.fresh = self.end

    def give(self, page: int) -> None:
        """Take a page back."""
        if page in self.returned or page >= self.fresh:
            raise AssertionError(f"page {page} of {self.owner} is free already")
        self.returned.add(page)


class PagePool:
    """Who holds which page of a memory. Pages are known by their byte offset. `size`: bytes for pages."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        """`memory`: what daemon.pool.create makes, or as many bytes; it must be whole slabs."""
        slabs, rest = divmod(memory.nbytes, SLAB)
        self.size = page_bytes(memory.nbytes)
        if self.size <= 0 or rest:
            raise AssertionError(f"a pool of {memory.nbytes} bytes is not whole slabs of {SLAB}")
        self.headers = PageHeaders(memory)
        self._lent = bytearray(slabs)  # 1 for each slab that some owner has, or the headers
        self._first = slabs - self.slabs
        self._lent[: self._first] = b"\1" * self._first
        self._cuts: dict[Owner, dict[int, _Cut]] = {}  # owner -> first slab -> its pages
        self._open: dict[Owner, dict[int, _Cut]] = {}  # those among them with a free page
        self._held: dict[Owner, int] = {}  # pages handed out
        self._resting: dict[Owner, int] = {}  # those among them that nobody uses

    def allocate(self, owner: Owner, count: int) -> list[int] | None:
        """Offsets of `count` pages, or None (and nothing changed) where that many are not free."""
        taken: list[int] = []
        while len(self._cuts.get(owner, ())) * owner.pages_per_cut - self._held.get(owner, 0) < count:
            slab = self._take_slab(owner)
            if slab is None:
                for each in taken:
                    self._give_slab(owner, each)
                return None
            taken.append(slab)
        if count:
            self._held[owner] = self._held.get(owner, 0) + count
        pages: list[int] = []
        while len(pages) < count:
            slab, cut = next(iter(self._open[owner].items()))
            pages += [cut.take() for _ in range(min(len(cut), count - len(pages)))]
            if not len(cut):
                del self._open[owner][slab]
        return pages

    def free(self, owner: Owner, pages: list[int]) -> None:
        """Take pages back. The slab of the last one is anybody's again."""
        for page in pages:
            slab = page // SLAB
            cut = self._cuts[owner][slab]
            cut.give(page)
            self._held[owner] -= 1
            self.headers.clear(page, owner.page_bytes)
            if len(cut) < owner.pages_per_cut:
                self._open[owner][slab] = cut
            else:
                self._give_slab(owner, slab)

    def restore(self, owner: Owner, slab: int, pages: Collection[int]) -> bool:
        """Hand out pages of a slab again, as they were in an engine before this one; False where it is not free."""
        run = owner.slabs_per_page
        if slab < self._first or self._lent[slab : slab + run] != bytes(run):
            return False
        cut = self._lend(owner, slab)
        cut.restore(pages)
        self._held[owner] = self._held.get(owner, 0) + len(pages)
        if not len(cut):
            del self._open[owner][slab]
        return True

    def rest(self, owner: Owner) -> None:
        """One page handed out to `owner` is only kept from here on, and counts as free."""
        self._resting[owner] = self._resting.get(owner, 0) + 1

    def wake(self, owner: Owner) -> None:
        """One page that was only kept is in use again."""
        if self._resting.get(owner, 0) < 1:
            raise AssertionError(f"no page of {owner} rests")
        self._resting[owner] -= 1

    def held(self, image: str) -> int:
        """Pages in use by all cache groups of an image."""
        used = sum(count for owner, count in self._held.items() if owner.image == image)
        return used - sum(count for owner, count in self._resting.items() if owner.image == image)

    @property
    def used_bytes(self) -> int:
        """Bytes of all pages in use."""
        return sum(count * owner.page_bytes for owner, count in self._held.items()) - self.cached_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of all pages that are kept, but not in use."""
        return sum(count * owner.page_bytes for owner, count in self._resting.items())

    @property
    def free_bytes(self) -> int:
        """Bytes that no page has, what is left over in slabs included."""
        return self.size - self.used_bytes - self.cached_bytes

    @property
    def available_bytes(self) -> int:
        """Bytes that no page in use has; the cache can be asked for its part of them."""
        return self.size - self.used_bytes

    @property
    def slabs(self) -> int:
        """Slabs for pages, whoever has them."""
        return self.size // SLAB

    @property
    def free_slabs(self) -> int:
        """Slabs that nobody has."""
        return self._lent.count(0)

    def _take_slab(self, owner: Owner) -> int | None:
        """Cut one more slab (or run of slabs) for `owner`. Runs come from the far end: singles do not split them."""
        run = owner.slabs_per_page
        slab = self._lent.find(0) if run == 1 else self._lent.rfind(bytes(run))
        if slab < 0:
            return None
        self.headers.cut(slab, run, owner.image, owner.group, owner.page_bytes)
        self._lend(owner, slab)
        return slab

    def _lend(self, owner: Owner, slab: int) -> _Cut:
        self._lent[slab : slab + owner.slabs_per_page] = b"\1" * owner.slabs_per_page
        cut = _Cut(owner, slab)
        self._cuts.setdefault(owner, {})[slab] = self._open.setdefault(owner, {})[slab] = cut
        return cut

    def _give_slab(self, owner: Owner, slab: int) -> None:
        self._lent[slab : slab + owner.slabs_per_page] = bytes(owner.slabs_per_page)
        self.headers.forget(slab)
        self._open[owner].pop(slab, None)
        del self._cuts[owner][slab]
        if not self._cuts[owner]:
            del self._cuts[owner], self._open[owner]
            self._held.pop(owner, None)
            self._resting.pop(owner, None)
