"""Guessed tokens through the whole path: the same answers, and what came of the guesses in usage and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from vai.errors import BadRequest
from vai.llm import LLM
from vai.rom.registry import Name, Registry

from .system import System

REPEATING = list(range(60, 72)) * 4
OFF = {"speculative.n_max": 0}
TRIES = 20  # guesses are made where they pay by the clock, and on a busy machine it may look for a while as if none did
LOOKUP = {"speculative.type": "ngram-simple", "speculative.n_max": 16}


@pytest.fixture
def named(system: System) -> Iterator[System]:
    """A system with names whose draft models can guess, are not there, or cannot."""
    registry = Registry(system.root, system.names)
    digests = {name.name: name.digest for name in registry.names()}
    drafts = {"guided": "tiny", "waiting": "unburned", "mismatched": "tiny-qwen2"}
    registry.put(Name("unburned", "somewhere.gguf"))
    for name, draft in drafts.items():
        registry.put(Name(name, "", digest=digests["tiny"], overrides={"draft": draft}))
    yield system
    for name in [*drafts, "unburned"]:
        registry.forget(name)


def ask(system: System, how: dict[str, Any], model: str = "tiny", **more: Any) -> Any:
    body = {"ignore_eos": True} | how
    asked: dict[str, Any] = {"model": model, "prompt": REPEATING, "max_tokens": 80, "temperature": 0} | more
    return system.api.completions.create(**asked, extra_body=body)


def counted(system: System, model: str) -> list[int]:
    page = system.http.get(system.url + "/metrics").text
    names = ("drafts", "draft_tokens", "accepted_tokens")
    found = [re.search(rf'vllm:spec_decode_num_{name}_total{{model_name="{model}"}} ([0-9.]+)', page) for name in names]
    return [0 if each is None else int(float(each[1])) for each in found]


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.3, "seed": 5, "frequency_penalty": 0.1}], ids=["greedy", "sampled"]
)
def test_an_answer_is_the_same_with_guesses_and_usage_tells_how_many_stood(
    system: System, sampling: dict[str, Any]
) -> None:
    before = counted(system, "tiny")
    plain = ask(system, OFF, logprobs=3, **sampling)
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert counted(system, "tiny") == before
    drafts = drafted = 0
    for _ in range(TRIES):
        before = counted(system, "tiny")
        quick = ask(system, LOOKUP, logprobs=3, **sampling)
        assert quick.choices == plain.choices
        details = quick.usage.completion_tokens_details
        assert quick.usage.completion_tokens == plain.usage.completion_tokens == 80
        drafts, drafted, accepted = (now - then for now, then in zip(counted(system, "tiny"), before, strict=True))
        told = details.accepted_prediction_tokens, details.rejected_prediction_tokens
        assert told == (accepted, drafted - accepted)
        if drafts:
            break
    assert 0 < drafts <= drafted
    stream = ask(system, LOOKUP, stream=True, stream_options={"include_usage": True}, **sampling)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == plain.choices[0].text
    assert chunks[-1].usage.completion_tokens == 80


def test_a_stop_string_ends_an_answer_in_the_middle_of_what_was_guessed(system: System) -> None:
    text = ask(system, OFF).choices[0].text
    for begin in range(2, len(text) - 4, 12):
        stop = text[begin : begin + 3]
        plain, quick = ask(system, OFF, stop=stop, logprobs=0), ask(system, LOOKUP, stop=stop, logprobs=0)
        assert quick.choices == plain.choices
        assert quick.usage.completion_tokens == plain.usage.completion_tokens


def test_a_name_brings_its_draft_model_along(named: System) -> None:
    plain = ask(named, OFF)
    for how in ({}, {"speculative.type": "draft", "speculative.n_max": 3}):
        assert ask(named, how, model="guided").choices == plain.choices
    assert ask(named, {}, model="waiting").choices == plain.choices  # goes on without, until it is there


@pytest.mark.parametrize(
    ("model", "how", "status", "sentence"),
    [
        ("tiny", {"speculative.type": "draft"}, 400, "no draft model"),
        ("waiting", {"speculative.type": "draft"}, 503, "'unburned' is not resident"),
        ("mismatched", {}, 400, "'tiny-qwen2' cannot guess for 'mismatched': their tokenizers differ"),
        ("tiny", {"speculative.type": "eagle3"}, 400, "speculative.type"),
        ("tiny", {"speculative.n_max": 17}, 400, "speculative.n_max"),
        ("tiny", {"speculative.p_min": 0.5}, 400, "'speculative.p_min' is not known"),
    ],
)
def test_what_cannot_guess_is_refused_by_name(
    named: System, model: str, how: dict[str, Any], status: int, sentence: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=re.escape(sentence)) as caught:
        ask(named, how, model=model)
    assert caught.value.status_code == status


def test_an_llm_takes_a_draft_model_by_name(named: System) -> None:
    options: dict[str, Any] = {"root": named.root, "names": named.names, "threads": 1, "kv_bytes": 64 << 20}
    with LLM("tiny", **options) as llm:
        sampling = llm.sampling(temperature=0, max_tokens=60, logprobs=1)
        answers = (llm.generate(REPEATING, sampling) for _ in range(TRIES))
        expected = next(answer for answer in answers if answer.guessed)
    with LLM("tiny", draft="guided", **options) as llm:
        quick = llm.generate(REPEATING, sampling)
    assert (quick.token_ids, quick.logprobs, quick.text) == (expected.token_ids, expected.logprobs, expected.text)
    with pytest.raises(BadRequest, match="tokenizers differ"):
        LLM("tiny", draft="tiny-qwen2", **options)
