"""Kinds of pages, tried on a stand-in for a model whose answers tell in which kind each of its pages was computed.

It writes into a page not only its tokens but the kind of the step, and draws by both. So an answer is right only where
every page that it was drawn from, found or computed, once or again, has the kind that the request was told.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from vai.daemon.pool import SLAB
from vai.engine import kinds
from vai.engine.batch import Batch
from vai.engine.kinds import CHAINS, FEWEST, unpacked
from vai.engine.resume import Answer
from vai.engine.scheduler import STEP_WHILE_STREAMING
from vai.engine.select import Entry, StandIn
from vai.engine.sequence import Sequence
from vai.errors import BadRequest, NotSupported
from vai.kernels.program import PAGE_TOKENS, CacheGroup, Program, StepArgs
from vai.request import Output, Request, SamplingParams
from vai.scratchpad.pages import Owner

from . import test_scheduler
from .test_scheduler import VOCABULARY

FAST = 1000  # what a cell of a fast page has more than its token
PLAIN = (None, None)
WINDOWED = (None, 70, 33)


def drawn(cells: list[int]) -> int:
    return sum((i + 1) * (cell % FAST + 7 * (cell // FAST)) for i, cell in enumerate(cells)) % VOCABULARY


def answer(prompt: list[int], fast: bytes, count: int) -> list[int]:
    cells = [token + FAST * (fast[i // 32] if i // 32 < len(fast) else 0) for i, token in enumerate(prompt)]
    for _ in range(count):
        cells.append(drawn(cells))
    return cells[len(prompt) :]


class Echo:
    """A Plan that keeps tokens and kinds in the pages of every cache group, and draws by what it reads back."""

    workspace_bytes = 0
    kv_type = "bf16"
    fast = "echo"

    def __init__(self, windows: tuple[int | None, ...]) -> None:
        self._windows = windows

    def forward(self, step: StepArgs, pool: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert step.kind == "exact" or not len(step.output_rows)
        cells, fast = pool.view(np.int32), FAST * (step.kind == "fast")
        logits = np.zeros((len(step.output_rows), VOCABULARY), np.float32)
        for s, (begin, end) in enumerate(zip(step.seq_start, step.seq_start[1:], strict=False)):
            for row in range(begin, end):
                page, cell = divmod(int(step.positions[row]), PAGE_TOKENS)
                for table in step.block_tables:
                    cells[table[s, page] // 4 + cell] = step.tokens[row] + fast
                for output in np.flatnonzero(step.output_rows == row):
                    logits[output, drawn(self._read(cells, [table[s] for table in step.block_tables], step, row))] = 1
        return logits

    def _read(self, cells: NDArray[np.int32], tables: list[NDArray[np.int64]], step: StepArgs, row: int) -> list[int]:
        length = int(step.positions[row]) + 1
        found = []
        for window, table in zip(self._windows, tables, strict=True):
            first = max(0, length - (window or length))
            pages = [cells[at // 4 : at // 4 + PAGE_TOKENS] for at in table[first // PAGE_TOKENS :].tolist()]
            found.append(np.concatenate(pages)[first % PAGE_TOKENS :][: length - first].tolist())
        assert all(part == found[0][length - len(part) :] for part in found)
        whole: list[int] = found[0]
        return whole


def model(
    letter: str = "a",
    windows: tuple[int | None, ...] = PLAIN,
    *,
    fast: str | None = "echo",
    page_bytes: int = SLAB // 16,
) -> Entry:
    groups = tuple(CacheGroup(1, 1, 1, window) for window in windows)
    program = Program((), groups, {}, {}, width=1, vocabulary=VOCABULARY, context=1 << 20)
    owners = tuple(Owner(letter * 64, group, page_bytes) for group in range(len(groups)))
    stand_in = StandIn(lambda: Echo(windows)) if fast is None else None
    about = {"weights": letter, "fingerprint": "vai", "fast": fast, "stand_in": stand_in}
    return Entry(letter * 64, program, Echo(windows), owners, 0.0, **about)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [(17 * i + 31 * seed + i * i) % VOCABULARY for i in range(count)]


@dataclass
class Bench(test_scheduler.Bench):
    """A scheduler over stand-ins; `first`: the output with which each request was told its kinds."""

    first: dict[str, Output] = field(default_factory=dict)

    def take_outputs(self) -> None:
        for output in self.scheduler.take_outputs():
            self.first.setdefault(output.id, output)
            self.answers.setdefault(output.id, []).extend(output.tokens)
            self.cached[output.id] = self.cached.get(output.id, 0) + output.cached_tokens
            if output.finish is not None:
                self.finished[output.id] = output

    def kinds(self, identity: str) -> str:
        """The kinds of the first pages, up to the last fast one: E for exact, F for fast."""
        return "".join("EF"[fast] for fast in unpacked(self.first[identity].page_kinds or b""))

    def ask(self, prompt: list[int], count: int = 1, entry: Entry | None = None, **how: Any) -> tuple[str, int]:
        """(kinds, tokens found in the cache) of a request that runs alone, whose answer is checked."""
        identity = self.submit(model() if entry is None else entry, prompt, count, **how)
        self.run()
        fast = unpacked(self.first[identity].page_kinds or b"")
        assert self.answers[identity] == answer(prompt, fast, count)
        return self.kinds(identity), self.cached[identity]


def wire(text: str) -> bytes:
    return np.packbits([each == "F" for each in text], bitorder="little").tobytes()


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 32, 33, 96, 97, 128, 129, 160, 161, 300])
def test_pages_before_the_one_of_the_last_prompt_token_are_fast_where_there_are_four(length: int) -> None:
    before = (length - 1) // PAGE_TOKENS
    bench = Bench()
    found, _ = bench.ask(tokens(length), 70)
    assert found == ("F" * before if before >= FEWEST == 4 else "")
    fast_rows = sum(batch.rows for batch in bench.batches if batch.fast)
    assert fast_rows == len(found) * PAGE_TOKENS


def test_the_first_output_alone_says_the_kinds_and_exact_ones_are_not_mentioned() -> None:
    bench = Bench()
    fast, exact = bench.submit(model(), tokens(300), 3), bench.submit(model(), tokens(40), 3)
    bench.run()
    assert bench.first[fast].page_kinds == wire("F" * 9) == b"\xff\x01"
    assert bench.first[fast].fingerprint == "vai-echo"
    assert (bench.first[exact].page_kinds, bench.first[exact].fingerprint) == (None, "vai")
    assert bench.finished[fast].page_kinds is None


def test_a_model_without_a_fast_kind_and_a_deterministic_request_are_exact() -> None:
    bench = Bench()
    assert bench.ask(tokens(300), entry=model("b", fast=None)) == ("", 0)
    assert bench.ask(tokens(300), deterministic=True) == ("", 0)
    assert not any(batch.fast for batch in bench.batches)


def test_a_conversation_keeps_the_kinds_of_what_it_finds_and_chooses_for_the_rest() -> None:
    bench, said = Bench(slabs=16), tokens(200)
    assert bench.ask(said, 100) == ("F" * 6, 0)
    said = [*said, *bench.answers["0"]]  # 300 tokens; the page of the prompt's end and those behind it are exact
    assert bench.ask([*said, 1], 1) == ("F" * 6, 288)
    assert bench.ask([*said, *tokens(100, 1)], 1) == ("F" * 6, 288)  # three whole pages are left
    assert bench.ask([*said, *tokens(200, 2)], 1) == ("FFFFFFEEE" + "F" * 6, 288)


def test_a_deterministic_request_finds_exact_pages_only_and_others_the_longest_chain() -> None:
    bench = Bench(slabs=16)
    assert bench.ask(tokens(300)) == ("F" * 9, 0)
    assert bench.ask(tokens(300), deterministic=True) == ("", 0)
    assert bench.ask(tokens(300), deterministic=True) == ("", 288)
    assert bench.ask(tokens(300)) == ("", 288)  # equal in length, and more exact
    longer = [*tokens(300), *tokens(160, 1)]
    assert bench.ask(longer, page_kinds=wire("F" * 14)) == ("F" * 14, 288)
    assert bench.ask(longer) == ("F" * 14, 448)
    assert bench.ask(longer, deterministic=True) == ("", 288)
    assert bench.ask(longer[:330]) == ("", 320)


def test_of_chains_that_are_equally_long_the_more_exact_is_taken() -> None:
    bench = Bench(slabs=16)
    for chain in ("FFFFFFFFF", "EFFFEFFFF", "EEEEFFFFF", "FEEEEEEE"):
        bench.ask(tokens(300), page_kinds=wire(chain))
    assert bench.ask(tokens(300)) == ("F", 288)  # the last of them; what is behind its first page is exact
    bench.ask(tokens(400), page_kinds=wire("EEEEFFFFFFFF"))
    assert bench.ask(tokens(400)) == ("EEEEFFFFFFFF", 384)


def test_of_chains_that_lack_what_a_window_needs_none_counts_as_there() -> None:
    bench, entry = Bench(slabs=16), model(windows=WINDOWED)
    assert bench.ask(tokens(300), 1, entry) == ("F" * 9, 0)
    assert bench.ask([*tokens(300), 1, 2], 1, entry) == ("F" * 9, 288)
    assert bench.ask(tokens(100), 1, entry, deterministic=True) == ("", 0)
    assert bench.ask([*tokens(260), 1, 2], 1, entry) == ("EEEFFFFF", 96)  # behind eight pages much is gone


def test_a_request_without_the_cache_chooses_as_if_nothing_were_there() -> None:
    bench = Bench(slabs=16)
    bench.ask(tokens(300), deterministic=True)
    assert bench.ask(tokens(300), cache=False) == ("F" * 9, 0)
    assert bench.ask(tokens(300)) == ("", 288)


def test_the_search_for_the_longest_chain_looks_at_a_bounded_number_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant fills the cache with a tree of all kinds, which somebody's prompt then goes down."""
    bench, draw = Bench(slabs=40, max_rows=512), random.Random(1)
    for _ in range(28):
        bench.ask(tokens(300), page_kinds=wire("".join(draw.choice("EF") for _ in range(9))))
    assert len(bench.scheduler.cache) > 110
    looked = []
    look = bench.scheduler.cache.look
    monkeypatch.setattr(bench.scheduler.cache, "look", lambda key: looked.append(key) or look(key))
    bench.submit(model(), tokens(300), 1)
    assert 2 * 9 < len(looked) <= 2 * 9 * CHAINS
    bench.run()


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [PLAIN, WINDOWED], ids=["plain", "windowed"])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_the_kinds_told_whatever_is_cached_preempted_or_evicted(
    seed: int, windows: tuple[int | None, ...]
) -> None:
    draw = random.Random(seed)
    bench = Bench(slabs=draw.choice([6, 8]), max_rows=draw.choice([23, 64]), max_sequences=draw.choice([2, 5]))
    entries = [model("a", windows), model("b", windows, fast=None)]
    stems = [tokens(330, number) for number in range(2)]
    asked: dict[str, tuple[list[int], int]] = {}
    for number in range(18):
        said = [asked[identity][0] + bench.answers[identity] for identity in bench.finished if identity in asked]
        prompt = draw.choice(said) if said and draw.random() < 0.3 else draw.choice(stems)[: draw.randrange(1, 330)]
        prompt = [*prompt, *tokens(draw.randrange(1, 30), number)][:360]
        how = {"cache": draw.random() < 0.9, "deterministic": draw.random() < 0.2, "priority": draw.choice([0, 0, 1])}
        count = draw.randrange(1, 40)
        identity = bench.submit(draw.choice([*entries, entries[0]]), prompt, count, **how)
        if draw.random() < 0.1:
            for _ in range(3):
                bench.step()
            bench.scheduler.abort(identity)
        else:
            asked[identity] = prompt, count
        for _ in range(draw.randrange(12)):
            bench.step()
            assert bench.pool.used_bytes + bench.pool.cached_bytes + bench.pool.free_bytes == bench.pool.size
    bench.run()
    for identity, (prompt, count) in asked.items():
        assert bench.finished[identity].finish == "length"
        fast = unpacked(bench.first[identity].page_kinds or b"")
        assert bench.answers[identity] == answer(prompt, fast, count), identity
    assert any("F" in bench.kinds(identity) for identity in asked)
    assert windows is WINDOWED or sum(bench.cached.values()) > 0
    bench.check_that_every_page_is_back("ab")


