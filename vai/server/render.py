"""Answers in the OpenAI format, whole or as server-sent events, built from the same deltas of the same generation."""

from __future__ import annotations

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from vai.llm import ToolCall, whole_calls
from vai.request import TokenLogprob
from vai.server import schema
from vai.server.schema import encode
from vai.telemetry import Stages, Stopwatch

if TYPE_CHECKING:
    from vai.llm import Delta, Model

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def event(data: bytes) -> bytes:
    """One server-sent event; JSON has no line breaks of its own."""
    return b"data: " + data + b"\n\n"


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


@dataclass(slots=True)
class _Choice:
    """What has come of one answer so far. `opening`: the text that it begins with, before the model's."""

    opening: str = ""
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)  # pieces
    finish: str | None = None
    tokens: int = 0
    cached: int = 0
    guessed: int = 0
    accepted: int = 0
    started: bool = False
    places: list[schema.ChatLogprob] = field(default_factory=list)
    columns: schema.CompletionLogprobs = field(default_factory=schema.CompletionLogprobs)
    offset: _Offset = field(default_factory=lambda: _Offset())


class Answer(ABC):
    """One HTTP answer with `n` choices per prompt. Feed it every delta once, by `add` or by `chunk`, in order.

    The choices of prompt p have the indices [p n, p n + n), as in OpenAI's.
    """

    prefix: str

    def __init__(
        self,
        model: Model,
        prompt_tokens: list[int],
        *,
        n: int = 1,
        logprobs: bool,
        usage_chunk: bool,
        stages: bool,
        watch: Stopwatch,
        echo: Sequence[str] = (),
    ) -> None:
        """`prompt_tokens`: length of each prompt. `usage_chunk`: the stream ends with a chunk that has the usage.

        `stages`: the answer says what each took; `watch` has added up those outside the engine.
        `echo`: the text of each prompt, which its choices are to begin with; empty for none.
        """
        self.id = f"{self.prefix}{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.name = model.card.name
        self.fingerprint = ""  # comes with the first token
        self.prompt_tokens = sum(prompt_tokens)
        self.n = n
        self.choices = [_Choice(opening) for opening in echo or [""] * len(prompt_tokens) for _ in range(n)]
        self.with_logprobs = logprobs
        self.usage_chunk = usage_chunk
        self.watch = watch
        self._with_stages = stages
        self._engine_stages = Stages()

    @property
    def usage(self) -> schema.Usage:
        """Tokens over all choices, so far; those of a prompt count once, as its first choice found them."""
        made = sum(choice.tokens for choice in self.choices)
        cached = sum(choice.cached for choice in self.choices[:: self.n])
        guessed = sum(choice.guessed for choice in self.choices)
        accepted = sum(choice.accepted for choice in self.choices)
        return schema.usage(self.prompt_tokens, made, cached, guessed, accepted)

    @property
    def stages(self) -> Stages:
        """What each stage took, so far."""
        return self.watch.around(self._engine_stages)

    @property
    def _shown_stages(self) -> dict[str, float] | UnsetType:
        return self.stages.as_dict() if self._with_stages else UNSET

    @property
    def finished(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    @property
    def finish(self) -> str:
        """How the choices ended, for the log."""
        return ",".join(choice.finish or "open" for choice in self.choices)

    def _take(self, index: int, delta: Delta) -> _Choice:
        choice = self.choices[index]
        choice.tokens += len(delta.token_ids)
        choice.cached = max(choice.cached, delta.cached_tokens)
        choice.guessed += delta.guessed
        choice.accepted += delta.accepted
        choice.finish = delta.finish
        self.fingerprint = delta.fingerprint or self.fingerprint
        if delta.stages is not None:
            self._engine_stages = self._engine_stages.beside(delta.stages)
        return choice

    def _shown(self, delta: Delta) -> list[tuple[int, TokenLogprob]]:
        """The tokens of a delta that are part of the answer: not the one that ends the model's turn."""
        pairs = list(zip(delta.token_ids, delta.logprobs, strict=True))
        ended = delta.finish in ("stop", "tool_calls") and pairs and pairs[-1][0] in self.model.eog
        return pairs[:-1] if ended else pairs

    def _tail(self) -> bytes:
        """What ends a stream: a chunk with usage or stages where they were asked for, and the end mark."""
        if not self.finished:
            return b""
        return (event(self._last_chunk()) if self.usage_chunk or self._with_stages else b"") + DONE

    @property
    def _last_usage(self) -> schema.Usage | UnsetType:
        return self.usage if self.usage_chunk else UNSET

    @property
    def _unknown_usage(self) -> UnsetType | None:
        return None if self.usage_chunk else UNSET

    @abstractmethod
    def add(self, index: int, delta: Delta) -> None:
        """Keep a delta of choice `index` for `whole`."""

    @abstractmethod
    def whole(self) -> bytes:
        """The answer as one JSON object, after the last delta."""

    @abstractmethod
    def chunk(self, index: int, delta: Delta) -> bytes:
        """The events of one delta of choice `index`; with the last delta of all, also those that end the stream."""

    @abstractmethod
    def _last_chunk(self) -> bytes:
        """Of a stream: without choices."""


class ChatAnswer(Answer):
    """/v1/chat/completions."""

    prefix = "chatcmpl-"

    def add(self, index: int, delta: Delta) -> None:
        choice = self._take(index, delta)
        choice.text.append(delta.text)
        choice.reasoning.append(delta.reasoning)
        choice.calls.extend(delta.calls)
        if self.with_logprobs:
            choice.places.extend(self._places(delta))

    def whole(self) -> bytes:
        choices = [
            schema.ChatChoice(
                index,
                _message(choice),
                schema.ChatLogprobs(choice.places) if self.with_logprobs else None,
                choice.finish or "stop",
            )
            for index, choice in enumerate(self.choices)
        ]
        return encode(
            schema.Chat(self.id, self.created, self.name, self.fingerprint, choices, self.usage, self._shown_stages)
        )

    def chunk(self, index: int, delta: Delta) -> bytes:
        choice = self._take(index, delta)
        places = self._places(delta) if self.with_logprobs else []
        events = b""
        if delta.text or delta.token_ids or delta.calls or delta.reasoning or places or not choice.started:
            said = schema.AnswerDelta(
                role=None if choice.started else "assistant",
                content=delta.text if delta.text or not (delta.reasoning or delta.calls) else None,
                reasoning_content=delta.reasoning or None,
                tool_calls=[_call_delta(call) for call in delta.calls] or None,
            )
            logprobs = schema.ChatLogprobs(places) if places else None
            events = self._event(index, said, logprobs, None)
            choice.started = True
        if delta.finish is not None:
            events += self._event(index, schema.AnswerDelta(), None, delta.finish)
        return events + self._tail()

    def _event(
        self, index: int, delta: schema.AnswerDelta, places: schema.ChatLogprobs | None, finish: str | None
    ) -> bytes:
        choice = schema.ChatChunkChoice(index, delta, places, finish)
        return event(
            encode(
                schema.ChatChunk(
                    self.id, self.created, self.name, self.fingerprint, [choice], usage=self._unknown_usage
                )
            )
        )

    def _last_chunk(self) -> bytes:
        said = schema.ChatChunk(
            self.id, self.created, self.name, self.fingerprint, [], self._last_usage, self._shown_stages
        )
        return encode(said)

    def _places(self, delta: Delta) -> list[schema.ChatLogprob]:
        return [self._place(*pair) for pair in self._shown(delta)]

    def _place(self, token: int, logprob: TokenLogprob) -> schema.ChatLogprob:
        chosen = self._candidate(token, logprob.logprob)
        top = [self._candidate(*pair) for pair in zip(logprob.top_ids, logprob.top_logprobs, strict=True)]
        return schema.ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, top)

    def _candidate(self, token: int, logprob: float) -> schema.TopLogprob:
        raw = self.model.token_bytes(token)
        return schema.TopLogprob(raw.decode(errors="replace"), _finite(logprob), list(raw))


