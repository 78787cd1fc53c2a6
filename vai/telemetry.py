"""The four stages of a request, and the seconds that it spends in each: what they are is defined here alone.

`loader`: until its model is there: found by name, loaded by the daemon if it was not resident, its tokenizer built, its
image attached by the engine; next to nothing for every request but a model's first.
`preprocessor`: from words to token ids: the body parsed, the chat template rendered, the text encoded.
`core`: the engine's steps: `prefill` up to the first token, `decode` from there to the last.
`postprocessor`: from ids to what is sent: characters, stop strings, logprobs and tools, and the answer's JSON.

Between the second and the third a request may wait: `queue` is in none of the four. They are wall time, and the last
overlaps the third: the server writes a token while the engine computes the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of one request."""

    loader: float = 0.0
    preprocessor: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    postprocessor: float = 0.0

    @property
    def core(self) -> float:
        return self.prefill + self.decode

    def as_dict(self) -> dict[str, float]:
        """By name, in order, as they are shown to people and clients."""
        return {
            "loader": self.loader,
            "preprocessor": self.preprocessor,
            "queue": self.queue,
            "core": self.core,
            "prefill": self.prefill,
            "decode": self.decode,
            "postprocessor": self.postprocessor,
        }

    def beside(self, other: Stages) -> Stages:
        """Those of two answers to one request: the longest of what the engine did, the sum of the rest."""
        return Stages(
            loader=max(self.loader, other.loader),
            preprocessor=self.preprocessor + other.preprocessor,
            queue=max(self.queue, other.queue),
            prefill=max(self.prefill, other.prefill),
            decode=max(self.decode, other.decode),
            postprocessor=self.postprocessor + other.postprocessor,
        )


class Stopwatch:
    """Adds up the stages outside the engine, each of which may be entered more than once.

    What is written token by token adds to `postprocessor` itself.
    """

    def __init__(self) -> None:
        self.loader = 0.0
        self.preprocessor = 0.0
        self.postprocessor = 0.0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within: loader."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.loader += time.perf_counter() - began

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Within: preprocessor."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.preprocessor += time.perf_counter() - began

    def around(self, stages: Stages) -> Stages:
        """With what was added up here."""
        return replace(
            stages,
            loader=stages.loader + self.loader,
            preprocessor=stages.preprocessor + self.preprocessor,
            postprocessor=stages.postprocessor + self.postprocessor,
        )