def test_what_was_found_and_is_gone_before_it_runs_is_computed_in_the_kind_that_it_had() -> None:
    bench = Bench(slabs=16)
    bench.ask(tokens(300), page_kinds=wire("EEFFEFFF"))
    identity = bench.submit(model(), [*tokens(300), *tokens(150, 1)], 5)
    while bench.scheduler.cache.evict(pinned=True):
        pass
    bench.run()
    assert bench.kinds(identity) == "EEFFEFFFE" + "F" * 5
    assert bench.cached[identity] == 0
    assert bench.answers[identity] == answer([*tokens(300), *tokens(150, 1)], unpacked(wire(bench.kinds(identity))), 5)


def test_prompt_tokens_are_counted_by_the_kind_that_they_were_computed_and_found_in() -> None:
    bench, entry = Bench(slabs=16), model()
    bench.ask(tokens(300), 40)
    counts = bench.scheduler.prompts(entry.digest)
    assert vars(counts) == {"exact": 12, "fast": 288, "cached_exact": 0, "cached_fast": 0}
    assert bench.ask([*tokens(300), *tokens(50, 1)], page_kinds=wire("F" * 8)) == ("F" * 8, 256)
    assert vars(counts) == {"exact": 12 + 94, "fast": 288, "cached_exact": 0, "cached_fast": 256}
    assert bench.ask([*tokens(300), *tokens(50, 1), 5], page_kinds=wire("F" * 8)) == ("F" * 8, 320)
    assert vars(counts) == {"exact": 12 + 94 + 31, "fast": 288, "cached_exact": 64, "cached_fast": 256 + 256}
    bench.submit(entry, tokens(60, 3), 9, emitted=20)  # of an answer that began elsewhere
    bench.run()
    assert (counts.exact, counts.fast) == (12 + 94 + 31 + 40, 288)


