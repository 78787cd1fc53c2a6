"""Grammars for tool calls: whatever is drawn under one is a call in the family's format that satisfies its schema."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from vai.errors import BadRequest, NotSupported
from vai.text.families import DeepSeek, DeepSeekFenced, Hermes, Llama, Mistral, MistralArgs, MistralCallId, QwenCoder
from vai.text.fields import USER_DEFINED
from vai.text.grammar import Grammars, GrammarSpec, Matcher
from vai.text.parsers import Arguments, Call, Content, Event, Parser, Reasoning
from vai.text.structural import grammar
from vai.text.template import template_section
from vai.text.tokenizer import Tokenizer, tokenizer_section
from vai.text.tools import Tools, offered, read_choice, read_tools
from vai.text.vocabulary import byte_level_bpe

FAMILIES = [Hermes, QwenCoder, Llama, Mistral, MistralArgs, MistralCallId, DeepSeek, DeepSeekFenced]
END = "<|im_end|>"
SIZE = 600
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Köln"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tools(choice: Any = "required", parallel: bool | None = None, strict: bool | None = None) -> Tools:
    functions = [
        {"name": "weather", "parameters": WEATHER, "strict": strict},
        {"name": "time", "strict": strict},
    ]
    given = read_tools([{"type": "function", "function": function} for function in functions])
    found = offered(given, read_choice(choice), parallel)
    assert found is not None
    return found


class Vocabulary:
    """A tokenizer in which the markers of all families are control tokens, or user-defined ones, or only text."""

    def __init__(self, kind: str) -> None:
        markers = [marker for family in FAMILIES for marker in family.markers] if kind != "text" else []
        specials = list(dict.fromkeys((*markers, END)))
        vocabulary = byte_level_bpe(SIZE, specials)
        types = [
            USER_DEFINED if kind == "user-defined tokens" and token in markers else type
            for token, type in zip(vocabulary.tokens, vocabulary.types, strict=True)
        ]
        fields = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": vocabulary.tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": vocabulary.merges,
            "tokenizer.ggml.eos_token_id": vocabulary.tokens.index(END),
            "tokenizer.ggml.add_bos_token": False,
        }
        sections = tokenizer_section(fields), template_section(fields)
        self.tokenizer = Tokenizer.from_sections(*sections)
        ids = {marker: vocabulary.tokens.index(marker) for marker in markers}
        self.control = {marker: id for marker, id in ids.items() if self.tokenizer.is_control(id)}
        self.end = vocabulary.tokens.index(END)
        self.grammars = Grammars(lambda: sections)

    def matcher(self, family: type[Parser], offer: Tools, **how: Any) -> Matcher:
        lark = grammar(family, offer, self.control, **how)
        assert lark is not None
        return self.grammars.matcher(GrammarSpec("structural", lark), SIZE)

    def draw(self, matcher: Matcher, chance: random.Random, begin: str = "") -> tuple[str, bool]:
        """A text of tokens drawn after `begin`, and whether it is complete."""
        ids = self.tokenizer.encode(begin, parse_special=True)
        for token in ids:
            matcher.accept(token)
        while not matcher.finished and len(ids) < 500:
            allowed = [token for token in range(SIZE) if matcher.bits[token // 8] >> token % 8 & 1]
            ids.append(chance.choice(allowed))
            if ids[-1] == self.end:
                break
            matcher.accept(ids[-1])
        complete = matcher.finished or ids[-1] == self.end
        matcher.close()
        return self.tokenizer.decode([id for id in ids if id != self.end], control=True), complete


@pytest.fixture(scope="module", params=["control tokens", "user-defined tokens", "text"])
def vocabulary(request: pytest.FixtureRequest) -> Iterator[Vocabulary]:
    made = Vocabulary(request.param)
    yield made
    made.grammars.close()


def read(family: type[Parser], text: str, offer: Tools, thinking: bool = False) -> list[Event]:
    parser = family(offer.functions, thinking=thinking)
    return [*parser.feed(text), *parser.finish()]


def check(events: list[Event]) -> list[str]:
    """The names of the calls, the arguments of which satisfy their schemas, and beside which there is nothing."""
    assert not any(isinstance(event, Content) for event in events)
    names = [event.name for event in events if isinstance(event, Call)]
    for number, name in enumerate(names):
        written = [event.text for event in events if isinstance(event, Arguments) and event.number == number]
        value = json.loads("".join(written))
        if name == "time":
            assert value == {}
        else:
            assert value.keys() == {"city", "days"}
            assert value["city"] in ("Rome", "Köln")
            assert 1 <= value["days"] <= 14
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_where_calls_are_required_is_calls(vocabulary: Vocabulary, family: type[Parser]) -> None:
    chance = random.Random(1)
    named = {"type": "function", "function": {"name": "weather"}}
    for offer, allowed in (
        (tools(), {"weather", "time"}),
        (tools(named), {"weather"}),
        (tools("required", False), None),
    ):
        for _ in range(2):
            text, complete = vocabulary.draw(vocabulary.matcher(family, offer), chance)
            if complete:
                names = check(read(family, text, offer))
                assert names
                assert allowed is None or set(names) <= allowed
                assert len(names) == 1 or offer.parallel


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_is_begun_freely_is_held_to_a_strict_schema(vocabulary: Vocabulary, family: type[Parser]) -> None:
    chance = random.Random(2)
    offer = tools("auto", False, strict=True)
    begin = (family.opening + family.head).partition("NAME")[0]
    words = "" if family is Llama else "Let me see. "
    text, complete = vocabulary.draw(vocabulary.matcher(family, offer), chance, words + begin)
    assert complete
    events = read(family, text, offer)
    assert len(check([event for event in events if event != Content(words.strip())])) == 1
    free = vocabulary.matcher(family, offer)
    for token in vocabulary.tokenizer.encode("Just words, no more."):
        free.accept(token)
    assert free.bits[vocabulary.end // 8] >> vocabulary.end % 8 & 1
    free.close()


def test_nothing_is_held_where_the_model_may_do_as_it_likes() -> None:
    for family in FAMILIES:
        assert grammar(family, tools("auto"), {}) is None
        assert grammar(family, tools("auto", False), {}) is not None


@pytest.mark.parametrize("family", [Hermes, Mistral, DeepSeek])
def test_reasoning_comes_before_a_required_call(vocabulary: Vocabulary, family: type[Parser]) -> None:
    offer = tools("required", False)
    matcher = vocabulary.matcher(family, offer, thinking=True)
    text, complete = vocabulary.draw(matcher, random.Random(3), "I think <so>.\n</think>\n\n")
    assert complete
    [thought, *events] = read(family, text, offer, thinking=True)
    assert thought == Reasoning("I think <so>.")
    assert len(check(events)) == 1


def test_content_beside_calls_may_have_to_be_json(vocabulary: Vocabulary) -> None:
    offer = tools("auto")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    seen = set()
    for seed in range(12):
        matcher = vocabulary.matcher(Hermes, offer, content=schema)
        text, complete = vocabulary.draw(matcher, random.Random(seed), "" if seed else '{"ok": ')
        events = read(Hermes, text, offer)
        if complete and isinstance(events[0], Content):
            assert json.loads(events[0].text)["ok"] in (True, False)
            seen.add("content")
        elif isinstance(events[0], Call):
            seen.add("call")
    assert seen == {"content", "call"}
    with pytest.raises(NotSupported, match="without a marker"):
        grammar(Llama, offer, {}, content=schema)


def test_what_raw_text_cannot_be_held_to_is_refused_by_name() -> None:
    function = {"name": "f", "parameters": {"properties": {"zip": {"type": "string", "pattern": "[0-9]+"}}}}
    given = read_tools([{"type": "function", "function": function}])
    offer = offered(given, "required")
    assert offer is not None
    assert grammar(Hermes, offer, {}) is not None
    with pytest.raises(NotSupported, match="'zip' outside of JSON, where 'pattern' cannot be enforced") as caught:
        grammar(QwenCoder, offer, {})
    assert caught.value.param == "tools"


def test_a_schema_that_makes_no_sense_is_refused_before_a_token_is_drawn(vocabulary: Vocabulary) -> None:
    for wrong in ({"type": "wizard"}, {"$ref": "#/nowhere"}, {"type": "integer", "minimum": 3, "maximum": 1}):
        function = {"name": "f", "parameters": {"properties": {"x": wrong}, "required": ["x"]}}
        offer = offered(read_tools([{"type": "function", "function": function}]), "required")
        assert offer is not None
        with pytest.raises(BadRequest):
            vocabulary.matcher(Hermes, offer)
