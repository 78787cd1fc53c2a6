"""Prompt lookup by an index guesses exactly what a look through the whole text does, however the text came."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vai.engine.batch import Batch
from vai.engine.ngrams import NgramIndex, scan
from vai.engine.sequence import Sequence
from vai.engine.speculate import PIECE, Pace
from vai.request import Request, SamplingParams, Speculate

from .test_scheduler import Bench, model
from .test_speculate import drive

GoOn = Callable[[NgramIndex, list[int], int], list[int]]


def said_before(text: list[int], most: int) -> list[int]:
    """The definition: behind the latest place that agrees in four tokens, else three, else two."""
    for size in (4, 3, 2):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                going_on = list(text)
                for place in range(end, end + most):
                    going_on.append(going_on[place])
                return going_on[len(text) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_index_scan_and_definition_guess_the_same_at_every_length(text: list[int], data: st.DataObject) -> None:
    index = NgramIndex()
    for length in range(len(text) + 1):
        index.read(text[:length], data.draw(st.integers(-1, 5)))
        found = scan(array("i", text[:length]))
        guesses = index.go_on(text[:length], 3)
        assert guesses == said_before(text[:length], 3)
        assert bool(guesses) == (found is not None)


@given(st.lists(st.sampled_from([0, 1, 255, 256, 65536, 0x01000000, 0x7FFFFFFF]), min_size=2, max_size=80))
@settings(max_examples=100, deadline=None)
def test_an_index_that_is_up_to_date_needs_no_scan(text: list[int]) -> None:
    index = NgramIndex()
    assert index.read(text, len(text)) == len(text) - 2  # the first has nothing before it, the last nothing behind
    assert index.read(text, len(text)) == 0
    index.go_on(text, 1)
    assert index._look() == scan(array("i", text))


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 40, 30000])
def test_long_texts_are_guessed_alike(vocabulary: int) -> None:
    draw = random.Random(vocabulary)
    text = [draw.randrange(vocabulary) for _ in range(700)]
    index = NgramIndex()
    for length in range(500, 700):
        index.read(text[:length], 64)
        assert index.go_on(text[:length], 4) == said_before(text[:length], 4)


def test_a_text_takes_few_bytes_a_token() -> None:
    text = list(range(5000, 10_000))  # no two places alike: the most entries
    tracemalloc.start()
    try:
        index = NgramIndex()
        while index.read(text, PIECE):
            pass
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(text) < 220


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many guesses were asked for, each of which is held to the definition, and how many of them of the index."""
    counts = {"asked": 0, "looked": 0}
    go_on, look = NgramIndex.go_on, NgramIndex._look

    def check(index: NgramIndex, tokens: list[int], most: int) -> list[int]:
        counts["asked"] += 1
        guesses = go_on(index, tokens, most)
        assert guesses == said_before(tokens, most)
        return guesses

    def count(index: NgramIndex) -> int | None:
        counts["looked"] += 1
        return look(index)

    monkeypatch.setattr(NgramIndex, "go_on", check)
    monkeypatch.setattr(NgramIndex, "_look", count)
    return counts


def ask(bench: Bench, text: list[int], prompt: int, count: int, emitted: int = 0) -> str:
    number, entry = next(bench.ids), model("a")
    request = Request(
        id=str(number),
        image=entry.digest,
        tokens=text[: prompt + emitted],
        sampling=SamplingParams(max_tokens=count),
        speculate=Speculate(kind="ngram"),
        emitted=emitted,
    )
    bench.scheduler.add(Sequence(request, entry, arrival=number, limit=prompt + count, now=bench.now))
    return request.id


def test_guesses_are_the_same_across_rejections_preemptions_and_resumes(checked: dict[str, int]) -> None:
    noise = random.Random(3).choices(range(4), k=400)
    bench = Bench(slabs=6)
    texts = [[first, *noise[1:]] for first in (7, 8, 9)]  # so that they share no page
    ids = [ask(bench, texts[0], 40, 150), ask(bench, texts[1], 70, 120), ask(bench, texts[2], 30, 160, emitted=50)]
    drive(bench, lambda batch: 0.02, lambda position: noise[position])
    assert [bench.answers[each] for each in ids] == [noise[40:190], noise[70:190], noise[80:190]]
    assert bench.scheduler.counts("a" * 64)[3] > 0  # preemptions
    tally = bench.scheduler.tally("a" * 64)
    assert 0 < tally.accepted < tally.guessed
    assert checked["looked"] == checked["asked"] > 50  # who computes a prompt has read it when the answer begins


def test_a_prompt_that_is_found_in_the_cache_is_scanned_until_it_is_read(checked: dict[str, int]) -> None:
    noise = random.Random(4).choices(range(4), k=1200)
    bench = Bench(slabs=64)
    ask(bench, noise, 1100, 1)
    drive(bench, lambda batch: 0.02, lambda position: noise[position])
    assert checked == {"asked": 0, "looked": 0}
    again = ask(bench, noise, 1100, 60)
    drive(bench, lambda batch: 0.02, lambda position: noise[position])
    assert bench.answers[again] == noise[1100:1160]
    assert 0 < checked["asked"] - checked["looked"] <= 1100 // PIECE


def test_the_room_of_a_step_is_not_asked_for_where_there_is_nothing_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(slabs=64)
    rooms = []
    room = bench.scheduler._room

    def count(*about: object) -> object:
        rooms.append(about)
        return room(*about)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(bench.scheduler, "_room", count)
    different = list(range(200))
    ask(bench, different, 20, 150)
    batches: list[Batch] = []
    drive(bench, lambda batch: batches.append(batch) or 0.02, lambda position: different[position])  # type: ignore[func-returns-value]  # append's None
    assert len(batches) >= 150
    assert not rooms


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(1e-4, 10.0)), max_size=30), st.integers(0, 45), st.integers(0, 20)
)
@settings(max_examples=100, deadline=None)
def test_what_steps_take_is_as_numpy_interpolates(notes: list[tuple[int, float]], first: int, more: int) -> None:
    pace = Pace()
    for rows, seconds in notes:
        pace.note(rows, seconds)
    fresh = sorted((rows, mean) for rows, (mean, _) in pace._means.items())
    means = np.array([0.0, *(mean for _, mean in fresh)])
    rising = np.minimum.accumulate(means[::-1])[::-1]
    expected = np.interp(range(first, first + more + 1), [0, *(rows for rows, _ in fresh)], rising)
    assert pace.seconds(first, first + more) == expected.tolist()
