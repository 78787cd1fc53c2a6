"""The sampling that a GGUF file recommends (`general.sampling.*`, as llama.cpp's converter writes it)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import msgspec

from vai.errors import MalformedFile
from vai.request import SamplingParams

PREFIX = "general.sampling."
LARGEST = 1 << 31  # of a number that is looked at
KEYS: Mapping[str, str] = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def recommended(metadata: Mapping[str, object]) -> dict[str, float]:
    """What a request gets where it does not say, by the names of SamplingParams.

    Advice on samplers that VAI does not have (mirostat, XTC, their order) is not taken. Raises MalformedFile for values
    that no request could have.
    """
    chosen: dict[str, float] = {}
    for key, name in KEYS.items():
        value = metadata.get(PREFIX + key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
            raise MalformedFile(f"{PREFIX}{key} must be a number within reason.")
        if name != "top_k":
            chosen[name] = _as_written(value)
        elif value > 0:  # llama.cpp writes 0 or less for all of them
            chosen[name] = int(value)
    try:
        msgspec.convert(chosen, SamplingParams)
    except msgspec.ValidationError as error:
        raise MalformedFile(f"The sampling that the file recommends cannot be used: {error}.") from None
    return chosen


def _as_written(value: float) -> float:
    """The shortest decimal with the value's binary32: 0.95, where a file of binary32 numbers has 0.949999988079071."""
    single = struct.pack("<f", value)
    return next(short for digits in range(1, 18) if struct.pack("<f", short := float(f"{value:.{digits}g}")) == single)
