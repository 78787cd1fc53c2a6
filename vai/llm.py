"""The one door: words on one side, an engine's token ids on the other.

`Frontend` serves many models over an engine port and belongs to one asyncio loop; `LLM` runs one model in this process,
over the same bytes of shared memory that everybody else reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypedDict, TypeVar, Unpack, cast, overload

import msgspec

from vai import config
from vai.daemon import pool as memory
from vai.engine.port import EnginePort
from vai.errors import (
    BadRequest,
    ContextTooLong,
    CorruptImage,
    MalformedFile,
    ModelNotFound,
    Unavailable,
    VaiError,
    by_code,
)
from vai.request import MAX_CHOICES, Output, Request, SamplingParams, Speculate, Timing, TokenLogprob
from vai.rom import segment
from vai.rom.registry import Name, Registry
from vai.telemetry import Stages, Stopwatch
from vai.text.chat import Chat, ChatPrompt, Message
from vai.text.chat import Reading as Reading
from vai.text.grammar import Grammars
from vai.text.grammar import GrammarSpec as GrammarSpec
from vai.text.reader import Piece, Reader
from vai.text.template import chat_fields
from vai.text.tokenizer import Tokenizer
from vai.text.tools import MAX_TOOLS as MAX_TOOLS
from vai.text.tools import ToolCall as ToolCall
from vai.text.tools import ToolChoice as ToolChoice
from vai.text.tools import ToolList as ToolList
from vai.text.tools import Tools as Tools
from vai.text.tools import offered as offered
from vai.text.tools import read_choice, read_tools
from vai.text.tools import whole_calls as whole_calls

INLINE_CHARACTERS = 2048  # longer texts are encoded off the event loop
TOKENIZERS = 16  # kept, the least recently used go first; 50 MB each at 150,000 tokens
MODELS = 32
# Grammars are compiled and masks made by other processes. A thread waits for each: apart from those that are busy with
# texts, and masks apart from grammars, which may take seconds, so few at a time.
_grammar_threads = ThreadPoolExecutor(4, thread_name_prefix="grammars")
_mask_threads = ThreadPoolExecutor(32, thread_name_prefix="masks")
DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # what a checkpoint or a name may recommend

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class How(TypedDict, total=False):
    """What a request may say to the engine beside prompt and sampling; what each means says `request.Request`."""

    cache: bool
    cache_salt: str
    session: str
    retain: float | None
    priority: int
    speculate: Speculate


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A name and what is behind it. created: Unix seconds, 0 where not burned yet; context: tokens, 0 likewise;
    digest: "" likewise. A model that is not resident has to be loaded before it is opened.
    """

    name: str
    digest: str
    created: int
    context: int
    resident: bool


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


def connect(socket: Path, *, patience: float = 0.0) -> EnginePort:
    """The engine behind a Unix socket. Nothing is loaded but the client; the connection is made at first use.

    `patience`: seconds to wait for an engine that is away. An answer whose engine dies is then continued by the next
    one, token by token what it would have been; with 0 it ends with Unavailable.
    """
    from vai.engine.client import EngineClient

    return EngineClient(socket, patience=patience)


# --- one model's words ------------------------------------------------------------------------------------------------


class _Sizes(msgspec.Struct, frozen=True):
    """The part of the spec section that text needs; the rest is for the engine."""

    vocabulary: int
    context: int


