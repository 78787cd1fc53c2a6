"""Penalties, biases and choices over real tiny models: what each does, and that an answer stays its request's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from vai.engine.batch import Batch
from vai.engine.engine import Engine
from vai.engine.history import History
from vai.engine.runner import Runner
from vai.errors import BadRequest
from vai.request import Output, Request, SamplingParams, TokenLogprob

Make = Callable[..., Engine]
Root = tuple[Path, Path, dict[str, str]]
Answer = tuple[list[int], list[TokenLogprob]]

GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=20)
PENALIZED = SamplingParams(
    seed=3,
    max_tokens=60,
    logprobs=1,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias={5: 3.5, 9: -100, 400: 1.25},
)


def run(engine: Engine, requests: Iterable[Request], *, waiting: list[int] | None = None) -> dict[str, Answer]:
    """Tokens and logprobs of each request, computed together; `waiting` gets how many wait after each step."""
    answers: dict[str, Answer] = {}
    for each in requests:
        engine.submit(each)
        answers[each.id] = ([], [])
    while engine.has_work():
        for output in engine.step():
            take(answers[output.id], output)
        if waiting is not None:
            waiting.append(sum(model.waiting for model in engine.status().models))
    return answers


def take(answer: Answer, output: Output) -> None:
    assert output.error is None
    answer[0].extend(output.tokens)
    answer[1].extend(output.logprobs)


def one(engine: Engine, image: str, prompt: Iterable[int], sampling: SamplingParams) -> Answer:
    return run(engine, [Request(id="one", image=image, tokens=list(prompt), sampling=sampling)])["one"]


@pytest.fixture
def tiny(tiny_root: Root, make_engine: Make) -> tuple[Engine, str]:
    return make_engine(tiny_root[0]), tiny_root[2]["tiny"]


@given(prompt=st.lists(st.integers(0, 9)), answer=st.lists(st.integers(0, 9)))
def test_a_history_has_every_token_once_and_counts_those_of_the_answer(prompt: list[int], answer: list[int]) -> None:
    history = History(prompt, answer[: len(answer) // 2])
    for token in answer[len(answer) // 2 :]:
        history.append(token)
    assert len(set(history.ids)) == len(history.ids)
    counts = dict(zip(history.ids, history.made, strict=True))
    assert counts == dict.fromkeys(prompt, 0) | dict(Counter(answer))


def test_greedy_takes_the_best_logit_less_the_penalties_on_the_answer(tiny: tuple[Engine, str]) -> None:
    sampling = replace(GREEDY, presence_penalty=0.5, frequency_penalty=0.75)
    tokens, logprobs = one(*tiny, range(20, 60), sampling)
    assert tokens != one(*tiny, range(20, 60), GREEDY)[0]
    made: Counter[int] = Counter()
    for token, logprob in zip(tokens, logprobs, strict=True):
        scores = {
            id: value - 0.75 * made[id] - 0.5 * (made[id] > 0)
            for id, value in zip(logprob.top_ids, logprob.top_logprobs, strict=True)
        }
        assert token == max(scores, key=lambda id: scores[id])
        made[token] += 1


def test_repetition_counts_the_prompt_and_the_others_do_not(tiny: tuple[Engine, str]) -> None:
    favourite = one(*tiny, [7, 8], replace(GREEDY, max_tokens=1))[0][0]
    prompt = [favourite] * 3 + [7, 8]
    first = replace(GREEDY, max_tokens=1, logit_bias={favourite: 100})
    assert one(*tiny, prompt, first)[0] == [favourite]
    assert one(*tiny, prompt, replace(first, presence_penalty=2, frequency_penalty=2))[0] == [favourite]
    assert one(*tiny, prompt, replace(first, repetition_penalty=100))[0] != [favourite]


def test_a_bias_forces_and_forbids_and_leaves_the_logprobs(tiny: tuple[Engine, str]) -> None:
    plain = one(*tiny, [1, 2, 3], replace(GREEDY, max_tokens=1))
    forced = one(*tiny, [1, 2, 3], replace(GREEDY, max_tokens=1, logit_bias={77: 100}))
    banned = one(*tiny, [1, 2, 3], replace(GREEDY, max_tokens=1, logit_bias={plain[0][0]: -100}))
    assert forced[0] == [77] and banned[0] == [plain[1][0].top_ids[1]]
    assert forced[1][0].top_logprobs == banned[1][0].top_logprobs == plain[1][0].top_logprobs
    assert banned[1][0].logprob == plain[1][0].top_logprobs[1]


def test_a_bias_on_a_token_that_does_not_exist_is_refused_by_name(tiny: tuple[Engine, str]) -> None:
    with pytest.raises(BadRequest, match=r"16000000 has a bias but does not exist: .* 0 to \d+") as caught:
        one(*tiny, [1], replace(GREEDY, logit_bias={16_000_000: 1}))
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {1: 101}},
        {"logit_bias": dict.fromkeys(range(301), 1)},
    ],
)
def test_what_a_caller_of_this_process_sets_out_of_bounds_is_refused(
    tiny: tuple[Engine, str], change: dict[str, object]
) -> None:
    with pytest.raises(BadRequest):
        one(*tiny, [1], replace(GREEDY, **change))


def choices(image: str, prompt: Iterable[int], sampling: SamplingParams, count: int) -> list[Request]:
    tokens = list(prompt)
    return [
        Request(id=f"{index}", image=image, tokens=tokens, sampling=sampling, choice=index) for index in range(count)
    ]


def test_choices_differ_and_each_is_the_same_however_many_there_are(tiny_root: Root, make_engine: Make) -> None:
    image = tiny_root[2]["tiny"]
    for sampling in (PENALIZED, SamplingParams(seed=9, max_tokens=40, logprobs=0)):
        requests = choices(image, range(70), sampling, 4)
        alone = {each.id: run(make_engine(tiny_root[0]), [each])[each.id] for each in requests}
        assert len({tuple(tokens) for tokens, _ in alone.values()}) == 4
        assert run(make_engine(tiny_root[0]), requests) == alone
        assert run(make_engine(tiny_root[0], max_rows=7), [*requests[2:], requests[0]]) == {
            identity: answer for identity, answer in alone.items() if identity != "1"
        }


def test_the_prompt_of_several_choices_is_computed_once(
    tiny_root: Root, make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 0
    forward = Runner.forward

    def counted(self: Runner, batch: Batch) -> NDArray[np.float32]:
        nonlocal rows
        rows += batch.rows
        return forward(self, batch)

    monkeypatch.setattr(Runner, "forward", counted)
    requests = choices(tiny_root[2]["tiny"], range(200), replace(PENALIZED, max_tokens=20), 8)
    alone = {each.id: run(make_engine(tiny_root[0]), [each])[each.id] for each in requests}
    rows = 0
    assert run(make_engine(tiny_root[0]), requests) == alone
    made = sum(len(tokens) for tokens, _ in alone.values())
    assert rows == 200 + 7 * (200 % 32) + made - 8  # each computes the beginning of its own last page


@pytest.mark.parametrize("cut", [1, 31, 59])
def test_a_penalized_answer_goes_on_in_another_engine_where_the_first_left_it(
    tiny_root: Root, make_engine: Make, cut: int
) -> None:
    whole = choices(tiny_root[2]["tiny"], range(70), PENALIZED, 2)[1]
    tokens, logprobs = run(make_engine(tiny_root[0]), [whole])["1"]
    rest = replace(whole, tokens=whole.tokens + tokens[:cut], emitted=cut)
    assert run(make_engine(tiny_root[0]), [rest])["1"] == (tokens[cut:], logprobs[cut:])


def test_penalized_choices_continue_after_a_preemption_with_the_same_bits(
    wide_root: tuple[Path, str], make_engine: Make
) -> None:
    root, image = wide_root
    requests = choices(image, range(100), replace(PENALIZED, max_tokens=160), 3)
    alone = {each.id: run(make_engine(root), [each])[each.id] for each in requests}
    waiting: list[int] = []
    assert run(make_engine(root), requests, waiting=waiting) == alone
    assert waiting[0] == 0 and max(waiting) > 0  # somebody left and came back
