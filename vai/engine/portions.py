"""How the prompt rows of a step are divided among the prompts that wait for a first token.

In order of rank alone, one prompt of 4,000 tokens keeps all behind it waiting until it is done, however short they are.
By length alone, it might wait for ever. So the first in order gets its rows first, but a quarter of them is kept for
those that need the fewest: a short prompt gets in beside a long one, which takes at most a third longer for it.

What is divided is work. Its unit is a row without a context; a row with `context` tokens before it is
1 + slope * context, where the `slope` is what its model's steps have shown (worth.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

KEPT = 4  # one in so many rows


class Prompt(NamedTuple):
    """Rows to compute before the first token, the request's priority, and the tokens before those rows."""

    rows: int
    priority: int
    context: int = 0


def work(rows: int, context: int, slope: float) -> float:
    """What `rows` rows behind `context` tokens are, each with those before it in its context, too."""
    return rows + slope * (context * rows + rows * rows / 2)


def rows_within(room: float, context: int, slope: float) -> int:
    """The most rows behind `context` tokens that are no more than `room`."""
    price = 1 + slope * context
    return int(2 * room / (price + sqrt(price * price + 2 * slope * room)))


def portions(prompts: Sequence[Prompt], room: float, most: int | None = None, slope: float = 0.0) -> list[int]:
    """Rows for each of `prompts`, which come in order of rank; together at most `room` of work, and `most` rows.

    What is kept goes to those of the first one's priority: nobody gets in before a better one by being short. Where
    there is room for a row without context, the first one gets a row, whatever its context.
    """
    given = [0] * len(prompts)
    left = int(room) if most is None else min(int(room), most)
    if left < 1 or not prompts:
        return given

    def give(index: int, room: float, most: int) -> tuple[float, int]:
        prompt, done = prompts[index], given[index]
        rows = min(prompt.rows - done, most, rows_within(room, prompt.context + done, slope))
        given[index] += rows
        return work(rows, prompt.context + done, slope), rows

    equals = [index for index, prompt in enumerate(prompts) if prompt.priority == prompts[0].priority]
    kept, kept_rows = room / KEPT, left // KEPT
    for index in sorted(equals, key=lambda index: prompts[index].rows):
        used, rows = give(index, kept, kept_rows)
        kept, kept_rows, room, left = kept - used, kept_rows - rows, room - used, left - rows
    for index in range(len(prompts)):
        used, rows = give(index, room, left)
        room, left = room - used, left - rows
    if not any(given):
        given[0] = 1
    return given