class _Overrides(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a name changes about its model."""

    template: str | None = None
    system: str | None = None
    defaults: dict[str, float] = {}
    context: int | None = None
    draft: str | None = None  # the name (or digest) of a smaller model that guesses for it


def _read_facts(root: Path, digest: str) -> tuple[int, _Sizes]:
    """When an image was burned, and its sizes. Raises ModelNotFound, CorruptImage, WrongVersion."""
    created = int(segment.read_header(root, digest).burned_at)
    try:
        return created, msgspec.json.decode(segment.read_sections(root, digest, "spec")["spec"], type=_Sizes)
    except msgspec.MsgspecError as error:
        raise CorruptImage(f"The spec of image {digest[:12]} cannot be read: {error}. Burn the model again.") from None


def _read_tokenizer(root: Path, digest: str) -> tuple[bytes, bytes]:
    sections = segment.read_sections(root, digest, "tokenizer", "template")
    return sections["tokenizer"], sections["template"]


def _overrides(name: Name) -> _Overrides:
    try:
        return msgspec.convert(name.overrides, _Overrides)
    except msgspec.ValidationError as error:
        raise MalformedFile(f"The overrides of the name '{name.name}' cannot be used: {error}.") from None


def _context(sizes: _Sizes, overrides: _Overrides) -> int:
    return sizes.context if overrides.context is None else max(1, min(sizes.context, overrides.context))


class Words:
    """Everything about one model that is text: tokenizer, chat template, system prompt, recommended sampling."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer,
        grammars: Grammars,
        sections: Mapping[str, bytes],
        overrides: _Overrides,
    ) -> None:
        """`sections`: template, defaults and spec of the image. Raises MalformedFile."""
        chat = chat_fields(sections["template"])
        self.card = card
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.vocabulary = msgspec.json.decode(sections["spec"], type=_Sizes).vocabulary
        if tokenizer.vocabulary > self.vocabulary:
            raise MalformedFile(
                f"The tokenizer of '{card.name}' has {tokenizer.vocabulary} tokens, its model {self.vocabulary}; "
                "they are not of one checkpoint."
            )
        self.eog: tuple[int, ...] = tuple(sorted(tokenizer.eog))
        self.draft = overrides.draft
        self.defaults = _recommended(card.name, sections["defaults"], overrides)
        self.rendering = asyncio.Lock()  # a slow template holds up one thread, and its own model's chats only
        if overrides.template is not None:
            chat = msgspec.structs.replace(chat, chat_template=overrides.template)
        self._chat = Chat(card.name, tokenizer, chat, system=overrides.system)

    def chat(
        self, messages: Sequence[Message], tools: Tools | None = None, content: GrammarSpec | None = None
    ) -> ChatPrompt:
        """The prompt for a conversation, and how its answer is read. See `Chat.prompt`."""
        return self._chat.prompt(messages, tools, content)

    def sampling(self, **given: Any) -> SamplingParams:
        """Parameters with the model's recommendations under what is given, ending where the model ends its turn.

        Raises BadRequest for values out of bounds.
        """
        chosen = {**self.defaults, **{name: value for name, value in given.items() if value is not None}}
        chosen["stop_ids"] = tuple(dict.fromkeys((*self.eog, *chosen.get("stop_ids", ()))))
        try:
            return msgspec.convert(chosen, SamplingParams)
        except msgspec.ValidationError as error:
            raise BadRequest(f"These sampling parameters cannot be used: {error}.") from None

    def request(
        self,
        ids: Sequence[int],
        sampling: SamplingParams,
        choice: int = 0,
        *,
        constrained: bool = False,
        **how: Unpack[How],
    ) -> Request:
        """The engine's request for a prompt, checked. Raises BadRequest, ContextTooLong."""
        if not ids:
            raise BadRequest("The prompt is empty; it needs at least one token.", param="prompt")
        if not all(0 <= id < self.vocabulary for id in ids):
            raise BadRequest(f"Token ids of '{self.card.name}' go from 0 to {self.vocabulary - 1}.", param="prompt")
        if any(id >= self.vocabulary for id in sampling.logit_bias):
            raise BadRequest(f"Token ids of '{self.card.name}' go from 0 to {self.vocabulary - 1}.", param="logit_bias")
        left = self.card.context - len(ids)
        if left < 1:
            raise ContextTooLong(
                f"The prompt has {len(ids)} tokens, but the context of '{self.card.name}' holds {self.card.context}, "
                "answer included. Shorten it.",
                param="prompt",
            )
        sampling = msgspec.structs.replace(sampling, max_tokens=min(sampling.max_tokens, left))
        return Request(
            id=secrets.token_hex(16),
            image=self.card.digest,
            tokens=list(ids),
            sampling=sampling,
            choice=choice,
            constrained=constrained,
            **how,
        )

    def close(self) -> None:
        """End the template's process."""
        self._chat.close()


def _recommended(name: str, section: bytes, overrides: _Overrides) -> dict[str, float]:
    """Default sampling of the image under that of the name; what else the section may hold is not for requests."""
    try:
        stored = msgspec.json.decode(section, type=dict[str, Any])
        chosen = {key: value for key, value in {**stored, **overrides.defaults}.items() if key in DEFAULTS}
        checked = msgspec.convert(chosen, SamplingParams, strict=False)
    except msgspec.MsgspecError as error:
        raise MalformedFile(f"The recommended sampling of '{name}' cannot be used: {error}.") from None
    return {key: getattr(checked, key) for key in chosen}


