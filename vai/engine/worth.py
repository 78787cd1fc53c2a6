"""What prompt rows take: seconds by the tokens before them, learned from the steps of one model.

A row costs the same arithmetic on every weight, and attention to each token before it: a + b * context seconds. At a
context of 8,000 the second part can be ten times the first, so rows that are counted alone foretell nothing about a
prompt whose beginning is cached. `slope` is b / a, from running means of seconds for each octave of contexts, so that
what is known of long contexts survives an hour of short ones; `speed` is what the last step says about the machine.
"""

from __future__ import annotations

RENEW = 0.25  # weight of the newest step in a running mean
STEEPEST = 1 / 32  # of all slopes: what a token of context can cost at most, in rows
SMALLEST_CHUNK = 16  # work that a step may always have, and the size of the first, which tells the speed


class Worth:
    """One model's prompt rows. `speed`: work a second (see portions.py), 0 before the first step."""

    def __init__(self) -> None:
        self.speed = 0.0
        self.slope = 0.0
        self._means: dict[int, tuple[float, float]] = {}  # octave -> (tokens before a row, seconds of a row)

    def note(self, rows: int, reads: int, seconds: float) -> None:
        """A step of `rows` rows, in whose contexts were `reads` tokens together, took so long.

        One of little work tells nothing: it takes as long as reading the weights.
        """
        if rows + self.slope * reads < SMALLEST_CHUNK:
            return
        seconds = max(seconds, 1e-9)
        context, each = reads / rows, seconds / rows
        octave = (int(context) >> 7).bit_length()
        mean = self._means.get(octave, (context, each))
        self._means[octave] = mean[0] + RENEW * (context - mean[0]), mean[1] + RENEW * (each - mean[1])
        if len(self._means) > 1:
            self.slope = self._fit()
        self.speed = (rows + self.slope * reads) / seconds

    def _fit(self) -> float:
        """The slope of the line that is nearest to the means, by relative errors."""
        n = x = xx = y = xy = 0.0
        for context, seconds in self._means.values():
            weight = 1 / (seconds * seconds)
            n += weight
            x += weight * context
            xx += weight * context * context
            y += weight * seconds
            xy += weight * context * seconds
        level, rise = xx * y - x * xy, n * xy - x * y  # both times the same determinant
        if rise <= 0:
            return 0.0
        return min(STEEPEST, rise / level) if level > 0 else STEEPEST
