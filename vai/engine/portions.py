"""How the prompt rows of a step are divided among the prompts that wait for a first token.

In order of rank alone, one prompt of 4,000 tokens keeps all behind it waiting until it is done, however short they are.
By length alone, it might wait for ever. So the first in order gets its rows first, but a quarter of them is kept for
those that need the fewest: a short prompt gets in beside a long one, which takes at most a third longer for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

KEPT = 4  # one in so many rows


class Prompt(NamedTuple):
    """Rows to compute before the first token, and the request's priority."""

    rows: int
    priority: int


def portions(prompts: Sequence[Prompt], room: int) -> list[int]:
    """Rows for each of `prompts`, which come in order of rank; together at most `room`.

    What is kept goes to those of the first one's priority: nobody gets in before a better one by being short.
    """
    given = [0] * len(prompts)

    def give(index: int, most: int) -> int:
        rows = min(prompts[index].rows - given[index], most)
        given[index] += rows
        return rows

    equals = [index for index, prompt in enumerate(prompts) if prompt.priority == prompts[0].priority]
    kept = room // KEPT
    for index in sorted(equals, key=lambda index: prompts[index].rows):
        rows = give(index, kept)
        kept, room = kept - rows, room - rows
    for index in range(len(prompts)):
        room -= give(index, room)
    return given
