"""Token ids to text as they come: never half a character, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def token_bytes(self, token: int) -> bytes: ...

    def is_control(self, token: int) -> bool: ...


class StopStrings:
    """Finds the first of several strings in a stream, however the stream is cut.

    Text that may yet become a stop string is held back. The stop string that ends first wins (of those that end
    together, the longest): what comes out does not depend on how the stream was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now certain: up to the stop string, if one was found (`found` says which)."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        held = self._possible(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The held text: the stream ended before it became a stop string."""
        text, self._held = self._held, ""
        return text

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """One answer: feed its ids in order, get text pieces whose sum is the tokenizer's decoding of all ids.

    Control tokens are not shown, but for those in `shown`. Bytes that never become UTF-8 come out as U+FFFD. After a
    stop string nothing more comes out, and `stopped` is that string.
    """

    def __init__(
        self, tokenizer: TokenBytes, stops: Sequence[str] = (), *, shown: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> str | None:
        return self._stops.found

    def feed(self, tokens: Sequence[int]) -> str:
        shown = (id for id in tokens if id in self._shown or not self._tokenizer.is_control(id))
        return self._stops.feed(self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, shown))))

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped is not None:
            return ""
        return self._stops.feed(self._decoder.decode(b"", final=True)) + self._stops.finish()
