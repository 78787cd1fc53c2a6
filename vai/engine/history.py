"""Which tokens were there before, and how often each was made: what the penalties of a request weigh."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence


class History:
    """The distinct tokens of a prompt and its answer: `ids`, and how often the answer has each, in `made`."""

    def __init__(self, prompt: Iterable[int], answer: Iterable[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self.ids = array("i", distinct)
        self.made = array("i", bytes(4 * len(distinct)))
        self._places = {token: place for place, token in enumerate(distinct)}
        for token in answer:
            self.append(token)

    def after(self, ahead: Sequence[int]) -> tuple[array[int], array[int]]:
        """`ids` and `made` as they would be with the tokens `ahead` in the answer."""
        ids, made = self.ids, self.made
        if not ahead:
            return ids, made
        ids, made = ids[:], made[:]
        places: dict[int, int] = {}
        for token in ahead:
            place = self._places.get(token, -1)
            if place < 0:
                place = places.setdefault(token, len(ids))
            if place == len(ids):
                ids.append(token)
                made.append(0)
            made[place] += 1
        return ids, made

    def append(self, token: int) -> None:
        """A token of the answer."""
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.made.append(0)
        self.made[place] += 1
