"""One model in this process, over the same bytes of shared memory that everybody else reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack, cast, overload

import msgspec

from vai import config
from vai.daemon import pool as memory
from vai.errors import BadRequest, Unavailable
from vai.llm.answer import Completion, Delta, Reply
from vai.llm.guide import Guide
from vai.llm.library import Library
from vai.llm.words import How, ModelCard, held_to, seeded
from vai.request import SamplingParams, Speculate
from vai.rom import segment
from vai.telemetry import Stopwatch
from vai.text.chat import ChatPrompt, Message, Reading
from vai.text.grammar import GrammarSpec
from vai.text.tools import Tools, offered, read_choice, read_tools

Prompt = str | Sequence[int]


class LLM:
    """A resident model answered by an engine in this process, over the shared bytes: no copy of the weights is made.

    name: a name, a digest, or its first 8 digits. root, names, threads, kv_bytes, kv_type ("bf16", "f32" or
    "q8_0"), isa, fast ("off", "portable", "amx"): default to the configuration of this process. draft: a smaller
    resident model with the same tokenizer that guesses tokens ahead; the answers are the same without. deterministic:
    what requests are that do not say (see `request.Request`). One thread uses it at a time; a forked child cannot use
    it at all. A context manager.
    Raises ModelNotFound, Unavailable, NotEnoughRoom, BadRequest for a draft model that cannot be, NotSupported for an
    unknown KV type or fast kind.
    """

    def __init__(
        self,
        name: str,
        *,
        root: Path | str | None = None,
        names: Path | str | None = None,
        threads: int | None = None,
        kv_bytes: int | None = None,
        kv_type: str | None = None,
        isa: str | None = None,
        fast: str | None = None,
        draft: str | None = None,
        deterministic: bool = False,
    ) -> None:
        from vai.engine.engine import Engine
        from vai.kernels import table
        from vai.scratchpad.pages import map_pool

        settings = config.load()
        self._root = settings.root if root is None else Path(root)
        self._pid = os.getpid()
        self._deterministic = deterministic
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
            self._engine = Engine(
                self._root,
                threads=threads or settings.threads,
                pool=pool,
                isa=isa or settings.isa,
                fast=table.fast(fast or ("off" if isa else settings.fast)),
                kv_type=kv_type or settings.kv_type,
            )
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **how: Unpack[How],
    ) -> Completion:
        """The model's turn in a conversation. tools, tool_choice: as in OpenAI's API; calls are in `tool_calls`.

        `chat_template_kwargs`: variables for the model's template, such as {"enable_thinking": False}. Raises
        NotSupported for one that it does not read.
        """
        offer = offered(read_tools(tools), read_choice(tool_choice), parallel_tool_calls)
        prompt = self._prompt(messages, offer, grammar, chat_template_kwargs)
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
        params = seeded(self.sampling() if sampling is None else sampling, count)
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
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Ids, and how the answer is read."""
        self._check_process()
        if isinstance(prompt, str):
            return ChatPrompt(self.encode(prompt), Reading())
        if not prompt or not isinstance(prompt[0], Mapping):
            return ChatPrompt(list(cast(Sequence[int], prompt)), Reading())
        with self._watch.preparing():
            return self._words.chat(cast(Sequence[Message], prompt), tools, grammar, variables)

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
        grammar = held_to(grammar, reading)
        params = self.sampling() if sampling is None else self._with_end_of_turn(sampling)
        how.setdefault("speculate", self._speculate)
        how.setdefault("deterministic", self._deterministic)
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
            request.id: (index, Reply(self._words, request, stop, reading)) for index, request in enumerate(requests)
        }
        spent, self._watch = self._watch, Stopwatch()
        if not self._turn.acquire(blocking=False):
            raise BadRequest("This LLM is answering already; finish or close that answer, or make a second LLM.")
        guides: dict[str, Guide] = {}
        try:
            for request in requests:
                if grammar is not None:
                    guides[request.id] = Guide(self._words, grammar, request)
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
