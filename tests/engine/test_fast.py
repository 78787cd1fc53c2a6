"""Fast pages in real tiny models: what happens to a request changes no bit of its answer, nor does the executor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from vai import LLM
from vai.engine.engine import Engine
from vai.engine.kinds import unpacked
from vai.engine.resume import Answer
from vai.errors import BadRequest, NotSupported
from vai.kernels import table
from vai.kernels.program import PAGE_TOKENS
from vai.request import Output, Request, SamplingParams, Speculate

from .test_determinism import Answers, Make, Root, told

GREEDY = SamplingParams(temperature=0, seed=1, max_tokens=12, logprobs=3)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=16, logprobs=2)
BEST = table.fasts()[-1]
FAST = {"fast": BEST}


def prompt(count: int, seed: int) -> list[int]:
    return [(61 * i * i + 17 * i + 29 * seed) % 512 for i in range(count)]


@pytest.fixture(scope="module")
def columns(tiny_root: Root) -> list[Request]:
    """Prompts with fast pages, but for one that is too short; the first repeats itself for those who guess."""
    llama, qwen2 = tiny_root[2]["tiny"], tiny_root[2]["tiny-qwen2"]
    asked = {
        "greedy": (llama, [11, 12, 13, 14, 15, 16, 17] * 20, GREEDY, 0),
        "sampled": (llama, prompt(200, 1), SAMPLED, 0),
        "choice 2": (llama, prompt(200, 1), SAMPLED, 2),
        "short": (llama, prompt(100, 2), SAMPLED, 0),
        "other": (qwen2, prompt(161, 3), GREEDY, 0),
    }
    return [
        Request(id=name, image=image, tokens=tokens, sampling=sampling, choice=choice)
        for name, (image, tokens, sampling, choice) in asked.items()
    ]


def outputs_of(
    engine: Engine, requests: Iterable[Request], each_step: Callable[[int], None] = lambda step: None
) -> dict[str, list[Output]]:
    """Submit together and step to the end."""
    requests = list(requests)
    outputs: dict[str, list[Output]] = {}
    for request in requests:
        engine.submit(request)
    for step in itertools.count():
        if not engine.has_work():
            return {request.id: outputs[request.id] for request in requests}
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        each_step(step)
    raise AssertionError


def answers(outputs: dict[str, list[Output]]) -> Answers:
    return {name: told(own) for name, own in outputs.items()}


def kinds(outputs: dict[str, list[Output]]) -> dict[str, int]:
    """Fast pages of each, all of which are at the beginning."""
    found = {name: unpacked(own[0].page_kinds or b"") for name, own in outputs.items()}
    assert not any(b"\0" in each for each in found.values())
    return {name: len(each) for name, each in found.items()}


@pytest.fixture(scope="module")
def alone(tiny_root: Root, columns: list[Request]) -> Answers:
    """Each request in an engine that never sees another: what all others must be equal to."""
    found: Answers = {}
    for request in columns:
        engine = Engine(tiny_root[0], threads=1, pool=np.full(64 << 20, 0xFF, np.uint8), **FAST)
        outputs = outputs_of(engine, [request])
        assert kinds(outputs) == {request.id: len(request.tokens) // 32 if len(request.tokens) > 128 else 0}
        found |= answers(outputs)
        engine.close()
    assert len({each.tokens for each in found.values()}) == len(columns)
    return found


# --- what happens to requests -----------------------------------------------------------------------------------------


def together(make: Make, root: Path, columns: list[Request]) -> Answers:
    return answers(outputs_of(make(root, slabs=2, **FAST), columns))


def chunked_in_elevens(make: Make, root: Path, columns: list[Request]) -> Answers:
    return answers(outputs_of(make(root, slabs=2, max_rows=11, **FAST), columns))


def with_two_threads(make: Make, root: Path, columns: list[Request]) -> Answers:
    return answers(outputs_of(make(root, slabs=2, threads=2, **FAST), columns))


def without_the_prefix_cache(make: Make, root: Path, columns: list[Request]) -> Answers:
    return answers(outputs_of(make(root, slabs=2, **FAST), [replace(each, cache=False) for each in columns]))


def preempted(make: Make, root: Path, columns: list[Request]) -> Answers:
    """Urgent requests come again and again and take places away; what was computed is not kept, and so done again."""
    engine = make(root, slabs=2, max_sequences=2, max_rows=48, **FAST)
    images = sorted({request.image for request in columns})

    def disturb(step: int) -> None:
        if step % 9 == 8 and step < 90:
            for image in images:
                few = replace(SAMPLED, max_tokens=2)
                engine.submit(Request(id=f"{image[:4]} {step}", image=image, tokens=[step] * 40, sampling=few))

    asked = [replace(request, priority=1, cache=request.choice > 0) for request in columns]
    found = answers(outputs_of(engine, asked, disturb))
    assert max(model.preemptions for model in engine.status().models) > 1
    return found


def guessing_from_the_prompt(make: Make, root: Path, columns: list[Request]) -> Answers:
    engine = make(root, slabs=2, clock=lambda: 0.0, **FAST)  # steps cost nothing: every guess is worth it
    found = answers(
        outputs_of(engine, [replace(each, speculate=Speculate(kind="ngram", max_tokens=5)) for each in columns])
    )
    assert sum(model.guessed for model in engine.status().models) > 0
    return found


def guessing_with_a_draft_model(make: Make, root: Path, columns: list[Request]) -> Answers:
    """The model itself, whose shadows are exact, so that not all they guess stands."""
    engine = make(root, slabs=2, clock=lambda: 0.0, **FAST)
    guessing = [replace(each, speculate=Speculate(kind="draft", draft=each.image)) for each in columns]
    found = answers(outputs_of(engine, guessing))
    assert all(model.accepted > 0 for model in engine.status().models)
    return found


def after_switches(make: Make, root: Path, columns: list[Request]) -> Answers:
    """In turn with the other model, a step of each."""
    engine = make(root, slabs=2, max_rows=40, **FAST)
    for image in sorted({request.image for request in columns}) * 5:
        outputs_of(engine, [Request(id="s", image=image, tokens=[5], sampling=replace(GREEDY, max_tokens=1))])
    assert len(engine.switches().switched) == 10
    return answers(outputs_of(engine, columns))


ROWS = (
    together,
    chunked_in_elevens,
    with_two_threads,
    without_the_prefix_cache,
    preempted,
    guessing_from_the_prompt,
    guessing_with_a_draft_model,
    after_switches,
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_every_bit_of_an_answer_with_fast_pages_is_the_same(
    row: Callable[[Make, Path, list[Request]], Answers],
    tiny_root: Root,
    make_engine: Make,
    columns: list[Request],
    alone: Answers,
) -> None:
    assert row(make_engine, tiny_root[0], columns) == alone


@pytest.mark.parametrize("adopts", [False, True])
def test_an_engine_after_another_goes_on_in_the_same_kinds(
    adopts: bool, tiny_root: Root, columns: list[Request], alone: Answers
) -> None:
    """The first dies in the middle; the next has its pages, or nothing."""
    pool = np.full(64 << 20, 0xFF, np.uint8)
    first = Engine(tiny_root[0], threads=1, pool=pool, **FAST)
    went_on = {request.id: Answer(request) for request in columns}
    outputs: dict[str, list[Output]] = {request.id: [] for request in columns}
    for request in columns:
        first.submit(request)
    while sum(len(own) > 3 for own in outputs.values()) < 3:
        for output in first.step():
            outputs[output.id].append(went_on[output.id].take(output))
    cache, running = first._scheduler.cache, [first._scheduler.find(request.id) for request in columns]
    for sequence in filter(None, running):
        told = [page.fast for page in sequence.shared]
        assert told == [bool(kind) for kind in sequence.kinds.ljust(len(told), b"\0")[: len(told)]]
    # How far the first came with each depends on how fast it is.
    left = {request.id: PAGE_TOKENS * len(own.shared) for request, own in zip(columns, running, strict=True) if own}
    kinds_of = {key: page.fast for key, page in cache._pages.items()}
    assert {*kinds_of.values()} == {kind for _, kind in first._scheduler.retention._speeds} == {False, True}
    if not adopts:
        pool = np.full(64 << 20, 0xFF, np.uint8)
    second = Engine(tiny_root[0], threads=1, pool=pool, **FAST)  # the first was not closed: it is as if killed
    for image in {request.image for request in columns}:
        second.attach(image)
    second.adopt()
    taken_over = second._scheduler.cache._pages
    assert {key: page.fast for key, page in taken_over.items()} == (kinds_of if adopts else {})
    rest, found = {}, {}
    for request in columns:
        if not went_on[request.id].over:
            assert went_on[request.id].lost()
            asked = went_on[request.id].rest()
            rest[asked.id] = request.id
            second.submit(asked)
    while second.has_work():
        for output in second.step():
            identity = rest[output.id]
            found.setdefault(identity, output.cached_tokens)
            outputs[identity].append(went_on[identity].take(output))
    second.close()
    assert answers(outputs) == alone
    assert len(rest) >= 3
    hits = {name: found[name] for name in ("greedy", "sampled", "other") if name in found}  # the other choice may share
    if adopts:
        assert any(left[name] >= 128 for name in hits if name in left)
        assert all(hit >= min(128, left.get(name, 0)) for name, hit in hits.items())
    else:
        assert not any(hits.values())


def test_deterministic_answers_are_those_of_an_engine_without_a_fast_kind_whatever_is_cached(
    tiny_root: Root, make_engine: Make, columns: list[Request], alone: Answers
) -> None:
    exact = outputs_of(make_engine(tiny_root[0], slabs=2), columns)
    engine = make_engine(tiny_root[0], slabs=2, **FAST)
    assert answers(outputs_of(engine, columns)) == alone  # fast pages are there now
    asked = [replace(request, deterministic=True) for request in columns]
    for cached in (False, True):
        found = outputs_of(engine, asked)
        assert answers(found) == answers(exact)
        assert {own[0].fingerprint for own in found.values()} == {own[0].fingerprint for own in exact.values()}
        assert not any(own[0].page_kinds for own in found.values())
        if not cached:
            assert [found[name][0].cached_tokens for name in ("sampled", "other", "short")] == [0, 0, 96]
    differing = [name for name, each in alone.items() if each.logprobs != answers(exact)[name].logprobs]
    assert sorted(differing) == ["choice 2", "greedy", "other", "sampled"]  # the fast kind has other bits
    again = outputs_of(engine, columns)  # both chains are there, equally long: the exact one is taken
    assert answers(again) == answers(exact)


def test_the_native_engine_gives_the_tokens_and_logprobs_of_the_reference(
    tiny_root: Root, make_engine: Make, columns: list[Request], alone: Answers
) -> None:
    few = [replace(each, sampling=replace(each.sampling, max_tokens=3)) for each in (columns[0], columns[4])]
    native = outputs_of(make_engine(tiny_root[0], slabs=2, **FAST), few)
    reference = outputs_of(make_engine(tiny_root[0], slabs=2, backend="reference", **FAST), few)
    assert kinds(native) == kinds(reference) == {"greedy": 4, "other": 5}
    assert answers(native) == answers(reference)
    assert all(alone[name].tokens[:3] == each.tokens for name, each in answers(native).items())


def test_an_engine_says_what_computes_its_fast_pages_and_a_fingerprint_names_it(
    tiny_root: Root, make_engine: Make, columns: list[Request]
) -> None:
    engine, exact = make_engine(tiny_root[0], slabs=2, **FAST), make_engine(tiny_root[0])
    assert (engine.status().fast, exact.status().fast) == (BEST, None)
    found = {name: own[0].fingerprint for name, own in outputs_of(engine, columns[2:4]).items()}
    assert found["choice 2"] == f"{found['short']}-{BEST}"


def test_an_answer_with_fast_pages_ends_as_it_would_have_in_an_engine_without_a_fast_kind(
    tiny_root: Root, make_engine: Make, columns: list[Request]
) -> None:
    first, second = make_engine(tiny_root[0], slabs=2, **FAST), make_engine(tiny_root[0], slabs=2)
    whole = outputs_of(first, columns[:2])
    exact = outputs_of(second, columns[:2])
    before = [model.workspace_bytes for model in second.status().models]
    for request in columns[:2]:
        went_on, outputs = Answer(request), whole[request.id]
        took = [went_on.take(output) for output in outputs[:5]]
        assert went_on.lost()
        (rest,) = outputs_of(second, [went_on.rest()]).values()
        ended = [*took, *map(went_on.take, rest)]
        for own, same in ((ended, True), (exact[request.id], False)):
            bits = [[(output.tokens, output.logprobs) for output in each] for each in (own, outputs)]
            assert (bits[0] == bits[1]) is same
        assert went_on.over
    # What stands in was lowered when it was needed, and is what plans of the fast kind take.
    assert [model.workspace_bytes for model in second.status().models] > before


def test_kinds_from_outside_are_checked(tiny_root: Root, make_engine: Make, columns: list[Request]) -> None:
    engine, exact = make_engine(tiny_root[0], **FAST), make_engine(tiny_root[0])
    with pytest.raises(BadRequest, match="cannot be fast"):
        engine.submit(replace(columns[1], page_kinds=b"\xff"))
    with pytest.raises(NotSupported, match="fast kind"):
        exact.submit(replace(columns[1], page_kinds=b"\x0f"))
    with pytest.raises(NotSupported, match="steam"):
        make_engine(tiny_root[0], fast="steam").submit(columns[0])
    assert not engine.has_work() and not exact.has_work()


def test_a_model_in_this_process_is_deterministic_where_it_is_told_so_once_or_each_time(tiny_root: Root) -> None:
    where = {"root": tiny_root[0], "names": tiny_root[1], "threads": 1, "kv_bytes": 64 << 20}
    told = SamplingParams(temperature=0, max_tokens=3, logprobs=0)
    with LLM("tiny", fast="off", **where) as llm:
        exact = llm.generate(prompt(200, 1), told)
    with LLM("tiny", fast=BEST, **where) as llm:
        fast, asked = llm.generate(prompt(200, 1), told), llm.generate(prompt(200, 1), told, deterministic=True)
    with LLM("tiny", fast=BEST, deterministic=True, **where) as llm:
        always, unlike = llm.generate(prompt(200, 1), told), llm.generate(prompt(200, 2), told, deterministic=False)
    assert asked.logprobs == always.logprobs == exact.logprobs != fast.logprobs
    assert fast.fingerprint == unlike.fingerprint == f"{exact.fingerprint}-{BEST}"
    assert exact.fingerprint == asked.fingerprint == always.fingerprint
