"""An answer: the engine's outputs for a request as they come, and whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from vai.errors import from_wire
from vai.llm.words import Words
from vai.request import Output, Request, Timing, TokenLogprob
from vai.telemetry import Stages
from vai.text.chat import Reading
from vai.text.reader import Piece, Reader
from vai.text.tools import ToolCall, whole_calls


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to an answer. Texts add up to the answer; `text` may lag behind `token_ids`, because half
    characters and possible beginnings of stop strings are held back.

    In a chat, `text` is for the user; beside it come `reasoning` and the pieces of tool `calls`, and with a call the
    finish is "tool_calls" where it was "stop".
    logprobs: one for each id where asked for, else empty. finish: None until the last delta, then "stop", "length" or
    "abort". completion_tokens counts the whole answer so far. seed: what the engine draws with, once known.
    fingerprint: what the answer's bits depend on. guessed, accepted: tokens that this step verified (Speculate), and
    those of them in `token_ids`. timing, stages: with the last; the engine's part, and all that is
    known here: no loader or preprocessor but the engine's and, of an `LLM`, its own.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seed: int | None = None
    timing: Timing | None = None
    fingerprint: str = ""
    stages: Stages | None = None
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    guessed: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: its text and ids, why it ended ("stop", "tool_calls", "length", "abort"), what it took, and what
    its bits depend on.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish: str
    prompt_tokens: int
    cached_tokens: int
    seed: int | None
    timing: Timing | None
    fingerprint: str
    stages: Stages
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    guessed: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Completion:
        """The sum of an answer's deltas, the last of which has `finish`."""
        last = deltas[-1]
        return cls(
            text="".join(delta.text for delta in deltas),
            token_ids=[id for delta in deltas for id in delta.token_ids],
            logprobs=[logprob for delta in deltas for logprob in delta.logprobs],
            finish=last.finish or "abort",
            prompt_tokens=last.prompt_tokens,
            cached_tokens=last.cached_tokens,
            seed=last.seed,
            timing=last.timing,
            fingerprint=last.fingerprint,
            stages=last.stages or Stages(),
            reasoning="".join(delta.reasoning for delta in deltas),
            tool_calls=whole_calls(call for delta in deltas for call in delta.calls),
            guessed=sum(delta.guessed for delta in deltas),
            accepted=sum(delta.accepted for delta in deltas),
        )


class Reply:
    """Turns the engine's outputs for one request into deltas."""

    def __init__(self, words: Words, request: Request, stop: Sequence[str], reading: Reading | None = None) -> None:
        self._reader = Reader(words.tokenizer, stop, reading)
        self._prompt_tokens = len(request.tokens)
        self._tokens = 0
        self._cached = 0
        self._seed = request.sampling.seed
        self._fingerprint = ""
        self._started: tuple[float, Timing] | None = None  # when the first token came, and what it had taken
        self._postprocessor = 0.0

    def take(self, output: Output) -> Delta | None:
        """The next delta, the last one if it has `finish`; None where the output brought nothing to show.

        Raises the engine's error.
        """
        if output.error is not None:
            raise from_wire(*output.error, output.retry_after)
        began = time.perf_counter()
        piece, count = self._read(output)
        self._tokens += count
        self._cached = max(self._cached, output.cached_tokens)
        self._seed = output.seed if output.seed is not None else self._seed
        self._fingerprint = output.fingerprint or self._fingerprint
        if output.timing is not None and self._started is None:
            self._started = began, output.timing
        finish = output.finish if self._reader.stopped is None else "stop"
        if finish == "stop" and self._reader.called:
            finish = "tool_calls"
        now = time.perf_counter()
        self._postprocessor += now - began
        if finish is None and not output.tokens:
            return None
        timing = None if finish is None else self._timing(output, now)
        return Delta(
            text=piece.text,
            token_ids=output.tokens[:count],
            logprobs=output.logprobs[:count],
            finish=finish,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens,
            cached_tokens=self._cached,
            seed=self._seed,
            timing=timing,
            fingerprint=self._fingerprint,
            stages=None if timing is None else self._stages(timing),
            reasoning=piece.reasoning,
            calls=piece.calls,
            guessed=output.guessed,
            accepted=min(output.accepted, count),
        )

    def _read(self, output: Output) -> tuple[Piece, int]:
        """What an output brings, and how many of its tokens: those behind a stop string are not of the answer."""
        pieces: list[Piece] = []
        last = len(output.tokens) - 1
        for number in range(max(last, 0)):
            pieces.append(self._reader.feed(output.tokens[number : number + 1]))
            if self._reader.stopped is not None:
                break
        else:
            pieces.append(self._reader.feed(output.tokens[max(last, 0) :], last=output.finish is not None))
        return Piece.of(pieces), min(len(pieces), len(output.tokens))

    def _timing(self, output: Output, now: float) -> Timing | None:
        """The engine's own, or for an answer that a stop string ended here, what it would have been."""
        if self._started is None or (output.finish is not None and output.timing is not None):
            return output.timing
        first, timing = self._started
        return msgspec.structs.replace(timing, decode=now - first)

    def _stages(self, timing: Timing) -> Stages:
        return Stages(
            loader=timing.attach,
            queue=timing.queued,
            prefill=timing.prefill,
            decode=timing.decode,
            postprocessor=self._postprocessor,
        )