def test_a_request_takes_up_what_another_computes_meanwhile_where_the_kinds_agree() -> None:
    bench = Bench(slabs=16, max_rows=64)
    same = [bench.submit(model(), [*tokens(300), number], 2) for number in range(3)]
    other = bench.submit(model(), [*tokens(300), 9], 2, deterministic=True)
    bench.run()
    assert [bench.cached[each] for each in (*same, other)] == [0, 288, 288, 0]
    assert sum(batch.rows for batch in bench.batches if batch.fast) == 288


@pytest.mark.parametrize("windows", [PLAIN, WINDOWED], ids=["plain", "windowed"])
@pytest.mark.parametrize("chosen", [None, "EEFFEFFF"])
def test_an_answer_goes_on_in_its_kinds_in_an_engine_that_has_nothing_cached(
    chosen: str | None, windows: tuple[int | None, ...]
) -> None:
    """Whatever gives the same bits there: "amx" as before, "portable" as the engine's own, or as its stand-in."""
    entry, prompt, count = model("a", windows, fast="amx"), tokens(300), 60
    request = Request(id="0", image=entry.digest, tokens=prompt, sampling=SamplingParams(max_tokens=count))
    for cut, fast in ((1, "amx"), (30, "portable"), (59, None)):
        went_on, first = Answer(request), Bench(slabs=16)
        if chosen is not None:
            first.ask(prompt, entry=entry, page_kinds=wire(chosen))
        identity = first.submit(entry, prompt, count)
        while len(first.answers.get(identity, [])) < cut:
            first.step()
        told = first.first[identity]
        went_on.take(replace(told, id="0", tokens=first.answers[identity]))
        assert went_on.lost()
        rest = went_on.rest()
        assert (rest.page_kinds, rest.fast) == (wire(chosen or "F" * 9), "amx")
        second, heir = Bench(slabs=16), model("a", windows, fast=fast)
        kinds.check(rest, heir.fast)
        second.scheduler.add(Sequence(rest, heir, arrival=0, limit=len(prompt) + count, now=0.0))
        second.run()
        (made,), (later,) = second.answers.values(), second.first.values()
        assert (later.fast, later.fingerprint, later.page_kinds) == ("amx", "vai-amx", rest.page_kinds)
        if windows == PLAIN:  # its pages are found under the name that they were begun with
            assert second.ask(prompt, entry=model(fast="amx"), page_kinds=rest.page_kinds)[1] == 288
        assert first.answers[identity] + made == answer(prompt, unpacked(told.page_kinds or b""), count)


