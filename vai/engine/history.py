"""Which tokens were there before, and how often each was made: what the penalties of a request weigh."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class History:
    """The distinct tokens of a prompt and its answer: `ids`, and how often the answer has each, in `made`."""

    def __init__(self, prompt: Iterable[int], answer: Iterable[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self.ids = array("i", distinct)
        self.made = array("i", bytes(4 * len(distinct)))
        self._places = {token: place for place, token in enumerate(distinct)}
        for token in answer:
            self.append(token)

    def append(self, token: int) -> None:
        """A token of the answer."""
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.made.append(0)
        self.made[place] += 1
