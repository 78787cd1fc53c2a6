"""Many models over an engine port, for those who live in an asyncio loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

from vai.engine.port import EnginePort
from vai.errors import Unavailable
from vai.llm.answer import Delta, Reply
from vai.llm.guide import Guide, mask_threads
from vai.llm.library import Library
from vai.llm.words import How, ModelCard, Words, held_to, seeded
from vai.request import Output, SamplingParams, Speculate
from vai.text.chat import ChatPrompt, Message, Reading
from vai.text.grammar import GrammarSpec
from vai.text.tools import Tools

INLINE_CHARACTERS = 2048  # longer texts are encoded off the event loop


def connect(socket: Path, *, patience: float = 0.0) -> EnginePort:
    """The engine behind a Unix socket. Nothing is loaded but the client; the connection is made at first use.

    `patience`: seconds to wait for an engine that is away. An answer whose engine dies is then continued by the next
    one, token by token what it would have been; with 0 it ends with Unavailable.
    """
    from vai.engine.client import EngineClient

    return EngineClient(socket, patience=patience)


class Frontend:
    """All models of a root over one engine port. One asyncio loop owns it; the caller closes the port."""

    def __init__(self, root: Path, names: Path, port: EnginePort) -> None:
        self._library = Library(root, names)
        self._port = port
        self._opening: dict[str, asyncio.Task[Words]] = {}

    def models(self) -> list[ModelCard]:
        """A card for every name. Small files only: neither engine nor weights are touched."""
        return self._library.cards()

    async def open(self, name: str) -> Model:
        """The model of a name, digest, or first 8 digits of one; its tokenizer is built in a thread, once.

        Raises ModelNotFound (listing the names), Unavailable where it is not resident (with the way out).
        """
        words = self._library.opened(name)
        if words is None:  # one thread for all who wait: there are few, and others need them
            opening = self._opening.get(name)
            if opening is None:
                opening = asyncio.create_task(asyncio.to_thread(self._library.open, name))
                self._opening[name] = opening
                opening.add_done_callback(partial(self._opened, name))
            words = await asyncio.shield(opening)
        return Model(words, self._port, self._library)

    def _opened(self, name: str, opening: asyncio.Task[Words]) -> None:
        del self._opening[name]
        if not opening.cancelled():
            opening.exception()  # it is for those who wait; where nobody does any more, for nobody

    async def close(self) -> None:
        """End the processes that render templates."""
        await asyncio.to_thread(self._library.close)


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
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        content: GrammarSpec | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """The prompt for a conversation in which the model may call `tools`, and how its answer is read, the words of
        which must match `content`; the template is told the `variables`, too. See `text.chat.Chat.prompt`.
        """
        async with self._words.rendering:
            return await asyncio.to_thread(self._words.chat, messages, tools, content, variables)

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
        params = seeded(self.sampling() if sampling is None else sampling, count)
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
        grammar = held_to(grammar, reading)
        if "speculate" not in how:
            how["speculate"] = self.speculate()
        request = self._words.request(ids, params, choice, constrained=grammar is not None, **how)
        reply = Reply(self._words, request, stop, reading)
        loop, guide = asyncio.get_running_loop(), None
        if grammar is not None:
            guide = await Guide.open(self._words, grammar, request)
        first = () if guide is None else (guide.bits,)
        outputs = cast(AsyncGenerator[Output, None], self._port.generate(request, *first))
        try:
            async for output in outputs:
                if guide is not None:
                    await loop.run_in_executor(mask_threads, guide.accept, output)
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
