"""How keys and values are stored: any values at all, at the end of readable memory, and how far q8_0 may be off.

Nothing here is tuned. In q8_0 an element is off by at most half a step, d / 2, where d is a bfloat16 next to a / 127
and a the largest magnitude of 32 elements. A score is a sum over the elements of q * k, so it is off by at most scale *
sum |q| * d / 2, say s. Weights of the softmax then are off by at most the factor exp(2 s), and with them every output:
by (exp(2 s) - 1) * max |v|, and by half the step of the values themselves. Roundings of binary32 add what binary32 adds
with exact storage, 2^-24 for each of the additions that follow one another.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from vai import config
from vai.burn.synth import SHAPES
from vai.kernels import reference, table
from vai.kernels.ops import Attention, Embed, KvWrite
from vai.kernels.program import KV_GROUP, KV_TYPES, PAGE_TOKENS, CacheGroup, Plan, Program, StepArgs, kv_bytes
from vai.models.decoder import build
from vai.rom.image import BLOCK_ROWS, Part, StoredTensor, TensorTable, place, tensor_bytes

Floats = NDArray[np.float32]
LIBC = ctypes.CDLL(None, use_errno=True)
TOKENS = 16  # different ones: rows of the tables that queries, keys and values come from


class Rom:
    """Three tables of floats and what lowering needs of an image."""

    def __init__(self, **values: Floats) -> None:
        sizes = [tensor_bytes("F32", BLOCK_ROWS, x.shape[1]) for x in values.values()]
        offsets, end = place(sizes)
        memory = np.zeros(end, np.uint8)
        stored = []
        for (name, x), offset, size in zip(values.items(), offsets, sizes, strict=True):
            columns = x.shape[1]
            tiles = np.zeros((-(-columns // 16) * 16, BLOCK_ROWS), "<f4")
            tiles[:columns] = x.T
            memory[offset : offset + size] = tiles.reshape(-1).view(np.uint8)
            stored.append(StoredTensor(name, "F32", BLOCK_ROWS, columns, offset, size, (Part(name, TOKENS, 0, 1),)))
        self.table, self.data = TensorTable(end, [bytes(32)] * -(-end // (4 << 20)), stored), memoryview(memory)

    def tensor(self, name: str) -> tuple[StoredTensor, Part, memoryview]:
        stored, part = self.table.find(name)
        return stored, part, self.data[stored.offset : stored.offset + stored.bytes]


def attending(rom: Rom, heads: int, kv_heads: int, head_dim: int, scale: float) -> Program:
    ops = (
        *(Embed(name, name) for name in "qkv"),
        KvWrite("k", "v", group=0, layer=0),
        Attention("y", "q", 0, 0, heads, kv_heads, head_dim, scale=scale),
    )
    constants = {stored.name: (TOKENS, stored.columns) for stored in rom.table.tensors}
    return Program(ops, (CacheGroup(1, kv_heads, head_dim),), {"logits": "y"}, constants, 0, TOKENS, 4096)


@contextmanager
def guarded(size: int) -> Iterator[NDArray[np.uint8]]:
    """Memory whose last byte is the last that may be touched."""
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    guard = ctypes.c_void_p(whole.ctypes.data + room)
    assert LIBC.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    yield whole[room - size : room]
    assert LIBC.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) == 0


def run(plan: Plan, tokens: NDArray[np.int32], pool: NDArray[np.uint8], page: int, context: int = 0) -> Floats:
    count = len(tokens)
    pages = -(-(context + count) // PAGE_TOKENS)
    step = StepArgs(
        tokens,
        np.arange(context, context + count, dtype=np.int32),
        np.array([0, count], np.int32),
        np.array([context], np.int32),
        (np.arange(pages, dtype=np.int64)[None, ::-1].copy() * page,),
        np.arange(count, dtype=np.int32),
    )
    return plan.forward(step, pool).copy()


def same(a: Floats, b: Floats) -> None:
    """Bit for bit, but for what kind of NaN a NaN is."""
    a, b = (np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32) for x in (a, b))
    np.testing.assert_array_equal(a, b)


def awkward(rng: np.random.Generator, columns: int) -> Floats:
    """Rows with outliers, zeros, values below and at every guard, huge ones, halves of a step, infinities and NaNs."""
    x = rng.standard_normal((TOKENS, columns)).astype(np.float32)
    x[:, columns // 3] *= 40
    x[1] = 0
    x[2] *= np.float32(2.0**-101)
    x[3] *= np.float32(2.0**-140)  # subnormal
    x[4] *= np.float32(2.0**120)
    x[5, columns // 2], x[6, 0], x[7, -1] = np.nan, np.inf, -np.inf
    x[8] = np.float32(-0.0)
    x[9] = np.where(np.arange(columns) % 2, 0.5, 127.0)  # d is 1, codes on the half
    x[10] = np.where(np.arange(columns) % 3, -2.5, 127.0)
    x[11] = np.finfo(np.float32).max
    x[12] = np.float32(2.0**-100)
    x[13] = np.nextafter(np.float32(2.0**-100), np.float32(0))
    return x


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(3, 3, 1), (5, 1, 33), (6, 2, 64), (4, 2, 100), (9, 3, 128), (2, 1, 256), (30, 1, 16)],
)
def test_any_values_give_the_references_pages_and_no_byte_behind_the_pool_is_touched(
    heads: int, kv_heads: int, head_dim: int, kv_type: str
) -> None:
    rng = np.random.default_rng(head_dim)
    q = rng.standard_normal((TOKENS, heads * head_dim)).astype(np.float32)
    rom = Rom(q=q, k=awkward(rng, kv_heads * head_dim), v=awkward(rng, kv_heads * head_dim))
    program = attending(rom, heads, kv_heads, head_dim, 0.2)
    page = program.groups[0].page_bytes(kv_type)
    plain = [0, *range(8, 11), 14, 15]  # tokens under which not everything is a NaN or overflows
    prompts = [rng.choice(TOKENS, 45), rng.choice(plain, 45)]
    for prompt in prompts:
        tokens = prompt.astype(np.int32)
        twin = reference.ReferencePlan(program, rom, kv_type=kv_type, max_rows=64, max_sequences=64)
        stored = np.full(2 * page, 0xFF, np.uint8)
        expected = run(twin, tokens, stored, page)
        assert np.isfinite(expected).all() == (prompt is prompts[1])
        for isa in table.isas():
            for threads in (1, 3):
                plan = table.lower(
                    program, rom, isa=isa, kv_type=kv_type, max_rows=64, max_sequences=64,
                    workers=table.make_workers(threads),
                )  # fmt: skip
                with guarded(2 * page) as pool:
                    pool[:] = 0xFF
                    same(run(plan, tokens, pool, page), expected)
                    np.testing.assert_array_equal(pool, stored)
                    pool[:] = 0xFF
                    ends = (0, 7, 8, 9, 31, 40, 45)  # chunks, some of one row
                    parts = [run(plan, tokens[a:b], _turned(pool, page, b), page, a) for a, b in pairwise(ends)]
                    same(np.concatenate(parts), expected)


def _turned(pool: NDArray[np.uint8], page: int, tokens: int) -> NDArray[np.uint8]:
    """Where a sequence has one page, `run` puts it first: the pool from the second page on."""
    return pool if tokens > PAGE_TOKENS else pool[page:]


def test_an_element_of_q8_0_is_off_by_at_most_half_a_step() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((500, 64)) * 2.0 ** rng.integers(-90, 90, (500, 1))).astype(np.float32)
    codes, scales = reference.quantize_q8_0(x)
    steps = np.repeat((scales.astype(np.uint32) << 16).view(np.float32), KV_GROUP, axis=1).astype(np.float64)
    largest = np.repeat(np.abs(x).reshape(500, 2, KV_GROUP).max(axis=2), KV_GROUP, axis=1)
    assert (np.abs(steps * 127 / largest - 1) <= 2.0**-8).all()  # half a unit of 8 significant bits, and 2^-24
    # The reciprocal and the product are rounded: each moves |x| / d, at most 127.5, by 2^-24 of itself.
    assert (np.abs(x - codes * steps) <= steps * (0.5 + 127.5 * 2.0**-23)).all()
    assert np.array_equal((codes.astype(np.float32) * steps.astype(np.float32)).astype(np.float64), codes * steps)


@pytest.mark.parametrize("outlier", [1, 30])
def test_attention_over_q8_0_is_off_by_no_more_than_its_rounding_steps_allow(outlier: int) -> None:
    rng = np.random.default_rng(2)
    heads, kv_heads, head_dim, count = 6, 2, 128, 90
    q, k, v = (rng.standard_normal((TOKENS, n * head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    k[:, 5] *= outlier  # as biases of keys make it in real models
    rom, scale = Rom(q=q, k=k, v=v), head_dim**-0.5
    program = attending(rom, heads, kv_heads, head_dim, scale)
    tokens = rng.integers(0, TOKENS, count, np.int32)
    outputs = {}
    for kv_type in ("f32", "q8_0"):
        plan = table.lower(
            program, rom, kv_type=kv_type, max_rows=count, max_sequences=count, workers=table.make_workers(2)
        )
        page = program.groups[0].page_bytes(kv_type)
        outputs[kv_type] = run(plan, tokens, np.zeros(3 * page, np.uint8), page).astype(np.float64)
    shape = (TOKENS, kv_heads, head_dim)
    half_steps = {
        name: np.repeat(_steps(x.reshape(shape)), KV_GROUP, axis=2) * (0.5 + 127.5 * 2.0**-23)
        for name, x in (("k", k), ("v", v))
    }
    errors = np.abs(outputs["q8_0"] - outputs["f32"]).reshape(count, heads, head_dim)
    roundings = 2 * (head_dim + count + 8) * 2.0**-24  # of scores and sums, in both
    bounds = np.empty_like(errors)
    for row in range(count):
        seen = np.unique(tokens[: row + 1])
        for head in range(heads):
            mine = head // (heads // kv_heads)
            query = np.abs(q[tokens[row]].reshape(heads, head_dim)[head]).astype(np.float64)
            sizes = np.abs(k.reshape(shape)[seen, mine]) @ query
            off = scale * (half_steps["k"][seen, mine] @ query + roundings * sizes).max()
            values = np.abs(v.reshape(shape)[seen, mine])
            bounds[row, head] = np.expm1(2 * off) * values.max(axis=0) + half_steps["v"][seen, mine].max(axis=0)
            bounds[row, head] += roundings * values.max(axis=0)
    assert (errors <= bounds).all()
    assert errors.max() > 0


def _steps(x: Floats) -> NDArray[np.float64]:
    """The largest that d may be for x [tokens, kv_heads, head_dim]: half a unit of bfloat16 above a / 127."""
    largest = np.abs(x).reshape(*x.shape[:2], -1, KV_GROUP).max(axis=3).astype(np.float64)
    return largest / 127 * (1 + 2.0**-8)


def test_what_a_token_takes_is_exact() -> None:
    assert tuple(config.KV_TYPES) == KV_TYPES
    assert [kv_bytes(type, 128) for type in KV_TYPES] == [256, 512, 136]
    assert [kv_bytes("q8_0", head_dim) for head_dim in (1, 32, 33, 64, 80)] == [3, 34, 37, 68, 86]
    (group,) = build(SHAPES["qwen2-1.5b"]).groups
    assert group.page_bytes("bf16") // PAGE_TOKENS == 28 * 2 * 2 * 256
    assert group.page_bytes("q8_0") // PAGE_TOKENS == 28 * 2 * 2 * 136
    assert all(CacheGroup(1, 1, head_dim).page_bytes("q8_0") % 64 == 0 for head_dim in range(1, 257))
