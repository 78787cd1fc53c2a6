"""How much fits: tokens of one sequence in a pool, before anything is allocated."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vai.daemon.pool import SLAB
from vai.kernels.program import PAGE_TOKENS
from vai.scratchpad.pages import Owner


def pages_for(tokens: int) -> int:
    """Pages (of each cache group) that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def slabs_for(owner: Owner, pages: int) -> int:
    """Slabs that `pages` pages of one owner take from an empty pool."""
    return -(-pages // owner.pages_per_cut) * owner.slabs_per_page


def pages_at_once(window: int | None, rows: int) -> int:
    """The most pages of a cache group with this window that a sequence needs at once, in steps of at most `rows` rows.

    The pages that a next turn reads behind the last full page, those that a step writes, and one at each end that is
    not read or written whole.
    """
    return sys.maxsize if window is None else pages_for(window) + pages_for(rows) + 2


def tokens_that_fit(pool_bytes: int, owners: Sequence[Owner], at_once: Sequence[int] | None = None) -> int | None:
    """The longest sequence that an otherwise empty pool holds, in tokens; None where any length fits.

    `owners` are the cache groups of one model, of which a sequence needs no more pages than `at_once`; an encoder has
    none.
    """
    most = [sys.maxsize] * len(owners) if at_once is None else at_once
    slabs = pool_bytes // SLAB

    def fit(pages: int) -> bool:
        needed = (slabs_for(owner, min(pages, limit)) for owner, limit in zip(owners, most, strict=True))
        return sum(needed) <= slabs

    if fit(sys.maxsize):
        return None
    fits, too_many = 0, slabs * max(owner.pages_per_cut for owner in owners) + 1
    while too_many - fits > 1:
        pages = (fits + too_many) // 2
        if fit(pages):
            fits = pages
        else:
            too_many = pages
    return fits * PAGE_TOKENS
