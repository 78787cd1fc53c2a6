"""Small statistics, all over lists of numbers: medians, percentiles, and a bootstrap interval of a median."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * len(ordered) * 1000) // 1000) - 1))]


def median_interval(values: Sequence[float], *, rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Median with its 95 % percentile bootstrap interval (Efron 1979)."""
    generator = random.Random(seed)  # noqa: S311 - resampling, not a secret
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(rounds))
    return statistics.median(values), medians[int(0.025 * rounds)], medians[int(0.975 * rounds) - 1]
