"""Priorities: who goes first, who makes way, and that nobody waits for ever; on the stand-in for a model."""

from __future__ import annotations

import itertools

import pytest

from vai.engine.batch import Batch
from vai.engine.priority import HEAD_START, MAX_HEAD_START, rank
from vai.engine.sampler import Draw
from vai.engine.scheduler import MAX_WAIT, QUANTUM, STEP_WHILE_STREAMING

from .test_scheduler import Bench, answer, model, turns


def take(bench: Bench, batch: Batch, seconds: float) -> None:
    """A step whose results do not matter, and so are not computed."""
    bench.now += seconds
    bench.scheduler.commit(batch, [Draw(0, None) for _ in batch.places])
    bench.take_outputs()


def step(bench: Bench, seconds_per_row: float) -> None:
    batch = bench.scheduler.pick()
    assert batch is not None
    take(bench, batch, seconds_per_row * batch.rows)


def test_the_lower_number_goes_first_and_equals_go_in_order_of_age() -> None:
    bench = Bench(max_sequences=1)
    bench.submit(model("a"), [9], 3)
    bench.step()
    by_id = {bench.submit(model("a"), [1], 1, priority=each): each for each in (5, -1, 0, 0, -2)}
    bench.run()
    assert [by_id[each] for each in bench.finished if each in by_id] == [-2, -1, 0, 0, 5]
    assert sorted(by_id, key=lambda each: (by_id[each], int(each))) == [
        each for each in bench.finished if each in by_id
    ]


@pytest.mark.parametrize("priority", [1, 3, 29, 1000, (1 << 31) - 1])
def test_a_step_of_priority_is_worth_so_many_seconds_of_age_and_no_more(priority: int) -> None:
    head_start = min(priority * HEAD_START, MAX_HEAD_START)
    assert rank(0.0, priority, 1) < rank(head_start + 0.1, 0, 2)
    assert rank(0.0, priority, 1) > rank(head_start - 0.1, 0, 2)


def test_who_has_a_low_priority_waits_a_bounded_time_however_many_urgent_ones_come() -> None:
    bench = Bench(max_sequences=1)
    patient = bench.submit(model("a"), [1], 1, priority=1 << 30)
    for _ in range(4):
        bench.submit(model("a"), [2], 5, priority=-(1 << 30))
    while patient not in bench.finished:
        bench.submit(model("a"), [2], 5, priority=-(1 << 30))  # five steps of work a second, and a second has five
        for _ in range(5):
            bench.step()
            bench.now += 0.2
        assert bench.now < 2 * MAX_HEAD_START + 60
    assert bench.now > 2 * MAX_HEAD_START - 60


def test_an_urgent_request_takes_the_room_of_lesser_ones_which_then_go_on_where_they_were() -> None:
    bench = Bench(slabs=2)  # four pages for each of the two groups
    lesser = [bench.submit(model("a"), [n] * 40, 20, priority=3) for n in range(2)]
    bench.step()
    bench.step()
    urgent = bench.submit(model("a"), [7] * 60, 2)  # two pages: one of the two makes way, the younger
    bench.run()
    assert list(bench.finished) == [urgent, *lesser]
    assert bench.scheduler.counts("a" * 64)[3] == 1
    assert bench.answers == {
        urgent: answer([7] * 60, 2),
        **{each: answer([n] * 40, 20) for n, each in enumerate(lesser)},
    }
    bench.check_that_every_page_is_back("a")


def test_an_urgent_request_takes_the_place_of_a_lesser_one_where_no_more_may_run_at_once() -> None:
    bench = Bench(max_sequences=2)
    lesser = [bench.submit(model("a"), [n], 30, priority=1) for n in range(2)]
    bench.step()
    urgent = bench.submit(model("a"), [7], 2)
    bench.run()
    assert list(bench.finished) == [urgent, *lesser]
    assert all(bench.answers[each] == answer([n], 30) for n, each in enumerate(lesser))


def test_equals_never_make_way_and_nobody_does_where_it_would_not_be_enough() -> None:
    bench = Bench(slabs=2)
    equal = bench.submit(model("a"), [1] * 70, 10)
    lesser = bench.submit(model("a"), [2], 10, priority=1)
    bench.step()
    large = bench.submit(model("a"), [3] * 96, 2)  # four pages of four; the lesser has one, the equal three
    bench.run()
    assert set(bench.finished) == {equal, lesser, large} and list(bench.finished)[-1] == large
    assert bench.scheduler.counts("a" * 64)[3] == 0


def test_pages_that_run_out_are_taken_from_the_lowest_priority_though_it_be_the_oldest() -> None:
    bench = Bench(slabs=2)
    old = bench.submit(model("a"), [1] * 20, 60, priority=2)
    young = bench.submit(model("a"), [2] * 40, 60)
    bench.run()
    assert list(bench.finished) == [young, old]
    assert bench.scheduler.counts("a" * 64)[3] >= 1
    assert bench.answers == {old: answer([1] * 20, 60), young: answer([2] * 40, 60)}


