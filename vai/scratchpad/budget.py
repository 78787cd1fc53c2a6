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


def pages_ahead(rows: int) -> int:
    """Pages that a step of `rows` rows of one sequence may write into, wherever in a page it begins."""
    return pages_for(rows) + 1


def pages_at_once(window: int | None, ahead: int) -> int:
    """The most pages of a cache group with this window that a sequence needs at once, in steps that write into at most
    `ahead` pages: those, and the ones before them that a row behind the last full page reads.

    `ahead` 1 is the least: steps that end where their page does.
    """
    return sys.maxsize if window is None else pages_for(window - 1) + ahead


def bytes_that_hold(tokens: int, owners: Sequence[Owner], at_once: Sequence[int]) -> int:
    """The smallest pool that holds a sequence of `tokens` tokens, and nothing else; see tokens_that_fit."""
    groups = zip(owners, at_once, strict=True)
    return SLAB * sum(slabs_for(owner, min(pages_for(tokens), most)) for owner, most in groups)


def tokens_that_fit(pool_bytes: int, owners: Sequence[Owner], at_once: Sequence[int] | None = None) -> int | None:
    """The longest sequence that an otherwise empty pool holds, in tokens; None where any length fits.

    `owners` are the cache groups of one model, of which a sequence needs no more pages than `at_once`; an encoder has
    none.
    """
    most = [sys.maxsize] * len(owners) if at_once is None else at_once
    slabs = pool_bytes // SLAB

    def fit(pages: int) -> bool:
        return bytes_that_hold(pages * PAGE_TOKENS, owners, most) <= slabs * SLAB

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
