"""Attention in the fast kind: every implementation this machine has against the NumPy twin.

As with linear layers, the portable one and an emulated AMX have the twin's bits, and a processor's AMX is judged by how
far two orders of additions can lead: a score moves by little, but that may round a weight to its other neighbour among
bfloat16.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.kernels import _native, reference, table
from vai.kernels.program import PAGE_TOKENS, StepArgs

from .test_native_ops import attending, same, step

Floats = NDArray[np.float32]


@pytest.fixture(scope="module", params=table.fasts())
def fast(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def judge(fast: str, found: Floats, expected: Floats) -> None:
    """An outcome is a mean of values, whose weights may each be one of two that are 2^-8 apart."""
    if fast == "portable" or _native.emulated:
        same(found, expected)
    else:
        assert (np.abs(found - expected) <= 2.0**-7 * np.abs(expected).max()).all()


def of_kind(args: StepArgs, kind: str) -> StepArgs:
    return dataclasses.replace(args, kind=kind)


@pytest.mark.parametrize("kv_type", ["bf16", "q8_0"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 8), (4, 4, 64), (6, 3, 20), (7, 1, 80), (40, 1, 32), (2, 1, 128)]
)
@pytest.mark.parametrize("how", [{}, {"window": 33, "softcap": 1.5}])
def test_a_row_has_its_twin_s_bits_over_pages_in_any_order(
    fast: str, heads: int, kv_heads: int, head_dim: int, kv_type: str, how: dict[str, float]
) -> None:
    rom, prog = attending(heads, kv_heads, head_dim, heads, **how)
    rng = np.random.default_rng(10)
    page = prog.groups[0].page_bytes(kv_type)
    places = (rng.permutation(12).astype(np.int64) * page).reshape(3, 4)
    pools_of = [np.full(12 * page, 0xFF, np.uint8) for _ in range(2)]
    twin = reference.ReferencePlan(prog, rom, kv_type=kv_type, max_rows=64, max_sequences=64, fast="portable")
    workers = table.make_workers(2)
    plan = table.lower(prog, rom, workers=workers, kv_type=kv_type, max_rows=64, max_sequences=64, fast=fast)
    contexts = [0, 0, 0]
    for lengths in ([40, 1, 9], [1, 23, 7], [31, 2, 16]):
        starts = np.cumsum([0, *lengths])
        pages = places.copy()
        for sequence, context in enumerate(contexts if how else ()):
            behind = max(0, context + 1 - 33) // PAGE_TOKENS
            for pool in pools_of:  # NaNs now, and nobody knows where they are
                for gone in places[sequence, :behind]:
                    pool[gone : gone + page] = 0xFF
            pages[sequence, :behind] = -1
        args = of_kind(step(rng.integers(0, 64, starts[-1]), starts[:-1].tolist(), contexts, [pages]), "fast")
        got, want = plan.forward(args, pools_of[0]), twin.forward(args, pools_of[1])
        assert np.isfinite(got).all()
        judge(fast, got, want)
        np.testing.assert_array_equal(pools_of[0], pools_of[1])
        contexts = [c + n for c, n in zip(contexts, lengths, strict=True)]


@pytest.mark.parametrize("how", [{}, {"window": 1100, "softcap": 2.0}])
def test_chunks_of_1024_are_added_from_position_0_and_company_changes_no_bit(fast: str, how: dict[str, float]) -> None:
    rom, prog = attending(4, 2, 16, 11, **how)
    page = prog.groups[0].page_bytes("bf16")
    pages = np.arange(36, dtype=np.int64)[None, ::-1] * page
    twin = reference.ReferencePlan(prog, rom, kv_type="bf16", max_rows=64, max_sequences=64, fast="portable")
    workers = table.make_workers(3)
    plan = table.lower(prog, rom, workers=workers, max_rows=64, max_sequences=64, fast=fast)
    pool = np.zeros(36 * page, np.uint8)
    tokens = np.random.default_rng(12).integers(0, 64, 36 * PAGE_TOKENS)
    for begin in range(0, 1120, 56):
        args = of_kind(step(tokens[begin : begin + 56], context=[begin], tables=[pages.copy()]), "fast")
        whole = plan.forward(args, pool).copy()
        if begin in (0, 1008, 1064):
            judge(fast, whole, twin.forward(args, pool.copy()))
            alone, kept = [], pool.copy()
            for row in (0, 1, 30, 55):
                args = of_kind(step([tokens[begin + row]], context=[begin + row], tables=[pages.copy()]), "fast")
                alone.append(plan.forward(args, kept)[0].copy())
            same(np.stack(alone), whole[[0, 1, 30, 55]])


def test_stored_keys_that_are_subnormal_count_as_zeros(fast: str) -> None:
    """As AMX reads them: with queries this large they would else make scores."""
    rom, prog = attending(2, 1, 32, 4)
    tables = np.frombuffer(rom.data, np.uint8).copy()
    for name, factor in (("q.weight", 2.0**120), ("k.weight", 0)):
        stored = rom.table.find(name)[0]
        tables[stored.offset :][: stored.bytes].view("<f4")[:] *= np.float32(factor)
    rom = SimpleNamespace(table=rom.table, data=memoryview(tables))
    page, rng = prog.groups[0].page_bytes("bf16"), np.random.default_rng(6)
    pool = np.zeros(2 * page, np.uint8)
    planes = pool.view(np.uint16).reshape(2, 2, 2, -1)  # pages, layers, keys and values
    planes[:, :, 0] = rng.choice([0x007F, 0x807F], planes[:, :, 0].shape)
    planes[:, :, 1] = rng.integers(0x3F00, 0x4000, planes[:, :, 1].shape)
    plan = table.lower(prog, rom, workers=table.make_workers(1), max_rows=64, max_sequences=64, fast=fast)
    args = step([1, 2, 3], context=[PAGE_TOKENS], tables=[np.arange(2, dtype=np.int64)[None] * page])
    found, exact = (plan.forward(of_kind(args, kind), pool.copy()).copy() for kind in ("fast", "exact"))
    judge(fast, found[0, :32], found[0, 32:])  # all scores are 0, so both heads have the same mean
    assert (found[0] != exact[0]).any()


def test_fast_attention_is_near_the_exact_one(fast: str) -> None:
    rom, prog = attending(6, 3, 64, 5)
    page = prog.groups[0].page_bytes("bf16")
    plan = table.lower(prog, rom, workers=table.make_workers(1), max_rows=64, max_sequences=64, fast=fast)
    args = step(np.random.default_rng(3).integers(0, 64, 60), tables=[np.arange(2, dtype=np.int64)[None] * page])
    pool = np.zeros(2 * page, np.uint8)
    exact, quick = (plan.forward(of_kind(args, kind), pool).copy() for kind in ("exact", "fast"))
    # A score is 0.3 times 64 products of size 2, each off by up to 2^-8: together by 0.02 or so, and so is a weight.
    assert 0 < np.linalg.norm(exact - quick) < np.linalg.norm(exact) / 16
