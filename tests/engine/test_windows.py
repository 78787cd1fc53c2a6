"""Cache groups with a window, tried on a stand-in for a model that reads back what a query may read, and no more."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.daemon.pool import SLAB, whole_bytes
from vai.engine.runner import Runner
from vai.engine.sampler import Draw
from vai.engine.scheduler import Scheduler
from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.engine.windows import first_read
from vai.kernels.program import PAGE_TOKENS, CacheGroup, Program, StepArgs
from vai.request import Request, SamplingParams, Speculate
from vai.scratchpad.budget import bytes_that_hold, pages_ahead, pages_at_once
from vai.scratchpad.pages import Owner, PagePool

from .test_scheduler import VOCABULARY, answer, next_token

WINDOWS = (None, 70, 33)
GROUPS = tuple(CacheGroup(1, 1, 1, window) for window in WINDOWS)


class Echo:
    """A Plan that writes each token into the page of its position, in every group, and reads back what is in reach."""

    workspace_bytes = 0
    kv_type = "bf16"

    def forward(self, step: StepArgs, pool: NDArray[np.uint8]) -> NDArray[np.float32]:
        cells = pool.view(np.int32)
        logits = np.zeros((len(step.output_rows), VOCABULARY), np.float32)
        for s, (begin, end) in enumerate(zip(step.seq_start, step.seq_start[1:], strict=False)):
            for row in range(begin, end):
                page, cell = divmod(int(step.positions[row]), PAGE_TOKENS)
                for group, table in enumerate(step.block_tables):
                    cells[table[s, page] // 4 + cell] = step.tokens[row] + 1000 * group
                kept = [
                    [
                        int(cells[table[s, t // PAGE_TOKENS] // 4 + t % PAGE_TOKENS]) - 1000 * group
                        for t in range(
                            max(0, step.positions[row] + 1 - (WINDOWS[group] or 1 << 30)), step.positions[row] + 1
                        )
                    ]
                    for group, table in enumerate(step.block_tables)
                ]
                assert all(part == kept[0][len(kept[0]) - len(part) :] for part in kept)
                for output in np.flatnonzero(step.output_rows == row):
                    logits[output, next_token(kept[0])] = 1
        return logits


class Bench:
    def __init__(self, slabs: int, max_rows: int = 64, page_bytes: int = SLAB // 8) -> None:
        memory = np.zeros(whole_bytes(slabs * SLAB), np.uint8)
        self.slabs, self.now = slabs, 0.0
        self.pool = PagePool(memory)
        self.scheduler = Scheduler(self.pool, max_rows=max_rows, max_sequences=8, clock=lambda: self.now)
        self.runner = Runner(memory)
        program = Program((), GROUPS, {}, {}, width=1, vocabulary=VOCABULARY, context=1 << 20)
        owners = tuple(Owner("a" * 64, group, page_bytes) for group in range(len(GROUPS)))
        self.entry = Entry("a" * 64, program, Echo(), owners, 0.0, weights="a")
        self.answers: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.held: dict[str, list[int]] = {}  # pages of each group, while it ran
        self.rows: list[int] = []  # of each step

    def submit(self, prompt: list[int], count: int, **how: Any) -> str:
        request = Request(
            id=str(len(self.held)), image="a" * 64, tokens=prompt, sampling=SamplingParams(max_tokens=count), **how
        )
        self.held[request.id], self.answers[request.id], self.cached[request.id] = [0] * len(GROUPS), [], 0
        sequence = Sequence(request, self.entry, arrival=len(self.held), limit=len(prompt) + count, now=self.now)
        self.scheduler.add(sequence)
        return request.id

    def step(self) -> None:
        batch = self.scheduler.pick()
        if batch is not None:
            self.rows.append(batch.rows)
            self.now += 1e-6
            logits = self.runner.forward(batch)
            self.scheduler.commit(batch, [Draw(int(row.argmax()), None) for row in logits])
            for sequence in batch.sequences:
                if sequence.running:
                    kept = [sum(page >= 0 for page in table) for table in sequence.block_table]
                    self.held[sequence.request.id] = kept
        outputs = self.scheduler.take_outputs()
        assert batch is not None or outputs or not self.scheduler.has_work()  # nobody waits for ever
        for output in outputs:
            assert output.error is None
            self.answers[output.id] += output.tokens
            self.cached[output.id] += output.cached_tokens

    def run(self) -> None:
        while self.scheduler.has_work():
            self.step()


def test_the_first_page_that_is_read() -> None:
    assert [first_read(tokens, 33) for tokens in (0, 31, 32, 63, 64, 95, 96)] == [0, 0, 0, 0, 1, 1, 2]
    assert first_read(1000, 1) == 1000 // 32


@pytest.mark.parametrize("cache", [True, False])
def test_pages_behind_the_window_are_freed(cache: bool) -> None:
    bench = Bench(slabs=16)
    request = bench.submit(list(range(200)), 60, cache=cache)
    bench.run()
    assert bench.answers[request] == answer(list(range(200)), 60)
    assert bench.held[request] == [9, 4, 2]
    assert bench.pool.used_bytes == 0
    bench.scheduler.cache.forget("a" * 64)
    assert (bench.pool.cached_bytes, bench.pool.free_slabs) == (0, bench.slabs)


def test_a_conversation_goes_on_and_a_fork_that_needs_what_was_freed_computes_it_again() -> None:
    bench = Bench(slabs=16)
    prompt = list(range(200))
    first = bench.submit(prompt, 60)
    bench.run()
    said = prompt + bench.answers[first]
    more, fork = bench.submit([*said, 1, 2], 5), bench.submit([*prompt[:100], 7], 5)
    bench.run()
    assert (bench.cached[more], bench.cached[fork]) == (256, 0)
    assert bench.answers[more] == answer([*said, 1, 2], 5)
    assert bench.answers[fork] == answer([*prompt[:100], 7], 5)
    again = bench.submit([*prompt[:100], 8], 5)
    bench.run()
    assert bench.cached[again] == 96  # the fork computed what was gone, and it is kept


@pytest.mark.parametrize("seed", range(5))
def test_answers_do_not_depend_on_what_is_cached_taken_up_freed_or_evicted(seed: int) -> None:
    draw = random.Random(seed)
    bench = Bench(slabs=draw.choice([6, 9]), max_rows=draw.choice([5, 64]))
    stems = [[draw.randrange(VOCABULARY) for _ in range(150)] for _ in range(2)]
    asked: dict[str, tuple[list[int], int]] = {}
    for _ in range(14):
        done = [
            prompt + bench.answers[identity] for identity, (prompt, _) in asked.items() if len(bench.answers[identity])
        ]
        prompt = draw.choice(stems)[: draw.randrange(1, 150)]
        if done and draw.random() < 0.5:
            prompt = draw.choice(done)[: draw.randrange(1, 200)]
        prompt = [*prompt, *(draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 6)))][:200]
        count = draw.randrange(1, 50)
        asked[bench.submit(prompt, count, cache=draw.random() < 0.9)] = (prompt, count)
        for _ in range(draw.randrange(15)):
            bench.step()
            assert bench.pool.used_bytes + bench.pool.cached_bytes + bench.pool.free_bytes == bench.pool.size
    bench.run()
    assert bench.answers == {identity: answer(prompt, count) for identity, (prompt, count) in asked.items()}
    assert bench.pool.used_bytes == 0
    assert sum(bench.cached.values()) > 0
    bench.scheduler.cache.forget("a" * 64)
    assert (bench.pool.cached_bytes, bench.pool.free_slabs) == (0, bench.slabs)


def test_a_prompt_is_admitted_with_what_its_windows_need_at_once() -> None:
    prompt = [7 * number % 241 for number in range(600)]
    at_once = [pages_at_once(window, pages_ahead(64)) for window in WINDOWS]
    assert at_once[1:] == [6, 4]
    bench = Bench(slabs=5)  # 8 pages each: 19 pages of the group that sees everything take three
    request = bench.submit(prompt, 20)
    while bench.scheduler.has_work():
        bench.step()
        assert all(held <= most for held, most in zip(bench.held[request], at_once, strict=True))
    assert bench.answers[request] == answer(prompt, 20)
    assert bench.scheduler.counts("a" * 64)[3] == 0
    assert bench.pool.used_bytes == 0


@pytest.mark.parametrize("cache", [True, False])
def test_prompts_that_were_admitted_together_never_lack_a_page(cache: bool) -> None:
    prompts = [[(seed + 7) * number % 241 for number in range(320)] for seed in range(3)]
    bench = Bench(slabs=10)  # 3 * (11 + 6 + 4) pages and what slabs leave over, where all would be 3 * 3 * 11
    requests = [bench.submit(prompt, 10, cache=cache) for prompt in prompts]
    bench.step()
    assert bench.scheduler.counts("a" * 64)[:2] == (3, 0)
    bench.run()
    assert [bench.answers[each] for each in requests] == [answer(prompt, 10) for prompt in prompts]
    assert bench.scheduler.counts("a" * 64)[3] == 0


def test_a_prompt_runs_in_the_largest_chunks_that_the_pool_has_room_for_and_a_page_at_a_time_at_worst() -> None:
    prompt = [7 * number % 241 for number in range(330)]  # 11 pages
    for slabs, largest in [(11 + 4 + 2, 32), (11 + 5 + 3, 64), (11 + 8 + 6, 128), (3 * 11, 128)]:
        bench = Bench(slabs, max_rows=128, page_bytes=SLAB)  # one page each
        bench.submit(prompt[:64], 1, cache=False)  # which tells the speed
        bench.run()
        bench.rows.clear()
        request = bench.submit(prompt, 8, cache=False)
        bench.run()
        assert (bench.rows[1], bench.scheduler.counts("a" * 64)[3]) == (largest, 0)  # with windows before it
        assert bench.answers[request] == answer(prompt, 8)


def test_prompts_that_begin_the_same_share_what_is_in_the_window_and_come_through() -> None:
    stem = [5 * number % 241 for number in range(500)]
    prompts = [[*stem, number] for number in range(4)]
    bench = Bench(slabs=6)
    requests = [bench.submit(prompt, 40) for prompt in prompts]
    bench.run()
    assert [bench.answers[each] for each in requests] == [answer(prompt, 40) for prompt in prompts]
    assert sum(bench.cached.values()) > 0
    assert bench.pool.used_bytes == 0


@pytest.mark.parametrize("priority", [-1, 1])
def test_who_passes_pages_that_another_still_reads_takes_others_or_waits(
    priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vai.engine.windows.pages_at_once", lambda window, ahead: pages_at_once(window, 1))  # no slack
    stem = [5 * number % 241 for number in range(160)]
    bench = Bench(slabs=30, max_rows=32, page_bytes=SLAB)  # one page each
    slow = bench.submit(stem, 60)
    while not bench.answers[slow]:
        bench.step()
    prompt = [*stem, *(3 * number % 241 for number in range(400))]
    fast = bench.submit(prompt, 5, priority=priority)
    other = bench.submit([1], 30)
    bench.step()
    assert (bench.scheduler.counts("a" * 64)[:2], bench.pool.free_slabs) == ((3, 0), 0)
    bench.run()
    assert bench.answers == {slow: answer(stem, 60), fast: answer(prompt, 5), other: answer([1], 30)}
    assert bench.scheduler.counts("a" * 64)[3] > 0
    assert bench.pool.used_bytes == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("slabs", "page_bytes"), [(5, SLAB // 8), (4, SLAB // 8), (22, SLAB)])
def test_long_prompts_in_a_pool_that_is_too_small_for_all_of_them(slabs: int, page_bytes: int, seed: int) -> None:
    """The last two hold the longest that may come where its prompt is computed a page at a time, and not otherwise."""
    draw = random.Random(seed)
    bench = Bench(slabs, max_rows=draw.choice([20, 64, 512]), page_bytes=page_bytes)
    at_once = [pages_at_once(window, 1) for window in WINDOWS]
    assert bytes_that_hold(512, bench.entry.owners, at_once) == (slabs - (slabs == 5)) * SLAB
    stems = [[draw.randrange(VOCABULARY) for _ in range(450)] for _ in range(2)]
    asked: dict[str, tuple[list[int], int]] = {}
    for _ in range(7):
        prompt = [*draw.choice(stems)[: draw.randrange(100, 450)], draw.randrange(VOCABULARY)]
        count = draw.randrange(1, 60)
        guesses = Speculate(kind=draw.choice(["off", "ngram"]))
        how = {"cache": draw.random() < 0.8, "priority": draw.choice([0, 0, -1, 1]), "speculate": guesses}
        asked[bench.submit(prompt, count, **how)] = (prompt, count)
        for _ in range(draw.randrange(8)):
            bench.step()
            assert bench.pool.used_bytes + bench.pool.cached_bytes + bench.pool.free_bytes == bench.pool.size
    bench.run()
    assert bench.answers == {identity: answer(prompt, count) for identity, (prompt, count) in asked.items()}
    assert bench.pool.used_bytes == 0
    bench.scheduler.cache.forget("a" * 64)
    assert (bench.pool.cached_bytes, bench.pool.free_slabs) == (0, bench.slabs)