def test_an_answer_that_began_with_exact_pages_stays_exact() -> None:
    request = Request(id="0", image="a" * 64, tokens=tokens(300))
    went_on = Answer(request)
    assert went_on.lost()
    assert went_on.rest().page_kinds is None  # nothing was said: the next engine chooses
    assert went_on.take(Output(id="x", tokens=[1], seed=5)).page_kinds is None
    assert went_on.lost()
    assert went_on.rest().page_kinds == b""
    bench = Bench()
    assert bench.ask(tokens(300), page_kinds=b"") == ("", 0)


def test_a_later_engine_tells_the_client_nothing_that_the_first_has_told() -> None:
    went_on = Answer(Request(id="0", image="a" * 64, tokens=tokens(300)))
    first = went_on.take(Output(id="0", tokens=[1], seed=5, page_kinds=b"\x0f", fast="echo"))
    assert went_on.lost()
    later = went_on.take(Output(id="x", tokens=[1], seed=5, page_kinds=b"\x0f", fast="echo", fingerprint="vai-echo"))
    assert (first.page_kinds, first.fast) == (b"\x0f", "echo")
    assert (later.page_kinds, later.fast, later.fingerprint) == (None, None, None)
    assert (went_on.rest().page_kinds, went_on.rest().fast) == (b"\x0f", "echo")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page_kinds", "how", "sentence"),
    [
        (b"\x00\x00\x01", {}, "Kinds of 24 pages are more than the prompt has, which is 10"),
        (bytes(1 << 16), {}, "more than the prompt has"),
        (b"\x00\x02", {}, "Page 9 of a prompt of 10 pages cannot be fast"),
        (b"\x00\x80", {}, "Page 15 of a prompt of 10 pages cannot be fast"),
        (b"\x80", {"emitted": 60}, "Page 7 of a prompt of 8 pages cannot be fast"),
        (b"\x01", {"deterministic": True}, "has no fast pages"),
    ],
)
def test_kinds_that_cannot_be_are_refused(page_kinds: bytes, how: dict[str, Any], sentence: str) -> None:
    request = Request(id="0", image="a" * 64, tokens=tokens(300), page_kinds=page_kinds, **how)
    with pytest.raises(BadRequest, match=sentence) as caught:
        kinds.check(request, "echo")
    assert caught.value.param == "page_kinds"


