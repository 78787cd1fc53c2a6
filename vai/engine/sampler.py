"""Logits to ids: gathers how each row is to be drawn, and hands out what was drawn."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.engine.batch import Batch
from vai.engine.sequence import Sequence
from vai.errors import VaiError
from vai.kernels import table
from vai.kernels.program import Adjustments, SampleArgs, Sampled
from vai.request import TokenLogprob


class Draw(NamedTuple):
    """One new token."""

    token: int
    logprob: TokenLogprob | None


def sample(batch: Batch, logits: NDArray[np.float32]) -> list[Draw | VaiError]:
    """One draw for each of `batch.drawing`, whose logits are [R, vocabulary].

    A row that is not a number gives an error for its request alone. A sequence below its `min_tokens` draws no stop id.
    """
    if not batch.drawing:
        return []
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
        choice=np.array([sequence.request.choice for sequence in batch.drawing], np.uint32),
        position=np.array([len(sequence.tokens) for sequence in batch.drawing], np.uint32),
        logprobs=np.array([-1 if each.logprobs is None else each.logprobs for each in params], np.int32),
        adjustments=_adjustments(batch.drawing),
    )


def _adjustments(sequences: list[Sequence]) -> Adjustments | None:
    """What changes the logits of these rows before they are drawn from; None where nothing does."""
    biases = [_biases(sequence) for sequence in sequences]
    histories = [sequence.history for sequence in sequences]
    if not any(biases) and not any(histories):
        return None
    params = [sequence.request.sampling for sequence in sequences]
    ids, made = array("i"), array("i")
    for history in histories:
        if history is not None:
            ids.extend(history.ids)
            made.extend(history.made)
    return Adjustments(
        repetition=np.array([each.repetition_penalty for each in params], np.float32),
        presence=np.array([each.presence_penalty for each in params], np.float32),
        frequency=np.array([each.frequency_penalty for each in params], np.float32),
        bias_start=_starts(map(len, biases)),
        bias_ids=np.array([id for own in biases for id in own], np.int32),
        biases=np.array([bias for own in biases for bias in own.values()], np.float32),
        seen_start=_starts(0 if history is None else len(history.ids) for history in histories),
        seen_ids=np.array(ids, np.int32),
        made=np.array(made, np.int32),
    )


def _biases(sequence: Sequence) -> dict[int, float]:
    biases = sequence.request.sampling.logit_bias
    return {**biases, **dict.fromkeys(sequence.stop_ids, -np.inf)} if sequence.stop_is_masked else biases


def _starts(counts: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *counts], dtype=np.int64)


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
