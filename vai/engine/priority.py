"""Whose turn it is where requests have priorities: an order fixed when a request comes, so that nobody starves.

A priority is worth time: each step of it counts as HEAD_START seconds of age, at most MAX_HEAD_START in all. The order
of two requests never changes, so the first of all always gets on, and no request waits for others that come more than
2 * MAX_HEAD_START after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

HEAD_START = 10.0  # seconds
MAX_HEAD_START = 300.0


class Ranked(Protocol):
    """What is put in order."""

    @property
    def rank(self) -> tuple[float, int]: ...

    @property
    def priority(self) -> int: ...


RankedT = TypeVar("RankedT", bound=Ranked)


def rank(submitted: float, priority: int, arrival: int) -> tuple[float, int]:
    """What requests are sorted by, the lowest first. `submitted`: seconds; `arrival` tells the same moment apart."""
    return submitted + min(max(priority * HEAD_START, -MAX_HEAD_START), MAX_HEAD_START), arrival


def by_rank(each: Ranked) -> tuple[float, int]:
    """The key to sort by."""
    return each.rank


def displaced(sequence: Ranked, running: Iterable[RankedT]) -> list[RankedT]:
    """Those that must make way for a request which waits, the last first: equals in priority never do."""
    worse = [each for each in running if each.priority > sequence.priority and each.rank > sequence.rank]
    return sorted(worse, key=by_rank, reverse=True)
