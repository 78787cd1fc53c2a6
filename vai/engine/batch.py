"""What one step computes: rows of several sequences of one model, as plain lists until the runner needs arrays."""

from __future__ import annotations

import numpy as np

from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.kernels.program import StepArgs


class Batch:
    """Sequence s contributes the rows of its tokens [computed, computed + counts[s]).

    `drawing` are the sequences whose last uncomputed token is among them, in row order: each gets one new token.
    `picked_at`: when the scheduler began to pick this step, in seconds of time.perf_counter.
    """

    def __init__(self, entry: Entry, picked_at: float) -> None:
        self.entry = entry
        self.picked_at = picked_at
        self.sequences: list[Sequence] = []
        self.counts: list[int] = []
        self.drawing: list[Sequence] = []
        self.rows = 0
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._starts = [0]
        self._context: list[int] = []
        self._output_rows: list[int] = []

    def add(self, sequence: Sequence, count: int) -> None:
        """Compute the next `count` tokens of `sequence`; its block tables must cover them."""
        begin = sequence.computed
        end = begin + count
        self.sequences.append(sequence)
        self.counts.append(count)
        self._context.append(begin)
        self._tokens += sequence.tokens[begin:end]
        self._positions += range(begin, end)
        self.rows += count
        self._starts.append(self.rows)
        if end == len(sequence.tokens):
            self.drawing.append(sequence)
            self._output_rows.append(self.rows - 1)

    def step_args(self) -> StepArgs:
        """The arrays of this step."""
        return StepArgs(
            tokens=np.array(self._tokens, np.int32),
            positions=np.array(self._positions, np.int32),
            seq_start=np.array(self._starts, np.int32),
            context=np.array(self._context, np.int32),
            block_tables=tuple(map(self._block_table, range(len(self.entry.owners)))),
            output_rows=np.array(self._output_rows, np.int32),
        )

    def _block_table(self, group: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        tables = [sequence.block_table[group] for sequence in self.sequences]
        padded = np.zeros((len(tables), max(map(len, tables))), np.int64)
        for row, pages in enumerate(tables):
            padded[row, : len(pages)] = pages
        return padded