@pytest.mark.parametrize(
    ("begun", "fast", "named"),
    [
        (None, None, "fast kind, which this engine cannot"),
        ("echo", None, r"\(echo\), which this engine cannot"),
        ("echo", "amx", r"\(echo\), which this engine \(amx\) cannot"),
        ("amx", "echo", r"\(amx\), which this engine \(echo\) cannot"),
    ],
)
def test_fast_pages_are_refused_where_nothing_gives_their_bits(begun: str | None, fast: str | None, named: str) -> None:
    request = Request(id="0", image="a" * 64, tokens=tokens(300), page_kinds=b"\x08", fast=begun)
    with pytest.raises(NotSupported, match=f"{named} .* VAI_FAST"):
        kinds.check(request, fast)
    for page_kinds in (None, b"", b"\0", b"\0\0"):
        kinds.check(replace(request, page_kinds=page_kinds), fast)
    if begun is not None:
        kinds.check(request, begun)


# --- when they are computed -------------------------------------------------------------------------------------------

ROWS = 150  # fast ones that a step has time for while others stream
SECONDS = {fast: cost * STEP_WHILE_STREAMING / (ROWS + 0.5) for fast, cost in ((True, 1), (False, 3))}  # of a row


def timed(bench: Bench) -> Batch | None:
    batch = bench.scheduler.pick()
    if batch is not None:
        bench.batches.append(batch)
        logits = bench.runner.forward(batch)
        bench.now += SECONDS[batch.fast] * batch.rows
        bench.commit(batch, logits)
    return batch


