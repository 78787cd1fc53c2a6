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
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, cast, overload

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
from vai.request import MAX_CHOICES, Output, Request, SamplingParams, Timing, TokenLogprob
from vai.rom import segment
from vai.rom.registry import Name, Registry
from vai.text.detokenizer import Detokenizer
from vai.text.template import Template, chat_fields
from vai.text.tokenizer import Tokenizer

INLINE_CHARACTERS = 2048  # longer texts are encoded off the event loop
TOKENIZERS = 16  # kept, the least recently used go first; 50 MB each at 150,000 tokens
MODELS = 32
ROLES = frozenset({"system", "user", "assistant", "tool"})
DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # what a checkpoint or a name may recommend
# One of these characters, which no text has any use for, breaks up control tokens in what users write.
_MARKERS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF0100))]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Message = Mapping[str, Any]


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

    logprobs: one for each id where asked for, else empty. finish: None until the last delta, then "stop", "length" or
    "abort". completion_tokens counts the whole answer so far. seed: what the engine draws with, once known.
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


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: its text and ids, why it ended ("stop", "length", "abort"), and what it took."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish: str
    prompt_tokens: int
    cached_tokens: int
    seed: int | None
    timing: Timing | None

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


def _read_facts(root: Path, digest: str) -> tuple[int, _Sizes]:
    """When an image was burned, and its sizes. Raises ModelNotFound, CorruptImage, WrongVersion."""
    created = int(segment.read_header(root, digest).burned_at)
    try:
        return created, msgspec.json.decode(segment.read_sections(root, digest, "spec")["spec"], type=_Sizes)
    except msgspec.MsgspecError as error:
        raise CorruptImage(f"The spec of image {digest[:12]} cannot be read: {error}. Burn the model again.") from None


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
        self, card: ModelCard, tokenizer: Tokenizer, sections: Mapping[str, bytes], overrides: _Overrides
    ) -> None:
        """`sections`: template, defaults and spec of the image. Raises MalformedFile."""
        chat = chat_fields(sections["template"])
        self.card = card
        self.tokenizer = tokenizer
        self.vocabulary = msgspec.json.decode(sections["spec"], type=_Sizes).vocabulary
        if tokenizer.vocabulary > self.vocabulary:
            raise MalformedFile(
                f"The tokenizer of '{card.name}' has {tokenizer.vocabulary} tokens, its model {self.vocabulary}; "
                "they are not of one checkpoint."
            )
        self.eog: tuple[int, ...] = tuple(sorted(tokenizer.eog))
        self.defaults = _recommended(card.name, sections["defaults"], overrides)
        self._system = overrides.system
        self.rendering = asyncio.Lock()  # a slow template holds up one thread, and its own model's chats only
        self._template = Template(chat.chat_template if overrides.template is None else overrides.template)
        self._variables = {"bos_token": chat.bos_token, "eos_token": chat.eos_token, "add_generation_prompt": True}

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation in the model's chat format, up to where the model's turn begins.

        Control tokens are those of the template; spelled out in a message they stay text. Raises BadRequest for
        messages of no known shape, and where the template refuses them. Images without a template use
        `template.PLAIN_CHAT`.
        """
        plain = [_plain_message(message, number) for number, message in enumerate(messages)]
        if self._system is not None and not any(message["role"] == "system" for message in plain):
            plain.insert(0, {"role": "system", "content": self._system})
        marker = _unused_marker(plain)
        safe = [{**self._disarmed(message, marker), "role": message["role"]} for message in plain]
        prompt = self._template.render(safe, **self._variables)
        return self.tokenizer.encode(prompt, parse_special=True, marker=marker)

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
        cache: bool = True,
        cache_salt: str = "",
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
            cache=cache,
            cache_salt=cache_salt,
        )

    def close(self) -> None:
        """End the template's process."""
        self._template.close()

    def _disarmed(self, value: Any, marker: str) -> Any:
        """The same value with no control token in any text of it."""
        if isinstance(value, str):
            return self.tokenizer.disarm(value, marker)
        if isinstance(value, Mapping):
            return {
                self.tokenizer.disarm(str(key), marker): self._disarmed(item, marker) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._disarmed(item, marker) for item in value]
        return value


def _recommended(name: str, section: bytes, overrides: _Overrides) -> dict[str, float]:
    """Default sampling of the image under that of the name; what else the section may hold is not for requests."""
    try:
        stored = msgspec.json.decode(section, type=dict[str, Any])
        chosen = {key: value for key, value in {**stored, **overrides.defaults}.items() if key in DEFAULTS}
        checked = msgspec.convert(chosen, SamplingParams, strict=False)
    except msgspec.MsgspecError as error:
        raise MalformedFile(f"The recommended sampling of '{name}' cannot be used: {error}.") from None
    return {key: getattr(checked, key) for key in chosen}


