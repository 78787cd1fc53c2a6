"""One request on its way: its tokens so far, how many of them are in the cache, and which pages hold them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence as List

from vai.engine.history import History
from vai.engine.select import Entry
from vai.kernels.program import PAGE_TOKENS
from vai.request import Output, Request, SamplingParams, Timing, TokenLogprob
from vai.scratchpad.prefix import CachedPage, page_key, root_key


class Sequence:
    """The state of one request inside the scheduler.

    `tokens` are the prompt and everything made since; the first `computed` of them are in the cache, so
    [computed, len(tokens)) is what the next steps compute. A step that computes the last one yields a new token.
    The full pages at its beginning are `shared`: held in the prefix cache, read by anybody, written by nobody.
    After a preemption `computed` is 0 again and nothing else has changed: every row is computed to the same bits, and
    draws are keyed by (seed, choice, position), so the request continues as if it had never stopped.
    """

    def __init__(self, request: Request, entry: Entry, *, arrival: int, limit: int, now: float) -> None:
        """`arrival` orders requests by age. `limit`: prompt and answer together have at most this many tokens."""
        self.request = request
        self.entry = entry
        self.arrival = arrival
        self.limit = limit
        self.tokens = list(request.tokens)
        self.computed = 0
        self.running = False
        self.block_table = [array("q") for _ in entry.owners]  # for each cache group, the byte offset of every page
        self.shared: list[CachedPage] = []  # its first pages
        self.cached_tokens = 0  # in pages that it found instead of computing them
        self._known_pages = 0  # that it has computed or found, before any preemption
        self._keys = [root_key(entry.weights, entry.plan.kv_type, request.cache_salt)]
        seed = request.sampling.seed
        self.seed = seed if seed is not None else int.from_bytes(os.urandom(8), "little") >> 1
        # A stop id that the model cannot draw changes nothing; only those it can are looked at.
        self.stop_ids = frozenset(id for id in request.sampling.stop_ids if id < entry.program.vocabulary)
        prompt = len(self.tokens) - self.made
        self.history = _history(request.sampling, self.tokens[:prompt], self.tokens[prompt:])
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

    @property
    def stop_is_masked(self) -> bool:
        """Whether the next token must not be a stop id."""
        return bool(self.stop_ids) and self.made < self.request.sampling.min_tokens

    @property
    def next_key(self) -> bytes | None:
        """The key of the first page that is not shared; None where that page is not full, or may not be shared."""
        begin = len(self.shared) * PAGE_TOKENS
        if not self.request.cache or not self.block_table or begin + PAGE_TOKENS > len(self.tokens):
            return None
        if len(self._keys) == len(self.shared) + 1:
            self._keys.append(page_key(self._keys[-1], self.tokens[begin : begin + PAGE_TOKENS]))
        return self._keys[len(self.shared) + 1]

    def share(self, page: CachedPage) -> None:
        """Read `page`, which it is a holder of, as the first that was not shared yet."""
        index = len(self.shared)
        for table, offset in zip(self.block_table, page.pages, strict=True):
            table[index : index + 1] = array("q", [offset])
        self.shared.append(page)
        end = len(self.shared) * PAGE_TOKENS
        if index == self._known_pages:
            self._known_pages += 1
            self.cached_tokens += PAGE_TOKENS if self.computed < end else 0
        self.computed = max(self.computed, end)

    def admit(self, now: float) -> None:
        """It has its pages and will be computed."""
        self.running = True
        if self._admitted is None:
            self._admitted = now

    def append(self, token: int, logprob: TokenLogprob | None, now: float) -> Output:
        """Take the drawn token and say so; the output has `finish` if it was the last."""
        first = self._first_token is None
        if self._first_token is None:
            self._first_token = now
        self.tokens.append(token)
        if self.history is not None:
            self.history.append(token)
        finish = "stop" if token in self.stop_ids else "length" if len(self.tokens) >= self.limit else None
        return Output(
            id=self.request.id,
            tokens=[token],
            logprobs=[] if logprob is None else [logprob],
            finish=finish,
            seed=self.seed if first else None,
            cached_tokens=self.cached_tokens if first else 0,
            timing=self.timing(now) if finish else None,
        )

    def timing(self, now: float) -> Timing:
        """Seconds spent in each phase, up to `now`."""
        admitted = now if self._admitted is None else self._admitted
        first_token = now if self._first_token is None else self._first_token
        return Timing(queued=admitted - self._submitted, prefill=first_token - admitted, decode=now - first_token)


def _history(sampling: SamplingParams, prompt: List[int], answer: List[int]) -> History | None:
    """What the penalties of a request weigh; None for a request without any."""
    if sampling.repetition_penalty != 1:
        return History(prompt, answer)
    if sampling.presence_penalty or sampling.frequency_penalty:
        return History((), answer)
    return None
