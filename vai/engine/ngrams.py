"""Prompt lookup: what followed the last tokens of a text where they stood before (Saxena, 2023).

An index says it for a few lookups in a dictionary, at a moment when a model's weights have driven everything out of the
caches (`NgramIndex`). It is kept as the text grows, a piece behind each step; until it has come to the end of a text, a
scan of the whole says the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

SIZES = range(2, 5)  # tokens that must agree to say what comes next; the more the better


class NgramIndex:
    """Where the last tokens of a growing text stood before, and what followed.

    A place is the position of the last of some tokens that stand there. The index has each place once: under its last
    two tokens if it is the latest place with these, else under its last three if it is the latest with these of those
    that are left, else under its last four. So it has no more entries than the text has tokens, each about 130 bytes,
    and a new place moves at most two others. Keys are the tokens' bytes, whose hashes no client can foretell.
    """

    def __init__(self) -> None:
        self._text = array("i")
        self._latest: dict[bytes, int] = {}
        self._next = SIZES[0] - 1  # the first place that is not in the index

    def read(self, tokens: Sequence[int], most: int) -> int:
        """Add at most `most` places of `tokens`, which have only grown since the last call; how many.

        The last place is not added: nothing has followed it yet.
        """
        begin, end = self._next, min(len(tokens) - 1, self._next + most)
        if begin >= end:
            return 0
        self._text.extend(tokens[len(self._text) : end])
        for place in range(begin, end):
            self._add(place)
        self._next = end
        return end - begin

    def go_on(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` guesses at what follows `tokens`, which have only grown since the last call.

        The longest agreement counts, up to four tokens, and the latest of equally long ones. A text that repeats itself
        is guessed to go on doing so.
        """
        text = self._text
        text.extend(tokens[len(text) :])
        place = self._look() if self._next >= len(text) - 1 else scan(text)
        if place is None:
            return []
        guesses: list[int] = []
        for behind in range(place + 1, place + 1 + most):
            guesses.append(text[behind] if behind < len(text) else guesses[behind - len(text)])
        return guesses

    def _add(self, place: int) -> None:
        """Put a place into the index, before which are all those before it."""
        text, latest = self._text, self._latest
        for size in SIZES:
            if place < size - 1:
                return
            key = text[place - size + 1 : place + 1].tobytes()
            older = latest.get(key)
            latest[key] = place
            if older is None:
                return
            place = older

    def _look(self) -> int | None:
        """The place that agrees best with the end of the text: what `scan` finds.

        All places that agree in so many tokens, but for those under fewer, are under these tokens or, older, under more
        of them. So of each size only the one in the index can be the latest that agrees in more.
        """
        end, found, agreed = len(self._text), None, 0
        for size in SIZES:
            place = self._latest.get(self._text[end - size :].tobytes()) if end >= size else None
            if place is None:
                break
            agreement = self._agreement(place, size)
            if agreement > agreed:
                found, agreed = place, agreement
        return found

    def _agreement(self, place: int, known: int) -> int:
        """In how many tokens a place agrees with the end of the text, which it does in those `known`."""
        text, end = self._text, len(self._text) - 1
        while known < SIZES[-1] and known <= place and text[place - known] == text[end - known]:
            known += 1
        return known


def scan(text: array[int]) -> int | None:
    """The place that agrees with the end of a text in most tokens, up to four, and the latest of those; None if none
    agrees in two.
    """
    if not text:
        return None
    seen = np.frombuffer(text, np.int32)
    places = np.flatnonzero(seen[:-1] == seen[-1])
    found = None
    for size in SIZES:
        places = places[places >= size - 1]
        places = places[seen[places - size + 1] == seen[-size]] if len(seen) >= size else places[:0]
        if not len(places):
            break
        found = int(places[-1])
    return found
