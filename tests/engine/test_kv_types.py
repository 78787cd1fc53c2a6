"""Whatever type keys and values are stored in, an answer has the same bits in any company, chunks and pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from vai import LLM
from vai.daemon.pool import SLAB, whole_bytes
from vai.engine.client import EngineClient
from vai.engine.engine import Engine
from vai.errors import NotSupported
from vai.kernels.program import KV_TYPES
from vai.request import Output, Request, SamplingParams

Root = tuple[Path, Path, dict[str, str]]
Make = Callable[..., Engine]
Answer = tuple[tuple[int, ...], list[Any]]

SAMPLED = SamplingParams(temperature=0.9, top_k=40, seed=7, max_tokens=56, logprobs=5)
STEM = [7 * i % 500 for i in range(64)]


def requests(digest: str, count: int = 1) -> list[Request]:
    """Conversations that branch off one beginning."""
    return [Request(id=str(n), image=digest, tokens=[*STEM, *range(n, n + 66)], sampling=SAMPLED) for n in range(count)]


def run(engine: Engine, asked: Iterable[Request], steps_between: int = 0) -> tuple[dict[str, Answer], int]:
    """What each was answered, and how many tokens of the prompts came from kept pages."""
    outputs: list[Output] = []
    for each in asked:
        engine.submit(each)
        for _ in range(steps_between):
            outputs += engine.step()
    while engine.has_work():
        outputs += engine.step()
    assert not any(output.error for output in outputs)
    told: dict[str, Answer] = {}
    for output in outputs:
        tokens, logprobs = told.get(output.id, ((), []))
        told[output.id] = (tokens + tuple(output.tokens), logprobs + list(output.logprobs))
    return told, sum(output.cached_tokens for output in outputs)


@pytest.mark.parametrize(("kv_type", "count"), [("bf16", 4), ("q8_0", 8)])  # more than a slab holds at once
def test_company_chunks_threads_hits_and_preemption_change_no_bit(
    wide_root: tuple[Path, str], make_engine: Make, kv_type: str, count: int
) -> None:
    root, digest = wide_root
    asked = requests(digest, count)
    alone = make_engine(root, slabs=2, kv_type=kv_type, max_rows=7)
    expected = {}
    for each in asked:
        expected |= run(alone, [replace(each, cache=False)])[0]
    tight = make_engine(root, threads=3, kv_type=kv_type)
    got, hits = run(tight, asked, steps_between=1)
    assert got == expected
    assert hits > 0
    assert sum(model.preemptions for model in tight.status().models) > 0


def test_types_give_different_answers_and_say_so(tiny_root: Root, make_engine: Make) -> None:
    root, _, digests = tiny_root
    told = {}
    for kv_type in KV_TYPES:
        engine = make_engine(root, kv_type=kv_type)
        told[kv_type] = run(engine, requests(digests["tiny"]))[0]["0"][1]
        assert engine.status().kv_type == kv_type
    assert told["bf16"] != told["f32"] != told["q8_0"] != told["bf16"]
    with pytest.raises(NotSupported, match="bf16, f32, q8_0"):
        make_engine(root, kv_type="q4_0").attach(digests["tiny"])


def test_pages_of_another_type_are_never_taken_over(tiny_root: Root, make_engine: Make) -> None:
    root, _, digests = tiny_root
    asked = requests(digests["tiny"])
    expected = {kv_type: run(make_engine(root, kv_type=kv_type), asked)[0] for kv_type in KV_TYPES}
    pool = np.full(whole_bytes(2 * SLAB), 0xFF, np.uint8)
    before = None
    for kv_type in ("bf16", "q8_0", "q8_0", "f32", "bf16", "q8_0"):
        engine = Engine(root, threads=1, pool=pool, kv_type=kv_type)
        engine.attach(digests["tiny"])
        engine.adopt()
        adopted = engine.status().adopted_pages
        answers, hits = run(engine, asked)
        engine.close()
        assert answers == expected[kv_type]
        assert (adopted > 0, hits > 0) == (kv_type == before, kv_type == before)
        before = kv_type


async def test_an_engine_process_stores_what_it_is_told_to(
    tiny_root: Root, start_engine: Callable[..., Any], make_engine: Make
) -> None:
    root, _, digests = tiny_root
    (asked,) = requests(digests["tiny"])
    client = EngineClient(start_engine(root, "--kv-type", "q8_0", "--fast", "off").socket)
    try:
        tokens = [token async for output in client.generate(asked) for token in output.tokens]
        assert (await client.status()).kv_type == "q8_0"
    finally:
        await client.close()
    assert tuple(tokens) == run(make_engine(root, kv_type="q8_0"), [asked])[0]["0"][0]


def test_an_llm_stores_what_it_is_told_to(tiny_root: Root, make_engine: Make) -> None:
    root, names, digests = tiny_root
    (asked,) = requests(digests["tiny"])
    with LLM("tiny", root=root, names=names, threads=1, kv_bytes=SLAB, kv_type="q8_0", fast="off") as llm:
        answer = llm.generate(asked.tokens, replace(SAMPLED, stop_ids=()))
    expected = run(make_engine(root, kv_type="q8_0"), [asked])[0]["0"][0]
    assert tuple(answer.token_ids) == expected[: len(answer.token_ids)]
    assert len(answer.token_ids) > 0