def test_streams_go_on_while_a_long_fast_prompt_comes_and_a_step_keeps_its_time() -> None:
    bench, entry = Bench(slabs=32, max_rows=512), model()
    streams = [bench.submit(entry, tokens(5, number), 400) for number in range(3)]
    for _ in range(3):
        timed(bench)
    long = bench.submit(entry, tokens(2000), 2)
    begun = len(bench.batches)
    while long not in bench.answers:
        timed(bench)
    steps = bench.batches[begun:]
    assert not any(left.fast and right.fast for left, right in itertools.pairwise(steps))
    assert all({each.request.id for each in batch.sequences} >= {*streams} for batch in steps if not batch.fast)
    fast = [batch.rows for batch in steps if batch.fast]
    assert sum(fast) == 62 * PAGE_TOKENS
    assert set(fast[1:-1]) == {ROWS}  # the first tells the speed
    assert [each.request.id for each in steps[-1].sequences] == [*streams, long]  # its exact tail, beside who decodes
    assert steps[-1].rows == 3 + 2000 % PAGE_TOKENS


def test_prompts_of_both_kinds_get_on_beside_each_other() -> None:
    bench, entry = Bench(slabs=64, max_rows=64), model()
    exact = bench.submit(entry, tokens(1500, 1), 1, deterministic=True)
    fast = bench.submit(entry, tokens(1500, 2), 1)
    while not bench.finished:
        timed(bench)
    turns = [batch.fast for batch in bench.batches]
    both = turns[: len(turns) - turns[::-1].index(True)]
    assert both == [number % 2 == 0 for number in range(len(both))]
    assert len(both) > 40
    bench.run()
    assert bench.answers == {
        exact: answer(tokens(1500, 1), b"", 1),
        fast: answer(tokens(1500, 2), b"\1" * 46, 1),
    }


def test_a_short_prompt_does_not_wait_for_long_steps_of_the_other_kind() -> None:
    bench, entry = Bench(slabs=32, max_rows=512), model()
    long = bench.submit(entry, tokens(4000), 1)
    while len(bench.batches) < 3:
        timed(bench)
    assert bench.batches[-1].rows == 512
    for turns in ([False], [True, False]):
        short, came, begun = bench.submit(entry, tokens(12, 1), 1), bench.now, len(bench.batches)
        while short not in bench.finished:
            timed(bench)
        assert [batch.fast for batch in bench.batches[begun:]] == turns
        assert bench.now - came < 2 * STEP_WHILE_STREAMING
    timed(bench)
    assert bench.batches[-1].rows == 512 and long not in bench.finished


def test_a_chunk_ends_where_the_kind_changes() -> None:
    bench = Bench(slabs=16, max_rows=512)
    for deterministic in (False, True):  # so that the speeds are known
        bench.ask(tokens(500, 7), cache=False, deterministic=deterministic)
    bench.batches.clear()
    bench.ask(tokens(400), page_kinds=wire("FFEEEFEEFFFF"), cache=False)
    assert [(batch.rows // PAGE_TOKENS, batch.fast) for batch in bench.batches] == [
        (2, True), (3, False), (1, True), (2, False), (4, True), (0, False),
    ]  # fmt: skip


def test_what_computing_again_costs_is_what_the_pages_of_a_model_cost() -> None:
    bench = Bench(slabs=32, max_rows=512)
    for letter, how in (("a", {}), ("b", {"deterministic": True})):
        bench.submit(model(letter), tokens(400), 1, **how)
    while bench.scheduler.has_work():
        timed(bench)
    speeds = bench.scheduler.retention._speeds
    assert speeds["a" * 64, True] == pytest.approx(1 / SECONDS[True], rel=0.1)
    assert speeds["b" * 64, False] == pytest.approx(1 / SECONDS[False], rel=0.1)
