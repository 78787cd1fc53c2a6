"""Cache groups with a window: what is behind it is freed, and a cached beginning counts where none of it is missing.

A query reads at most `window` tokens of such a group, its own included. So pages before them are read by nobody who is
further on: their entries in the block table are GONE, and a page of the prefix cache loses the part that all of its
holders have behind them. A sequence can go on behind a cached page only where every page within the windows there
still has its part.

So a sequence holds no more of such a group at once than budget.pages_at_once says, and is admitted with that much at
most: it takes a page further on for each that it leaves behind (Scheduler). Its own page behind the window is free at
once, so that one is there. One that is shared is free when the last who holds it has passed it: until then there may be
none, and the sequence is like one that decodes and needs a page.

How much that is depends on how many pages a step may write into. A prompt has as many as the largest step takes where a
pool that is empty otherwise would hold it so, else as many as it would hold: it is computed in smaller chunks, and what
can run a page at a time does run.
"""

from __future__ import annotations

import sys

from vai.engine.sequence import Sequence
from vai.kernels.program import PAGE_TOKENS
from vai.scratchpad.budget import bytes_that_hold, pages_ahead, pages_at_once, pages_for
from vai.scratchpad.pages import PagePool
from vai.scratchpad.prefix import GONE, CachedPage, PrefixCache


def first_read(tokens: int, window: int) -> int:
    """The first page that a row behind `tokens` tokens reads."""
    return max(0, tokens + 1 - window) // PAGE_TOKENS


def widest_steps(sequence: Sequence, pool_bytes: int, max_rows: int) -> int:
    """Into how many pages the steps of a sequence may write so that an empty pool holds it with its next token; as many
    as `max_rows` rows need at most, and 1 at least.
    """
    entry, tokens = sequence.entry, len(sequence.tokens) + 1
    for ahead in range(pages_ahead(max_rows), 1, -1):
        at_once = [pages_at_once(group.window, ahead) for group in entry.program.groups]
        if bytes_that_hold(tokens, entry.owners, at_once) <= pool_bytes:
            return ahead
    return 1


def lengths(sequence: Sequence, tokens: int) -> list[int]:
    """How long a sequence's block tables have to be before it computes up to `tokens` tokens.

    Of a prompt, as far as that is now: with each page that it leaves behind in a group with a window it needs one more.
    """
    pages = pages_for(tokens)
    needed = [pages] * len(sequence.block_table)
    if sequence.uncomputed > 1:
        for group, window in sequence.windows.items():
            needed[group] = min(pages, sequence.behind[group] + pages_at_once(window, sequence.ahead))
    return needed


def reach(sequence: Sequence, cache: PrefixCache) -> int:
    """How many of its first pages a sequence may have from the cache, if they are there."""
    if not sequence.windows or not sequence.request.cache:
        return sys.maxsize
    begin, found = len(sequence.shared), list[CachedPage]()
    for key in sequence.page_keys()[begin : (len(sequence.tokens) - 1) // PAGE_TOKENS]:
        page = cache.look(key)
        if page is None:
            break
        found.append(page)
    for end in range(begin + len(found), begin, -1):
        parts = (
            page.pages[group]
            for group, window in sequence.windows.items()
            for page in found[max(0, first_read(end * PAGE_TOKENS, window) - begin) : end - begin]
        )
        if GONE not in parts:
            return end
    return begin


def leave_behind(sequence: Sequence, cache: PrefixCache, pool: PagePool) -> None:
    """Let go of the pages that nobody reads who goes on behind the last full page, as the next turn does."""
    for group, window in sequence.windows.items():
        table, first = sequence.block_table[group], first_read(sequence.computed // PAGE_TOKENS * PAGE_TOKENS, window)
        for index in range(sequence.behind[group], first):
            if table[index] == GONE:
                continue  # it was when the page was found
            if index < len(sequence.shared):
                cache.leave_behind(sequence.shared[index], group)
            else:
                pool.free(sequence.entry.owners[group], [table[index]])
            table[index] = GONE
        sequence.behind[group] = max(first, sequence.behind[group])
