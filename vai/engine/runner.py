"""Batch to logits: one native call, and the time from the scheduler's pick to it.

That time is the whole price of a context select, so it is kept in two classes: steps of the same model as the step
before, and steps of another.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from vai.engine.batch import Batch
from vai.engine.port import Switches
from vai.engine.usage import NativeTime

KEPT_TIMES = 1 << 14


class Runner:
    """Runs batches over one pool of pages. `native`: the time of its thread in native calls."""

    def __init__(self, pool: NDArray[np.uint8]) -> None:
        self.native = NativeTime()
        self._pool = pool
        self._last: str | None = None
        self._same: deque[float] = deque(maxlen=KEPT_TIMES)
        self._switched: deque[float] = deque(maxlen=KEPT_TIMES)

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """The logits [R, vocabulary] of a batch, valid until the model's next step."""
        entry = batch.entry
        step = batch.step_args()
        times = self._same if entry.digest == self._last else self._switched
        self._last = entry.digest
        times.append(time.perf_counter() - batch.picked_at)
        plan = entry.fast_plan if batch.fast else entry.plan
        with self.native:
            return plan.forward(step, self._pool)

    def take_switches(self) -> Switches:
        """The last times from pick to native call, in seconds, which are then forgotten."""
        taken = Switches(list(self._same), list(self._switched))
        self._same.clear()
        self._switched.clear()
        return taken