def _plain_message(message: Message, number: int) -> dict[str, Any]:
    """A message as chat templates expect it: a known role, and its content as one text. Raises BadRequest."""
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} must have a role and content.", param=where)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise BadRequest(f"{where} must have a role of {', '.join(sorted(ROLES))}.", param=where)
    content = message.get("content")
    if isinstance(content, list | tuple):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise BadRequest(f"{where}.content must be a text or a list of text parts.", param=where)
        content = "".join(map(str, texts))
    if not isinstance(content, str | None):
        raise BadRequest(f"{where}.content must be a text or a list of text parts.", param=where)
    return {**message, "role": role, "content": content or ""}


def _unused_marker(messages: list[dict[str, Any]]) -> str:
    try:
        text = msgspec.json.encode(messages).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"The messages cannot be written as JSON text: {error}.", param="messages") from None
    for marker in _MARKERS:
        if marker not in text:
            return marker
    raise BadRequest("The messages are full of characters that stand for nothing; send text.", param="messages")


def _seeded(sampling: SamplingParams, count: int) -> SamplingParams:
    """The parameters that `count` answers to one prompt share, so with one seed. Raises BadRequest."""
    if not 1 <= count <= MAX_CHOICES:
        raise BadRequest(f"A prompt has 1 to {MAX_CHOICES} answers at once, not {count}.", param="n")
    if count == 1 or sampling.seed is not None:
        return sampling
    return msgspec.structs.replace(sampling, seed=secrets.randbits(63))


