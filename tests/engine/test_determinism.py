"""Determinism as a matrix: every way of asking, under everything that happens to requests, gives the same bits.

A row is a way to run the requests; the columns are the requests: greedy, sampled, hot with every logprob, penalized and
biased, several choices, stop ids. What is compared are token ids, the bits of all logprobs, and how each answer ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from msgspec.structs import replace

from vai import LLM
from vai.engine.engine import Engine
from vai.kernels import table
from vai.kernels.program import MAX_SEQUENCES
from vai.request import Output, Request, SamplingParams, Speculate

Root = tuple[Path, Path, dict[str, str]]
Make = Callable[..., Engine]


class Answer(NamedTuple):
    """All that a request was told, floats as their bits."""

    tokens: tuple[int, ...]
    logprobs: bytes
    finish: str | None
    seed: int | None


Answers = dict[str, Answer]

GREEDY = SamplingParams(temperature=0, seed=1, max_tokens=24, logprobs=3)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=28, logprobs=0)
HOT = SamplingParams(temperature=1.5, min_p=0.01, seed=1 << 62, max_tokens=22, logprobs=20)
PENALIZED = SamplingParams(
    seed=3, max_tokens=24, logprobs=1, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
    logit_bias={5: 3.5, 9: -100, 400: 1.25},
)  # fmt: skip
STOPPED = SamplingParams(
    temperature=0.8, seed=4, max_tokens=60, min_tokens=5, logprobs=2, stop_ids=tuple(range(0, 512, 8))
)


@pytest.fixture(scope="module")
def columns(tiny_root: Root) -> list[Request]:
    """Prompts of one token, under and over a page and a chunk, with repetitions for those who guess."""
    llama, qwen2 = tiny_root[2]["tiny"], tiny_root[2]["tiny-qwen2"]
    repeating = [11, 12, 13, 14, 15, 16, 17] * 8
    asked = {
        "greedy": (llama, repeating, GREEDY, 0),
        "sampled": (llama, range(32), SAMPLED, 0),
        "hot": (llama, [3 * i % 500 for i in range(130)], HOT, 0),
        "penalized": (llama, range(20, 90), PENALIZED, 0),
        "choice 0": (llama, range(70), SAMPLED, 0),
        "choice 3": (llama, range(70), SAMPLED, 3),
        "stopped": (llama, [5], STOPPED, 0),
        "other greedy": (qwen2, repeating, GREEDY, 0),
        "other hot": (qwen2, range(100, 133), HOT, 0),
        "other stopped": (qwen2, range(40), STOPPED, 1),
    }
    return [
        Request(id=name, image=image, tokens=list(prompt), sampling=sampling, choice=choice)
        for name, (image, prompt, sampling, choice) in asked.items()
    ]


def told(outputs: Sequence[Output]) -> Answer:
    logprobs = [one for output in outputs for one in output.logprobs]
    floats = itertools.chain.from_iterable((one.logprob, *one.top_logprobs) for one in logprobs)
    ids = itertools.chain.from_iterable(one.top_ids for one in logprobs)
    bits = np.fromiter(floats, "<f4").tobytes() + np.fromiter(ids, "<i4").tobytes()
    assert not any(output.error for output in outputs)
    tokens = tuple(token for output in outputs for token in output.tokens)
    return Answer(tokens, bits, outputs[-1].finish, next(each.seed for each in outputs if each.seed is not None))


def run(engine: Engine, requests: Iterable[Request], each_step: Callable[[int], None] = lambda step: None) -> Answers:
    """Submit together and step to the end; `each_step` gets the number of the step that was."""
    requests = list(requests)
    outputs: dict[str, list[Output]] = {}
    for request in requests:
        engine.submit(request)
    for step in itertools.count():
        if not engine.has_work():
            return {request.id: told(outputs[request.id]) for request in requests}
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        each_step(step)
    raise AssertionError


@pytest.fixture(scope="module")
def alone(tiny_root: Root, columns: list[Request]) -> Answers:
    """Each request in an engine that never sees another, with one thread: what all others must be equal to."""
    answers: Answers = {}
    for request in columns:
        engine = Engine(tiny_root[0], threads=1, pool=np.full(64 << 20, 0xFF, np.uint8))
        answers |= run(engine, [request])
        engine.close()
    assert len({answer.tokens for answer in answers.values()}) == len(columns)
    assert {answer.finish for answer in answers.values()} == {"stop", "length"}
    return answers


# --- the rows -------------------------------------------------------------------------------------------------------


def in_a_batch_of_64(make: Make, root: Path, columns: list[Request]) -> Answers:
    engine, running = make(root, slabs=4), []
    for image in {request.image for request in columns}:
        own = sum(request.image == image for request in columns)
        for number in range(MAX_SEQUENCES - own):
            prompt = [(number * 7 + i) % 512 for i in range(number % 40 + 1)]
            engine.submit(Request(id=f"{image[:4]} {number}", image=image, tokens=prompt, sampling=SAMPLED))
    answers = run(engine, columns, lambda _: running.append(min(each.running for each in engine.status().models)))
    assert max(running) == MAX_SEQUENCES
    return answers


def chunked_in_sevens(make: Make, root: Path, columns: list[Request]) -> Answers:
    return run(make(root, slabs=2, max_rows=7), columns)


def one_row_at_a_time(make: Make, root: Path, columns: list[Request]) -> Answers:
    return run(make(root, slabs=2, max_rows=1), columns)


def with_two_threads(make: Make, root: Path, columns: list[Request]) -> Answers:
    return run(make(root, slabs=2, threads=2), columns)


def preempted(make: Make, root: Path, columns: list[Request]) -> Answers:
    """Urgent requests of the same models come again and again, and take places and pages away."""
    engine = make(root, slabs=2, max_sequences=2)
    images = sorted({request.image for request in columns})

    def disturb(step: int) -> None:
        if step % 6 == 5 and step < 400:
            for image in images:
                tokens = [step % 500] * 40
                engine.submit(
                    Request(id=f"{image[:4]} {step}", image=image, tokens=tokens, sampling=replace(HOT, max_tokens=3))
                )

    answers = run(engine, [replace(request, priority=1) for request in columns], disturb)
    assert all(model.preemptions > 3 for model in engine.status().models)
    return answers


def after_100_switches(make: Make, root: Path, columns: list[Request]) -> Answers:
    engine = make(root, slabs=2)
    images = sorted({request.image for request in columns})
    for number in range(101):
        run(engine, [Request(id="s", image=images[number % 2], tokens=[number], sampling=replace(HOT, max_tokens=1))])
    assert len(engine.switches().switched) == 101
    return run(engine, columns)


def in_an_engine_after_another(make: Make, root: Path, columns: list[Request]) -> Answers:
    """The first engine dies in the middle; the second gets what was answered so far, in the pool of the first."""
    pool = np.full(64 << 20, 0xFF, np.uint8)
    first = Engine(root, threads=1, pool=pool)
    begun: dict[str, list[Output]] = {request.id: [] for request in columns}
    for request in columns:
        first.submit(request)
    while sum(len(outputs) > 4 for outputs in begun.values()) < 3:
        for output in first.step():
            begun[output.id].append(output)
    second = Engine(root, threads=1, pool=pool)  # the first was not closed: it is as if killed
    rest = {}
    for request in columns:
        made = [token for output in begun[request.id] for token in output.tokens]
        if not begun[request.id] or begun[request.id][-1].finish is None:
            rest[request.id] = replace(request, tokens=[*request.tokens, *made], emitted=len(made))
    for request in rest.values():
        second.submit(request)
    while second.has_work():
        for output in second.step():
            begun[output.id].append(output)
    second.close()
    assert sum(request.emitted > 0 for request in rest.values()) >= 3
    return {name: told(outputs) for name, outputs in begun.items()}


def after_a_prefix_hit(make: Make, root: Path, columns: list[Request]) -> Answers:
    engine, cached = make(root, slabs=2), {}
    run(engine, [replace(request, sampling=GREEDY) for request in columns])
    for request in columns:
        engine.submit(request)
    outputs: dict[str, list[Output]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
            cached[output.id] = max(output.cached_tokens, cached.get(output.id, 0))
    assert all(cached[each.id] == (len(each.tokens) - 1) // 32 * 32 for each in columns)
    return {name: told(own) for name, own in outputs.items()}


def without_the_prefix_cache(make: Make, root: Path, columns: list[Request]) -> Answers:
    return run(make(root, slabs=2), [replace(request, cache=False) for request in columns])


def guessing_from_the_prompt(make: Make, root: Path, columns: list[Request]) -> Answers:
    engine = make(root, slabs=2, clock=lambda: 0.0)  # steps cost nothing, so that every guess is worth it
    answers = run(engine, [replace(each, speculate=Speculate(kind="ngram", max_tokens=5)) for each in columns])
    verified = [(model.guessed, model.accepted) for model in engine.status().models]
    assert all(guessed > accepted > 0 for guessed, accepted in verified)  # some stood, and some did not
    return answers


def guessing_with_a_draft_model(make: Make, root: Path, columns: list[Request]) -> Answers:
    """The model itself: nobody else has its vocabulary here, and all its guesses stand."""
    engine = make(root, slabs=2, clock=lambda: 0.0)
    answers = run(engine, [replace(each, speculate=Speculate(kind="draft", draft=each.image)) for each in columns])
    assert all(model.accepted > 10 for model in engine.status().models)
    return answers


ROWS = (
    in_a_batch_of_64,
    chunked_in_sevens,
    one_row_at_a_time,
    with_two_threads,
    preempted,
    after_100_switches,
    in_an_engine_after_another,
    after_a_prefix_hit,
    without_the_prefix_cache,
    guessing_from_the_prompt,
    guessing_with_a_draft_model,
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_every_bit_of_every_answer_is_the_same(
    row: Callable[[Make, Path, list[Request]], Answers],
    tiny_root: Root,
    make_engine: Make,
    columns: list[Request],
    alone: Answers,
) -> None:
    assert row(make_engine, tiny_root[0], columns) == alone


@pytest.mark.parametrize("isa", table.isas())
def test_every_bit_is_the_same_on_every_instruction_set(
    isa: str, tiny_root: Root, make_engine: Make, columns: list[Request], alone: Answers
) -> None:
    assert run(make_engine(tiny_root[0], slabs=2, isa=isa), columns) == alone


# --- words: what stop strings and choices are made of -----------------------------------------------------------------


def test_stop_strings_and_choices_are_the_same_in_company_with_other_threads_and_again(tiny_root: Root) -> None:
    prompts = [f"{number} sheep went to " * (number % 5 + 1) for number in range(12)]
    sampling = SamplingParams(temperature=0.9, seed=11, max_tokens=40, logprobs=2)
    with LLM("tiny", root=tiny_root[0], names=tiny_root[1], threads=1, kv_bytes=64 << 20) as llm:
        free = [llm.generate(prompt, sampling) for prompt in prompts]
        stop = sorted({each.text[len(each.text) // 2 :][:2] for each in free} - {""})[:8]
        alone = [llm.generate(prompt, sampling, stop=stop) for prompt in prompts]
        together = llm.generate(prompts, sampling, stop=stop)
        choices = llm.choices(prompts[3], 4, sampling, stop=stop)
    assert any(each.finish == "stop" for each in alone)
    with LLM("tiny", root=tiny_root[0], names=tiny_root[1], threads=2, kv_bytes=64 << 20) as llm:
        again = llm.generate(prompts[::-1], sampling, stop=stop)[::-1]
        more = llm.choices(prompts[3], 9, sampling, stop=stop)

    def said(answers: Iterable[object]) -> list[tuple[object, ...]]:
        names = ("text", "token_ids", "logprobs", "finish", "seed", "fingerprint")
        return [tuple(getattr(each, name) for name in names) for each in answers]

    assert said(together) == said(again) == said(alone)
    assert said(choices) == said(more[:4])
    assert len({each.text for each in more}) > 4


def test_a_fingerprint_names_the_model_and_its_arithmetic_whatever_runs_it(tiny_root: Root) -> None:
    made = {}
    for name, threads in itertools.product(("tiny", "tiny-qwen2"), (1, 2)):
        with LLM(name, root=tiny_root[0], names=tiny_root[1], threads=threads, kv_bytes=64 << 20) as llm:
            made[name, threads] = llm.generate("x", SamplingParams(max_tokens=1)).fingerprint
    assert made["tiny", 1] == made["tiny", 2] != made["tiny-qwen2", 1] == made["tiny-qwen2", 2]
    kind, weights, program, abi, kv_type = made["tiny", 1].split("-")
    assert (kind, abi, kv_type, len(weights), len(program)) == ("vai", "1", "bf16", 12, 12)