def _seeded(sampling: SamplingParams, count: int) -> SamplingParams:
    """The parameters that `count` answers to one prompt share, so with one seed. Raises BadRequest."""
    if not 1 <= count <= MAX_CHOICES:
        raise BadRequest(f"A prompt has 1 to {MAX_CHOICES} answers at once, not {count}.", param="n")
    if count == 1 or sampling.seed is not None:
        return sampling
    return msgspec.structs.replace(sampling, seed=secrets.randbits(63))


def _held_to(grammar: GrammarSpec | None, reading: Reading | None) -> GrammarSpec | None:
    """The grammar of an answer: what it must match, or the calls that it must be."""
    return grammar if reading is None or reading.grammar is None else reading.grammar


class _Reply:
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
            code, sentence = output.error
            raise by_code(code)(sentence)
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


class _Guide:
    """Keeps one answer to its grammar: behind each token the engine gets the mask of the next."""

    def __init__(self, words: Words, grammar: GrammarSpec, request: Request) -> None:
        """Compiles the grammar where nobody has. Raises BadRequest, Overloaded, Unavailable."""
        self._matcher = words.grammars.matcher(grammar, words.vocabulary)
        self._id = request.id
        self._position = len(request.tokens)

    @classmethod
    async def open(cls, words: Words, grammar: GrammarSpec, request: Request) -> _Guide:
        """One made off the loop; nobody's where the answer is given up meanwhile. Raises as the constructor does."""
        with words.grammars.waiting():
            made = _grammar_threads.submit(cls, words, grammar, request)
            try:
                return await asyncio.wrap_future(made)
            except asyncio.CancelledError:
                made.add_done_callback(_close_unclaimed)
                raise

    @property
    def bits(self) -> bytes:
        return self._matcher.bits

    def accept(self, output: Output) -> None:
        """Go on behind the tokens of an output: the slow part, which may run in any thread. Raises BadRequest."""
        for token in output.tokens if output.finish is None else ():
            self._matcher.accept(token)
            self._position += 1

    def allow(self, output: Output, mask: Callable[[str, int, bytes], None]) -> Output:
        """Tell the engine what may come next, by `mask`; the output, with the finish "stop" where nothing may."""
        if output.finish is not None or not output.tokens:
            return output
        if self._matcher.finished:
            return msgspec.structs.replace(output, finish="stop")
        mask(self._id, self._position, self._matcher.bits)
        return output

    def close(self) -> None:
        """The answer is over; another thread, which may still be in `accept`, waits for it."""
        _mask_threads.submit(self._matcher.close)


