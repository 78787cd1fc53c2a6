"""Which tokens were there before, and how often each was made: what the penalties of a request weigh."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class History:
    """The distinct tokens of a prompt and its answer: `ids`, and how often the answer has each, in `made`."""

    def __init__(self, prompt: Iterable[int], answer: Iterable[int]) -> None:
        self.ids = array("i")
        self.made = array("i")
        self._places: dict[int, int] = {}
        for token in dict.fromkeys(prompt):
            self._add(token, 0)
        for token in answer:
            self.append(token)

    def append(self, token: int) -> None:
        """A token of the answer."""
        place = self._places.get(token)
        if place is None:
            self._add(token, 1)
        else:
            self.made[place] += 1

    def _add(self, token: int, made: int) -> None:
        self._places[token] = len(self.ids)
        self.ids.append(token)
        self.made.append(made)
