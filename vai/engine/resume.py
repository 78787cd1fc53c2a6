"""An answer that outlives its engine: what is left to ask the next one for, so that the whole is as if nothing was.

Every row is computed to the same bits whoever computes it, and draws are keyed by (seed, position). So the prompt with
the tokens that have come, the seed of the first admission and the kinds of its pages, give exactly the tokens that are
missing.
"""

from __future__ import annotations

import secrets

from msgspec.structs import replace

from vai.engine.port import Mask
from vai.request import Output, Request

RETRIES = 3  # engines that one request may lose, and still go on
FRUITLESS = 2  # of them in a row without a token in between: a request that kills engines is not sent for ever
_TOLD = {"seed": None, "cached_tokens": 0, "fingerprint": None, "page_kinds": None, "fast": None}  # once


class Answer:
    """One request's answer over all the engines that worked on it. `over`: its last output has come."""

    def __init__(self, request: Request, mask: bytes = b"") -> None:
        """`mask`: of a constrained request's first token."""
        self.over = False
        self._id = request.id  # what the engine at work knows it by
        self._mask = (len(request.tokens), mask)
        self._request = request
        self._tokens: list[int] = []
        self._seed = request.sampling.seed
        self._page_kinds = request.page_kinds
        self._fast = request.fast
        self._admitted = False  # an engine has said what it draws with, and what it had cached
        self._lost = 0
        self._fruitless = 0

    def rest(self) -> Request:
        """The request for the next engine: the whole one at first, then what is missing, under an id of its own."""
        if not self._lost:
            return self._request
        self._id = secrets.token_hex(16)
        return replace(
            self._request,
            id=self._id,
            tokens=[*self._request.tokens, *self._tokens],
            emitted=self._request.emitted + len(self._tokens),
            sampling=replace(self._request.sampling, seed=self._seed),
            page_kinds=self._page_kinds,
            fast=self._fast,
        )

    def allow(self, position: int, bits: bytes) -> None:
        """Note the mask of the token at `position`."""
        self._mask = (position, bits)

    def mask(self) -> Mask | None:
        """What the engine at work needs to draw the next token, as far as it is known."""
        position, bits = self._mask
        due = bits and position == len(self._request.tokens) + len(self._tokens)
        return Mask(self._id, position, bits) if due else None

    def take(self, output: Output) -> Output:
        """Note an output, and give it back as if there had been one engine. Its timing is that of the last one."""
        self.over = output.finish is not None
        if output.tokens:
            self._tokens += output.tokens
            self._fruitless = 0
        if self._lost:
            output = replace(output, id=self._request.id, **(_TOLD if self._admitted else {}))
        if output.seed is not None:
            self._seed, self._admitted = output.seed, True
            self._page_kinds = output.page_kinds or b""  # all exact, which is a choice too
            self._fast = output.fast
        return output

    def lost(self) -> bool:
        """Note that the engine went away; whether to go on with the next."""
        self._lost += 1
        self._fruitless += 1
        return self._lost <= RETRIES and self._fruitless <= FRUITLESS