class _Reply:
    """Turns the engine's outputs for one request into deltas."""

    def __init__(self, words: Words, request: Request, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(words.tokenizer, stop)
        self._prompt_tokens = len(request.tokens)
        self._tokens = 0
        self._cached = 0
        self._seed = request.sampling.seed

    def take(self, output: Output) -> Delta | None:
        """The next delta, the last one if it has `finish`; None where the output brought nothing to show.

        Raises the engine's error.
        """
        if output.error is not None:
            code, sentence = output.error
            raise by_code(code)(sentence)
        self._tokens += len(output.tokens)
        self._cached = max(self._cached, output.cached_tokens)
        self._seed = output.seed if output.seed is not None else self._seed
        text = self._detokenizer.feed(output.tokens)
        finish = output.finish
        if self._detokenizer.stopped is not None:
            finish = "stop"
        elif finish is not None:
            text += self._detokenizer.finish()
            finish = "stop" if self._detokenizer.stopped is not None else finish
        if finish is None and not output.tokens:
            return None
        return Delta(
            text=text,
            token_ids=output.tokens,
            logprobs=output.logprobs,
            finish=finish,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens,
            cached_tokens=self._cached,
            seed=self._seed,
            timing=output.timing,
        )


# --- many models over an engine port ----------------------------------------------------------------------------------


class Model:
    """An opened model: its words, and the engine that answers. Made by `Frontend.open`; belongs to its loop."""

    def __init__(self, words: Words, port: EnginePort) -> None:
        self._words = words
        self._port = port
        self.card = words.card
        self.eog = words.eog
        self.defaults = words.defaults

    async def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt: control tokens in it count as they are spelled, BOS comes where the model wants it."""
        if len(text) <= INLINE_CHARACTERS:
            return self._words.tokenizer.encode(text, parse_special=True)
        return await asyncio.to_thread(self._words.tokenizer.encode, text, parse_special=True)

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, up to where the model's turn begins. See `Words.encode_chat`."""
        async with self._words.rendering:
            return await asyncio.to_thread(self._words.encode_chat, messages)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control tokens."""
        return self._words.tokenizer.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, which may be a part of a character."""
        return self._words.tokenizer.token_bytes(token)

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters from the model's recommendations, what is given, and its own end-of-turn ids."""
        return self._words.sampling(**given)

    def choices(
        self,
        ids: Sequence[int],
        count: int,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        *,
        cache: bool = True,
        cache_salt: str = "",
    ) -> list[AsyncGenerator[Delta, None]]:
        """Several answers to one prompt, as `stream` gives one. They share a seed, and the first is that of `stream`.

        Raises BadRequest.
        """
        params = _seeded(self.sampling() if sampling is None else sampling, count)
        return [
            self.stream(ids, params, stop, choice=choice, cache=cache, cache_salt=cache_salt) for choice in range(count)
        ]

    async def stream(
        self,
        ids: Sequence[int],
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        *,
        choice: int = 0,
        cache: bool = True,
        cache_salt: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """The answer to a prompt as it comes. Closing the generator aborts the request.

        `choice`: which of the answers that a seed gives to this prompt. `cache`: the prefix cache may be read and added
        to, among requests of the same `cache_salt`; the answer is the same without, and the first token later.
        It ends at one of `sampling.stop_ids` (which `sampling()` sets to the model's own), at a stop string, or where
        the context is full. Raises BadRequest, ContextTooLong, and what the engine refuses or fails with.
        """
        params = self.sampling() if sampling is None else sampling
        request = self._words.request(ids, params, choice, cache=cache, cache_salt=cache_salt)
        reply = _Reply(self._words, request, stop)
        outputs = cast(AsyncGenerator[Output, None], self._port.generate(request))
        try:
            async for output in outputs:
                delta = reply.take(output)
                if delta is not None:
                    yield delta
                    if delta.finish is not None:
                        return
        finally:
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

    def close(self) -> None:
        """Let everything go."""
        self._words.clear()
        self._tokenizers.clear()

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
        return Words(self._card(name), made, sections, _overrides(name))

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
        return Model(words, self._port)

    async def close(self) -> None:
        """End the processes that render templates."""
        await asyncio.to_thread(self._library.close)


# --- one model in this process ----------------------------------------------------------------------------------------

Prompt = str | Sequence[int]


class LLM:
    """A resident model answered by an engine in this process, over the shared bytes: no copy of the weights is made.

    name: a name, a digest, or its first 8 digits. root, names, threads, kv_bytes, isa: default to the configuration of
    this process. One thread uses it at a time; a forked child cannot use it at all. A context manager.
    Raises ModelNotFound, Unavailable, NotEnoughRoom.
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
    ) -> None:
        from vai.engine.engine import Engine
        from vai.scratchpad.pages import map_pool

        settings = config.load()
        self._root = settings.root if root is None else Path(root)
        self._pid = os.getpid()
        self._turn = threading.Lock()
        with ExitStack() as undo:
            self._library = Library(self._root, settings.names if names is None else Path(names))
            undo.callback(self._library.close)
            self._words = self._library.open(name)
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
        return self._words.tokenizer.encode(text, parse_special=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without control tokens."""
        return self._words.tokenizer.decode(ids)

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters from the model's recommendations, what is given, and its own end-of-turn ids."""
        return self._words.sampling(**given)

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], sampling: SamplingParams | None = None, *, stop: Sequence[str] = ()
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, stop: Sequence[str] = ()
    ) -> Completion: ...

    def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> Completion | list[Completion]:
        """Complete a prompt (a text, or token ids), or several together: then a list in their order.

        sampling None: `sampling()`. Given parameters are taken as they are, with the model's end-of-turn ids added.
        """
        if isinstance(prompt, str) or all(isinstance(id, int) for id in prompt):
            return self._complete([cast(Prompt, prompt)], sampling, stop)[0]
        return self._complete(cast(Sequence[Prompt], prompt), sampling, stop)

    def chat(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None, *, stop: Sequence[str] = ()
    ) -> Completion:
        """The model's turn in a conversation."""
        self._check_process()
        return self._complete([self._words.encode_chat(messages)], sampling, stop)[0]

    def choices(
        self,
        prompt: Prompt | Sequence[Message],
        count: int,
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Several answers, 1 to 16, to a text, token ids, or a conversation: the first is what `generate` would give.

        They share the seed. Each stays the same however many are asked for.
        """
        ids = self._ids(prompt)
        params = _seeded(self.sampling() if sampling is None else sampling, count)
        return self._complete([ids] * count, params, stop, range(count))

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> Iterator[Delta]:
        """The answer as it comes, to a text, token ids, or a conversation. Closing the iterator ends the request."""
        for _, delta in self._run([self._ids(prompt)], sampling, stop):
            yield delta

    def close(self) -> None:
        """Give back the lease and the scratchpad."""
        if self._pid == os.getpid():
            self._undo.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ids(self, prompt: Prompt | Sequence[Message]) -> Sequence[int]:
        self._check_process()
        if isinstance(prompt, str):
            return self.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self._words.encode_chat(cast(Sequence[Message], prompt))
        return cast(Sequence[int], prompt)

    def _complete(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None,
        stop: Sequence[str],
        choices: Sequence[int] | None = None,
    ) -> list[Completion]:
        answers: list[list[Delta]] = [[] for _ in prompts]
        for index, delta in self._run(prompts, sampling, stop, choices):
            answers[index].append(delta)
        return [Completion.of(deltas) for deltas in answers]

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None,
        stop: Sequence[str],
        choices: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Delta]]:
        """(index of the prompt, delta) until every answer is complete. Whatever ends it early aborts the rest.

        `choices`: for each prompt, which of the answers that a seed gives to it; the first where None.
        """
        self._check_process()
        params = self.sampling() if sampling is None else self._with_end_of_turn(sampling)
        requests = [
            self._words.request(self.encode(prompt) if isinstance(prompt, str) else prompt, params, choice)
            for prompt, choice in zip(prompts, choices or [0] * len(prompts), strict=True)
        ]
        replies = {request.id: (index, _Reply(self._words, request, stop)) for index, request in enumerate(requests)}
        if not self._turn.acquire(blocking=False):
            raise BadRequest("This LLM is answering already; finish or close that answer, or make a second LLM.")
        try:
            for request in requests:
                self._engine.submit(request)
            while replies:
                for output in self._engine.step():
                    if output.id not in replies:
                        continue  # it ended by a stop string; this is its abort
                    index, reply = replies[output.id]
                    delta = reply.take(output)
                    if delta is None:
                        continue
                    if delta.finish is not None:
                        del replies[output.id]
                        if output.finish is None:
                            self._engine.abort(output.id)
                    yield index, delta
        finally:
            for identity in replies:
                self._engine.abort(identity)
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
