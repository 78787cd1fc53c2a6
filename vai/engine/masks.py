"""Token masks: a constrained request draws each token under a mask, made elsewhere, that is due when it is drawn.

Nobody waits for one. A row whose mask is not there is left out of the draw: its logits are kept, and when the mask has
come they are drawn from as they would have been, so the token is the same. Meanwhile its model goes on with the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as List

import numpy as np
from numpy.typing import NDArray

from vai.engine.batch import Place
from vai.engine.sampler import Draw, sample
from vai.engine.sequence import Sequence
from vai.engine.usage import NativeTime
from vai.errors import BadRequest, VaiError

PATIENCE = 30.0  # seconds that a request waits for a mask, before it ends
GRACE = 0.5  # seconds of them after which a row that waits gives its pages back, to be computed again

Drawn = Draw | VaiError | None  # None: left out


def check(bits: bytes, vocabulary: int) -> BadRequest | None:
    """Why nothing can be drawn under a mask, or None."""
    if len(bits) != -(-vocabulary // 8):
        return BadRequest(f"A mask of {len(bits)} bytes is not one of {vocabulary} tokens.")
    if not bits.strip(b"\0"):
        return BadRequest("A mask allows no token at all, so there is none to go on with.")
    return None


class Held:
    """The sequences whose masks are due, and the rows that wait for them. Not thread-safe."""

    def __init__(self, patience: float = PATIENCE, clock: Callable[[], float] = time.perf_counter) -> None:
        self._patience = patience
        self._clock = clock
        self._due: dict[Sequence, float] = {}  # since when
        self._ready: list[Sequence] = []  # held rows whose masks have come

    def expect(self, sequence: Sequence) -> None:
        """The mask of its next token is due, if it is constrained."""
        if sequence.request.constrained:
            self._due[sequence] = self._clock()

    def arrived(self, sequence: Sequence) -> None:
        """It has its mask."""
        self._due.pop(sequence, None)
        if sequence.held is not None:
            self._ready.append(sequence)

    def forget(self, alive: Callable[[Sequence], bool]) -> None:
        """Forget those that have ended."""
        for sequence in [sequence for sequence in self._due if not alive(sequence)]:
            del self._due[sequence]

    def draw(self, places: List[Place], logits: NDArray[np.float32], native: NativeTime) -> list[Drawn]:
        """Draw a token for each of `places`, whose logits are [R, vocabulary]; keep the rows that have no mask."""
        late = [place.sequence.request.constrained and place.sequence.mask is None for place in places]
        for row, place in enumerate(places):
            if late[row]:
                place.sequence.held = logits[row].copy()  # the next step of the model writes over the logits
            self.expect(place.sequence)
        if not any(late):
            return list(sample(places, logits, native))
        rows = [row for row, is_late in enumerate(late) if not is_late]
        drawn = iter(sample([places[row] for row in rows], logits[rows], native))
        return [None if is_late else next(drawn) for is_late in late]

    def take(self) -> list[tuple[list[Place], NDArray[np.float32]]]:
        """The rows whose masks have come, with their logits, for each model; they are kept no longer."""
        found: dict[str, list[tuple[Sequence, NDArray[np.float32]]]] = {}
        for sequence in self._ready:
            if sequence.held is not None:  # else it ended, or lost its pages and will be computed again
                found.setdefault(sequence.entry.digest, []).append((sequence, sequence.held))
                sequence.held = None
        self._ready.clear()
        return [
            ([Place(sequence) for sequence, _ in rows], np.stack([row for _, row in rows])) for rows in found.values()
        ]

    def slow(self) -> list[Sequence]:
        """Those whose rows have waited so long that others should have their pages."""
        latest = self._clock() - GRACE
        return [sequence for sequence, since in self._due.items() if sequence.held is not None and since <= latest]

    def overdue(self) -> list[Sequence]:
        """Those that have waited longer than they may."""
        latest = self._clock() - self._patience
        return [sequence for sequence, since in self._due.items() if since <= latest]

    def patience(self) -> float | None:
        """Seconds until the next of them is slow or overdue; None where nobody waits."""
        waits = [since + self._wait(sequence) for sequence, since in self._due.items()]
        return max(0.0, min(waits) - self._clock()) if waits else None

    def _wait(self, sequence: Sequence) -> float:
        return self._patience if sequence.held is None else min(GRACE, self._patience)