def _close_unclaimed(made: Future[_Guide]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().close()


# --- many models over an engine port ----------------------------------------------------------------------------------


class Model:
    """An opened model: its words, and the engine that answers. Made by `Frontend.open`; belongs to its loop."""

    def __init__(self, words: Words, port: EnginePort, library: Library) -> None:
        self._words = words
        self._port = port
        self._library = library
        self.card = words.card
        self.eog = words.eog
        self.defaults = words.defaults

    async def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt: control tokens in it count as they are spelled, BOS comes where the model wants it."""
        if len(text) <= INLINE_CHARACTERS:
            return self._words.tokenizer.encode(text, parse_special=True)
        return await asyncio.to_thread(self._words.tokenizer.encode, text, parse_special=True)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, up to where the model's turn begins."""
        return (await self.chat(messages)).ids

    async def chat(
        self, messages: Sequence[Message], tools: Tools | None = None, content: GrammarSpec | None = None
    ) -> ChatPrompt:
        """The prompt for a conversation in which the model may call `tools`, and how its answer is read, the words of
        which must match `content`. See `text.chat.Chat.prompt`.
        """
        async with self._words.rendering:
            return await asyncio.to_thread(self._words.chat, messages, tools, content)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control tokens."""
        return self._words.tokenizer.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, which may be a part of a character."""
        return self._words.tokenizer.token_bytes(token)

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters from the model's recommendations, what is given, and its own end-of-turn ids."""
        return self._words.sampling(**given)

    def speculate(self, kind: str | None = None, most: int | None = None) -> Speculate:
        """How tokens are guessed for a request; see `Library.speculate`."""
        return self._library.speculate(self._words, kind, most)

    def choices(
        self,
        ids: Sequence[int],
        count: int,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        *,
        grammar: GrammarSpec | None = None,
        reading: Reading | None = None,
        **how: Unpack[How],
    ) -> list[AsyncGenerator[Delta, None]]:
        """Several answers to one prompt, as `stream` gives one. They share a seed, and the first is that of `stream`.

        Raises BadRequest.
        """
        params = _seeded(self.sampling() if sampling is None else sampling, count)
        return [
            self.stream(ids, params, stop, choice=choice, grammar=grammar, reading=reading, **how)
            for choice in range(count)
        ]

    async def stream(
        self,
        ids: Sequence[int],
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        *,
        choice: int = 0,
        grammar: GrammarSpec | None = None,
        reading: Reading | None = None,
        **how: Unpack[How],
    ) -> AsyncGenerator[Delta, None]:
        """The answer to a prompt as it comes. Closing the generator aborts the request.

        `choice`: which of the answers that a seed gives to this prompt. `grammar`: what the whole answer must match; it
        ends ("stop") where nothing may follow. `reading`: that of the conversation, where the prompt is one. `how`
        changes when the answer comes, and no token of it. It ends at one of `sampling.stop_ids` (which `sampling()`
        sets to the model's own), at a stop string, or where the context is full. Raises BadRequest, ContextTooLong, and
        what the engine refuses or fails with.
        """
        params = self.sampling() if sampling is None else sampling
        grammar = _held_to(grammar, reading)
        if "speculate" not in how:
            how["speculate"] = self.speculate()
        request = self._words.request(ids, params, choice, constrained=grammar is not None, **how)
        reply = _Reply(self._words, request, stop, reading)
        loop, guide = asyncio.get_running_loop(), None
        if grammar is not None:
            guide = await _Guide.open(self._words, grammar, request)
        first = () if guide is None else (guide.bits,)
        outputs = cast(AsyncGenerator[Output, None], self._port.generate(request, *first))
        try:
            async for output in outputs:
                if guide is not None:
                    await loop.run_in_executor(_mask_threads, guide.accept, output)
                    output = guide.allow(output, self._port.mask)
                delta = reply.take(output)
                if delta is not None:
                    yield delta
                    if delta.finish is not None:
                        return
        finally:
            if guide is not None:
                guide.close()
            await outputs.aclose()
        raise Unavailable("The engine went away before the answer was complete; send the request again.")


class _Shared(Generic[Key, Value]):
    """Things that are slow to make: made once however many ask at the same moment, the least recently used let go."""

    def __init__(self, limit: int, let_go: Callable[[Value], None] | None = None) -> None:
        self._limit = limit
        self._let_go = let_go
        self._lock = threading.Lock()
        self._made: OrderedDict[Key, Future[Value]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made by `make` in this thread if nobody has yet. A failure is not kept."""
        with self._lock:
            future = self._made.get(key)
            mine = future is None
            if future is None:
                future = self._made[key] = Future()
            self._made.move_to_end(key)
        if not mine:
            return future.result()
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)
            with self._lock:
                self._made.pop(key, None)
            raise
        self._trim(self._limit)
        return future.result()

    def peek(self, key: Key) -> Value | None:
        """The value of `key` if it is there by now."""
        with self._lock:
            future = self._made.get(key)
            if future is None or not future.done():
                return None
            self._made.move_to_end(key)
        return future.result()

    def clear(self) -> None:
        self._trim(0)

    def _trim(self, limit: int) -> None:
        with self._lock:
            old = [key for key, future in self._made.items() if future.done()]
            gone = [self._made.pop(key) for key in old[: max(0, len(self._made) - limit)]]
        for future in gone:
            if self._let_go is not None and future.exception() is None:
                self._let_go(future.result())


class Library:
    """Opens models from the images and names there are: reads metadata sections, takes no lease, touches no weights."""

    def __init__(self, root: Path, names: Path) -> None:
        self._root = root
        self._registry = Registry(root, names)
        self._tokenizers: _Shared[bytes, Tokenizer] = _Shared(TOKENIZERS)
        self._grammars: _Shared[bytes, Grammars] = _Shared(TOKENIZERS, Grammars.close)
        self._words: _Shared[Hashable, Words] = _Shared(MODELS, Words.close)
        self._facts: _Shared[tuple[str, int], tuple[int, _Sizes]] = _Shared(256)

    def cards(self) -> list[ModelCard]:
        """All names, whether resident or not."""
        return [self._card(name) for name in self._registry.names()]

    def opened(self, name: str) -> Words | None:
        """The model if it is open and still resident, without any work. Raises as `open`."""
        found = self._find(name)
        return self._words.peek(self._key(found))

    def open(self, name: str) -> Words:
        """The model of a name, a digest, or its first 8 digits. Raises ModelNotFound, Unavailable if not resident."""
        found = self._find(name)
        return self._words.get(self._key(found), lambda: self._read(found))

    def speculate(self, words: Words, kind: str | None = None, most: int | None = None) -> Speculate:
        """How tokens are guessed for a request: in this `kind` ("off", "ngram", "draft"), else by the draft model that
        the name has, where it is resident, else by lookup; `most` at a time, 0 for none.

        Raises BadRequest where the name has no draft model or one of another tokenizer, Unavailable where it is not
        resident and `kind` asks for it.
        """
        most = Speculate().max_tokens if most is None else most
        if kind == "off" or most == 0:
            return Speculate()
        if kind == "ngram" or (kind is None and words.draft is None):
            return Speculate(kind="ngram", max_tokens=most)
        if words.draft is None:
            raise BadRequest(f"The model '{words.card.name}' has no draft model; leave the kind of guesses open.")
        try:
            return Speculate(kind="draft", draft=self.draft(words, words.draft), max_tokens=most)
        except (ModelNotFound, Unavailable):
            if kind is None:  # it will be there, or not: the answer is the same
                return Speculate(kind="ngram", max_tokens=most)
            raise

    def draft(self, words: Words, name: str) -> str:
        """The digest of a model that can guess for another. Raises ModelNotFound, Unavailable, BadRequest."""
        digest = self._find(name).digest or ""
        own, other = (
            segment.read_header(self._root, each).sections["tokenizer"] for each in (words.card.digest, digest)
        )
        if own.sha256 != other.sha256:
            raise BadRequest(
                f"The model '{name}' cannot guess for '{words.card.name}': their tokenizers differ. Choose a smaller "
                "model of the same family.",
                param="draft",
            )
        return digest

    def close(self) -> None:
        """Let everything go."""
        self._words.clear()
        self._tokenizers.clear()
        self._grammars.clear()

    def _find(self, text: str) -> Name:
        try:
            name = self._registry.get(text)
        except ModelNotFound:
            name = Name(text, "", digest=self._registry.find(text))
        if name.digest is None or not self._registry.is_resident(name.digest):
            load = f"vai load {name.source} --name {name.name}" if name.source else "vai load FILE"
            raise Unavailable(f"The model '{text[:128]}' is not resident. Load it: {load}")
        return name

    def _key(self, name: Name) -> Hashable:
        return name.name, name.digest, msgspec.json.encode(name.overrides)

    def _read(self, name: Name) -> Words:
        digest = name.digest or ""
        sections = segment.read_sections(self._root, digest, "spec", "tokenizer", "template", "defaults")
        tokenizer, template = sections["tokenizer"], sections["template"]
        key = hashlib.sha256(tokenizer).digest() + hashlib.sha256(template).digest()
        made = self._tokenizers.get(key, lambda: Tokenizer.from_sections(tokenizer, template))
        grammars = self._grammars.get(key, lambda: Grammars(partial(_read_tokenizer, self._root, digest)))
        return Words(self._card(name), made, grammars, sections, _overrides(name))

    def _card(self, name: Name) -> ModelCard:
        digest = name.digest or ""
        try:
            inode = segment.image_path(self._root, digest).stat().st_ino
            created, sizes = self._facts.get((digest, inode), lambda: _read_facts(self._root, digest))
            context = _context(sizes, _overrides(name))
        except (OSError, VaiError):  # not there, or damaged: opening it says which
            return ModelCard(name.name, digest, created=0, context=0, resident=False)
        return ModelCard(name.name, digest, created, context, resident=True)


class Frontend:
    """All models of a root over one engine port. One asyncio loop owns it; the caller closes the port."""

    def __init__(self, root: Path, names: Path, port: EnginePort) -> None:
        self._library = Library(root, names)
        self._port = port

    def models(self) -> list[ModelCard]:
        """A card for every name. Small files only: neither engine nor weights are touched."""
        return self._library.cards()

    async def open(self, name: str) -> Model:
        """The model of a name, digest, or first 8 digits of one; its tokenizer is built in a thread, once.

        Raises ModelNotFound (listing the names), Unavailable where it is not resident (with the way out).
        """
        words = self._library.opened(name)
        if words is None:
            words = await asyncio.to_thread(self._library.open, name)
        return Model(words, self._port, self._library)

    async def close(self) -> None:
        """End the processes that render templates."""
        await asyncio.to_thread(self._library.close)


# --- one model in this process ----------------------------------------------------------------------------------------

Prompt = str | Sequence[int]


class LLM:
    """A resident model answered by an engine in this process, over the shared bytes: no copy of the weights is made.

    name: a name, a digest, or its first 8 digits. root, names, threads, kv_bytes, isa: default to the configuration of
    this process. draft: a smaller resident model with the same tokenizer that guesses tokens ahead; the answers are the
    same without. One thread uses it at a time; a forked child cannot use it at all. A context manager.
    Raises ModelNotFound, Unavailable, NotEnoughRoom, BadRequest for a draft model that cannot be.
    """

    def __init__(
        self,
        name: str,
        *,
        root: Path | str | None = None,
        names: Path | str | None = None,
        threads: int | None = None,
        kv_bytes: int | None = None,
        isa: str | None = None,
        draft: str | None = None,
    ) -> None:
        from vai.engine.engine import Engine
        from vai.scratchpad.pages import map_pool

        settings = config.load()
        self._root = settings.root if root is None else Path(root)
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._watch = Stopwatch()  # what the next answer has taken before it is asked for
        with ExitStack() as undo, self._watch.loading():
            self._library = Library(self._root, settings.names if names is None else Path(names))
            undo.callback(self._library.close)
            self._words = self._library.open(name)
            self._speculate = self._library.speculate(self._words)
            if draft is not None:
                self._speculate = Speculate(kind="draft", draft=self._library.draft(self._words, draft))
            size = kv_bytes or settings.kv_bytes or memory.default_bytes(segment.free_room(self._root).free)
            descriptor = memory.create(size)
            try:
                pool = map_pool(descriptor)
            finally:
                os.close(descriptor)
            self._engine = Engine(self._root, threads=threads or settings.threads, pool=pool, isa=isa or settings.isa)
            undo.callback(self._engine.close)
            self._engine.attach(self.card.digest)
            self._undo = undo.pop_all()

    @property
    def card(self) -> ModelCard:
        """Name, digest, context of the model."""
        return self._words.card

    def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt; control tokens in it count as they are spelled."""
        with self._watch.preparing():
            return self._words.tokenizer.encode(text, parse_special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control tokens."""
        return self._words.tokenizer.decode(ids)

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters from the model's recommendations, what is given, and its own end-of-turn ids."""
        return self._words.sampling(**given)

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
        **how: Unpack[How],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
        **how: Unpack[How],
    ) -> Completion: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
        **how: Unpack[How],
    ) -> Completion | list[Completion]:
        """Complete a prompt (a text, or token ids), or several together: then a list in their order.

        sampling None: `sampling()`. Given parameters are taken as they are, with the model's end-of-turn ids added.
        grammar: what every answer must match; one ends where nothing may follow. how: see `How`.
        """
        if isinstance(prompt, str) or all(isinstance(id, int) for id in prompt):
            return self._complete([cast(Prompt, prompt)], sampling, stop, grammar=grammar, **how)[0]
        return self._complete(cast(Sequence[Prompt], prompt), sampling, stop, grammar=grammar, **how)

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: Any = None,
        parallel_tool_calls: bool = True,
        **how: Unpack[How],
    ) -> Completion:
        """The model's turn in a conversation. tools, tool_choice: as in OpenAI's API; calls are in `tool_calls`."""
        offer = offered(read_tools(tools), read_choice(tool_choice), parallel_tool_calls)
        prompt = self._prompt(messages, offer, grammar)
        return self._complete([prompt.ids], sampling, stop, grammar=grammar, reading=prompt.reading, **how)[0]

    def choices(
        self,
        prompt: Prompt | Sequence[Message],
        count: int,
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
        **how: Unpack[How],
    ) -> list[Completion]:
        """Several answers, 1 to 16, to a text, token ids, or a conversation: the first is what `generate` would give.

        They share the seed. Each stays the same however many are asked for.
        """
        ids, reading = self._prompt(prompt, None, grammar)
        params = _seeded(self.sampling() if sampling is None else sampling, count)
        return self._complete([ids] * count, params, stop, range(count), grammar, reading, **how)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
        grammar: GrammarSpec | None = None,
        **how: Unpack[How],
    ) -> Iterator[Delta]:
        """The answer as it comes, to a text, token ids, or a conversation. Closing the iterator ends the request."""
        ids, reading = self._prompt(prompt, None, grammar)
        for _, delta in self._run([ids], sampling, stop, grammar=grammar, reading=reading, **how):
            yield delta

    def end_session(self, session: str, cache_salt: str = "") -> int:
        """Free the pages that only the conversations of a session have read; how many."""
        return self._engine.end_session(session, cache_salt)

    def close(self) -> None:
        """Give back the lease and the scratchpad."""
        if self._pid == os.getpid():
            self._undo.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _prompt(
        self,
        prompt: Prompt | Sequence[Message],
        tools: Tools | None = None,
        grammar: GrammarSpec | None = None,
    ) -> ChatPrompt:
        """Ids, and how the answer is read."""
        self._check_process()
        if isinstance(prompt, str):
            return ChatPrompt(self.encode(prompt), Reading())
        if not prompt or not isinstance(prompt[0], Mapping):
            return ChatPrompt(list(cast(Sequence[int], prompt)), Reading())
        with self._watch.preparing():
            return self._words.chat(cast(Sequence[Message], prompt), tools, grammar)

    def _complete(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None,
        stop: Sequence[str],
        choices: Sequence[int] | None = None,
        grammar: GrammarSpec | None = None,
        reading: Reading | None = None,
        **how: Unpack[How],
    ) -> list[Completion]:
        answers: list[list[Delta]] = [[] for _ in prompts]
        for index, delta in self._run(prompts, sampling, stop, choices, grammar, reading, **how):
            answers[index].append(delta)
        return [Completion.of(deltas) for deltas in answers]

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None,
        stop: Sequence[str],
        choices: Sequence[int] | None = None,
        grammar: GrammarSpec | None = None,
        reading: Reading | None = None,
        **how: Unpack[How],
    ) -> Iterator[tuple[int, Delta]]:
        """(index of the prompt, delta) until every answer is complete. Whatever ends it early aborts the rest.

        `choices`: for each prompt, which of the answers that a seed gives to it; the first where None.
        """
        self._check_process()
        grammar = _held_to(grammar, reading)
        params = self.sampling() if sampling is None else self._with_end_of_turn(sampling)
        how.setdefault("speculate", self._speculate)
        requests = [
            self._words.request(
                self.encode(prompt) if isinstance(prompt, str) else prompt,
                params,
                choice,
                constrained=bool(grammar),
                **how,
            )
            for prompt, choice in zip(prompts, choices or [0] * len(prompts), strict=True)
        ]
        replies = {
            request.id: (index, _Reply(self._words, request, stop, reading)) for index, request in enumerate(requests)
        }
        spent, self._watch = self._watch, Stopwatch()
        if not self._turn.acquire(blocking=False):
            raise BadRequest("This LLM is answering already; finish or close that answer, or make a second LLM.")
        guides: dict[str, _Guide] = {}
        try:
            for request in requests:
                if grammar is not None:
                    guides[request.id] = _Guide(self._words, grammar, request)
                self._engine.submit(request)
                if grammar is not None:
                    self._engine.mask(request.id, len(request.tokens), guides[request.id].bits)
            while replies:
                for output in self._engine.step():
                    if output.id not in replies:
                        continue  # it ended by a stop string or its grammar; this is its abort
                    index, reply = replies[output.id]
                    if grammar is not None:
                        guides[output.id].accept(output)
                        output = guides[output.id].allow(output, self._engine.mask)
                    delta = reply.take(output)
                    if delta is None:
                        continue
                    if delta.finish is not None:
                        del replies[output.id]
                        self._engine.abort(output.id)
                    if delta.stages is not None:
                        delta = replace(delta, stages=spent.around(delta.stages))
                    yield index, delta
        finally:
            for identity in replies:
                self._engine.abort(identity)
            for guide in guides.values():
                guide.close()
            self._turn.release()

    def _with_end_of_turn(self, sampling: SamplingParams) -> SamplingParams:
        stop_ids = tuple(dict.fromkeys((*self._words.eog, *sampling.stop_ids)))
        return msgspec.structs.replace(sampling, stop_ids=stop_ids)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise Unavailable(
                f"This LLM was made by process {self._pid}, and its lease and threads do not cover a fork; "
                "make an LLM in this process (multiprocessing: use the 'spawn' start method)."
            )
