"""Linear layers of any shape over any bytes: every implementation and number of threads gives the portable one's bits.

The weights are random bytes, so that scales are zero, subnormal, infinite and NaN as often as chance has it, and they
end where the readable memory ends: a load behind them would end the process. Activations come from 16 rows, each of
which was computed alone by the portable implementation; what a row gives must not depend on its company. In the fast
kind every implementation is held against itself.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from vai.kernels import table
from vai.kernels.program import Plan, StepArgs
from vai.rom.image import BLOCK_ROWS, BLOCK_TYPES, place, tensor_bytes

THREADS = (1, 2, len(os.sched_getaffinity(0)) + 1)
MOST_ROWS, MOST_FAST_ROWS = 513, 512
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def pools() -> list[table.Workers]:
    return [table.make_workers(threads) for threads in THREADS]


@contextmanager
def guarded(size: int) -> Iterator[NDArray[np.uint8]]:
    """Memory whose last byte is the last that may be read."""
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    guard = ctypes.c_void_p(whole.ctypes.data + room)
    assert LIBC.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    yield whole[room - size : room]
    assert LIBC.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) == 0


def step(tokens: NDArray[np.int32], kind: str) -> StepArgs:
    count, none = len(tokens), np.zeros(0, np.int32)
    bounds = np.array([0, count], np.int32)
    return StepArgs(tokens, np.arange(count, dtype=np.int32), bounds, np.zeros(1, np.int32), (), none, kind)


def run(plan: Plan, tokens: NDArray[np.int32], kind: str = "exact") -> NDArray[np.uint32]:
    """The bits of the results; every NaN is one NaN."""
    results = plan.forward(step(tokens, kind), np.zeros(0, np.uint8)).copy()
    results[np.isnan(results)] = np.float32(np.nan)
    return results.view(np.uint32)


def activations(rng: np.random.Generator, columns: int) -> NDArray[np.float32]:
    x = rng.standard_normal((BLOCK_ROWS, columns)).astype(np.float32)
    x[1], x[2, : columns // 2], x[3] = 0, 0, x[3] * np.float32(2.0**-140)
    x[4, 0], x[5, -1], x[6] = np.nan, np.inf, x[6] * np.float32(2.0**100)
    return x


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("type", table.block_types())
def test_any_shape_gives_the_portable_bits_and_reads_no_byte_behind_its_weights(
    type: str, seed: int, pools: list[table.Workers]
) -> None:
    chance, rng = random.Random(f"{type} {seed}"), np.random.default_rng(seed)
    group = BLOCK_TYPES[type].k if BLOCK_TYPES[type].slow else BLOCK_TYPES[type].group or 1
    outputs, columns = BLOCK_ROWS * chance.randint(1, 6), group * chance.randint(1, 1600 // group)
    sizes = [tensor_bytes("F32", BLOCK_ROWS, columns), tensor_bytes(type, outputs, columns)]
    end = place(sizes)[0][1] + sizes[1]
    x = activations(rng, columns)
    with guarded(end) as memory:
        memory[:] = rng.integers(0, 256, end, np.uint8)
        tiles = np.zeros((-(-columns // 16) * 16, BLOCK_ROWS), "<f4")
        tiles[:columns] = x.T
        memory[: sizes[0]] = tiles.reshape(-1).view(np.uint8)

        def plan(isa: str, workers: table.Workers, fast: str | None = None) -> Plan:
            data, rows = memoryview(memory).toreadonly(), MOST_ROWS if fast is None else MOST_FAST_ROWS
            return table.lower_linear(type, outputs, columns, data, max_rows=rows, workers=workers, isa=isa, fast=fast)

        portable = plan("scalar", pools[0])
        alone = np.concatenate([run(portable, np.array([token], np.int32)) for token in range(BLOCK_ROWS)])
        assert not (alone == 0).all()
        for isa in table.isas():
            for workers in pools:
                each = plan(isa, workers)
                for rows in (MOST_ROWS, chance.randint(2, 16), chance.randint(17, 130)):
                    tokens = rng.integers(0, BLOCK_ROWS, rows, np.int32)
                    np.testing.assert_array_equal(run(each, tokens), alone[tokens])
        for fast in table.fasts():
            first = plan("scalar", pools[0], fast)
            alone = np.concatenate([run(first, np.array([token], np.int32), "fast") for token in range(BLOCK_ROWS)])
            for workers in pools:
                each = plan(table.isa(), workers, fast)
                for rows in (MOST_FAST_ROWS, chance.randint(17, 130)):
                    tokens = rng.integers(0, BLOCK_ROWS, rows, np.int32)
                    np.testing.assert_array_equal(run(each, tokens, "fast"), alone[tokens])
