"""The prefix cache: full pages of any request, known by what they hold, for every later request that begins the same.

A page's key is a chain: SHA-256 over the key before it, the kind of arithmetic, and its 32 tokens; the first follows
`root_key`. Equal keys mean equal bits, so a page found by its key is as good as one computed again. Walking the chain
from its root is the radix tree: a key can only be asked for by who knows all tokens before it.

Whoever holds a page holds every page before it, and lets go of the last first. So among the pages that nobody holds,
the one unused for longest is always a leaf, and evicting in that order never cuts a chain that is still useful.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from vai.kernels.program import KERNEL_ABI
from vai.scratchpad.pages import Owner, PagePool

_EXACT = b"\0"  # the kind of a page computed in the exact kind


def root_key(weights: str, kv_type: str, salt: str) -> bytes:
    """The key before a sequence's first page: whatever else its bits, and the right to see them, depend on.

    `weights`: the image's weights id. `salt` keeps tenants apart: pages are found under the salt they were made with.
    """
    digest = sha256(b"vai page\0" + KERNEL_ABI.to_bytes(4, "little"))
    for part in (weights, "", kv_type, salt):  # "": no adapter
        text = part.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.digest()


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of an exact page that holds `tokens`, after the page (or root) with the key `before`."""
    return sha256(before + _EXACT + np.array(tokens, "<u4").tobytes()).digest()


class CachedPage:
    """One page of every cache group of a model, sealed: `pages` are their offsets, in the order of `owners`."""

    __slots__ = ("holders", "key", "owners", "pages")

    def __init__(self, key: bytes, owners: tuple[Owner, ...], pages: tuple[int, ...]) -> None:
        self.key = key
        self.owners = owners
        self.pages = pages
        self.holders = 1


class PrefixCache:
    """Sealed pages by key, with a count of holders. Those without one stay until their room is needed."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[bytes, CachedPage] = {}
        self._idle: OrderedDict[bytes, CachedPage] = OrderedDict()  # without a holder, longest unused first

    def __len__(self) -> int:
        """Pages, held or not."""
        return len(self._pages)

    def take(self, key: bytes) -> CachedPage | None:
        """The page with this key, of which the caller is now a holder; None where there is none.

        The caller holds every page before it.
        """
        page = self._pages.get(key)
        if page is None:
            return None
        if page.holders == 0:
            del self._idle[key]
            for owner in page.owners:
                self._pool.wake(owner)
        page.holders += 1
        return page

    def put(self, key: bytes, owners: tuple[Owner, ...], pages: tuple[int, ...]) -> CachedPage:
        """Seal pages of the caller's that will not be written any more; the caller is a holder of what comes back.

        Where the key is there already, the pages given are freed, and the answer is the one that everybody has.
        """
        found = self.take(key)
        if found is not None:
            for owner, page in zip(owners, pages, strict=True):
                self._pool.free(owner, [page])
            return found
        self._pages[key] = CachedPage(key, owners, pages)
        return self._pages[key]

    def give(self, chain: Sequence[CachedPage]) -> None:
        """Let go of a chain that begins at its root, the last page first."""
        for page in reversed(chain):
            page.holders -= 1
            if page.holders == 0:
                self._idle[page.key] = page
                for owner in page.owners:
                    self._pool.rest(owner)

    def evict(self) -> bool:
        """Free the page that nobody has held for longest; False where every page has a holder."""
        if not self._idle:
            return False
        self._free(self._idle.popitem(last=False)[1])
        return True

    def forget(self, image: str) -> None:
        """Free every page of an image that has no holder."""
        for page in [page for page in self._idle.values() if page.owners[0].image == image]:
            del self._idle[page.key]
            self._free(page)

    def _free(self, page: CachedPage) -> None:
        del self._pages[page.key]
        for owner, offset in zip(page.owners, page.pages, strict=True):
            self._pool.wake(owner)
            self._pool.free(owner, [offset])
