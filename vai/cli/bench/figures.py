"""What a load run was like, in the field's terms: those of vLLM's `benchmark_serving`, for runs that end on time.

A run ends after so many seconds, whatever is under way. A request that waits for its first token at that moment counts
in the percentiles of first tokens with the time it has waited: a percentile that falls on it, or beyond, is a lower
bound and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from vai.cli.bench.traffic import Record


class Quantile(NamedTuple):
    """Seconds; `at_least`: the true value may be larger."""

    seconds: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>' if self.at_least else ''}{self.seconds:.3f}"


class Goal(NamedTuple):
    """What makes a request good: seconds to its first token, and seconds a token after it."""

    first: float
    between: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds and rates a second. `prompt_rate` counts prompts whose first token came; `goodput` is in requests.

    between: gaps between events (ITL). per_token: (last - first) / (tokens - 1) of each complete request (TPOT).
    """

    seconds: float
    sent: int
    complete: int
    errors: int
    waiting: int
    prompt_rate: float
    output_rate: float
    first_p50: Quantile
    first_p99: Quantile
    between_p50: float
    between_p99: float
    between_max: float
    per_token_p50: float
    goodput: float

    @property
    def total_rate(self) -> float:
        return self.prompt_rate + self.output_rate


def quantile(values: Sequence[Quantile], share: float) -> Quantile:
    """The smallest value that at least `share` of all do not exceed; NaN of none."""
    if not values:
        return Quantile(float("nan"))
    ordered = sorted(values)
    place = max(0, -(-int(share * 1_000_000) * len(ordered) // 1_000_000) - 1)
    return Quantile(ordered[place].seconds, any(value.at_least for value in ordered[: place + 1]))


def _plain(values: Sequence[float], share: float) -> float:
    return quantile([Quantile(value) for value in values], share).seconds


def gaps(record: Record) -> list[float]:
    """Seconds from each event to the next."""
    return [after - before for before, after in pairwise(record.events)]


def _per_token(record: Record) -> float:
    return (record.events[-1] - record.events[0]) / max(1, record.tokens - 1)


def _good(record: Record, goal: Goal) -> bool:
    if not (record.complete and record.events):
        return False
    return record.events[0] - record.sent <= goal.first and _per_token(record) <= goal.between


def figures(records: Sequence[Record], *, began: float, seconds: float, goal: Goal) -> Figures:
    """The figures of a run that began at `began` and ended `seconds` later, by time.perf_counter."""
    end = began + seconds
    answered = [record for record in records if record.events and record.error is None]
    waiting = [record for record in records if not record.events and record.error is None and record.ended is None]
    first = [Quantile(record.events[0] - record.sent) for record in answered]
    first += [Quantile(end - record.sent, True) for record in waiting]
    between = [gap for record in answered for gap in gaps(record)]
    complete = [record for record in answered if record.complete]
    tokens = sum(record.tokens or len(record.events) for record in answered)
    return Figures(
        seconds=seconds,
        sent=len(records),
        complete=len(complete),
        errors=sum(record.error is not None for record in records),
        waiting=len(waiting),
        prompt_rate=sum(record.prompt for record in answered) / seconds,
        output_rate=tokens / seconds,
        first_p50=quantile(first, 0.5),
        first_p99=quantile(first, 0.99),
        between_p50=_plain(between, 0.5),
        between_p99=_plain(between, 0.99),
        between_max=max(between, default=float("nan")),
        per_token_p50=statistics.median(map(_per_token, complete)) if complete else float("nan"),
        goodput=sum(_good(record, goal) for record in records) / seconds,
    )
