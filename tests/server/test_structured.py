"""What an answer must look like, in the words of several APIs: read as one thing, and never as nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vai.errors import BadRequest, NotSupported
from vai.llm import GrammarSpec
from vai.server.schema import decode_chat, decode_completion
from vai.server.structured import grammar_of

SCHEMA = '{"type": "object", "properties": {"b": {}, "a": {}}}'


def read(**fields: Any) -> GrammarSpec | None:
    """What a chat request and a completion request with these fields say alike; json.dumps keeps the order of keys."""
    chat = decode_chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode())
    completion = decode_completion(json.dumps({"model": "m", "prompt": "x", **fields}).encode())
    assert grammar_of(chat) == grammar_of(completion)
    return grammar_of(chat)


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None, "guided_json": None, "grammar": None}, None),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"response_format": {"type": "json_object"}}, GrammarSpec("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": json.loads(SCHEMA), "strict": True, "description": None},
                }
            },
            GrammarSpec("json_schema", SCHEMA),
        ),
        ({"structured_outputs": {"json": json.loads(SCHEMA)}}, GrammarSpec("json_schema", SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarSpec("json_schema", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, GrammarSpec("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "ü"]}}, GrammarSpec("choice", '["a","ü"]')),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, GrammarSpec("ebnf", 'root ::= "a"')),
        ({"structured_outputs": {"json_object": True}}, GrammarSpec("json_object")),
        ({"guided_json": json.loads(SCHEMA)}, GrammarSpec("json_schema", SCHEMA)),
        ({"guided_json": SCHEMA}, GrammarSpec("json_schema", SCHEMA)),
        ({"guided_regex": "a+"}, GrammarSpec("regex", "a+")),
        ({"guided_choice": ["a"]}, GrammarSpec("choice", '["a"]')),
        ({"guided_grammar": 'start: "a"'}, GrammarSpec("ebnf", 'start: "a"')),
        ({"json_schema": json.loads(SCHEMA)}, GrammarSpec("json_schema", SCHEMA)),
        ({"grammar": 'root ::= "a"'}, GrammarSpec("ebnf", 'root ::= "a"')),
    ],
)
def test_every_way_to_say_it_is_read(fields: dict[str, Any], spec: GrammarSpec | None) -> None:
    assert read(**fields) == spec


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "grammar": "x"}, "grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, None),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": "x"}, "structured_outputs"),
    ],
)
def test_what_contradicts_itself_or_is_none_is_refused_by_name(fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        read(**fields)
    if param is not None:
        assert caught.value.param == param


def test_a_response_format_of_another_type_is_not_supported() -> None:
    with pytest.raises(NotSupported, match="structural_tag"):
        read(response_format={"type": "structural_tag"})
