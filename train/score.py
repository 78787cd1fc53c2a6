"""Held-out text under a GGUF file, by VAI's own arithmetic: what its users get, not what PyTorch would compute."""

from __future__ import annotations

import math
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.evaluate import windows
from vai.burn.burn import burn
from vai.kernels import table
from vai.kernels.program import MAX_ROWS, PAGE_TOKENS, Plan, Program, StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.segment import attach


class Score(NamedTuple):
    """bits: of all tokens together · greedy: the likeliest token at each place."""

    bits: float
    greedy: np.ndarray


def score(file: Path, tokens: np.ndarray, *, threads: int | None = None) -> Score:
    """Burn a GGUF file and run the tokens through it, in the windows of train.evaluate.

    Burned into a folder beside the file, which is gone afterwards. Raises VaiError.
    """
    with ExitStack() as undo:
        root = Path(undo.enter_context(tempfile.TemporaryDirectory(dir=file.parent)))
        image = undo.enter_context(attach(root, burn(file, root).digest))
        program = build(Spec.from_bytes(image.spec))
        workers = table.make_workers(threads or len(os.sched_getaffinity(0)))
        plan = table.lower(program, image, max_rows=MAX_ROWS, max_sequences=MAX_ROWS, workers=workers)
        pages = -(-program.context // PAGE_TOKENS)
        pool = np.zeros(pages * program.groups[0].page_bytes(plan.kv_type), np.uint8)
        nats, greedy = 0.0, []
        for window, skip in windows(tokens, program.context):
            for logits, targets in _window(plan, program, pool, window.astype(np.int32), skip):
                highest = logits.max(axis=1)
                total = np.exp(logits - highest[:, None]).sum(axis=1, dtype=np.float64)
                found = logits[np.arange(len(targets)), targets]
                nats += float((np.log(total) + highest - found).sum(dtype=np.float64))
                greedy.append(logits.argmax(axis=1).astype(np.int32))
        del plan  # it reads the image, which is closed now
    return Score(nats / math.log(2), np.concatenate(greedy))


def _window(
    plan: Plan, program: Program, pool: np.ndarray, window: np.ndarray, skip: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(logits, targets) of the tokens behind the first `skip`, in steps of MAX_ROWS."""
    page = program.groups[0].page_bytes(plan.kv_type)
    found = []
    for start in range(0, len(window) - 1, MAX_ROWS):
        rows = window[start : min(start + MAX_ROWS, len(window) - 1)]
        outputs = np.arange(max(0, skip - start), len(rows), dtype=np.int32)
        if not len(outputs):
            outputs = np.array([len(rows) - 1], np.int32)  # a step has a result; this one is not looked at
        step = StepArgs(
            tokens=rows,
            positions=np.arange(start, start + len(rows), dtype=np.int32),
            seq_start=np.array([0, len(rows)], np.int32),
            context=np.array([start], np.int32),
            block_tables=(np.arange(len(pool) // page, dtype=np.int64)[None] * page,),
            output_rows=outputs,
        )
        logits = plan.forward(step, pool)
        if start + len(rows) > skip:
            found.append((logits.copy(), window[start + outputs + 1]))
    return found
