"""Logits to ids: gathers how each row is to be drawn, and hands out what was drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.engine.batch import Batch
from vai.engine.sequence import Sequence
from vai.errors import VaiError
from vai.kernels import table
from vai.kernels.program import SampleArgs, Sampled
from vai.request import TokenLogprob


class Draw(NamedTuple):
    """One new token."""

    token: int
    logprob: TokenLogprob | None


def sample(batch: Batch, logits: NDArray[np.float32]) -> list[Draw | VaiError]:
    """One draw for each of `batch.drawing`, whose logits [R, vocabulary] may be overwritten.

    A row that is not a number gives an error for its request alone. A sequence below its `min_tokens` draws no stop id.
    """
    if not batch.drawing:
        return []
    for row, sequence in zip(logits, batch.drawing, strict=True):
        if sequence.stop_is_masked:
            row[list(sequence.stop_ids)] = -np.inf
    sampled = table.sample(logits, _arguments(batch))
    return [_draw(sampled, row, sequence) for row, sequence in enumerate(batch.drawing)]


def _arguments(batch: Batch) -> SampleArgs:
    params = [sequence.request.sampling for sequence in batch.drawing]
    return SampleArgs(
        temperature=np.array([each.temperature for each in params], np.float32),
        top_k=np.array([each.top_k for each in params], np.int32),
        top_p=np.array([each.top_p for each in params], np.float32),
        min_p=np.array([each.min_p for each in params], np.float32),
        seed=np.array([sequence.seed for sequence in batch.drawing], np.uint64),
        choice=np.zeros(len(params), np.uint32),
        position=np.array([len(sequence.tokens) for sequence in batch.drawing], np.uint32),
        logprobs=np.array([-1 if each.logprobs is None else each.logprobs for each in params], np.int32),
    )


def _draw(sampled: Sampled, row: int, sequence: Sequence) -> Draw | VaiError:
    token = int(sampled.tokens[row])
    if token < 0:
        return VaiError(
            "The model computed something that is not a number for this prompt, so there is no next token. Other "
            "requests are not concerned; `vai verify` tells whether the model's image is damaged."
        )
    count = sequence.request.sampling.logprobs
    if count is None:
        return Draw(token, None)
    top_ids, top_logprobs = sampled.top_ids[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist()
    return Draw(token, TokenLogprob(float(sampled.logprob[row]), top_ids, top_logprobs))
