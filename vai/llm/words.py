"""One model's words: what turns texts into the engine's requests."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import msgspec

from vai.errors import BadRequest, ContextTooLong, MalformedFile
from vai.request import MAX_CHOICES, Request, SamplingParams, Speculate
from vai.text.chat import Chat, ChatPrompt, Message, Reading
from vai.text.grammar import Grammars, GrammarSpec
from vai.text.template import chat_fields
from vai.text.tokenizer import Tokenizer
from vai.text.tools import Tools

DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # what a checkpoint or a name may recommend


class How(TypedDict, total=False):
    """What a request may say to the engine beside prompt and sampling; what each means says `request.Request`."""

    cache: bool
    cache_salt: str
    session: str
    retain: float | None
    priority: int
    speculate: Speculate
    deterministic: bool


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


class Sizes(msgspec.Struct, frozen=True):
    """The part of the spec section that text needs; the rest is for the engine."""

    vocabulary: int
    context: int


class Overrides(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a name changes about its model."""

    template: str | None = None
    system: str | None = None
    defaults: dict[str, float] = {}
    context: int | None = None
    draft: str | None = None  # the name (or digest) of a smaller model that guesses for it


class Words:
    """Everything about one model that is text: tokenizer, chat template, system prompt, recommended sampling."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: Tokenizer,
        grammars: Grammars,
        sections: Mapping[str, bytes],
        overrides: Overrides,
    ) -> None:
        """`sections`: template, defaults and spec of the image. Raises MalformedFile."""
        chat = chat_fields(sections["template"])
        self.card = card
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.vocabulary = msgspec.json.decode(sections["spec"], type=Sizes).vocabulary
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
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        content: GrammarSpec | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """The prompt for a conversation, and how its answer is read. See `Chat.prompt`."""
        return self._chat.prompt(messages, tools, content, variables)

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
        left = self.card.context - len(ids)
        if left < 1:
            raise ContextTooLong(
                f"The prompt has {len(ids)} tokens, but the context of '{self.card.name}' holds {self.card.context}, "
                "answer included. Shorten it.",
                param="prompt",
            )
        if not all(0 <= id < self.vocabulary for id in ids):  # after the length: of millions nobody looks at each
            raise BadRequest(f"Token ids of '{self.card.name}' go from 0 to {self.vocabulary - 1}.", param="prompt")
        if any(id >= self.vocabulary for id in sampling.logit_bias):
            raise BadRequest(f"Token ids of '{self.card.name}' go from 0 to {self.vocabulary - 1}.", param="logit_bias")
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


def _recommended(name: str, section: bytes, overrides: Overrides) -> dict[str, float]:
    """Default sampling of the image under that of the name; what else the section may hold is not for requests."""
    try:
        stored = msgspec.json.decode(section, type=dict[str, Any])
        chosen = {key: value for key, value in {**stored, **overrides.defaults}.items() if key in DEFAULTS}
        checked = msgspec.convert(chosen, SamplingParams, strict=False)
    except msgspec.MsgspecError as error:
        raise MalformedFile(f"The recommended sampling of '{name}' cannot be used: {error}.") from None
    return {key: getattr(checked, key) for key in chosen}


def seeded(sampling: SamplingParams, count: int) -> SamplingParams:
    """The parameters that `count` answers to one prompt share, so with one seed. Raises BadRequest."""
    if not 1 <= count <= MAX_CHOICES:
        raise BadRequest(f"A prompt has 1 to {MAX_CHOICES} answers at once, not {count}.", param="n")
    if count == 1 or sampling.seed is not None:
        return sampling
    return msgspec.structs.replace(sampling, seed=secrets.randbits(63))


def held_to(grammar: GrammarSpec | None, reading: Reading | None) -> GrammarSpec | None:
    """The grammar of an answer: what it must match, or the calls that it must be."""
    return grammar if reading is None or reading.grammar is None else reading.grammar
