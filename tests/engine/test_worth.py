"""What a model's steps teach about its next prompt rows, and what it is good for: a step that keeps to its time."""

from __future__ import annotations

import random

import pytest

from vai.engine.batch import Batch
from vai.engine.sampler import Draw
from vai.engine.scheduler import STEP_WHILE_STREAMING
from vai.engine.worth import STEEPEST, Worth

from .test_scheduler import Bench, model

READ, ROW, TOKEN = 0.04, 0.0018, 0.0018 * 0.0012  # seconds of a step, a row and a token in its context: a 0.5B


def take(bench: Bench, batch: Batch, token: float) -> float:
    seconds = READ + ROW * batch.rows + token * batch.reads()
    bench.now += seconds
    bench.scheduler.commit(batch, [Draw(0, None) for _ in batch.places])
    bench.take_outputs()
    return seconds


def run(bench: Bench, identity: str, token: float) -> list[float]:
    """Seconds of the steps until a request is answered."""
    seconds = []
    while identity not in bench.finished:
        batch = bench.scheduler.pick()
        assert batch is not None
        seconds.append(take(bench, batch, token))
    return seconds


@pytest.mark.parametrize("token", [TOKEN, 2 * TOKEN])
def test_a_long_prompt_keeps_to_the_time_of_a_step_however_dear_its_end_is(token: float) -> None:
    bench = Bench(slabs=40, max_rows=512)
    a = model("a", 65536)
    for number in range(4):
        bench.submit(a, [number], 20_000)
    long = bench.submit(a, [n % 250 for n in range(8000)], 1)
    seconds = run(bench, long, token)
    assert max(seconds) < STEP_WHILE_STREAMING * 1.15
    assert sum(seconds) / len(seconds) > STEP_WHILE_STREAMING * 0.8  # and its time is used


def test_the_next_turn_of_a_long_conversation_is_foreseen_after_many_short_ones() -> None:
    bench = Bench(slabs=40, max_rows=512)
    a = model("a", 65536)
    for number in range(4):
        bench.submit(a, [number], 20_000)
    said = [n % 250 for n in range(8000)]
    run(bench, bench.submit(a, said, 1), TOKEN)
    for number in range(40):
        run(bench, bench.submit(a, [number % 250] * 200, 1), TOKEN)
    again = bench.submit(a, [*said, *range(200)], 1)
    seconds = run(bench, again, TOKEN)
    assert bench.cached[again] == 8000
    assert max(seconds) < STEP_WHILE_STREAMING * 1.3


def test_the_slope_is_found_through_noise_and_survives_what_is_short() -> None:
    draw, worth = random.Random(1), Worth()
    for context in [*range(0, 8000, 100), *(draw.randrange(100) for _ in range(300))]:
        seconds = 80 * (ROW + TOKEN * context) * draw.uniform(0.8, 1.25)
        worth.note(80, 80 * context, seconds)
    assert 0.7 < worth.slope / (TOKEN / ROW) < 1.4
    assert 0.7 < worth.speed * ROW < 1.4


def test_steps_that_say_nothing_teach_nothing() -> None:
    worth = Worth()
    worth.note(6, 600, 1.0)
    assert worth.speed == 0
    worth.note(64, 0, 0.1)
    worth.note(64, 64 * 9000, 1e6)  # the machine stood still
    assert 0 < worth.slope <= STEEPEST
    falling = Worth()
    falling.note(64, 0, 0.1)
    falling.note(64, 64 * 9000, 0.01)
    assert falling.slope == 0
