"""One request on its way: its tokens so far, how many of them are in the cache, and which pages hold them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as List

import numpy as np
from numpy.typing import NDArray

from vai.engine.history import History
from vai.engine.priority import rank
from vai.engine.select import Entry
from vai.kernels.program import MAX_ROWS, PAGE_TOKENS
from vai.request import Output, Request, SamplingParams, Timing, TokenLogprob
from vai.scratchpad.budget import pages_ahead
from vai.scratchpad.prefix import CachedPage, page_key, root_key
from vai.scratchpad.retention import Conversation


class Sequence:
    """The state of one request inside the scheduler.

    `tokens` are the prompt and everything made since; the first `computed` of them are in the cache, so
    [computed, len(tokens)) is what the next steps compute. A step that computes the last one yields a new token.
    The full pages at its beginning are `shared`: held in the prefix cache, read by anybody, written by nobody.
    After a preemption `computed` is 0 again and nothing else has changed: every row is computed to the same bits, and
    draws are keyed by (seed, choice, position), so the request continues as if it had never stopped. For that, too,
    each of its pages is of a kind that never changes.
    """

    def __init__(
        self,
        request: Request,
        entry: Entry,
        *,
        arrival: int,
        limit: int,
        now: float,
        draft: Entry | None = None,
        attach: float = 0.0,
    ) -> None:
        """`arrival` tells requests of one moment apart. `limit`: most tokens of prompt and answer together.

        `draft`: the model that guesses for it (speculate.py). `attach`: seconds until its image was there.
        """
        self.request = request
        self.entry = entry
        self.arrival = arrival
        self.draft = draft
        kind = request.speculate.kind
        self.guesses = (
            not request.constrained
            and limit > len(request.tokens) + 1  # a last token needs no guess at what follows it
            and (kind == "ngram" or (kind == "draft" and draft is not None))
        )
        self.priority = request.priority
        self.rank = rank(now, request.priority, arrival)
        self.limit = limit
        self.tokens = list(request.tokens)
        self.computed = 0
        self.running = False
        self.kinds = b""  # of its first pages: 1 where one is fast (kinds.py); fixed before any of its keys is made
        self.fast: str | None = None  # what computes those; their keys name it
        self.page_kinds: bytes | None = None  # the kinds, as they are told
        self.fingerprint = entry.fingerprint
        self.block_table = [array("q") for _ in entry.owners]  # for each cache group, the byte offset of every page
        self.shared: list[CachedPage] = []  # its first pages
        groups = enumerate(entry.program.groups)
        self.windows = {number: group.window for number, group in groups if group.window is not None}
        self.behind = [0] * len(entry.owners)  # for each cache group, how many of the first pages it does not read
        self.ahead = pages_ahead(MAX_ROWS)  # pages that its steps may write into at once (windows.py)
        self.conversation: Conversation | None = None  # that it belongs to, where its pages are kept
        self.prompt = len(request.tokens) - request.emitted  # tokens of it
        self.cached_tokens = 0  # in pages that it found instead of computing them
        self.cached_fast = 0  # of those, in fast ones
        self._known_pages = 0  # that it has computed or found, before any preemption
        self._keys = [root_key(entry.weights, entry.plan.kv_type, request.cache_salt)]
        seed = request.sampling.seed
        self.seed = seed if seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
        # A stop id that the model cannot draw changes nothing; only those it can are looked at.
        self.stop_ids = frozenset(id for id in request.sampling.stop_ids if id < entry.program.vocabulary)
        self.history = _history(request.sampling, self.tokens[: self.prompt], self.tokens[self.prompt :])
        self.mask: bytes | None = None  # for its next token, where it is constrained
        self.held: NDArray[np.float32] | None = None  # logits of its next token, which wait for the mask
        self._attach = attach
        self._submitted = now
        self._admitted: float | None = None
        self._first_token: float | None = None

    @property
    def made(self) -> int:
        """Tokens of the answer so far, those that the request brought along included."""
        return len(self.tokens) - len(self.request.tokens) + self.request.emitted

    @property
    def uncomputed(self) -> int:
        """Rows still to compute before the next token can be drawn: 1 while decoding, more in prefill."""
        return len(self.tokens) - self.computed

    def page_is_full(self) -> bool:
        """Whether the next row needs a page that is not there, in any cache group."""
        pages = self.computed // PAGE_TOKENS
        return any([len(table) <= pages for table in self.block_table])  # noqa: C419 - a generator costs more, in every step

    def masks_stop(self, ahead: int) -> bool:
        """Whether the token behind the next `ahead` must not be a stop id.

        A grammar that allows nothing else is stronger.
        """
        if not self.stop_ids or self.made + ahead >= self.request.sampling.min_tokens:
            return False
        return self.mask is None or not _only(self.mask, self.stop_ids)

    def rows_ahead(self) -> tuple[bool, int]:
        """Whether the next rows are those of fast pages, and how many come before the first of the other kind."""
        page = self.computed // PAGE_TOKENS
        if page >= len(self.kinds):
            return False, self.uncomputed
        fast = self.kinds[page] == 1
        end = self.kinds.find(b"\0" if fast else b"\1", page)
        return fast, (end if end >= 0 else len(self.kinds)) * PAGE_TOKENS - self.computed

    def page_keys(self) -> List[bytes]:
        """The keys of its full pages."""
        for page in range(len(self._keys) - 1, len(self.tokens) // PAGE_TOKENS):
            self._add_key(page)
        return self._keys[1:]

    @property
    def last_key(self) -> bytes:
        """The key of its last shared page, or the root's."""
        return self._keys[len(self.shared)]

    @property
    def next_key(self) -> bytes | None:
        """The key of the first page that is not shared; None where that page is not full, or may not be shared."""
        begin = len(self.shared) * PAGE_TOKENS
        if not self.request.cache or not self.block_table or begin + PAGE_TOKENS > len(self.tokens):
            return None
        if len(self._keys) == len(self.shared) + 1:
            self._add_key(len(self.shared))
        return self._keys[len(self.shared) + 1]

    def _add_key(self, page: int) -> None:
        fast = self.fast if page < len(self.kinds) and self.kinds[page] else None
        tokens = self.tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
        self._keys.append(page_key(self._keys[-1], tokens, fast))

    def share(self, page: CachedPage) -> None:
        """Read `page`, which it is a holder of, as the first that was not shared yet."""
        index = len(self.shared)
        for table, offset in zip(self.block_table, page.pages, strict=True):
            table[index : index + 1] = array("q", [offset])
        self.shared.append(page)
        end = len(self.shared) * PAGE_TOKENS
        if index == self._known_pages:
            self._known_pages += 1
            if self.computed < end:
                self.cached_tokens += PAGE_TOKENS
                self.cached_fast += PAGE_TOKENS if index < len(self.kinds) and self.kinds[index] else 0
        self.computed = max(self.computed, end)

    def bytes_of_pages(self, lengths: Iterable[int]) -> int:
        """What the pages take that are not behind a window, of block tables of these lengths."""
        groups = zip(self.entry.owners, lengths, self.behind, strict=True)
        return sum(owner.page_bytes * (length - behind) for owner, length, behind in groups)

    def rows_with_pages(self) -> int:
        """How many of the next rows have their pages in every cache group."""
        return min(map(len, self.block_table)) * PAGE_TOKENS - self.computed

    def admit(self, now: float) -> None:
        """It has its pages and will be computed."""
        self.running = True
        if self._admitted is None:
            self._admitted = now

    def append(self, tokens: List[int], logprobs: List[TokenLogprob | None], now: float, guessed: int = 0) -> Output:
        """Take the tokens drawn in one step, up to the last of the answer, and say so; then the output has `finish`.

        Of `guessed` tokens all of `tokens` but the last stood, and are computed already.
        """
        first = self._first_token is None
        if self._first_token is None:
            self._first_token = now
        self.mask = None
        finish, taken = None, 0
        while finish is None and taken < len(tokens):
            token = tokens[taken]
            taken += 1
            self.tokens.append(token)
            if self.history is not None:
                self.history.append(token)
            finish = "stop" if token in self.stop_ids else "length" if len(self.tokens) >= self.limit else None
        self.computed += taken - 1
        return Output(
            id=self.request.id,
            tokens=list(tokens[:taken]),
            logprobs=[each for each in logprobs[:taken] if each is not None],
            finish=finish,
            guessed=guessed,
            accepted=min(taken, len(tokens) - 1),
            seed=self.seed if first else None,
            cached_tokens=self.cached_tokens if first else 0,
            fingerprint=self.fingerprint if first else None,
            page_kinds=self.page_kinds if first else None,
            fast=self.fast if first else None,
            timing=self.timing(now) if first or finish else None,
        )

    def timing(self, now: float) -> Timing:
        """Seconds spent in each phase, up to `now`."""
        admitted = now if self._admitted is None else self._admitted
        first_token = now if self._first_token is None else self._first_token
        return Timing(admitted - self._submitted, first_token - admitted, now - first_token, self._attach)


def _only(mask: bytes, ids: frozenset[int]) -> bool:
    """Whether a mask allows none but these ids."""
    others = bytearray(mask)
    for id in ids:
        others[id // 8] &= ~(1 << id % 8)
    return not others.strip(b"\0")


def _history(sampling: SamplingParams, prompt: List[int], answer: List[int]) -> History | None:
    """What the penalties of a request weigh; None for a request without any."""
    if sampling.repetition_penalty != 1:
        return History(prompt, answer)
    if sampling.presence_penalty or sampling.frequency_penalty:
        return History((), answer)
    return None
