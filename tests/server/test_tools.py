"""Tool calls through the real server, by the `openai` client: models of random weights call when they have to.

Under a grammar even random weights write calls that can be parsed and satisfy the schema; left alone they write noise.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from vai.llm import LLM
from vai.rom.registry import Name, Registry

from .system import System, until

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Zürich", 'a "b" {c}']},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"type": "array", "items": {"enum": ["C", "mm"]}, "maxItems": 2},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "What it will be", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
MODELS = ("tiny", "tiny-qwen2")  # a template that knows no tools, and one that does
SEEDS = range(3)


def ask(system: System, model: str = "tiny-qwen2", **more: Any) -> Any:
    more = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 400, "temperature": 1} | more
    return system.api.chat.completions.create(model=model, **more)


def check(name: str, arguments: str) -> None:
    """A call satisfies the schema of its function."""
    value = json.loads(arguments)
    if name == "get_time":
        assert value == {}
        return
    assert name == "get_weather"
    assert {"city", "days"} <= value.keys() <= WEATHER["properties"].keys()
    assert value["city"] in WEATHER["properties"]["city"]["enum"]
    assert isinstance(value["days"], int)
    assert 1 <= value["days"] <= 14
    assert set(value.get("units", [])) <= {"C", "mm"}
    assert len(value.get("note", "")) <= 8


def streamed(chunks: Any) -> dict[int, Any]:
    """By choice: content, calls put together as clients do it, and the finish."""
    answers: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            answer = answers.setdefault(choice.index, {"content": "", "calls": [], "finish": None})
            assert answer["finish"] is None
            answer["content"] += choice.delta.content or ""
            answer["finish"] = choice.finish_reason
            for piece in choice.delta.tool_calls or ():
                if piece.index == len(answer["calls"]):
                    assert piece.id
                    assert piece.type == "function"
                    answer["calls"].append([piece.id, piece.function.name, ""])
                else:
                    assert (piece.id, piece.type, piece.function.name) == (None, None, None)
                answer["calls"][piece.index][2] += piece.function.arguments
    return answers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_calls_that_are_required_come_and_satisfy_their_schemas_whole_and_streamed(
    system: System, model: str, choice: Any
) -> None:
    for seed in SEEDS:
        whole = ask(system, model, tool_choice=choice, seed=seed).choices[0]
        ended = whole.finish_reason == "tool_calls"
        assert ended or whole.finish_reason == "length"
        assert whole.message.content is None or not ended  # a call that was cut before its name is no call yet
        calls = whole.message.tool_calls
        assert len({call.id for call in calls}) == len(calls)
        assert {call.type for call in calls} == {"function"}
        done = calls if ended else calls[:-1]
        assert done
        for call in done:
            check(call.function.name, call.function.arguments)
        if choice == NAMED:
            assert [call.function.name for call in done] == ["get_weather"]
        answer = streamed(ask(system, model, tool_choice=choice, seed=seed, stream=True))[0]
        assert (answer["content"] or None, answer["finish"]) == (whole.message.content, whole.finish_reason)
        assert [call[1:] for call in answer["calls"]] == [
            [call.function.name, call.function.arguments] for call in calls
        ]


def test_one_call_or_several_as_asked(system: System) -> None:
    for seed in range(30):
        several = ask(system, tool_choice="required", seed=seed, max_tokens=200).choices[0].message.tool_calls or []
        if len(several) > 1:
            break
    single = ask(system, tool_choice="required", seed=seed, parallel_tool_calls=False).choices[0]
    assert [call.function for call in single.message.tool_calls] == [several[0].function]
    assert single.finish_reason == "tool_calls"


def test_every_choice_of_a_prompt_calls_for_itself(system: System) -> None:
    whole = ask(system, tool_choice="required", seed=3, n=2)
    answers = streamed(ask(system, tool_choice="required", seed=3, n=2, stream=True))
    written = [[call.function.arguments for call in choice.message.tool_calls] for choice in whole.choices]
    assert [[call[2] for call in answers[index]["calls"]] for index in (0, 1)] == written
    assert len({call.id for choice in whole.choices for call in choice.message.tool_calls}) == sum(map(len, written))
    for choice in whole.choices:
        for call in choice.message.tool_calls:
            check(call.function.name, call.function.arguments)


def test_a_call_cut_short_is_what_there_is_of_it(system: System) -> None:
    answer = ask(system, tool_choice=NAMED, seed=1).choices[0].message.tool_calls[0].function.arguments
    cut = ask(system, tool_choice=NAMED, seed=1, max_tokens=40).choices[0]
    assert cut.finish_reason == "length"
    begun = "".join(call.function.arguments for call in cut.message.tool_calls or ())
    assert answer.startswith(begun) or cut.message.content


def test_where_the_model_may_choose_its_words_are_content_and_none_means_none(system: System) -> None:
    plain = ask(system, seed=5, max_tokens=30, tools=[], tool_choice="none").choices[0]
    none = ask(system, seed=5, max_tokens=30, tool_choice="none").choices[0]
    assert none.message.content == plain.message.content
    assert none.message.tool_calls is None
    auto = ask(system, seed=5, max_tokens=30).choices[0]
    assert auto.message.content
    assert auto.message.content != plain.message.content  # it was told of the tools
    assert auto.message.tool_calls is None
    assert streamed(ask(system, seed=5, max_tokens=30, stream=True))[0]["content"] == auto.message.content


def test_an_answer_is_a_call_or_of_the_schema_that_was_asked_for(system: System) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    asked = {"name": "answer", "schema": schema | {"additionalProperties": False}}
    seen: set[str] = set()
    for seed in range(30):
        if seen >= {"stop", "tool_calls"}:
            break
        answer = ask(system, seed=seed, response_format={"type": "json_schema", "json_schema": asked}).choices[0]
        seen.add(answer.finish_reason)
        if answer.finish_reason == "stop":
            assert json.loads(answer.message.content)["ok"] in (True, False)
        elif answer.finish_reason == "tool_calls":
            assert answer.message.tool_calls
    assert seen >= {"stop", "tool_calls"}


def test_a_conversation_with_calls_and_results_is_rendered_by_the_models_own_template(system: System) -> None:
    first = ask(system, tool_choice="required", seed=0)
    said = first.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12 °C"} for call in said.tool_calls]
    history = [*MESSAGES, said.model_dump(exclude_none=True), *results, {"role": "user", "content": "And now?"}]
    answer = ask(system, messages=history, max_tokens=1)
    with LLM("tiny-qwen2", root=system.root, names=system.names, threads=1, kv_bytes=64 << 20) as llm:
        calls = "".join(
            f'\n<tool_call>\n{{"name": "{call.function.name}", "arguments": '
            f"{json.dumps(json.loads(call.function.arguments), ensure_ascii=False)}}}\n</tool_call>"
            for call in said.tool_calls
        )
        described = [json.dumps(tool, ensure_ascii=False) for tool in rendered()]
        text = (
            "<|im_start|>system\n# Tools\n\nThese functions may be called:\n<tools>\n" + "\n".join(described) + "\n"
            "</tools>\n\nWrite each call as a JSON object with name and arguments:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
            f"<|im_start|>user\n{MESSAGES[0]['content']}<|im_end|>\n<|im_start|>assistant{calls}<|im_end|>\n"
            "<|im_start|>user" + "\n<tool_response>\n12 °C\n</tool_response>" * len(results) + "<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert answer.usage.prompt_tokens == len(llm.encode(text))
        assert llm._prompt(history, offered_tools()).ids == llm.encode(text)
        completion = llm.chat(
            MESSAGES, llm.sampling(seed=0, max_tokens=400, temperature=1), tools=TOOLS, tool_choice="required"
        )
        assert [(call.name, call.arguments) for call in completion.tool_calls] == [
            (call.function.name, call.function.arguments) for call in said.tool_calls
        ]
        assert (completion.finish, completion.text) == ("tool_calls", "")


def offered_tools() -> Any:
    from vai.text.tools import offered, read_tools

    return offered(read_tools(TOOLS))


def rendered() -> list[dict[str, Any]]:
    return offered_tools().rendered()


def test_results_reach_a_model_whose_template_knows_no_tools(system: System) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
    ]
    with LLM("tiny", root=system.root, names=system.names, threads=1, kv_bytes=64 << 20) as llm:
        text = llm.decode(llm._prompt(history, offered_tools()).ids)
    assert '{"type": "function", "function": {"name": "get_time"' in text
    assert '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n' in text
    assert "<tool_response>\nnoon\n</tool_response>\n<tool_response>\none\n</tool_response>\n" in text
    assert ask(system, "tiny", messages=history, max_tokens=1).usage.prompt_tokens > 100


def test_a_template_whose_calls_are_of_no_known_format_is_refused_by_name_with_tools_only(system: System) -> None:
    card = Registry(system.root, system.names).get("tiny")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<call>{{ tools | tojson }}{% endif %}"
    Registry(system.root, system.names).put(
        Name("odd", card.source, digest=card.digest, overrides={"template": template})
    )
    try:
        assert ask(system, "odd", tools=[], max_tokens=1).choices
        with pytest.raises(
            openai.BadRequestError, match="chat template of 'odd' takes tools, but the format"
        ) as caught:
            ask(system, "odd", max_tokens=1)
        assert (caught.value.param, caught.value.code) == ("tools", "not_supported")
    finally:
        Registry(system.root, system.names).forget("odd")


def test_reasoning_is_streamed_beside_the_content(system: System) -> None:
    card = Registry(system.root, system.names).get("tiny-qwen2")
    template = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    )
    Registry(system.root, system.names).put(
        Name("thinker", card.source, digest=card.digest, overrides={"template": template})
    )
    try:
        common: dict[str, Any] = {"tools": [], "max_tokens": 20, "seed": 1, "logprobs": True}
        thought = ask(system, "thinker", **common).choices[0]
        assert thought.message.reasoning_content
        assert thought.message.content == ""
        deltas = [chunk.choices[0].delta for chunk in ask(system, "thinker", **common, stream=True)]
        pieces = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
        assert "".join(pieces) == thought.message.reasoning_content
        assert not any(delta.content for delta in deltas)
        silent = {"chat_template_kwargs": {"enable_thinking": False}}
        spoken = ask(system, "thinker", **common, extra_body=silent).choices[0]
        assert spoken.message.content
        assert getattr(spoken.message, "reasoning_content", None) is None
        with pytest.raises(openai.BadRequestError, match="reads no variable 'enable_thinking'") as caught:
            ask(system, "tiny-qwen2", **common, extra_body=silent)
        assert caught.value.param == "chat_template_kwargs"
        called = ask(system, "thinker", tool_choice=NAMED, seed=0, max_tokens=300, temperature=1.5).choices[0]
        assert called.message.reasoning_content
        if called.finish_reason == "tool_calls":
            check("get_weather", called.message.tool_calls[0].function.arguments)
    finally:
        Registry(system.root, system.names).forget("thinker")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "get_rich"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": openai.omit, "extra_body": {"functions": [{"name": "f"}]}}, "functions"),
        ({"extra_body": {"guided_regex": "a+"}}, "tools"),
    ],
)
def test_what_cannot_be_offered_is_400_with_the_field(system: System, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(system, **more)
    assert caught.value.param == param


def test_hostile_schemas_are_refused_in_time_and_cost_nobody_anything(system: System) -> None:
    hostile = [
        {"type": "object", "properties": {"x": {"type": "string", "pattern": "(a+)+$" * 50}}, "required": ["x"]},
        {"type": "object", "properties": {"x": {"type": "wizard"}}},
        {"type": "object", "properties": {"x": {"$ref": "https://example.com/x"}}},
    ]
    for parameters in hostile:
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        with pytest.raises(openai.BadRequestError):
            ask(system, tools=tools, tool_choice="required")
    many = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(128)]
    with pytest.raises(openai.BadRequestError, match="context of 'tiny-qwen2' holds 4096"):
        ask(system, tools=[*many[1:], TOOLS[0]], tool_choice="required")
    answer = ask(system, tools=many[:20], tool_choice="required", seed=1, max_tokens=2).choices[0]
    assert answer.finish_reason == "length"
    until(system.idle)
