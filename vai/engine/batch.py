"""What one step computes: rows of several sequences of one model, as plain lists until the runner needs arrays."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import NamedTuple

import numpy as np

from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.kernels.program import MAX_ROWS, StepArgs

COUNTING = np.arange(MAX_ROWS + 1, dtype=np.int32)
COUNTING.setflags(write=False)


class Place(NamedTuple):
    """Where a token is drawn: in `sequence`, behind its tokens and those `ahead`, which are guesses (speculate.py).

    `guess`: so is what is drawn, by a draft model.
    """

    sequence: Sequence
    ahead: List[int] = ()
    guess: bool = False


class Batch:
    """Sequence s contributes the rows of its tokens [computed, computed + counts[s]), then those of its guesses.

    `places`: where something is drawn, in row order: behind each last uncomputed token that is among them, and behind
    each guess. `picked_at`: when the scheduler began to pick this step, in seconds of time.perf_counter. `turn`: the
    digest of the model whose turn it is, which a draft model's steps are part of. `fast`: all rows are of fast pages,
    and nothing is drawn.
    """

    def __init__(self, entry: Entry, picked_at: float, *, turn: str | None = None, fast: bool = False) -> None:
        self.entry = entry
        self.picked_at = picked_at
        self.turn = entry.digest if turn is None else turn
        self.drafting = turn is not None
        self.fast = fast
        self.sequences: list[Sequence] = []
        self.counts: list[int] = []
        self.places: list[Place] = []
        self.rows = 0
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._starts = [0]
        self._context: list[int] = []
        self._output_rows: list[int] = []

    def add(self, sequence: Sequence, count: int, draft: List[int] = ()) -> None:
        """Compute the next `count` tokens of `sequence`, and behind its last one a `draft` of guesses.

        Its block tables must cover them all.
        """
        self._add_rows(sequence, count, draft)
        if sequence.computed + count < len(sequence.tokens):
            return
        if not draft:
            self.places.append(Place(sequence))
            self._output_rows.append(self.rows - 1)
        else:
            self.places += [Place(sequence, draft[:guesses]) for guesses in range(len(draft) + 1)]
            self._output_rows += range(self.rows - len(draft) - 1, self.rows)

    def add_ahead(self, shadow: Sequence, count: int, sequence: Sequence, guesses: List[int]) -> None:
        """Compute the next `count` tokens of a draft model's `shadow`: those of `sequence`, then its `guesses`."""
        self._add_rows(shadow, count)
        if shadow.computed + count == len(shadow.tokens):
            self.places.append(Place(sequence, tuple(guesses), guess=True))
            self._output_rows.append(self.rows - 1)

    def _add_rows(self, sequence: Sequence, count: int, draft: List[int] = ()) -> None:
        begin = sequence.computed
        rows = count + len(draft)
        self.sequences.append(sequence)
        self.counts.append(count)
        self._context.append(begin)
        self._tokens += sequence.tokens[begin : begin + count]
        self._tokens += draft
        self._positions += range(begin, begin + rows)
        self.rows += rows
        self._starts.append(self.rows)

    def reads(self) -> int:
        """Tokens in the contexts of all rows of sequences, their own included, those of guesses left out."""
        counts = zip(self._context, self.counts, strict=True)
        return sum(count * before + count * (count + 1) // 2 for before, count in counts)

    def step_args(self) -> StepArgs:
        """The arrays of this step."""
        count = len(self.sequences)
        positions = np.array(self._positions, np.int32)
        one_row_each = self.rows == count  # as when all decode: then much is the same
        return StepArgs(
            np.array(self._tokens, np.int32),
            positions,
            COUNTING[: count + 1] if one_row_each else np.array(self._starts, np.int32),
            positions if one_row_each else np.array(self._context, np.int32),
            tuple(map(self._block_table, range(len(self.entry.owners)))),
            COUNTING[: self.rows] if len(self.places) == self.rows else np.array(self._output_rows, np.int32),
            "fast" if self.fast else "exact",
        )

    def _block_table(self, group: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        if len(self.sequences) == 1 and not self.sequences[0].windows:
            # By way of a list, as the other arrays: NumPy's code for buffers would have to be fetched as well.
            return np.array([self.sequences[0].block_table[group].tolist()], np.int64)
        tables = [sequence.block_table[group] for sequence in self.sequences]
        padded = np.zeros((len(tables), max(map(len, tables))), np.int64)
        for row, pages in enumerate(tables):
            padded[row, : len(pages)] = pages
        return np.maximum(padded, 0)  # an entry that is GONE is not read
