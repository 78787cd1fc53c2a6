"""Requests: what is understood, what is refused by name, and nothing in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vai.errors import BadRequest, NotSupported
from vai.server import schema

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def chat(**fields: Any) -> schema.ChatRequest:
    return schema.decode_chat(json.dumps(CHAT | fields).encode())


def text(**fields: Any) -> schema.CompletionRequest:
    return schema.decode_completion(json.dumps(TEXT | fields).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("store", True),
        ("service_tier", "priority"),
        ("verbosity", "low"),
        ("skip_special_tokens", False),
    ],
)
def test_what_is_not_done_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(NotSupported) as caught:
        chat(**{field: value})
    assert (caught.value.param, caught.value.code, caught.value.status) == (field, "not_supported", 400)
    assert field in caught.value.message


@pytest.mark.parametrize(("field", "value"), [("suffix", "x"), ("best_of", 2)])
def test_what_completions_do_not_do_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(NotSupported) as caught:
        text(**{field: value})
    assert caught.value.param == field


def test_what_is_harmless_or_asks_for_nothing_is_taken() -> None:
    request = chat(
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        n=1,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
        prompt_cache_key="k",
        safety_identifier="s",
        verbosity="medium",
        parallel_tool_calls=True,
        top_logprobs=0,
        reasoning_effort=None,
        audio=None,
        web_search_options=None,
        stop=None,
        seed=None,
    )
    assert request.seed is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("seed", -1),
        ("seed", 1 << 63),
        ("max_tokens", 0),
        ("max_tokens", 1 << 70),
        ("n", 0),
        ("n", 17),
        ("n", 1 << 31),
        ("n", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 101),
        ("presence_penalty", -2.1),
        ("logit_bias", {"1": 100.5}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"1": None}),
        ("logit_bias", {str(id): 1 for id in range(301)}),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 1_000_000]),
        ("top_logprobs", 21),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(100))),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "hi"),
        ("model", ""),
        ("model", 3),
        ("frequency_penalty", 3),
        ("cache_salt", ""),
        ("cache_salt", "x" * 257),
        ("cache_salt", 3),
        ("cache_prompt", "no"),
        ("cache_prompt", 0),
        ("deterministic", "yes"),
        ("deterministic", 1),
        ("session_id", ""),
        ("session_id", "x" * 257),
        ("cache_control", "ephemeral"),
        ("cache_control", {"type": "forever"}),
        ("cache_control", {"type": "ephemeral", "ttl": 300}),
        ("cache_control", {"type": "ephemeral", "ttl": "5 minutes"}),
        ("cache_control", {"type": "ephemeral", "ttl": "25h"}),
        ("cache_control", {"type": "ephemeral", "ttl": "5m\n"}),
        ("cache_control", {"type": "ephemeral", "scope": "all"}),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**{field: value})
    assert caught.value.param is not None
    assert caught.value.param.startswith(field)


def test_an_unknown_field_is_refused_by_name_wherever_it_is() -> None:
    with pytest.raises(BadRequest) as caught:
        chat(tempurature=1)
    assert caught.value.param == "tempurature"
    with pytest.raises(BadRequest) as caught:
        chat(messages=[{"role": "user", "content": "x", "colour": 1}])
    assert caught.value.param == "messages[0].colour"
    with pytest.raises(BadRequest) as caught:
        chat(**{"z" * 100_000: 1})
    assert len(caught.value.message) < 500


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadRequest) as caught:
        schema.decode_chat(b'{"model": "m"}')
    assert caught.value.param == "messages"
    assert "required" in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "m", "prompt": "\xed\xa0\x80"}',
        b'{"model": "m", "prompt": "x", "temperature": 1e999}',
        b'{"model": "m", "prompt": "x"} trailing',
    ],
)
def test_what_is_not_json_is_refused_in_a_sentence(body: bytes) -> None:
    for decode in (schema.decode_chat, schema.decode_completion):
        with pytest.raises(BadRequest) as caught:
            decode(body)
        assert caught.value.message.endswith(".")


def test_fields_that_contradict_each_other_are_refused() -> None:
    for fields, param in (
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ):
        with pytest.raises(BadRequest) as caught:
            chat(**fields)
        assert caught.value.param == param


def test_penalties_biases_and_choices_are_read() -> None:
    request = chat(
        n=16, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.1, logit_bias={"7": -100, "151935": 1.5}
    )
    assert (request.n, request.presence_penalty, request.frequency_penalty) == (16, -2, 2)
    assert (request.repetition_penalty, request.logit_bias) == (1.1, {7: -100.0, 151935: 1.5})


def test_echo_does_not_go_with_logprobs() -> None:
    assert text(echo=True).echo
    with pytest.raises(NotSupported, match="'echo' is not supported together with 'logprobs'") as caught:
        text(echo=True, logprobs=0)
    assert caught.value.param == "echo"


@pytest.mark.parametrize(
    ("fields", "param"), [({"prompt": ["a"] * 65}, "prompt"), ({"prompt": ["a"] * 5, "n": 13}, "n")]
)
def test_more_answers_than_go_in_one_request_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest, match="at most 64 go in one request") as caught:
        schema.prompts(text(**fields))
    assert caught.value.param == param
    assert len(schema.prompts(text(prompt=["a"] * 4, n=16))) == 4


def test_all_four_forms_of_prompt_are_read() -> None:
    assert schema.prompts(text(prompt="a")) == ["a"]
    assert schema.prompts(text(prompt=["a", "b"])) == ["a", "b"]
    assert schema.prompts(text(prompt=[1, 2])) == [[1, 2]]
    assert schema.prompts(text(prompt=[[1], [2, 3]])) == [[1], [2, 3]]
    for wrong in ([], ["a", 1], [[1], "a"], ["a"] * 65):
        with pytest.raises(BadRequest) as caught:
            schema.prompts(text(prompt=wrong))
        assert caught.value.param == "prompt"


def test_messages_become_role_and_text() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": None},
        ]
    )
    assert schema.plain_messages(request.messages) == [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "tool", "tool_call_id": "1"}, "messages[0].content"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, "messages[0].function_call"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ],
)
def test_a_message_that_cannot_be_rendered_names_its_place(message: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        schema.plain_messages(chat(messages=[message]).messages)
    assert caught.value.param == param


def test_calls_and_their_results_become_messages_for_a_template() -> None:
    request = chat(
        messages=[
            {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "reasoning_content": "hm"},
            {"role": "tool", "content": [{"type": "text", "text": "sunny"}], "tool_call_id": "call_1"},
            {"role": "assistant", "content": "It is sunny.", "tool_calls": None},
        ]
    )
    assert schema.plain_messages(request.messages) == [
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is sunny."},
    ]


def function(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [function("")]}, "tools[0].function.name"),
        ({"tools": [function("x" * 129)]}, "tools[0].function.name"),
        ({"tools": [function("f\n")]}, "tools[0].function.name"),
        ({"tools": [function('f"}')]}, "tools[0].function.name"),
        ({"tools": [function("<|im_end|>")]}, "tools[0].function.name"),
        ({"tools": [function("f"), function("g"), function("f")]}, "tools[2].function.name"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [function(parameters=nested(60))]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters=nested(300))]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"x": "y" * (1 << 16)})]}, "tools[0].function.parameters"),
        ({"tools": [function(description="y" * (1 << 17))]}, "tools[0].function.description"),
        ({"tools": [function(colour="red")]}, "tools[0].function.colour"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [function()], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [function()], "tool_choice": function("g")}, "tool_choice"),
        ({"tools": [function()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": function()}, "tool_choice"),
    ],
)
def test_tools_that_cannot_be_offered_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        schema.tools_of(chat(**fields))
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)
    assert len(caught.value.message) < 400


def test_tools_and_choices_are_read() -> None:
    tools = [function("get", parameters={"properties": {}}, description="d"), function("a.b-c_D9")]
    offers = {
        choice: schema.tools_of(chat(tools=tools, tool_choice=choice)) for choice in ("auto", "none", "required", None)
    }
    assert offers["none"] is None
    assert offers["auto"] == offers[None]
    assert offers["auto"] is not None
    assert not offers["auto"].required
    assert offers["required"] is not None
    assert offers["required"].required
    named = schema.tools_of(chat(tools=tools, tool_choice=function("get")))
    assert named is not None
    assert (named.required, named.name, named.parallel) == (True, "get", False)
    single = schema.tools_of(chat(tools=tools, parallel_tool_calls=False))
    assert single is not None
    assert not single.parallel
    assert named.rendered()[0] == {
        "type": "function",
        "function": {"name": "get", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    assert schema.tools_of(chat(tools=[], tool_choice="none")) is schema.tools_of(chat()) is None


FIELDS = sorted({*schema.ChatRequest.__struct_fields__, *schema.CompletionRequest.__struct_fields__, "unknown"})
EXTREME = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 2**31, -(2**31), 2**63, 2**64, 10**30])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "x", "auto", "user", "text", "\x00", "é" * 50, "y" * 2000]),
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1", ""]), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(FIELDS), EXTREME, max_size=4), st.sampled_from([CHAT, TEXT]))
def test_extreme_values_are_read_or_refused_with_the_field_named(fields: dict[str, Any], base: dict[str, Any]) -> None:
    body = json.dumps(base | fields).encode()
    try:
        if base is CHAT:
            request = schema.decode_chat(body)
            schema.plain_messages(request.messages)
            schema.tools_of(request)
        else:
            schema.prompts(schema.decode_completion(body))
    except BadRequest as error:
        assert error.param, error.message
        assert error.status == 400


# Every field about how an answer is drawn, shaped or scheduled that OpenAI's API or vLLM's (0.32) has. Beside it is a
# value that asks for something, and where that is refused also the value that asks for nothing.
DONE = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "n": 2,
    "stop": ["x"],
    "stop_token_ids": [1],
    "ignore_eos": True,
    "max_tokens": 5,
    "min_tokens": 2,
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "repetition_penalty": 1.5,
    "logit_bias": {"1": 2},
    "priority": -1,
    "cache_salt": "x",
    "stream": True,
    "structured_outputs": {"regex": "a"},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_json": {},
    "guided_grammar": 'start: "a"',
    "response_format": {"type": "json_object"},
}
REFUSED = {
    "use_beam_search": (True, False),
    "length_penalty": (1.5, 1.0),
    "prompt_logprobs": (0, None),
    "allowed_token_ids": ([1], None),
    "bad_words": (["x"], []),
    "logits_processors": (["x"], []),
    "truncate_prompt_tokens": (5, None),
    "include_stop_str_in_output": (True, False),
    "skip_special_tokens": (False, True),
    "spaces_between_special_tokens": (False, True),
    "return_token_ids": (True, False),
    "return_tokens_as_token_ids": (True, False),
    "kv_transfer_params": ({}, None),
    "vllm_xargs": ({"a": 1}, None),
    "service_tier": ("priority", "auto"),
}
IN_CHAT = {
    "logprobs": True,
    "max_completion_tokens": 5,
    "parallel_tool_calls": False,
    "chat_template_kwargs": {"a": 1},
    "tools": [],
    "tool_choice": "none",
}
REFUSED_IN_CHAT = {
    "echo": (True, False),
    "add_generation_prompt": (False, True),
    "continue_final_message": (True, False),
    "add_special_tokens": (True, False),
    "documents": ([{"text": "x"}], []),
    "chat_template": ("x", None),
    "mm_processor_kwargs": ({}, None),
    "include_reasoning": (False, True),
    "reasoning_effort": ("high", "none"),
    "verbosity": ("low", "medium"),
    "prediction": ({}, None),
    "functions": ([{"name": "f"}], []),
    "modalities": (["audio"], ["text"]),
}
IN_COMPLETION = {"logprobs": 3, "echo": True}
REFUSED_IN_COMPLETION = {
    "best_of": (2, 1),
    "suffix": ("x", ""),
    "add_special_tokens": (False, True),
    "prompt_embeds": ("x", None),
}


@pytest.mark.parametrize("kind", [chat, text])
def test_every_field_of_openais_and_vllms_is_done_or_refused_by_name(kind: Callable[..., Any]) -> None:
    in_chat = kind is chat
    for field, value in (DONE | (IN_CHAT if in_chat else IN_COMPLETION)).items():
        assert getattr(kind(**{field: value}), field) is not None
    for field, (asks, asks_not) in (REFUSED | (REFUSED_IN_CHAT if in_chat else REFUSED_IN_COMPLETION)).items():
        with pytest.raises(NotSupported, match=f"'{field}'") as caught:
            kind(**{field: asks})
        assert caught.value.param == field
        kind(**{field: asks_not})
    with pytest.raises(BadRequest, match="'a_field_of_tomorrow' is not known here"):
        kind(a_field_of_tomorrow=None)
