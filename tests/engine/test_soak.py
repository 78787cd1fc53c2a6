"""Everything at once, at random, with far too little room: every request ends as it would have ended alone, every page
comes back, and nothing is ever promised twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from vai.engine.engine import Engine
from vai.request import Output, Request, SamplingParams, Speculate

from .test_scheduler import PAGE, Bench, answer, model

Make = Callable[..., Engine]
STEPS = 20_000  # far more than any of these needs: more is a deadlock


@pytest.mark.parametrize("seed", range(4))
def test_requests_of_many_models_and_priorities_end_whoever_is_aborted_or_preempted(seed: int) -> None:
    draw = random.Random(seed)
    bench = Bench(slabs=draw.choice([6, 9]), max_rows=draw.choice([7, 64]), max_sequences=draw.choice([2, 6]))
    models = [model("a"), model("b", PAGE // 3), model("c"), model("d", PAGE // 7)]
    stems = [[draw.randrange(251) for _ in range(90)] for _ in range(3)]
    expected: dict[str, list[int]] = {}
    aborted: set[str] = set()

    def come() -> None:
        prompt = draw.choice(stems)[: draw.randrange(1, 90)] + [draw.randrange(251) for _ in range(draw.randrange(6))]
        count = draw.randrange(1, 60)
        identity = bench.submit(
            draw.choice(models),
            prompt,
            count,
            priority=draw.choice([0, 0, 0, -2, 1, 40, -(1 << 31)]),
            cache=draw.random() < 0.8,
            cache_salt=draw.choice(["", "x"]),
        )
        expected[identity] = answer(prompt, count)

    for _ in range(STEPS):
        if len(expected) < 60 and draw.random() < 0.2:
            come()
        if draw.random() < 0.02 and (left := sorted(expected.keys() - bench.finished.keys())):
            aborted.add(draw.choice(left))
            bench.scheduler.abort(draw.choice(sorted(aborted)))
        bench.step(seconds_per_row=draw.choice([0.0, 0.001, 0.3]))
        assert bench.pool.used_bytes + bench.pool.cached_bytes + bench.pool.free_bytes == bench.pool.size
        assert 0 <= bench.pool.used_bytes <= bench.pool.size
        if len(expected) == 60 and not bench.scheduler.has_work():
            break
    else:
        raise AssertionError(f"after {STEPS} steps these still wait: {expected.keys() - bench.finished.keys()}")
    for identity, whole in expected.items():
        assert bench.finished[identity].error is None
        made = bench.answers[identity]
        if bench.finished[identity].finish == "abort":
            assert identity in aborted and made == whole[: len(made)]
        else:
            assert made == whole
    assert sum(bench.scheduler.counts(letter * 64)[3] for letter in "abcd") > 0
    bench.check_that_every_page_is_back("abcd")


@pytest.mark.parametrize("seed", range(2))
def test_answers_of_real_models_survive_a_pool_that_holds_two_of_them(
    wide_root: tuple[Path, str], make_engine: Make, seed: int
) -> None:
    """Each request alone says what it must be; then all of them at once, with aborts, in 512 tokens of room."""
    root, image = wide_root
    draw = random.Random(seed)
    requests = []
    for number in range(9):
        sampling = SamplingParams(
            temperature=draw.choice([0, 0.8]), seed=number, max_tokens=draw.randrange(20, 70), logprobs=1
        )
        prompt = [draw.randrange(500) for _ in range(draw.choice([3, 40, 100]))] * draw.choice([1, 2])
        guesses = Speculate(kind=draw.choice(["off", "ngram"]))
        priority = draw.choice([0, 0, -1, 2])
        requests.append(
            Request(id=str(number), image=image, tokens=prompt, sampling=sampling, priority=priority, speculate=guesses)
        )
    quiet = make_engine(root, slabs=8)
    expected = {}
    for request in requests:
        expected[request.id] = _told(
            _run(quiet, [replace(request, speculate=Speculate())], random.Random(0), {})[request.id]
        )
    engine, aborted = make_engine(root), dict[str, int]()
    for request in requests:
        if draw.random() < 0.2:
            aborted[request.id] = draw.randrange(1, 40)
    outputs = _run(engine, requests, draw, aborted)
    for request in requests:
        tokens, logprobs = _told(outputs.get(request.id, []))
        whole = expected[request.id]
        if request.id in aborted:
            assert (tokens, logprobs) == (whole[0][: len(tokens)], whole[1][: len(logprobs)])
        else:
            assert (tokens, logprobs) == whole
    status = engine.status()
    assert status.pool_used == 0 and status.models[0].running == status.models[0].waiting == 0
    assert status.models[0].preemptions > 0


def _run(
    engine: Engine, requests: list[Request], draw: random.Random, aborted: dict[str, int]
) -> dict[str, list[Output]]:
    """Submit with some steps in between, abort those named after so many steps, and step to the end."""
    outputs: dict[str, list[Output]] = {}
    waiting = list(requests)
    for step in range(STEPS):
        if waiting and draw.random() < 0.5:
            engine.submit(waiting.pop(0))
        for identity in [identity for identity, after in aborted.items() if after == step]:
            engine.abort(identity)
        for output in engine.step():
            assert output.error is None, output.error
            outputs.setdefault(output.id, []).append(output)
        if not waiting and not engine.has_work():
            return outputs
    raise AssertionError(f"after {STEPS} steps there is still work")


def _told(outputs: list[Output]) -> tuple[list[int], list[tuple[float, tuple[int, ...], tuple[float, ...]]]]:
    tokens = [token for output in outputs for token in output.tokens]
    places = [one for output in outputs for one in output.logprobs]
    return tokens, [(one.logprob, tuple(one.top_ids), tuple(one.top_logprobs)) for one in places]
