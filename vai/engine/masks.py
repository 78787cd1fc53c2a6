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

PATIENCE = 30.0  # seconds that a computed row waits for its mask, before its request ends

Drawn = Draw | VaiError | None  # None: left out


def check(bits: bytes, vocabulary: int) -> BadRequest | None:
    """Why nothing can be drawn under a mask, or None."""
    if len(bits) != -(-vocabulary // 8):
        return BadRequest(f"A mask of {len(bits)} bytes is not one of {vocabulary} tokens.")
    if not bits.strip(b"\0"):
        return BadRequest("A mask allows no token at all, so there is none to go on with.")
    return None


class Held:
    """The rows that wait for their masks, longest first. Not thread-safe."""

    def __init__(self, patience: float = PATIENCE, clock: Callable[[], float] = time.perf_counter) -> None:
        self._patience = patience
        self._clock = clock
        self._since: dict[Sequence, float] = {}

    def draw(self, places: List[Place], logits: NDArray[np.float32], native: NativeTime) -> list[Drawn]:
        """Draw a token for each of `places`, whose logits are [R, vocabulary]; keep the rows that have no mask."""
        late = [place.sequence.request.constrained and place.sequence.mask is None for place in places]
        if not any(late):
            return list(sample(places, logits, native))
        for row, place in enumerate(places):
            if late[row]:
                place.sequence.held = logits[row].copy()  # the next step of the model writes over the logits
                self._since[place.sequence] = self._clock()
        rows = [row for row, is_late in enumerate(late) if not is_late]
        drawn = iter(sample([places[row] for row in rows], logits[rows], native))
        return [None if is_late else next(drawn) for is_late in late]

    def take(self) -> list[tuple[list[Place], NDArray[np.float32]]]:
        """The rows whose masks have come, with their logits, for each model; they are kept no longer."""
        self._forget_gone()
        found: dict[str, list[tuple[Sequence, NDArray[np.float32]]]] = {}
        for sequence in list(self._since):
            if sequence.mask is not None and sequence.held is not None:
                found.setdefault(sequence.entry.digest, []).append((sequence, sequence.held))
                sequence.held = None
                del self._since[sequence]
        return [
            ([Place(sequence) for sequence, _ in rows], np.stack([row for _, row in rows])) for rows in found.values()
        ]

    def overdue(self) -> list[Sequence]:
        """Those that have waited longer than they may."""
        self._forget_gone()
        oldest = self._clock() - self._patience
        return [sequence for sequence, since in self._since.items() if since <= oldest]

    def patience(self) -> float | None:
        """Seconds until the first of them will have waited too long; None where nobody waits."""
        self._forget_gone()
        first = next(iter(self._since.values()), None)
        return None if first is None else max(0.0, first + self._patience - self._clock())

    def _forget_gone(self) -> None:
        """Those that ended, or lost their pages and will be computed again."""
        for sequence in [sequence for sequence in self._since if sequence.held is None]:
            del self._since[sequence]
