"""Answers that outlive their engine: engine processes are killed in mid-answer, and nobody can tell from the tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from vai.daemon import pool as memory
from vai.daemon.pool import SLAB
from vai.engine.client import EngineClient
from vai.engine.engine import Engine
from vai.engine.resume import FRUITLESS, RETRIES, Answer
from vai.errors import BadRequest, Unavailable
from vai.request import Output, Request, SamplingParams

Root = tuple[Path, Path, dict[str, str]]
Start = Callable[..., Any]  # gives an EngineProcess of conftest.py

PROMPT = list(range(3, 43))
GREEDY = SamplingParams(temperature=0, seed=1, max_tokens=500, logprobs=3)
SAMPLED = SamplingParams(temperature=1.1, top_p=0.9, seed=11, max_tokens=500, logprobs=2)
HELD_OFF = SamplingParams(temperature=1, seed=4, max_tokens=500, min_tokens=200, stop_ids=tuple(range(60)))


def plain(outputs: list[Output]) -> list[Output]:
    """Outputs without what clocks and caches say."""
    return [replace(output, timing=None, cached_tokens=0) for output in outputs]


def run(engine: Engine, request: Request) -> list[Output]:
    engine.submit(request)
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    return plain(outputs)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, HELD_OFF], ids=["greedy", "sampled", "min tokens"])
def test_an_answer_that_brings_its_beginning_along_ends_as_the_whole_one(
    tiny_root: Root, make_engine: Callable[..., Engine], sampling: SamplingParams
) -> None:
    root, _, digests = tiny_root
    engine = make_engine(root)
    request = Request(id="whole", image=digests["tiny-qwen2"], tokens=PROMPT, sampling=replace(sampling, max_tokens=90))
    whole = run(engine, request)
    for cut in (1, 24, len(whole) - 1):
        answer = Answer(request)
        first = [answer.take(output) for output in whole[:cut]]
        assert answer.lost()
        rest = answer.rest()
        assert rest.id != request.id
        assert first + [answer.take(output) for output in run(engine, rest)] == whole
        assert answer.over


@pytest.mark.parametrize("emitted", [1, 2, 40])
def test_a_beginning_that_cannot_be_is_refused(
    tiny_root: Root, make_engine: Callable[..., Engine], emitted: int
) -> None:
    root, _, digests = tiny_root
    few = SamplingParams(max_tokens=2 if emitted == 2 else 100)
    tokens = [1] if emitted == 1 else PROMPT
    engine = make_engine(root)
    with pytest.raises(BadRequest, match="cannot be an answer"):
        engine.submit(Request(id="a", image=digests["tiny"], tokens=tokens, sampling=few, emitted=emitted))
    assert not engine.has_work()


async def killing(
    client: EngineClient, request: Request, cuts: list[int], next_engine: Callable[[], None]
) -> list[Output]:
    """The outputs of a request whose engine is replaced after so many of them, each time."""
    outputs, restarts = [], []
    async for output in client.generate(request):
        outputs.append(output)
        if len(outputs) in cuts:
            restarts.append(asyncio.create_task(asyncio.to_thread(next_engine)))
    await asyncio.gather(*restarts)
    return plain(outputs)


@pytest.fixture
def replaced(tiny_root: Root, start_engine: Start) -> tuple[Path, Callable[[], None]]:
    """(socket of a running engine, what kills it and starts another)."""
    engines = [start_engine(tiny_root[0])]

    def next_engine() -> None:
        engines[-1].process.kill()
        engines[-1].process.wait()
        engines.append(start_engine(tiny_root[0]))

    return engines[0].socket, next_engine


async def test_streams_go_on_where_a_killed_engine_left_them(
    tiny_root: Root, replaced: tuple[Path, Callable[[], None]], make_engine: Callable[..., Engine]
) -> None:
    (root, _, digests), (path, next_engine) = tiny_root, replaced
    request = Request(id="s", image=digests["tiny-qwen2"], tokens=PROMPT, sampling=SAMPLED)
    client = EngineClient(path, patience=30)
    try:
        assert await killing(client, request, [1, 60], next_engine) == run(make_engine(root), request)
        status = await client.status()
        unseeded = replace(request, id="u", sampling=replace(SAMPLED, seed=None))
        drawn = await killing(client, unseeded, [30], next_engine)
    finally:
        await client.close()
    assert 0 < sum(model.tokens for model in status.models) < 500  # the last of three engines made a part of it
    seeds = [output.seed for output in drawn if output.seed is not None]
    assert len(seeds) == 1
    again = replace(unseeded, sampling=replace(SAMPLED, seed=seeds[0]))
    assert drawn == run(make_engine(root), again)


async def test_the_next_engine_finds_the_pages_that_a_killed_one_had_sealed(
    tiny_root: Root, start_engine: Start, make_engine: Callable[..., Engine]
) -> None:
    """kill -9 in mid-answer to a long prompt: what follows computes the unsealed tail, to the same bits.

    The whole pages of the prompt are of the fast kind, which the client is told once. What another conversation has
    pinned before stays pinned.
    """
    root, _, digests = tiny_root
    pool = memory.create(4 * SLAB)
    how, over = ("--pool-fd", str(pool), "--fast", "portable"), {"pass_fds": (pool,)}
    engines = [start_engine(root, *how, **over)]

    def next_engine() -> None:
        engines[-1].process.kill()
        engines[-1].process.wait()
        engines.append(start_engine(root, *how, **over))

    long = [7 * n % 500 for n in range(900)]
    request = Request(id="s", image=digests["tiny-qwen2"], tokens=long, sampling=replace(SAMPLED, max_tokens=80))
    expected = run(make_engine(root, fast="portable"), request)
    assert [output.page_kinds for output in expected[:2]] == [b"\xff\xff\xff\x0f", None]
    client = EngineClient(engines[0].socket, patience=30)
    pinned = replace(request, id="p", image=digests["tiny"], tokens=long[:70], session="p", retain=300)
    try:
        few = [output async for output in client.generate(replace(pinned, sampling=replace(GREEDY, max_tokens=2)))]
        before = (await client.status()).pool_pinned
        assert await killing(client, request, [40], next_engine) == expected
        status = await client.status()
        assert status.pool_pinned == before > 0
        assert (900 + 40 - 32) // 32 <= status.adopted_pages - 2 <= (900 + 80) // 32
        assert await client.end_session("p") == 2 < len(few) + 1
        assert (await client.status()).pool_pinned == 0
        again = [output async for output in client.generate(replace(request, id="again"))]
        other = [output async for output in client.generate(replace(request, id="o", image=digests["tiny"]))]
    finally:
        await client.close()
        os.close(pool)
    assert (again[0].cached_tokens, other[0].cached_tokens) == (896, 0)
    assert [output.tokens for output in again] == [output.tokens for output in expected]


async def test_an_engine_asked_to_stop_hands_its_streams_on_too(
    tiny_root: Root, start_engine: Start, make_engine: Callable[..., Engine]
) -> None:
    root, _, digests = tiny_root
    first = start_engine(root)
    request = Request(id="s", image=digests["tiny"], tokens=PROMPT, sampling=GREEDY)
    client = EngineClient(first.socket, patience=30)

    def next_engine() -> None:
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(20) == 0
        start_engine(root)

    try:
        assert await killing(client, request, [5], next_engine) == run(make_engine(root), request)
    finally:
        await client.close()


async def test_without_an_engine_a_request_waits_while_patience_lasts(tiny_root: Root, start_engine: Start) -> None:
    root, _, digests = tiny_root
    path = root / "run/engine.sock"
    request = Request(id="w", image=digests["tiny"], tokens=PROMPT, sampling=GREEDY)
    hasty, patient = EngineClient(path, patience=0.05), EngineClient(path, patience=30)
    with pytest.raises(Unavailable, match="No engine listens"):
        await anext(hasty.generate(request))
    with pytest.raises(Unavailable, match="No engine listens"):
        await patient.status()  # whoever asks how the engine is, is told
    outputs = patient.generate(request)
    waiting = asyncio.ensure_future(anext(outputs))
    await asyncio.to_thread(start_engine, root)
    assert (await waiting).tokens
    await outputs.aclose()
    await patient.close()


def test_a_request_is_sent_again_so_often_and_less_often_if_it_brings_nothing() -> None:
    request = Request(id="r", image="0" * 64, tokens=[1])
    useful, fruitless = Answer(request), Answer(request)
    for token in range(RETRIES):
        useful.take(Output(id="r", tokens=[token], seed=1))
        assert useful.lost()
    assert not useful.lost()
    assert [fruitless.lost() for _ in range(FRUITLESS + 1)] == [True] * FRUITLESS + [False]
