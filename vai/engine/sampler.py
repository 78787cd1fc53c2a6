"""Logits to ids: gathers how each row is to be drawn, and hands out what was drawn."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as List
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.engine.batch import Place
from vai.engine.sequence import Sequence
from vai.engine.usage import NativeTime
from vai.errors import VaiError
from vai.kernels import table
from vai.kernels.program import Adjustments, Masks, SampleArgs, Sampled
from vai.request import TokenLogprob


class Draw(NamedTuple):
    """One new token."""

    token: int
    logprob: TokenLogprob | None


def sample(places: List[Place], logits: NDArray[np.float32], native: NativeTime) -> list[Draw | VaiError]:
    """One draw for each of `places`, whose logits are [R, vocabulary]; the native call counts as `native`.

    A row that is not a number gives an error for its request alone. A sequence below its `min_tokens` draws no stop id.
    """
    if not places:
        return []
    arguments = _arguments(places)
    with native:
        sampled = table.sample(logits, arguments, workers=places[0].sequence.entry.workers)
    return [_draw(sampled, row, place) for row, place in enumerate(places)]


def _arguments(places: List[Place]) -> SampleArgs:
    sequences = [place.sequence for place in places]
    params = [sequence.request.sampling for sequence in sequences]
    return SampleArgs(
        temperature=np.array([each.temperature for each in params], np.float32),
        top_k=np.array([each.top_k for each in params], np.int32),
        top_p=np.array([each.top_p for each in params], np.float32),
        min_p=np.array([each.min_p for each in params], np.float32),
        seed=np.array([sequence.seed for sequence in sequences], np.uint64),
        choice=np.array([sequence.request.choice for sequence in sequences], np.uint32),
        position=np.array([len(place.sequence.tokens) + len(place.ahead) for place in places], np.uint32),
        logprobs=np.array([_logprobs(place) for place in places], np.int32),
        adjustments=_adjustments(places),
        masks=_masks(sequences),
    )


def _logprobs(place: Place) -> int:
    """How many alternatives are wanted, -1 for no logprobs at all; nobody sees those of a guess."""
    count = place.sequence.request.sampling.logprobs
    return -1 if count is None or place.guess else count


def _masks(sequences: List[Sequence]) -> Masks | None:
    """The masks of those that have one; None where nobody has."""
    bits = [sequence.mask for sequence in sequences if sequence.mask is not None]
    if not bits:
        return None
    row = iter(range(len(bits)))
    return Masks(
        bits=np.frombuffer(b"".join(bits), np.uint8).reshape(len(bits), -1),
        of=np.array([-1 if sequence.mask is None else next(row) for sequence in sequences], np.int32),
    )


def _adjustments(places: List[Place]) -> Adjustments | None:
    """What changes the logits of these rows before they are drawn from; None where nothing does."""
    biases = [_biases(place) for place in places]
    histories = [place.sequence.history for place in places]
    if not any(biases) and not any(histories):
        return None
    params = [place.sequence.request.sampling for place in places]
    ids, made, counts = array("i"), array("i"), []
    for place, history in zip(places, histories, strict=True):
        seen = (array("i"), array("i")) if history is None else history.after(place.ahead)
        ids.extend(seen[0])
        made.extend(seen[1])
        counts.append(len(seen[0]))
    return Adjustments(
        repetition=np.array([each.repetition_penalty for each in params], np.float32),
        presence=np.array([each.presence_penalty for each in params], np.float32),
        frequency=np.array([each.frequency_penalty for each in params], np.float32),
        bias_start=_starts(map(len, biases)),
        bias_ids=np.array([id for own in biases for id in own], np.int32),
        biases=np.array([bias for own in biases for bias in own.values()], np.float32),
        seen_start=_starts(counts),
        seen_ids=np.array(ids, np.int32),
        made=np.array(made, np.int32),
    )


def _biases(place: Place) -> dict[int, float]:
    sequence, biases = place.sequence, place.sequence.request.sampling.logit_bias
    masked = sequence.masks_stop(len(place.ahead))
    return {**biases, **dict.fromkeys(sequence.stop_ids, -np.inf)} if masked else biases


def _starts(counts: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *counts], dtype=np.int64)


def _draw(sampled: Sampled, row: int, place: Place) -> Draw | VaiError:
    token = int(sampled.tokens[row])
    if token < 0:
        return VaiError(
            "The model computed something that is not a number for this prompt, so there is no next token. Other "
            "requests are not concerned; `vai verify` tells whether the model's image is damaged."
        )
    count = _logprobs(place)
    if count < 0:
        return Draw(token, None)
    top_ids, top_logprobs = sampled.top_ids[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist()
    return Draw(token, TokenLogprob(float(sampled.logprob[row]), top_ids, top_logprobs))
