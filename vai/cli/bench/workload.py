"""What clients ask for: prompts of seeded random ids and answers of fixed length, the same for every server."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vai.burn.gguf import GgufFile
from vai.errors import MalformedFile

NORMAL = 1  # the type of a token that is text, in a GGUF file


class Workload(NamedTuple):
    """Prompts of log-uniform length, in tokens, and the length of every answer."""

    shortest: int
    longest: int
    answer: int


WORKLOADS = {
    "mixed": Workload(10, 4000, 64),
    "decode": Workload(10, 100, 128),
    "prefill": Workload(1000, 4000, 16),
}


class Ask(NamedTuple):
    """One request: a prompt as token ids, so that every server computes the same, and the tokens to answer with."""

    prompt: list[int]
    answer: int


def text_ids(file: Path) -> list[int]:
    """The ids of a checkpoint's vocabulary that stand for text."""
    with GgufFile(file) as source:
        kinds = source.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list):
        raise MalformedFile(f"{file} does not say which of its tokens are text.")
    return [token for token, kind in enumerate(kinds) if kind == NORMAL]


def asks(workload: Workload, ids: Sequence[int], seed: int) -> Iterator[Ask]:
    """Requests without end; the same arguments give the same ones."""
    generator = random.Random(seed)  # noqa: S311 - a load, not a secret
    low, high = math.log(workload.shortest), math.log(workload.longest + 1)
    while True:
        length = min(workload.longest, int(math.exp(generator.uniform(low, high))))
        yield Ask(generator.choices(ids, k=length), workload.answer)


def pauses(rate: float, seed: int) -> Iterator[float]:
    """Seconds between the arrivals of a Poisson process of `rate` a second."""
    generator = random.Random(seed)  # noqa: S311 - a load, not a secret
    while True:
        yield generator.expovariate(rate)