def _message(choice: _Choice) -> schema.AnswerMessage:
    text, reasoning = "".join(choice.text), "".join(choice.reasoning)
    calls = [
        schema.MadeCall(call.id, schema.CalledFunction(call.arguments, call.name)) for call in whole_calls(choice.calls)
    ]
    return schema.AnswerMessage(
        content=text if text or not calls else None, reasoning_content=reasoning or UNSET, tool_calls=calls or UNSET
    )


def _call_delta(call: ToolCall) -> schema.CallDelta:
    function = schema.CalledFunction(call.arguments, call.name or None)
    return schema.CallDelta(call.number, function, call.id or None, "function" if call.id else None)


class TextAnswer(Answer):
    """/v1/completions."""

    prefix = "cmpl-"

    def add(self, index: int, delta: Delta) -> None:
        choice = self._take(index, delta)
        choice.text.append(delta.text)
        if self.with_logprobs:
            self._extend(choice.columns, index, delta)

    def whole(self) -> bytes:
        choices = [
            schema.TextChoice(
                index,
                choice.opening + "".join(choice.text),
                choice.columns if self.with_logprobs else None,
                choice.finish or "stop",
            )
            for index, choice in enumerate(self.choices)
        ]
        said = schema.Completion(
            self.id, self.created, self.name, self.fingerprint, choices, self.usage, self._shown_stages
        )
        return encode(said)

    def chunk(self, index: int, delta: Delta) -> bytes:
        taken = self._take(index, delta)
        places = schema.CompletionLogprobs()
        if self.with_logprobs:
            self._extend(places, index, delta)
        text = delta.text if taken.started else taken.opening + delta.text
        if not text and not delta.token_ids and delta.finish is None:
            return b""
        taken.started = True
        choice = schema.TextChoice(index, text, places if places.tokens else None, delta.finish)
        chunk = schema.Completion(
            self.id, self.created, self.name, self.fingerprint, [choice], usage=self._unknown_usage
        )
        return event(encode(chunk)) + self._tail()

    def _last_chunk(self) -> bytes:
        said = schema.Completion(
            self.id, self.created, self.name, self.fingerprint, [], self._last_usage, self._shown_stages
        )
        return encode(said)

    def _extend(self, places: schema.CompletionLogprobs, index: int, delta: Delta) -> None:
        for token, logprob in self._shown(delta):
            raw = self.model.token_bytes(token)
            places.tokens.append(_spelled(raw))
            places.token_logprobs.append(_finite(logprob.logprob))
            places.top_logprobs.append(
                {
                    _spelled(self.model.token_bytes(other)): _finite(value)
                    for other, value in zip(logprob.top_ids, logprob.top_logprobs, strict=True)
                }
            )
            places.text_offset.append(self.choices[index].offset.before(raw))


def _spelled(raw: bytes) -> str:
    """A token as this API writes it: its text, or `bytes:\\xe2\\x80` where it is not whole UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _Offset:
    """Characters of whole text before each token, when tokens may end inside a character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def before(self, raw: bytes) -> int:
        offset = self._characters
        self._characters += len(self._decoder.decode(raw))
        return offset
