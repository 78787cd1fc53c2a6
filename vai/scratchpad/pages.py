"""The page pool: one memory for the KV pages of all models, and the exact account of who holds which page.

The memory is cut into slabs of 16 MiB. A slab is lent to one owner (a cache group of a model), which cuts it into its
pages; a page larger than a slab takes consecutive slabs. When the last page of a slab is free the slab goes back, so
nothing is reserved per model. What is not there is not promised: `allocate` gives all or None.

A page that the prefix cache keeps for nobody in particular is handed out, but not in use: it counts as free for whoever
can have it evicted.
"""

from __future__ import annotations

import fcntl
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.daemon.pool import SLAB
from vai.errors import BadRequest
from vai.rom.mapping import Mapping

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
    if size == 0 or size % SLAB or seals & _SIZE_SEALS != _SIZE_SEALS:
        raise BadRequest(
            f"File descriptor {descriptor} is not a scratchpad pool: {size} bytes, seals {seals:#x}; "
            f"a pool has whole slabs of {SLAB} bytes and a sealed size."
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

    def give(self, page: int) -> None:
        """Take a page back."""
        if page in self.returned or page >= self.fresh:
            raise AssertionError(f"page {page} of {self.owner} is free already")
        self.returned.add(page)


class PagePool:
    """Who holds which page of a memory of `size` bytes. Pages are known by their byte offset."""

    def __init__(self, size: int) -> None:
        """`size` must be whole slabs."""
        if size <= 0 or size % SLAB:
            raise AssertionError(f"a pool of {size} bytes is not whole slabs of {SLAB}")
        self.size = size
        self._lent = bytearray(size // SLAB)  # 1 for each slab that some owner has
        self._cuts: dict[Owner, dict[int, _Cut]] = {}  # owner -> first slab -> its pages
        self._held: dict[Owner, int] = {}  # pages handed out
        self._resting: dict[Owner, int] = {}  # those among them that nobody uses

    def allocate(self, owner: Owner, count: int) -> list[int] | None:
        """Offsets of `count` pages, or None (and nothing changed) where that many are not free."""
        cuts = self._cuts.setdefault(owner, {})
        held = self._held.get(owner, 0)
        while len(cuts) * owner.pages_per_cut - held < count:
            if not self._take_slab(owner, cuts):
                self._give_back_unused(owner)
                return None
        self._held[owner] = held + count
        pages: list[int] = []
        for cut in cuts.values():
            pages += [cut.take() for _ in range(min(len(cut), count - len(pages)))]
            if len(pages) == count:
                break
        return pages

    def free(self, owner: Owner, pages: list[int]) -> None:
        """Take pages back. The slab of the last one is anybody's again."""
        if not pages:
            return
        cuts = self._cuts[owner]
        for page in pages:
            cuts[page // SLAB].give(page)
        self._held[owner] -= len(pages)
        self._give_back_unused(owner)

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
        """Slabs, whoever has them."""
        return len(self._lent)

    @property
    def free_slabs(self) -> int:
        """Slabs that nobody has."""
        return self._lent.count(0)

    def _take_slab(self, owner: Owner, cuts: dict[int, _Cut]) -> bool:
        """Cut one more slab (or run of slabs) for `owner`. Runs come from the far end: singles do not split them."""
        run = owner.slabs_per_page
        slab = self._lent.find(0) if run == 1 else self._lent.rfind(bytes(run))
        if slab < 0:
            return False
        self._lent[slab : slab + run] = b"\1" * run
        cuts[slab] = _Cut(owner, slab)
        return True

    def _give_back_unused(self, owner: Owner) -> None:
        cuts = self._cuts[owner]
        for slab in [slab for slab, cut in cuts.items() if len(cut) == owner.pages_per_cut]:
            del cuts[slab]
            self._lent[slab : slab + owner.slabs_per_page] = bytes(owner.slabs_per_page)
        if not cuts:
            del self._cuts[owner]
            self._held.pop(owner, None)
            self._resting.pop(owner, None)