@pytest.mark.parametrize("lesser", "ab")
def test_models_with_urgent_requests_go_first_and_the_others_once_in_the_longest_wait(lesser: str) -> None:
    bench = Bench()
    for letter in "ab":
        bench.submit(model(letter, 4096), [1], 5000, priority=int(letter == lesser))
    order = turns(bench, 500, {"a": 0.02, "b": 0.02})
    seconds = 500 * 0.02
    assert seconds / (MAX_WAIT + 0.1) - 2 <= order.count(lesser) <= seconds / MAX_WAIT + 2
    assert max(map(len, order.split(lesser))) * 0.02 <= MAX_WAIT + 2 * 0.02


def test_a_model_is_as_urgent_as_those_of_its_requests_that_are_left() -> None:
    bench = Bench()
    urgent = bench.submit(model("a", 4096), [1], 5000)
    for letter in "ab":
        bench.submit(model(letter, 4096), [1], 5000, priority=1)
    turns(bench, 100, {"a": 0.02, "b": 0.02})
    bench.scheduler.abort(urgent)
    order = turns(bench, 60, {"a": 0.02, "b": 0.02})
    assert abs(order.count("a") - order.count("b")) <= 6


def test_a_model_that_waited_for_urgent_requests_of_another_has_saved_nothing_up() -> None:
    bench = Bench()
    urgent = bench.submit(model("a", 4096), [1], 5000)
    bench.submit(model("b", 4096), [1], 5000, priority=1)
    turns(bench, 1000, {"a": 0.02, "b": 0.02})
    bench.scheduler.abort(urgent)
    bench.submit(model("a", 4096), [1], 5000, priority=1)
    order = turns(bench, 60, {"a": 0.02, "b": 0.02})
    assert abs(order.count("a") - order.count("b")) <= 6


@pytest.mark.parametrize("costs", [{"a": 0.004, "b": 0.004}, {"a": 0.003, "b": 0.03}, {"a": 0.2, "b": 0.01}])
def test_two_clients_that_ask_two_models_in_turns_get_groups_of_steps_and_short_waits(costs: dict[str, float]) -> None:
    """Each sends its next request when the last one is answered, for a minute of the stand-in's clock."""
    bench = Bench()
    waiting: dict[str, float] = {}
    longest, order = 0.0, ""
    models = {letter: model(letter, 4096) for letter in "ab"}
    running = dict.fromkeys("ab", "")
    while bench.now < 60:
        for letter in "ab":
            if running[letter] in bench.finished or not running[letter]:
                running[letter] = bench.submit(models[letter], [1, 2, 3], 12)
                waiting[running[letter]] = bench.now
        batch = bench.scheduler.pick()
        assert batch is not None
        letter = batch.entry.digest[0]
        order += letter
        take(bench, batch, costs[letter])
        for identity in [each for each in waiting if bench.answers.get(each)]:
            longest = max(longest, bench.now - waiting.pop(identity))
    switches = sum(left != right for left, right in itertools.pairwise(order))
    quantum = {letter: max(1, int(QUANTUM / cost)) for letter, cost in costs.items()}
    assert longest <= MAX_WAIT + sum(costs.values()) + QUANTUM
    assert switches <= 2 * min(order.count(letter) / quantum[letter] for letter in "ab") * 1.35 + 10
    assert max(map(len, order.split("a"))) >= quantum["b"]  # and not a b a b


@pytest.mark.parametrize("other_model", [False, True])
@pytest.mark.parametrize("seconds_per_row", [0.0003, 0.002])
def test_a_prompt_of_8000_tokens_does_not_hold_up_those_who_stream(seconds_per_row: float, other_model: bool) -> None:
    bench = Bench(slabs=200, max_rows=512)
    streams = [bench.submit(model("a"), [n], 600) for n in range(8)]
    for _ in range(20):
        step(bench, seconds_per_row)
    long = bench.submit(model("b" if other_model else "a"), [n % 250 for n in range(8000)], 1)
    last = dict.fromkeys(streams, bench.now)
    made = {each: len(bench.answers[each]) for each in streams}
    worst, came = 0.0, bench.now
    while long not in bench.finished:
        step(bench, seconds_per_row)
        for each in streams:
            if len(bench.answers[each]) > made[each]:
                worst = max(worst, bench.now - last[each])
                made[each], last[each] = len(bench.answers[each]), bench.now
    chunk = 32 * seconds_per_row  # the first chunk of a model is small, and what it may always have
    turn = QUANTUM + 8 * seconds_per_row if other_model else 0.0
    assert worst <= STEP_WHILE_STREAMING + chunk + 8 * seconds_per_row + turn
    assert all(made[each] > 20 + (bench.now - came) / (STEP_WHILE_STREAMING + chunk + 0.1) / 2 for each in streams)
