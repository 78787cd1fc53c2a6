"""The scheduler, tried on a stand-in for a model that costs nothing: who runs, who waits, and whose pages are whose.

The stand-in keeps its tokens in the pages it is given and computes its next token from all it reads back there, so a
wrong page table, a lost token or a neighbour's write changes the answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.daemon.pool import SLAB, whole_bytes
from vai.engine.batch import Batch
from vai.engine.runner import Runner
from vai.engine.sampler import Draw
from vai.engine.scheduler import (
    MAX_WAIT,
    MAX_WAITING,
    MAX_WAITING_OF_ONE,
    QUANTUM,
    STEP_WHILE_STREAMING,
    Scheduler,
)
from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.engine.worth import SMALLEST_CHUNK
from vai.errors import BadRequest, Overloaded, VaiError
from vai.kernels.program import PAGE_TOKENS, CacheGroup, Program, StepArgs
from vai.request import Output, Request, SamplingParams
from vai.scratchpad.pages import Owner, PagePool

VOCABULARY = 251
PAGE = SLAB // 4
GROUPS = (CacheGroup(1, 1, 1), CacheGroup(1, 1, 1))


def next_token(history: list[int]) -> int:
    return sum((i + 1) * token for i, token in enumerate(history)) % VOCABULARY


def answer(prompt: list[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history))
    return history[len(prompt) :]


class Echo:
    """A Plan that writes each token into the page of its position, in every group, and reads them all back."""

    workspace_bytes = 0
    kv_type = "bf16"

    def forward(self, step: StepArgs, pool: NDArray[np.uint8]) -> NDArray[np.float32]:
        cells = pool.view(np.int32)
        logits = np.zeros((len(step.output_rows), VOCABULARY), np.float32)
        for s, (begin, end) in enumerate(zip(step.seq_start, step.seq_start[1:], strict=False)):
            assert step.positions[begin] == step.context[s]
            for group, table in enumerate(step.block_tables):
                for row in range(begin, end):
                    page, cell = divmod(int(step.positions[row]), PAGE_TOKENS)
                    cells[table[s, page] // 4 + cell] = step.tokens[row] + group
            for output in np.flatnonzero((step.output_rows >= begin) & (step.output_rows < end)):
                length = int(step.positions[step.output_rows[output]]) + 1
                kept = [
                    [int(cells[table[s, t // PAGE_TOKENS] // 4 + t % PAGE_TOKENS]) - group for t in range(length)]
                    for group, table in enumerate(step.block_tables)
                ]
                assert kept[0] == kept[1]
                logits[output, next_token(kept[0])] = 1
        return logits

    def lines(self) -> list[str]:
        return []


def model(letter: str, page_bytes: int = PAGE) -> Entry:
    program = Program((), GROUPS, {}, {}, width=1, vocabulary=VOCABULARY, context=1 << 20)
    owners = tuple(Owner(letter * 64, group, page_bytes) for group in range(len(GROUPS)))
    return Entry(letter * 64, program, Echo(), owners, 0.0, weights=letter)


@dataclass
class Bench:
    """A scheduler with a pool of `slabs`, and everything that came out of it. Its clock, `now`, moves by hand."""

    slabs: int = 8
    max_rows: int = 64
    max_sequences: int = 16
    now: float = 0.0
    answers: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, Output] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        memory = np.zeros(whole_bytes(self.slabs * SLAB), np.uint8)
        self.pool = PagePool(memory)
        self.scheduler = Scheduler(
            self.pool, max_rows=self.max_rows, max_sequences=self.max_sequences, clock=lambda: self.now
        )
        self.runner = Runner(memory)
        self.ids: Iterator[int] = iter(range(1 << 30))

    def submit(
        self,
        entry: Entry,
        prompt: list[int],
        count: int,
        limit: int = 1 << 20,
        **how: Any,
    ) -> str:
        number = next(self.ids)
        sampling = SamplingParams(max_tokens=count)
        request = Request(id=str(number), image=entry.digest, tokens=prompt, sampling=sampling, **how)
        limit = min(limit, len(prompt) + count)
        self.scheduler.add(Sequence(request, entry, arrival=number, limit=limit, now=self.now))
        return request.id

    def step(self, seconds_per_row: float = 0.0) -> Batch | None:
        batch = self.scheduler.pick()
        if batch is not None:
            self.batches.append(batch)
            logits = self.runner.forward(batch)
            self.now += seconds_per_row * batch.rows
            self.commit(batch, logits)
        else:
            self.take_outputs()
        return batch

    def commit(self, batch: Batch, logits: NDArray[np.float32]) -> None:
        self.scheduler.commit(batch, [Draw(int(row.argmax()), None) for row in logits])
        self.take_outputs()

    def take_outputs(self) -> None:
        for output in self.scheduler.take_outputs():
            self.answers.setdefault(output.id, []).extend(output.tokens)
            self.cached[output.id] = self.cached.get(output.id, 0) + output.cached_tokens
            if output.finish is not None:
                assert output.id not in self.finished
                self.finished[output.id] = output

    def run(self) -> None:
        while self.scheduler.has_work():
            self.step()

    def check_that_every_page_is_back(self, letters: str) -> None:
        assert self.pool.used_bytes == 0
        for letter in letters:
            self.scheduler.forget(letter * 64)
            self.scheduler.cache.forget(letter * 64)
        assert (self.pool.cached_bytes, self.pool.free_slabs) == (0, self.slabs)


@pytest.mark.parametrize("seed", range(8))
def test_answers_do_not_depend_on_company_chunks_or_preemption(seed: int) -> None:
    draw = random.Random(seed)
    bench = Bench(slabs=draw.choice([3, 4, 6]), max_rows=draw.choice([5, 7, 64]), max_sequences=draw.choice([2, 5]))
    models = [model("a"), model("b", PAGE // 3), model("c")]
    expected = {}
    for _ in range(25):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 70))]
        count = draw.randrange(1, 60)
        expected[bench.submit(draw.choice(models), prompt, count)] = answer(prompt, count)
        for _ in range(draw.randrange(6)):
            bench.step()
    bench.run()
    assert bench.answers == expected
    assert {output.finish for output in bench.finished.values()} == {"length"}
    bench.check_that_every_page_is_back("abc")


@pytest.mark.parametrize("seed", range(8))
def test_answers_do_not_depend_on_what_is_cached_taken_up_or_evicted(seed: int) -> None:
    """Prompts that begin alike, conversations that go on, two tenants, two models, pools far too small for all."""
    draw = random.Random(seed)
    bench = Bench(slabs=draw.choice([8, 10]), max_rows=draw.choice([5, 64]), max_sequences=draw.choice([2, 5]))
    models = [model("a"), model("b", PAGE // 3)]
    stems = [[draw.randrange(VOCABULARY) for _ in range(90)] for _ in range(3)]
    expected: dict[str, list[int]] = {}
    asked: dict[str, list[int]] = {}
    for _ in range(25):
        said = [asked[identity] + bench.answers[identity] for identity in bench.finished]
        prompt = draw.choice(stems)[: draw.randrange(1, 90)]
        if said and draw.random() < 0.4:
            prompt = draw.choice(said)
        prompt = [*prompt, *(draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 6)))][:95]
        count = draw.randrange(1, 30)
        cache = draw.random() < 0.9
        identity = bench.submit(draw.choice(models), prompt, count, cache=cache, cache_salt=draw.choice(["", "x"]))
        expected[identity], asked[identity] = answer(prompt, count), prompt
        for _ in range(draw.randrange(12)):
            bench.step()
            assert bench.pool.used_bytes + bench.pool.cached_bytes + bench.pool.free_bytes == bench.pool.size
    bench.run()
    assert bench.answers == expected
    assert {output.finish for output in bench.finished.values()} == {"length"}
    assert sum(bench.cached.values()) > 0
    assert all(bench.cached[each] < len(asked[each]) for each in asked)
    bench.check_that_every_page_is_back("ab")


def test_a_hit_ends_before_the_page_that_holds_the_last_prompt_token() -> None:
    for length, hit in ((32, 0), (33, 32), (64, 32), (65, 64), (96, 64)):
        bench = Bench()
        prompt = list(range(length))
        for _ in range(2):
            last = bench.submit(model("a"), prompt, 2)
            bench.run()
        assert bench.cached[last] == hit


def test_a_page_is_found_by_its_own_model_tenant_and_beginning_only() -> None:
    bench, prompt = Bench(slabs=16), list(range(100))
    bench.submit(model("a"), prompt, 1, cache_salt="mine")
    bench.run()
    strangers = [
        bench.submit(model("b"), prompt, 1, cache_salt="mine"),
        bench.submit(model("a"), prompt, 1, cache_salt="yours"),
        bench.submit(model("a"), prompt, 1),
        bench.submit(model("a"), [7, *prompt[1:]], 1, cache_salt="mine"),
        bench.submit(model("a"), prompt, 1, cache_salt="mine", cache=False),
    ]
    owner = bench.submit(model("a"), prompt, 1, cache_salt="mine")
    bench.run()
    assert [bench.cached[each] for each in strangers] == [0] * 5
    assert bench.cached[owner] == 96


def test_three_models_carry_more_requests_in_one_pool_than_in_three_thirds_of_it() -> None:
    """Most of the demand is for one model at a time, another one each time."""
    carried = {}
    for favourite in "abc":
        demand = [*"abc", *favourite * 30]
        for name, benches in (("one", [Bench(12, max_sequences=64)] * 3), ("thirds", [Bench(4) for _ in range(3)])):
            of = dict(zip("abc", benches, strict=True))
            for n, letter in enumerate(demand):
                of[letter].submit(model(letter, SLAB // 8), [n] * 60, 3)
            running = 0
            for bench in {id(bench): bench for bench in benches}.values():
                bench.step()
                running += sum(bench.scheduler.counts(letter * 64)[0] for letter in "abc")
                bench.run()
                assert len(bench.finished) == len(bench.answers)
            carried[favourite, name] = running
    assert all(carried[letter, "one"] > 1.5 * carried[letter, "thirds"] for letter in "abc"), carried


def test_nothing_of_a_request_without_the_cache_is_kept() -> None:
    bench = Bench()
    bench.submit(model("a"), [1] * 100, 10, cache=False)
    bench.run()
    assert (bench.pool.cached_bytes, bench.pool.free_slabs) == (0, bench.slabs)


def test_requests_that_begin_alike_and_come_together_share_what_one_of_them_computed() -> None:
    bench = Bench(max_rows=64)
    ids = [bench.submit(model("a"), [*range(200), n], 2) for n in range(3)]
    bench.run()
    assert [bench.cached[each] for each in ids] == [0, 192, 192]
    assert sum(batch.rows for batch in bench.batches) == 201 + 2 * (201 - 192) + 3
    assert all(bench.answers[each] == answer([*range(200), n], 2) for n, each in enumerate(ids))


def test_the_pages_unused_for_longest_go_first_and_the_last_of_a_chain_before_its_beginning() -> None:
    bench = Bench(slabs=6)  # twelve pages for each of the two groups
    old, new = [1] * 129, [2] * 129  # four full pages each, and one more
    for prompt in (old, new):
        bench.submit(model("a"), prompt, 1)
        bench.run()
    bench.submit(model("a"), [3] * 190, 1)  # six pages: there is room for four beside the others
    bench.run()
    assert bench.pool.cached_bytes == 2 * (2 + 4 + 5) * PAGE
    hits = {}
    for name, prompt in (("new", new), ("old", old)):
        identity = bench.submit(model("a"), prompt, 1)
        bench.run()
        hits[name] = bench.cached[identity]
    assert hits == {"new": 128, "old": 64}


def test_a_preempted_request_takes_its_own_pages_up_again_and_does_not_call_them_a_hit() -> None:
    bench = Bench(slabs=6)
    old = bench.submit(model("a"), [1] * 64, 3)
    young = bench.submit(model("a"), [2] * 200, 100)
    bench.step()
    preempted = bench.scheduler._by_id[young]
    while preempted.computed < 200:
        bench.step()
    bench.scheduler._preempt(preempted)
    before = len(bench.batches)
    bench.run()
    assert bench.batches[before].rows < 30
    assert bench.cached[young] == 0
    assert bench.answers == {old: answer([1] * 64, 3), young: answer([2] * 200, 100)}


def test_a_preempted_request_continues_as_if_it_had_never_stopped() -> None:
    bench = Bench(slabs=2)  # four pages for each of the two groups
    old = bench.submit(model("a"), [1] * 40, 60)
    young = bench.submit(model("a"), [2] * 20, 40)
    bench.run()
    rows = [
        count for batch in bench.batches for s, count in zip(batch.sequences, batch.counts, strict=True) if s.arrival
    ]
    assert sum(rows) > 20 + 40 - 1  # the young one was computed again
    assert bench.answers == {old: answer([1] * 40, 60), young: answer([2] * 20, 40)}


def test_demand_of_ten_pools_is_served_to_the_end_without_ever_promising_more_than_there_is() -> None:
    bench = Bench(slabs=2)
    ids = [bench.submit(model(letter), [n] * 60, 60) for n in range(10) for letter in "ab"]
    while bench.scheduler.has_work():
        bench.step()
        assert bench.pool.used_bytes <= bench.pool.size
    assert all(bench.answers[identity] == answer([n // 2] * 60, 60) for n, identity in enumerate(ids))


def test_requests_of_different_models_get_room_in_order_of_age() -> None:
    bench = Bench(slabs=2)
    first = bench.submit(model("a"), [1] * 96, 2)
    large = bench.submit(model("b"), [2] * 96, 2)
    small = bench.submit(model("c"), [3], 2)  # would fit beside the first, but the large one is older
    bench.run()
    assert list(bench.finished) == [first, large, small]


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_an_aborted_request_gives_its_pages_back_at_once_whatever_it_was_doing(steps: int) -> None:
    bench = Bench(slabs=2, max_rows=20)
    ids = [bench.submit(model("a"), [n] * 50, 30) for n in range(3)]  # decoding, in prefill, or waiting
    for _ in range(steps):
        bench.step()
    for identity in ids:
        bench.scheduler.abort(identity)
        bench.scheduler.abort(identity)
    assert bench.pool.used_bytes == 0
    assert bench.step() is None
    assert {bench.finished[identity].finish for identity in ids} == {"abort"}
    assert not bench.scheduler.has_work()


def test_forgetting_a_model_ends_its_requests_and_no_others() -> None:
    bench = Bench()
    gone = [bench.submit(model("a"), [n], 30) for n in range(20)]
    stays = bench.submit(model("b"), [5], 30)
    bench.step()
    bench.scheduler.forget("a" * 64)
    bench.run()
    assert {bench.finished[identity].finish for identity in gone} == {"abort"}
    assert bench.answers[stays] == answer([5], 30)


def test_a_draw_that_failed_ends_its_own_request_only() -> None:
    bench = Bench()
    bad, good = bench.submit(model("a"), [1], 3), bench.submit(model("a"), [2], 3)
    batch = bench.scheduler.pick()
    assert batch is not None
    token = next_token([2])
    bench.runner.forward(batch)
    bench.scheduler.commit(batch, [VaiError("no number"), Draw(token, None)])
    bench.run()
    assert (bench.finished[bad].finish, bench.finished[bad].error) == ("error", ("internal_error", "no number"))
    assert bench.answers[good] == answer([2], 3)
    assert bench.pool.used_bytes == 0


def test_a_step_that_failed_ends_the_requests_in_it_and_no_others() -> None:
    bench = Bench()
    bad, good = bench.submit(model("a"), [1], 3), bench.submit(model("b"), [2], 3)
    batch = bench.scheduler.pick()
    assert batch is not None and batch.entry.digest == "a" * 64
    bench.scheduler.fail(batch, VaiError("no step"))
    bench.run()
    assert bench.finished[bad].error == ("internal_error", "no step")
    assert bench.answers[good] == answer([2], 3)


def test_one_that_outgrows_the_whole_pool_ends_with_a_reason() -> None:
    bench = Bench(slabs=2)
    alone = bench.submit(model("a"), [1] * 100, 1000)
    bench.run()
    assert bench.finished[alone].error is not None
    assert bench.finished[alone].error[0] == "not_enough_room"
    assert bench.answers[alone] == answer([1] * 100, 29)


def turns(bench: Bench, count: int, costs: dict[str, float]) -> str:
    order = ""
    for _ in range(count):
        batch = bench.scheduler.pick()
        assert batch is not None
        bench.now += costs[batch.entry.digest[0]]
        bench.scheduler.commit(batch, [Draw(0, None) for _ in batch.places])
        order += batch.entry.digest[0]
    return order


def test_models_take_turns_in_groups_and_get_equal_time() -> None:
    bench = Bench()
    for letter in "ab":
        bench.submit(model(letter, 4096), [1], 5000)
    order = turns(bench, 600, {"a": QUANTUM / 5, "b": QUANTUM / 10})
    switches = sum(left != right for left, right in itertools.pairwise(order))
    assert switches <= 600 / 5
    assert abs(order.count("a") / 5 - order.count("b") / 10) <= 2


def test_no_model_waits_longer_than_the_bound_however_unequal_the_costs() -> None:
    bench = Bench()
    for letter in "abc":
        bench.submit(model(letter, 4096), [1], 5000)
    costs = {"a": 5.0, "b": 0.01, "c": 0.01}
    order = turns(bench, 900, costs)
    waited, since = 0.0, dict.fromkeys("abc", 0.0)
    now = 0.0
    for letter in order:
        waited = max(waited, now - since[letter])
        now += costs[letter]
        since[letter] = now
    assert waited <= MAX_WAIT + sum(costs.values())


def test_a_model_that_idled_has_saved_nothing_up() -> None:
    bench = Bench()
    bench.submit(model("a", 4096), [1], 5000)
    turns(bench, 1000, {"a": 0.02})
    bench.submit(model("b", 4096), [1], 5000)
    order = turns(bench, 40, {"a": 0.02, "b": 0.02})
    assert abs(order.count("a") - order.count("b")) <= 4


def test_a_model_that_comes_while_nobody_runs_has_saved_nothing_up_either() -> None:
    bench = Bench()
    first = bench.submit(model("a", 4096), [1], 5000)
    turns(bench, 1000, {"a": 0.02})
    bench.scheduler.abort(first)
    for letter in "ba":
        bench.submit(model(letter, 4096), [1], 5000)
    order = turns(bench, 40, {"a": 0.02, "b": 0.02})
    assert abs(order.count("a") - order.count("b")) <= 4


def test_prompts_are_cut_to_what_fits_the_time_of_a_step_while_others_stream() -> None:
    bench = Bench(max_rows=512)
    streaming = bench.submit(model("a"), [1], 50)
    bench.step()
    bench.submit(model("a"), [2] * 400, 1)
    while bench.scheduler.has_work():
        bench.step(STEP_WHILE_STREAMING / 80.5)
    chunks = [batch.counts[1] for batch in bench.batches if len(batch.counts) > 1]
    assert chunks == [SMALLEST_CHUNK, 79, 79, 79, 79, 400 - SMALLEST_CHUNK - 4 * 79]
    assert streaming in bench.finished


@pytest.mark.parametrize(
    ("streams", "rate", "rows"),
    [
        pytest.param(48, 80, 48, id="as many as there are streams, however long these take"),
        pytest.param(16, 200, 64, id="four times as many where that takes less than half a second"),
        pytest.param(16, 120, 44, id="or as many as half a second has"),
        pytest.param(2, 60, 16, id="a few, whoever streams"),
    ],
)
def test_prompts_get_a_share_of_every_step(streams: int, rate: int, rows: int) -> None:
    bench = Bench(slabs=40, max_rows=512, max_sequences=64)
    a = model("a", PAGE // 16)
    for _ in range(streams):
        bench.submit(a, [1] * 17, 50)
    while not bench.batches or set(bench.batches[-1].counts) != {1} or len(bench.batches[-1].counts) < streams:
        bench.step(1 / rate)
    seen = len(bench.batches)
    bench.submit(a, [2] * 400, 1)
    for _ in range(3):
        bench.step(1 / rate)
    assert [batch.counts[-1] for batch in bench.batches[seen:]] == [rows] * 3


def test_a_short_prompt_gets_its_first_token_while_a_long_one_is_computed() -> None:
    bench = Bench()
    a = model("a", PAGE // 16)
    stream = bench.submit(a, [1], 400)
    bench.step()
    long = bench.submit(a, [2] * 2000, 1)
    bench.step()
    short = bench.submit(a, [3] * 20, 1)
    ends = {}
    while long not in bench.finished:
        assert bench.step() is not None
        ends |= {identity: len(bench.batches) for identity in bench.finished if identity not in ends}
    assert ends[short] < ends[long] / 5
    assert len(bench.answers[stream]) == len(bench.batches)  # no step left the stream out


def test_an_id_in_use_is_refused() -> None:
    bench = Bench()
    bench.submit(model("a"), [1], 5)
    bench.ids = iter([0])
    with pytest.raises(BadRequest, match="'0' is already running"):
        bench.submit(model("a"), [1], 5)


def test_a_full_queue_is_refused_with_the_number_that_wait() -> None:
    bench = Bench()
    for number in range(MAX_WAITING):
        bench.submit(model("ab"[number % 2]), [1], 5)
    with pytest.raises(Overloaded, match=str(MAX_WAITING)):
        bench.submit(model("a"), [1], 5)


def test_who_is_refused_is_told_when_a_place_will_be_free_by_the_speed_of_the_queue() -> None:
    bench = Bench(max_sequences=4)
    for _ in range(MAX_WAITING_OF_ONE):
        bench.submit(model("a", 4096), [1], 5)
    for _ in range(40):  # four requests every five steps
        bench.step()
        bench.now += 0.5
        while len(bench.scheduler._queues["a" * 64].waiting) < MAX_WAITING_OF_ONE:
            bench.submit(model("a", 4096), [1], 5)
    waits = []
    for _ in range(200):
        with pytest.raises(Overloaded) as refused:
            bench.submit(model("a", 4096), [1], 5)
        waits.append(refused.value.retry_after)
    each = 5 * 0.5 / 4
    assert waits[:20] == pytest.approx([each * (number + 1) for number in range(20)], rel=0.2)
    assert max(waits) == waits[-1] == 60
    bench.now += 30
    with pytest.raises(Overloaded) as refused:
        bench.submit(model("a", 4096), [1], 5)
    assert refused.value.retry_after == pytest.approx(30, rel=0.1)  # the others' times have not changed


def test_no_client_fills_the_queue_for_the_others() -> None:
    bench = Bench()
    for _ in range(MAX_WAITING_OF_ONE):
        bench.submit(model("a"), [1], 5)
    with pytest.raises(Overloaded, match=f"{MAX_WAITING_OF_ONE} .* of one client"):
        bench.submit(model("a"), [1], 5)
    bench.submit(model("a"), [1], 5, cache_salt="another")
    bench.submit(model("b"), [1], 5)
    bench.step()  # some are admitted
    bench.submit(model("a"), [1], 5)


def test_who_gives_up_scattered_pages_is_let_in_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, entry, prompt = Bench(slabs=4), model("a"), [5, 6, 7]
    request = bench.submit(entry, prompt, 60)
    bench.step()
    scattered = [True]
    allocate, empty = bench.scheduler._allocate, bench.scheduler._empty_cache

    def in_the_way(*about: Any) -> bool:
        return not scattered[0] and allocate(*about)

    def clear() -> None:
        scattered[0] = False
        empty()

    monkeypatch.setattr(bench.scheduler, "_allocate", in_the_way)
    monkeypatch.setattr(bench.scheduler, "_empty_cache", clear)
    while bench.scheduler.has_work():
        assert bench.step() is not None  # an engine that finds nothing to compute rests until it is told something
    assert bench.answers[request] == answer(prompt, 60)
    assert (scattered, bench.scheduler.counts("a" * 64)[3]) == ([False], 1)
