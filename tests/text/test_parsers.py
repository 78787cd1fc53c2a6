"""Answers taken apart: every family's calls, nothing leaked, nothing lost, however the text comes in pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vai.text.families import (
    DeepSeek,
    DeepSeekFenced,
    Hermes,
    Llama,
    Mistral,
    MistralArgs,
    MistralCallId,
    QwenCoder,
    detect,
)
from vai.text.parsers import Arguments, Call, Content, Event, Parser, Reasoning
from vai.text.tools import Function

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTIONS = [Function(name="weather", parameters=CITY), Function(name="time")]
FAMILIES = [Hermes, QwenCoder, Llama, Mistral, MistralArgs, MistralCallId, DeepSeek, DeepSeekFenced]

HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome \\"}<"}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
LLAMA = '{"name": "weather", "parameters": {"city": "Rome", "days": [1, {}]}}'
ROME = '{"city": "Rome"}'
SECTION = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"


def read(
    family: type[Parser], text: str, cuts: Sequence[int] = (), functions: Sequence[Function] = FUNCTIONS, **how: bool
) -> list[Event]:
    """The events of a text that comes in pieces cut at `cuts`, neighbours joined."""
    parser = family(functions, **how)
    events: list[Event] = []
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    for begin, end in pairwise(places):
        events += parser.feed(text[begin:end])
    events += parser.finish()
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Call) or last is None or type(last) is not type(event):
            joined.append(event)
        else:
            joined[-1] = last._replace(text=last.text + event.text)
    return joined


def called(number: int, name: str, arguments: str) -> list[Event]:
    return [Call(number, name), Arguments(number, arguments)]


@pytest.mark.parametrize(
    ("family", "text", "events"),
    [
        (Hermes, "Hello {x} <tool", [Content("Hello {x} <tool")]),
        (Hermes, HERMES, called(0, "weather", '{"city": "Rome \\"}<"}')),
        (
            Hermes,
            f"Let me see.\n\n{HERMES}\n{HERMES}\nDone. ",
            [
                Content("Let me see."),
                *called(0, "weather", '{"city": "Rome \\"}<"}'),
                *called(1, "weather", '{"city": "Rome \\"}<"}'),
                Content("Done. "),
            ],
        ),
        (Hermes, '<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>', called(0, "f", '{"a":1}')),
        (Hermes, '<tool_call>{"id": [1, "}"], "name": "f"}</tool_call>', called(0, "f", "{}")),
        (Hermes, '<tool_call>{"name": "f", "arguments": null}</tool_call>', called(0, "f", "{}")),
        (Hermes, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', called(0, "f", '{"a": 1}')),
        (
            Hermes,
            '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> x',
            [*called(0, "f", '{"a": 1}'), Content("x")],
        ),
        (QwenCoder, CODER, called(0, "weather", '{"city": "12", "days": 3}')),
        (QwenCoder, "<tool_call><function=time></function></tool_call>", called(0, "time", "{}")),
        (
            QwenCoder,
            "<tool_call><function=other><parameter=a>\n[1,\n 2]\n</parameter><parameter=b>\nx\ny\n</parameter>"
            "</function></tool_call>",
            called(0, "other", '{"a": [1,\n 2], "b": "x\\ny"}'),
        ),
        (Llama, LLAMA, called(0, "weather", '{"city": "Rome", "days": [1, {}]}')),
        (Llama, f" {LLAMA}; {LLAMA}", 2),
        (Llama, f"<|python_tag|>{LLAMA}", 1),
        (Llama, '{"type": "function", "name": "time", "parameters": {}}', called(0, "time", "{}")),
        (Mistral, f'[TOOL_CALLS][{{"name": "weather", "arguments": {ROME}}}]', called(0, "weather", ROME)),
        (
            Mistral,
            f'Ok [TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}, "id": "abcdefghi"}}, '
            '{"name": "time", "arguments": {}}]',
            [Content("Ok"), *called(0, "weather", ROME), *called(1, "time", "{}")],
        ),
        (Mistral, f"[TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]time[ARGS]{{}}", 2),
        (Mistral, f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{ROME}", called(0, "weather", ROME)),
        (Mistral, f"[TOOL_CALLS]weather{ROME}", called(0, "weather", ROME)),
        (
            DeepSeek,
            f"{SECTION}function<｜tool▁sep｜>weather\n```json\n{ROME}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
            "time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            [*called(0, "weather", ROME), *called(1, "time", "{}")],
        ),
        (
            DeepSeek,
            f"a {SECTION}weather<｜tool▁sep｜>{ROME}<｜tool▁call▁end｜><｜tool▁calls▁end｜> b",
            [Content("a"), *called(0, "weather", ROME), Content("b")],
        ),
    ],
)
def test_calls_of_every_family_are_read(family: type[Parser], text: str, events: list[Event] | int) -> None:
    found = read(family, text)
    if isinstance(events, int):
        assert sum(isinstance(event, Call) for event in found) == events
        assert not any(isinstance(event, Content) for event in found)
    else:
        assert found == events


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (Hermes, "<tool_call>"),
        (Hermes, "<tool_call>\nnot json\n</tool_call>"),
        (Hermes, '<tool_call>{"name": "f", <tool_call>{"name": 5}</tool_call>'),
        (Hermes, '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        (Hermes, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        (Hermes, '<tool_call>{"name": "' + "f" * 5000 + '"}</tool_call>'),
        (Hermes, '<tool_call>{"name": "\\ud800'),
        (Hermes, '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        (Hermes, '<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>'),
        (Hermes, "I write <tool_call> in my text, </tool_call> too."),
        (Hermes, "a < b and <tool_cal"),
        (QwenCoder, "<tool_call>\n<function=we ather>\n</function></tool_call>"),
        (QwenCoder, '<tool_call>\n{"name": "weather"}</tool_call>'),
        (Llama, '{"name": "unknown", "parameters": {}}'),
        (Llama, '{"city": "Rome", "name": "weather", "parameters": {}}'),
        (Llama, f"The call is {LLAMA}."),
        (Llama, '<|python_tag|>search.call(query="x")'),
        (Llama, '  {"name": "weather"'),
        (Mistral, "[TOOL_CALLS]"),
        (Mistral, "[TOOL_CALLS] weather in Rome"),
        (Mistral, "[TOOL_CALLS][1, 2]"),
        (DeepSeek, SECTION + "weather"),
        (DeepSeek, "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>"),
    ],
)
def test_what_is_no_call_is_content_to_the_letter(family: type[Parser], text: str) -> None:
    assert read(family, text) == [Content(text)]
    assert read(family, text, range(len(text))) == [Content(text)]


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (Hermes, HERMES),
        (QwenCoder, CODER),
        (Llama, LLAMA),
        (Mistral, f'[TOOL_CALLS][{{"name": "weather", "arguments": {ROME}}}]'),
        (MistralArgs, f"[TOOL_CALLS]weather[ARGS]{ROME}"),
        (MistralCallId, f"[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{ROME}"),
        (DeepSeek, f"{SECTION}weather<｜tool▁sep｜>{ROME}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    ],
)
def test_a_call_that_is_cut_short_is_content_before_its_name_and_a_beginning_after(
    family: type[Parser], text: str
) -> None:
    whole = "".join(event.text for event in read(family, text) if isinstance(event, Arguments))
    begun = False
    for length in range(1, len(text)):
        events = read(family, text[:length])
        if isinstance(events[0], Call):
            begun = True
            arguments = "".join(event.text for event in events if isinstance(event, Arguments))
            assert whole.startswith(arguments.removesuffix('"')) or family is QwenCoder
            assert not any(isinstance(event, Content) for event in events), text[:length]
        else:
            assert not begun
            assert events == [Content(text[:length])]
    assert begun


PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ":",
        ",",
        ";",
        "x",
        "é",
        "12",
        "null",
        "```json",
    ),
    *(
        '"name"',
        '"arguments": ',
        '"parameters": ',
        '"weather"',
        "<function=weather>",
        "</function>",
        "<parameter=city>",
    ),
    *("</parameter>", "[TOOL_CALLS]", "weather", "[ARGS]", "[CALL_ID]", *DeepSeek.markers, "<|python_tag|>", "```"),
    *(
        "<think>",
        "</think>",
        HERMES,
        CODER,
        LLAMA,
        ROME,
        SECTION,
        '{"name": "weather", "arguments": {"city":',
        "<tool_",
        "call>",
    ),
]


@settings(max_examples=200)
@given(
    st.sampled_from([Parser, *FAMILIES]),
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_however_a_text_is_cut_the_events_are_the_same(
    family: type[Parser], text: str, cuts: list[int], thought: tuple[bool, bool]
) -> None:
    how = dict(zip(("thinks", "thinking"), thought, strict=True))
    whole = read(family, text, **how)
    assert read(family, text, cuts, **how) == whole
    assert read(family, text, range(len(text)), **how) == whole


def test_nothing_is_lost_in_noise_and_nothing_made_up() -> None:
    chance = random.Random(1)
    quiet = 0
    for family in FAMILIES:
        for _ in range(100):
            text = "".join(chance.choice(PIECES) for _ in range(chance.randrange(60)))
            events = read(family, text)
            content = "".join(event.text for event in events if isinstance(event, Content))
            if not any(isinstance(event, Call) for event in events):
                assert content == text
                quiet += 1
            rest = iter(text)
            assert all(character in rest for character in content)
    assert 80 < quiet < 720


def test_words_before_a_call_come_at_once_and_markers_are_held_back() -> None:
    parser = Hermes(FUNCTIONS)
    assert parser.feed("Let me see") == [Content("Let me see")]
    assert parser.feed(". <tool") == [Content(".")]
    assert parser.feed("box> and <to") == [Content(" <toolbox> and")]
    assert parser.feed('ol_call>{"name": "weather"') == []
    assert parser.feed(', "arguments": {"ci') == [Call(0, "weather"), Arguments(0, '{"ci')]
    assert parser.feed('ty": "Ro') == [Arguments(0, 'ty": "Ro')]
    assert parser.feed('me"}}</tool_') == [Arguments(0, 'me"}')]
    assert parser.feed("call>") == []
    assert parser.finish() == []


def test_reasoning_is_told_apart_from_words_and_calls() -> None:
    text = f"<think>\nFirst <tool_call>.\n</think>\n\nSo: {HERMES}"
    [thought, words, call, arguments] = read(Hermes, text, thinks=True)
    assert (thought, words) == (Reasoning("First <tool_call>."), Content("So:"))
    assert isinstance(call, Call)
    assert isinstance(arguments, Arguments)
    assert read(Hermes, text.removeprefix("<think>"), thinks=True, thinking=True) == [thought, words, call, arguments]
    assert read(Parser, "\n<think>a</think>b ", thinks=True) == [Reasoning("a"), Content("b ")]
    assert read(Parser, " no thoughts <think>", thinks=True) == [Content(" no thoughts <think>")]
    assert read(Parser, "a </thi", thinks=True, thinking=True) == [Reasoning("a </thi")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_own_words_are_detected_and_read_back(family: type[Parser]) -> None:
    call = family.opening + family.head.replace("NAME", "weather", 1) + ROME + family.tail + family.closing
    if family is QwenCoder:
        call = CODER.replace("12", "Rome").replace("<parameter=days>\n3\n</parameter>\n", "")
    assert read(family, call) == called(0, "weather", ROME)
    escaped = json.dumps(call, ensure_ascii=False)
    header = "<|start_header_id|>" if family is Llama else ""
    assert detect(header + "{% if tools %}{{ " + escaped + " }}{% endif %}") is family


def test_formats_that_are_not_known_are_not_taken_for_others() -> None:
    for template in (
        "plain",
        "<tool_call>{{ name }}\n<arg_key>{{ key }}</arg_key></tool_call>",
        '<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls> and <tool_call>',
        '<|start_header_id|> <function=f>{}</function> "parameters": {}',
        "<minimax:tool_call>",
    ):
        assert detect(template) is None
