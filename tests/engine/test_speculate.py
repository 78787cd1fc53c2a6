"""Speculation: whatever is guessed, by whom, and however much of it stands, answers are those of plain decoding."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from vai.burn.burn import burn
from vai.burn.synth import SHAPES, synthesize
from vai.engine.batch import Batch
from vai.engine.client import EngineClient
from vai.engine.engine import Engine
from vai.engine.resume import Answer
from vai.engine.sampler import Draw
from vai.engine.sequence import Sequence
from vai.engine.speculate import CHANCE, MEMORY, Lookup, Offer, Pace, Tally, kept, share
from vai.errors import BadRequest, ModelNotFound, VaiError
from vai.request import MAX_GUESSES, Output, Request, SamplingParams, Speculate, TokenLogprob

from .test_scheduler import Bench, answer, model

Root = tuple[Path, Path, dict[str, str]]
Make = Callable[..., Engine]
Told = tuple[list[int], list[TokenLogprob], str | None]

REPEATING = [11, 12, 13, 14, 15, 16, 17] * 8
GREEDY = SamplingParams(temperature=0, max_tokens=60, logprobs=3)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=50, logprobs=0)
COLD = SamplingParams(temperature=0.05, seed=3, max_tokens=60, logprobs=2)
PENALIZED = SamplingParams(
    temperature=0.05, seed=5, max_tokens=50, logprobs=1, repetition_penalty=1.02, presence_penalty=0.05,
    frequency_penalty=0.02, logit_bias={15: 4.0, 16: -3.0},
)  # fmt: skip
HELD_OFF = SamplingParams(temperature=0.05, seed=4, max_tokens=60, min_tokens=25, stop_ids=tuple(range(0, 512, 8)))
EVERY = {"greedy": GREEDY, "sampled": SAMPLED, "cold": COLD, "penalized": PENALIZED, "held off": HELD_OFF}


@pytest.fixture(scope="session")
def pair_root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """(root, nothing, digests) of two models with the same vocabulary."""
    base = tmp_path_factory.mktemp("pair")
    digests = {}
    for seed, (name, layers) in enumerate({"large": 4, "small": 2}.items()):
        synthesize(base / f"{name}.gguf", shape=replace(SHAPES["tiny"], layers=layers), type="Q8_0", seed=seed)
        digests[name] = burn(base / f"{name}.gguf", base / "root").digest
    return base / "root", base, digests


def frozen() -> float:
    """A clock for which steps cost nothing, so that everything that can be guessed is worth it."""
    return 0.0


def ask(image: str, sampling: SamplingParams, prompt: Iterable[int] = REPEATING, **more: Any) -> Request:
    return Request(id=more.pop("id", "a"), image=image, tokens=list(prompt), sampling=sampling, **more)


def run(engine: Engine, *requests: Request) -> list[Output]:
    for request in requests:
        engine.submit(request)
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert engine.status().pool_used == 0
    return outputs


def told(outputs: list[Output], identity: str = "a") -> Told:
    """Tokens, logprobs (compared bit for bit) and how it ended."""
    own = [output for output in outputs if output.id == identity]
    assert [output.finish for output in own[:-1]] == [None] * (len(own) - 1)
    tokens = [token for output in own for token in output.tokens]
    return tokens, [each for output in own for each in output.logprobs], own[-1].finish


def guessed(outputs: list[Output]) -> tuple[int, int]:
    return sum(output.guessed for output in outputs), sum(output.accepted for output in outputs)


def ways(digests: dict[str, str], image: str) -> dict[str, Speculate]:
    other = next(digest for digest in digests.values() if digest != image)
    return {
        "ngram": Speculate(kind="ngram"),
        "itself": Speculate(kind="draft", draft=image),  # is always right
        "another": Speculate(kind="draft", draft=other, max_tokens=3),  # is nearly never
    }


# --- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ngram", "itself", "another"])
@pytest.mark.parametrize("name", EVERY)
def test_tokens_and_logprobs_are_those_of_plain_decoding(
    pair_root: Root, make_engine: Make, name: str, way: str
) -> None:
    root, _, digests = pair_root
    image, sampling = digests["small"], EVERY[name]
    plain = run(make_engine(root, slabs=2), ask(image, sampling))
    engine = make_engine(root, slabs=2, clock=frozen)
    outputs = run(engine, ask(image, sampling, speculate=ways(digests, image)[way]))
    assert told(outputs) == told(plain)
    assert guessed(plain) == (0, 0)
    guesses, stood = guessed(outputs)
    assert guesses > 0
    assert [(each.guessed, each.accepted) for each in engine.status().models if each.image == image] == [
        (guesses, stood)
    ]
    if way == "itself":
        assert len(outputs) < len(plain) / 4
        assert stood >= guesses - MAX_GUESSES  # but for those behind the end of the answer


def test_all_kinds_together_with_several_choices_give_each_its_own_answer(pair_root: Root, make_engine: Make) -> None:
    root, _, digests = pair_root
    requests = []
    for image in digests.values():
        for way, speculate in [("plain", Speculate()), *ways(digests, image).items()]:
            for choice in range(3):
                sampling = replace([COLD, GREEDY, SAMPLED][choice], max_tokens=30)
                name = f"{image[:4]} {way} {choice}"
                prompt = REPEATING[: 20 + 9 * choice]
                requests.append(ask(image, sampling, prompt, id=name, choice=choice, speculate=speculate))
    plain = run(make_engine(root, slabs=2), *(replace(each, speculate=Speculate()) for each in requests))
    for options in ({}, {"max_rows": 7}, {"max_sequences": 5, "threads": 2}):
        outputs = run(make_engine(root, slabs=2, clock=frozen, **options), *requests)
        assert {each.id: told(outputs, each.id) for each in requests} == {
            each.id: told(plain, each.id) for each in requests
        }
        assert 0 < guessed(outputs)[1] < guessed(outputs)[0]


@pytest.mark.parametrize("way", ["ngram", "itself"])
def test_a_stop_id_among_the_guesses_ends_the_answer_there(pair_root: Root, make_engine: Make, way: str) -> None:
    root, _, digests = pair_root
    image = digests["small"]
    tokens = told(run(make_engine(root), ask(image, GREEDY)))[0]
    for stop in list(dict.fromkeys(tokens))[:4]:
        sampling = replace(GREEDY, stop_ids=(stop,))
        plain = run(make_engine(root), ask(image, sampling))
        outputs = run(
            make_engine(root, slabs=2, clock=frozen), ask(image, sampling, speculate=ways(digests, image)[way])
        )
        assert told(outputs) == told(plain)
        assert told(outputs)[0][-1] == stop


def test_an_answer_ends_at_its_last_token_however_many_were_guessed(pair_root: Root, make_engine: Make) -> None:
    root, _, digests = pair_root
    image = digests["large"]
    whole = told(run(make_engine(root), ask(image, COLD)))
    engine = make_engine(root, slabs=2, clock=frozen)
    for count in range(1, 20):
        sampling = replace(COLD, max_tokens=count)
        outputs = run(engine, ask(image, sampling, speculate=ways(digests, image)["itself"]))
        assert told(outputs) == (whole[0][:count], whole[1][:count], "length")


def test_an_answer_fills_the_context_to_the_same_token(short_root: tuple[Path, str], make_engine: Make) -> None:
    root, digest = short_root
    sampling = SamplingParams(temperature=0)
    plain = run(make_engine(root), ask(digest, sampling))
    for speculate in (Speculate(kind="ngram"), Speculate(kind="draft", draft=digest, max_tokens=16)):
        assert told(run(make_engine(root, slabs=2, clock=frozen), ask(digest, sampling, speculate=speculate))) == told(
            plain
        )


@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_preempted_requests_go_on_with_the_same_bits(wide_root: tuple[Path, str], make_engine: Make, kind: str) -> None:
    root, digest = wide_root
    speculate = Speculate(kind="ngram") if kind == "ngram" else Speculate(kind="draft", draft=digest)
    requests = [
        ask(digest, replace(COLD, max_tokens=200), REPEATING, id="old", speculate=speculate),
        ask(digest, replace(SAMPLED, max_tokens=150), range(50, 150), id="middle", speculate=speculate),
        ask(digest, replace(GREEDY, max_tokens=120), range(200, 300), id="young", speculate=speculate),
    ]
    plain = {each.id: told(run(make_engine(root), replace(each, speculate=Speculate())), each.id) for each in requests}
    engine = make_engine(root, clock=frozen)  # room for 512 tokens of 726, not counting those of a draft model
    outputs = run(engine, *requests)
    assert {each.id: told(outputs, each.id) for each in requests} == plain
    assert guessed(outputs)[0] > 0
    if kind == "ngram":
        assert engine.status().models[0].preemptions > 0


def test_a_draft_model_gives_its_pages_back_before_any_request_does(
    wide_root: tuple[Path, str], make_engine: Make
) -> None:
    root, digest = wide_root
    engine = make_engine(root, clock=frozen)
    first = ask(digest, replace(COLD, max_tokens=150), range(150), id="a", cache=False,
                speculate=Speculate(kind="draft", draft=digest))  # fmt: skip
    second = ask(digest, replace(COLD, max_tokens=80), range(100), id="b", cache=False)
    engine.submit(first)
    outputs = []
    while guessed(outputs)[0] < 20:
        outputs += engine.step()
    held = engine.status().models[0].pages
    assert held > 2 * 5  # those of the request, and its shadow's
    outputs += run(engine, second)
    assert told(outputs, "a") == told(run(make_engine(root), replace(first, speculate=Speculate())), "a")
    assert told(outputs, "b") == told(run(make_engine(root), second), "b")
    assert engine.status().models[0].preemptions == 0


def test_prompts_beside_guesses_are_computed_in_pieces_and_nothing_changes(pair_root: Root, make_engine: Make) -> None:
    root, _, digests = pair_root
    image = digests["large"]
    streams = [
        ask(image, replace(COLD, max_tokens=120), id=way, speculate=speculate)
        for way, speculate in ways(digests, image).items()
    ]
    prompt = ask(image, SAMPLED, [5 * i % 499 for i in range(600)], id="prompt")
    plain = {each.id: told(run(make_engine(root), replace(each, speculate=Speculate())), each.id) for each in streams}
    engine = make_engine(root, slabs=2, max_rows=24, clock=frozen)
    for stream in streams:
        engine.submit(stream)
    outputs = []
    while not guessed(outputs)[0]:
        outputs += engine.step()
    before = len(outputs)
    outputs += run(engine, prompt)
    assert {each.id: told(outputs, each.id) for each in streams} == plain
    assert told(outputs, "prompt") == told(run(make_engine(root), prompt), "prompt")
    first = next(number for number, output in enumerate(outputs) if output.id == "prompt")
    assert guessed(outputs[before:first])[1] > 0  # others went on while it was computed


def test_what_was_guessed_wrongly_leaves_nothing_in_the_prefix_cache(pair_root: Root, make_engine: Make) -> None:
    root, _, digests = pair_root
    image = digests["small"]
    long = replace(SAMPLED, max_tokens=150)
    plain = make_engine(root, slabs=2)
    first = told(run(plain, ask(image, long)))
    follow = [*REPEATING, *first[0], 1, 2, 3]
    expected = run(plain, ask(image, GREEDY, follow))
    for speculate in ways(digests, image).values():
        engine = make_engine(root, slabs=2, clock=frozen)
        assert told(run(engine, ask(image, long, speculate=speculate))) == first
        outputs = run(engine, ask(image, GREEDY, follow))
        assert told(outputs) == told(expected)
        assert outputs[0].cached_tokens == expected[0].cached_tokens > 150


# --- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_requests_go_on_without_a_draft_model_that_is_released(pair_root: Root, make_engine: Make, steps: int) -> None:
    root, _, digests = pair_root
    image, draft = digests["large"], digests["small"]
    request = ask(image, COLD, speculate=Speculate(kind="draft", draft=draft))
    engine = make_engine(root, slabs=2, clock=frozen)
    engine.submit(request)
    outputs = [output for _ in range(steps) for output in engine.step()]
    engine.release(draft)
    assert draft not in {each.image for each in engine.status().models}
    outputs += run(engine)
    assert told(outputs) == told(run(make_engine(root), ask(image, COLD)))


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_an_aborted_request_gives_back_the_pages_of_its_draft_model_too(
    pair_root: Root, make_engine: Make, steps: int
) -> None:
    root, _, digests = pair_root
    engine = make_engine(root, slabs=2, clock=frozen)
    engine.submit(ask(digests["large"], COLD, speculate=ways(digests, digests["large"])["another"]))
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    assert engine.status().pool_used == 0
    engine.step()
    assert not engine.has_work()


def test_a_step_of_a_draft_model_that_fails_costs_its_guesses_only(
    pair_root: Root, make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, digests = pair_root
    image, draft = digests["large"], digests["small"]
    engine = make_engine(root, slabs=2, clock=frozen)
    engine.attach(draft)
    plan = next(entry.plan for entry in engine._bank.entries() if entry.digest == draft)

    def broken(*arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(plan, "forward", broken)
    outputs = run(engine, ask(image, COLD, speculate=Speculate(kind="draft", draft=draft)))
    assert told(outputs) == told(run(make_engine(root), ask(image, COLD)))
    assert guessed(outputs) == (0, 0)


@pytest.mark.parametrize("sampling", [COLD, PENALIZED, HELD_OFF], ids=["cold", "penalized", "held off"])
def test_an_answer_goes_on_in_another_engine_where_the_first_left_it(
    pair_root: Root, make_engine: Make, sampling: SamplingParams
) -> None:
    root, _, digests = pair_root
    image = digests["small"]
    plain = told(run(make_engine(root), ask(image, sampling)))
    for speculate in ways(digests, image).values():
        engine = make_engine(root, slabs=2, clock=frozen)
        request = ask(image, sampling, speculate=speculate)
        whole = run(engine, request)
        for cut in (len(whole) // 2,):
            answer = Answer(request)
            first = [answer.take(output) for output in whole[:cut]]
            assert answer.lost()
            rest = run(make_engine(root, slabs=2, clock=frozen), answer.rest())
            assert told(first + [answer.take(output) for output in rest]) == plain


def test_a_resumed_answer_does_not_need_the_draft_model_it_began_with(pair_root: Root, make_engine: Make) -> None:
    root, _, digests = pair_root
    gone = Speculate(kind="draft", draft="0" * 64)
    tokens = told(run(make_engine(root), ask(digests["large"], COLD)))[0]
    rest = ask(digests["large"], COLD, [*REPEATING, *tokens[:9]], emitted=9, speculate=gone)
    assert told(run(make_engine(root), rest))[0] == tokens[9:]


async def test_streams_of_a_killed_engine_go_on_with_what_would_have_come(
    pair_root: Root, start_engine: Callable[..., Any], make_engine: Make
) -> None:
    root, _, digests = pair_root
    image = digests["small"]
    long = replace(COLD, max_tokens=400)
    expected = told(run(make_engine(root), ask(image, long)))
    engine = start_engine(root)
    client = EngineClient(engine.socket, patience=30)

    def next_engine() -> None:
        engine.process.kill()
        engine.process.wait()
        start_engine(root)

    outputs, restart = [], None
    try:
        async for output in client.generate(ask(image, long, speculate=Speculate(kind="ngram"))):
            outputs.append(output)
            if guessed(outputs)[0] and restart is None:
                restart = asyncio.create_task(asyncio.to_thread(next_engine))
        assert restart is not None
        await restart
    finally:
        await client.close()
    assert told(outputs) == expected


# --- what cannot be ------------------------------------------------------------------------------------------------


def test_a_draft_model_of_another_vocabulary_or_none_is_refused_by_name(
    pair_root: Root, tmp_path: Path, make_engine: Make
) -> None:
    synthesize(tmp_path / "m.gguf", shape=replace(SHAPES["tiny"], vocabulary=640), type="Q8_0", seed=1)
    synthesize(tmp_path / "n.gguf", shape=SHAPES["tiny"], type="Q8_0", seed=1)
    other, image = (burn(tmp_path / name, tmp_path / "root").digest for name in ("m.gguf", "n.gguf"))
    engine = make_engine(tmp_path / "root", slabs=2)
    for draft, error, sentence in (
        (other, BadRequest, r"640 tokens.* 512"),
        ("0" * 64, ModelNotFound, "000000000000"),
        (None, BadRequest, "need the digest"),
    ):
        with pytest.raises(error, match=sentence):
            engine.submit(ask(image, GREEDY, speculate=Speculate(kind="draft", draft=draft)))
    with pytest.raises(BadRequest, match="no others"):
        engine.submit(ask(image, GREEDY, speculate=Speculate(kind="ngram", draft=image)))
    with pytest.raises(BadRequest, match="at least 1"):
        engine.submit(ask(image, GREEDY, speculate=Speculate(kind="ngram", max_tokens=0)))
    assert not engine.has_work()


def test_a_constrained_request_does_not_guess(pair_root: Root, make_engine: Make) -> None:
    root, _, digests = pair_root
    engine = make_engine(root, clock=frozen)
    engine.submit(ask(digests["large"], GREEDY, constrained=True, speculate=Speculate(kind="ngram")))
    outputs, position = [], len(REPEATING)
    while not any(output.finish for output in outputs):
        engine.mask("a", position + sum(len(output.tokens) for output in outputs), b"\xff" * 64)
        outputs += engine.step()
    assert told(outputs) == told(run(make_engine(root), ask(digests["large"], GREEDY)))
    assert guessed(outputs) == (0, 0)


# --- whether it pays -----------------------------------------------------------------------------------------------


def submit(bench: Bench, prompt: list[int], count: int, speculate: Speculate, draft: str | None = None) -> str:
    number = next(bench.ids)
    entry = model("a")
    request = Request(
        id=str(number),
        image=entry.digest,
        tokens=prompt,
        sampling=SamplingParams(max_tokens=count),
        speculate=speculate,
    )
    guesser = None if draft is None else model(draft)
    bench.scheduler.add(
        Sequence(request, entry, arrival=number, limit=len(prompt) + count, now=bench.now, draft=guesser)
    )
    return request.id


def drive(
    bench: Bench,
    cost: Callable[[Batch], float],
    drawn: Callable[[int], int] | None = None,
    drafted: Callable[[int], int] | None = None,
) -> Tally:
    """Run to the end with steps that take `cost`, and tokens that are what the model says, or `drawn` at a position.

    `drafted`: what a draft model says in its place.
    """
    while bench.scheduler.has_work():
        batch = bench.scheduler.pick()
        assert batch is not None
        bench.batches.append(batch)
        tokens = [int(row.argmax()) for row in bench.runner.forward(batch)]
        if drawn is not None:
            say = drafted if batch.drafting and drafted is not None else drawn
            tokens = [say(len(place.sequence.tokens) + len(place.ahead)) for place in batch.places]
        bench.now += cost(batch)
        bench.scheduler.commit(batch, [Draw(token, None) for token in tokens])
        for output in bench.scheduler.take_outputs():
            bench.answers.setdefault(output.id, []).extend(output.tokens)
    assert bench.pool.used_bytes == 0
    return bench.scheduler.tally("a" * 64)


@pytest.mark.parametrize(("seconds_per_row", "least", "most"), [(0.0, 150, 9999), (0.01, 1, 60)])
def test_guesses_that_mostly_fail_are_given_up_where_they_cost(seconds_per_row: float, least: int, most: int) -> None:
    noise = random.Random(1).choices(range(4), k=1000)  # whatever comes stood before, and says nothing
    bench = Bench(slabs=64)
    request = submit(bench, noise[:20], 200, Speculate(kind="ngram"))
    tally = drive(bench, lambda batch: 0.02 + seconds_per_row * batch.rows, lambda position: noise[position])
    assert bench.answers[request] == noise[20:220]
    assert least <= tally.guessed <= most
    assert tally.accepted < tally.guessed / 2


def test_a_draft_model_that_is_always_right_is_not_asked_where_it_is_as_slow() -> None:
    bench = Bench(slabs=64)
    request = submit(bench, [3, 1, 4, 1, 5] * 4, 300, Speculate(kind="draft", draft="b" * 64), draft="b")
    drive(bench, lambda batch: 0.05)
    assert bench.answers[request] == answer([3, 1, 4, 1, 5] * 4, 300)
    assert sum(batch.drafting for batch in bench.batches) < len(bench.batches) / 8


def test_a_draft_model_that_is_right_and_quick_makes_most_of_the_answer() -> None:
    bench = Bench(slabs=64)
    request = submit(bench, list(range(150)), 300, Speculate(kind="draft", draft="b" * 64), draft="b")
    tally = drive(bench, lambda batch: 0.005 if batch.drafting else 0.05)
    assert bench.answers[request] == answer(list(range(150)), 300)
    assert tally.accepted > 200
    assert tally.accepted == tally.guessed


def test_a_draft_model_that_is_often_wrong_is_not_asked_where_the_text_repeats_itself() -> None:
    bench, luck = Bench(slabs=64), random.Random(3)
    period = [7, 1, 9, 4, 2, 8]
    submit(bench, period * 8, 600, Speculate(kind="draft", draft="b" * 64), draft="b")
    tally = drive(
        bench,
        lambda batch: 0.005 if batch.drafting else 0.05,
        lambda position: period[position % 6],
        lambda position: period[position % 6] if luck.random() < 0.5 else 0,
    )
    assert tally.accepted > 500
    assert tally.accepted > 0.9 * tally.guessed
    assert sum(batch.drafting for batch in bench.batches) < len(bench.batches) / 4


def test_a_draft_model_that_is_right_is_asked_where_lookups_are_mostly_wrong() -> None:
    noise = random.Random(1).choices(range(4), k=1000)
    bench = Bench(slabs=64)
    request = submit(bench, noise[:40], 300, Speculate(kind="draft", draft="b" * 64), draft="b")
    tally = drive(bench, lambda batch: 0.005 if batch.drafting else 0.05, lambda position: noise[position])
    assert bench.answers[request] == noise[40:340]
    assert tally.accepted > 200
    assert tally.accepted > 0.9 * tally.guessed


def test_lookups_go_on_while_a_draft_model_does_not_pay() -> None:
    noise, period = random.Random(2).sample(range(250), k=120), [7, 1, 9, 4, 2, 8]
    text = [*noise, *period * 60]
    bench = Bench(slabs=64)
    submit(bench, text[:20], 400, Speculate(kind="draft", draft="b" * 64), draft="b")
    tally = drive(bench, lambda batch: 0.05, lambda position: text[position])  # the draft model is as slow
    assert tally.accepted > 200
    assert sum(batch.drafting for batch in bench.batches) < len(bench.batches) / 4


def test_a_short_answer_to_a_long_prompt_is_not_worth_a_draft_model() -> None:
    for count, guesses in ((4, False), (200, True)):
        bench = Bench(slabs=128, max_rows=64)
        submit(bench, [n % 250 for n in range(600)], count, Speculate(kind="draft", draft="b" * 64), draft="b")
        tally = drive(bench, lambda batch: 0.01 + 0.001 * batch.rows if batch.drafting else 0.05)
        assert bool(tally.guessed) == guesses
        drafting = sum(batch.rows for batch in bench.batches if batch.drafting)
        assert (drafting > 600) == guesses


def test_the_likeliest_guesses_are_taken_until_their_rows_cost_more_than_they_bring() -> None:
    sure, unsure = Offer(0.95, 8), Offer(0.1, 8)
    free, linear = [1.0] * 20, [1.0 + n for n in range(20)]
    assert share([sure, unsure], free, 2) == [8, 8]
    assert share([sure], linear, 1) == [0]
    assert share([sure, unsure], [1.0 + 0.08 * n for n in range(20)], 2)[1] == 0
    assert 0 < share([sure], [1.0 + 0.2 * n for n in range(20)], 1)[0] <= 8
    assert share([sure], [1.0, 1.0], 1) == [1]  # room for one
    assert share([], [1.0], 3) == []


def test_who_does_not_guess_is_not_slowed_down_for_who_does() -> None:
    offer, seconds = Offer(0.8, 8), [1.0 + 0.15 * n for n in range(9)]
    alone, in_company = share([offer], seconds, 1)[0], share([offer], seconds, 8)[0]
    assert alone > 1
    assert in_company == 0


def test_steps_of_a_draft_model_count_once_for_all_that_share_them() -> None:
    offers = [Offer(0.9, 4, "d")] * 4
    dear = {"d": [0.0, 0.95, 0.95, 0.95, 0.95]}
    assert share(offers[:1], [1.0] * 20, 1, dear) == [0]
    assert share(offers, [1.0] * 20, 4, dear) == [0, 0, 0, 0]  # each would gain 1.9 times at most, in 1.9 steps
    cheap = {"d": [0.0, 0.3, 0.3, 0.3, 0.3]}
    assert min(share(offers, [1.0] * 20, 4, cheap)) >= 1


def test_what_steps_take_is_learned_and_forgotten() -> None:
    pace = Pace()
    assert pace.seconds(1, 3) == [0.0, 0.0, 0.0]
    pace.note(1, 1.0)
    pace.note(5, 3.0)
    assert pace.seconds(1, 6) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.0])
    pace.note(9, 2.0)  # nine rows in less time than five: those were disturbed
    assert pace.seconds(5, 5) == [2.0]
    for _ in range(MEMORY):
        pace.note(1, 1.0)
    assert pace.seconds(1, 9) == [1.0] * 9


def test_chances_follow_what_stood_and_return_when_nothing_is_tried() -> None:
    lookup = Lookup()
    assert lookup.chance == pytest.approx(CHANCE)
    for _ in range(5):
        lookup.judge(4, 0)
    low = lookup.chance
    assert low < 0.15
    for _ in range(30):
        lookup.decline()
    assert lookup.chance == pytest.approx(CHANCE, abs=0.05)
    for _ in range(10):
        lookup.judge(4, 4)
    assert lookup.chance > 0.95


def test_a_request_expects_what_came_of_the_guesses_for_others_before_it() -> None:
    bench = Bench(slabs=64)
    drafted = Speculate(kind="draft", draft="b" * 64)
    tallies = []
    for first in (1, 2):  # so that nothing is found of the other
        submit(bench, [first, *(n % 250 for n in range(300))], 120, drafted, draft="b")
        before = bench.scheduler.tally("a" * 64).guessed
        tallies.append(
            drive(bench, lambda batch: 0.02 + 0.001 * batch.rows if batch.drafting else 0.05).guessed - before
        )
    assert tallies[1] > 0.8 * tallies[0] > 0  # half of them without, now that it is known what guesses cost


def test_a_lookup_goes_on_as_the_text_did_where_it_stood_before() -> None:
    assert Lookup().look_up([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]
    assert Lookup().look_up([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 2) == [3, 8]  # three that agree beat two
    assert Lookup().look_up([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]  # of equals the latest
    assert Lookup().look_up([5, 6, 5, 6, 5], 6) == [6, 5, 6, 5, 6, 5]  # goes on repeating itself
    assert Lookup().look_up([7, 7, 7], 4) == [7] * 4
    for nothing in ([], [1], [1, 1], [1, 2, 3], [1, 2, 3, 2]):
        assert Lookup().look_up(nothing, 4) == []
    grown = Lookup()
    text = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1]
    for length in range(len(text)):
        grown.look_up(text[:length], 4)
    assert grown.look_up(text, 4) == Lookup().look_up(text, 4) == [4, 1, 5, 9]


def test_draws_stand_up_to_the_first_that_was_not_guessed() -> None:
    draws = [Draw(token, None) for token in (5, 6, 7)]
    assert kept([5, 6], draws) == draws
    assert kept([5, 9], draws) == draws[:2]
    assert kept([9, 6], draws) == draws[:1]
    assert kept([], draws[:1]) == draws[:1]
    wrong = VaiError("no number")
    assert kept([5, 6], [draws[0], wrong, draws[2]]) == [draws[0], wrong]
    assert kept([9, 6], [draws[0], wrong, draws[2]]) == draws[:1]  # nobody was to see it


def test_nobody_guesses_for_a_request_of_one_token() -> None:
    for count in (1, 2):
        request = Request(id="a", image="a", tokens=[1, 2, 3], speculate=Speculate(kind="ngram"))
        sequence = Sequence(request, model("a"), arrival=1, limit=3 + count, now=0.0)
        assert sequence.guesses == (count > 1)
