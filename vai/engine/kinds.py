"""Which arithmetic each page of a prompt is computed in: a kind belongs to a page.

A fast page costs less where the machine has the tiles for it, and holds other bits than an exact one. What is drawn
from is always exact: the page that holds the last prompt token, and every later one. Of the pages before it, those that
the prefix cache has, of either kind, stay what they are; the rest are fast where that pays, unless the request is
deterministic. This is decided once, when a request comes, and then kept: whatever was taken from the cache and is gone
later is computed again in the same kind, by this engine or the next (`Request.page_kinds`), so that an answer's bits do
not change in the middle.

The next engine may have another implementation of the fast kind, or none. `Request.fast` names the one that was at
work; pages go on under its name, and are computed by whatever gives its bits: the engine's own, or the portable one
where the engine has none, slowly (`Entry.stand_in`).

Kinds are bytes here, one for each of the first pages: 1 where it is fast. Pages behind them are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vai.engine.fingerprint import with_fast_pages
from vai.engine.sequence import Sequence
from vai.engine.windows import first_read
from vai.errors import BadRequest, NotSupported
from vai.kernels.program import PAGE_TOKENS
from vai.kernels.table import SAME_BITS
from vai.request import Request
from vai.scratchpad.budget import pages_for
from vai.scratchpad.prefix import GONE, PrefixCache, page_key

FEWEST = 4  # pages to compute for which it is worth having fast ones: each change of kinds costs a step
CHAINS = 4  # that are followed at once through the cache: where there are more, those with more fast pages are left


def check(request: Request, fast: str | None) -> None:
    """Raises BadRequest for kinds that no prompt like this can have, NotSupported for fast pages whose bits an engine
    with the fast kind `fast` (None: with none) cannot give again.
    """
    kinds = request.page_kinds
    if kinds is None:
        return
    pages, free = pages_for(len(request.tokens) - request.emitted), _free(request)
    if len(kinds) > -(-pages // 8):
        raise BadRequest(
            f"Kinds of {8 * len(kinds)} pages are more than the prompt has, which is {pages}.", param="page_kinds"
        )
    found = unpacked(kinds)
    if len(found) > free:
        raise BadRequest(
            f"Page {len(found) - 1} of a prompt of {pages} pages cannot be fast: the last one is exact, and so is all "
            "behind it.",
            param="page_kinds",
        )
    if found and request.deterministic:
        raise BadRequest("A deterministic request has no fast pages.", param="page_kinds")
    if found and not _gives(fast, request.fast):
        raise NotSupported(
            f"This answer was begun with pages of the fast kind{_named(request.fast)}, which this engine{_named(fast)} "
            "cannot compute again to the same bits. Start it with the same VAI_FAST as before, or send the request "
            "again from its beginning."
        )


def fix(sequence: Sequence, cache: PrefixCache) -> None:
    """Decide on the kinds of a request that was checked, before any of its pages is asked for by its key."""
    kinds, fast = _choose(sequence, cache), sequence.request.fast or sequence.entry.fast
    if kinds and fast is not None:
        sequence.kinds, sequence.fast = kinds, fast
        sequence.page_kinds = np.packbits(np.frombuffer(kinds, np.uint8), bitorder="little").tobytes()
        sequence.fingerprint = with_fast_pages(sequence.entry.fingerprint, fast)


def _choose(sequence: Sequence, cache: PrefixCache) -> bytes:
    request, fast = sequence.request, sequence.entry.fast
    if request.page_kinds is not None:
        return unpacked(request.page_kinds)
    if fast is None or request.deterministic or not sequence.entry.owners:
        return b""
    free = _free(request)
    found = longest_chain(sequence, cache, fast, free) if request.cache else b""
    left = free - len(found)
    return (found + (b"\1" * left if left >= FEWEST else b"")).rstrip(b"\0")


class Chain(NamedTuple):
    """Cached pages that follow each other from the beginning of a prompt, the more exact the smaller.

    `whole`: for each cache group with a window, the first page from which on none is GONE.
    """

    fast: int
    kinds: bytes
    key: bytes
    whole: tuple[int, ...]


def longest_chain(sequence: Sequence, cache: PrefixCache, fast: str, most: int) -> bytes:
    """The kinds of the longest chain of at most `most` pages that a sequence can go on behind; of several, those of the
    most exact.

    The pages after a page form a tree: each can be there in both kinds. It is walked breadth first, with at most CHAINS
    branches, so that whoever has it grow wide makes nobody's search long.
    """
    tokens = np.array(sequence.tokens[: most * PAGE_TOKENS], "<u4")
    chains, found = [Chain(0, b"", sequence.last_key, (0,) * len(sequence.windows))], b""
    for end in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS):
        longer = []
        for chain in chains:
            for kind, name in ((0, None), (1, fast)):
                key = page_key(chain.key, tokens[end - PAGE_TOKENS : end], name)
                page = cache.look(key)
                if page is not None:
                    groups = zip(chain.whole, sequence.windows, strict=True)
                    whole = tuple(end // PAGE_TOKENS if page.pages[group] == GONE else first for first, group in groups)
                    longer.append(Chain(chain.fast + kind, chain.kinds + bytes([kind]), key, whole))
        chains = sorted(longer)[:CHAINS]
        if not chains:
            break
        reads = [first_read(end, window) for window in sequence.windows.values()]
        usable = (chain.kinds for chain in chains if all(map(int.__le__, chain.whole, reads)))
        found = next(usable, found)
    return found


def _gives(fast: str | None, begun: str | None) -> bool:
    """Whether an engine with the fast kind `fast` can go on with what `begun` began; None: none, and nobody knows."""
    if begun is None or begun == fast:
        return fast is not None
    return begun in SAME_BITS and (fast is None or fast in SAME_BITS)


def _named(fast: str | None) -> str:
    return "" if fast is None else f" ({fast})"


def unpacked(bits: bytes) -> bytes:
    """Kinds that have travelled (Output.page_kinds), up to the last fast page."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").tobytes().rstrip(b"\0")


def _free(request: Request) -> int:
    """Pages before the one that holds the last prompt token: those whose kinds can be chosen."""
    return (len(request.tokens) - request.emitted - 1) // PAGE_TOKENS
