"""How much fits: tokens of one sequence in a pool, before anything is allocated."""

from __future__ import annotations

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


def tokens_that_fit(pool_bytes: int, owners: Sequence[Owner]) -> int | None:
    """The longest sequence that an otherwise empty pool holds, in tokens; None where nothing is kept.

    `owners` are the cache groups of one model; an encoder has none, so any length fits.
    """
    if not owners:
        return None
    slabs = pool_bytes // SLAB
    fits, too_many = 0, slabs * max(owner.pages_per_cut for owner in owners) + 1
    while too_many - fits > 1:
        pages = (fits + too_many) // 2
        if sum(slabs_for(owner, pages) for owner in owners) <= slabs:
            fits = pages
        else:
            too_many = pages
    return fits * PAGE_TOKENS
