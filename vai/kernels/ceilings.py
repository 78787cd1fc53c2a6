"""What this machine can do at most, and how near the linear kernels come: measured, in a second or two.

Other programs may be running, so every speed is a median with its spread, and each kernel is timed in turns with the
ceiling it is compared with: what disturbs one disturbs the other.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vai.kernels import _native, table, tuning
from vai.kernels.program import MAX_ROWS, Plan, StepArgs
from vai.rom.image import BLOCK_ROWS, BLOCK_TYPES, align, tensor_bytes

COLUMNS = 4096  # of the measured layers, as in a model of 7B
MANY_ROWS = 128  # where a layer is bound by multiplication
MOST_OUTPUTS = 4096  # of the layer with many rows

_FILL = 0x3C  # as fp16 scales about 1, as bf16 and binary32 about 0.01: nothing overflows, nothing is subnormal
_SAMPLES = 5
_BUDGET = 0.15  # seconds for one comparison, its first pair apart
_RATE_SECONDS = 0.01  # of one sample of a multiplication rate


class Speed(NamedTuple):
    """Something a second: the median, the lowest and the highest of the samples."""

    median: float
    low: float
    high: float


class Ceiling(NamedTuple):
    """What `threads` threads can do.

    read: bytes/s from a buffer larger than the caches · int8, f32: multiply-adds/s in registers, in the operations of
    the exact kind (integer products and sums; multiply and add, each rounded) · bf16: in tiles, as the fast kind has
    them; None where the machine has none.
    """

    threads: int
    read: Speed
    int8: Speed
    f32: Speed
    bf16: Speed | None


class Linear(NamedTuple):
    """A linear layer of one block type, with all threads.

    read: bytes/s of weights at one row · multiply: multiply-adds/s at 128 rows · the shares are of the ceilings
    measured in turns with them; multiply's is f32 where `floats`, else int8.
    """

    type: str
    floats: bool
    read: Speed
    read_share: float
    multiply: Speed
    multiply_share: float


class Fast(NamedTuple):
    """A linear layer of one block type in the fast kind, at 512 rows: multiply-adds/s, and the share of the ceiling."""

    type: str
    multiply: Speed
    multiply_share: float


class Measured(NamedTuple):
    """isa: the instruction set that ran · ahead: bytes from the weights that are read to those that are fetched, see
    tuning · buffer_bytes: what was read · one, all: with one thread and with all · fast: layers of the fast kind, where
    the machine has one that is worth having.
    """

    isa: str
    ahead: int
    buffer_bytes: int
    one: Ceiling
    all: Ceiling
    linear: list[Linear]
    fast: list[Fast]


def measure(*, threads: int, buffer_bytes: int, directory: Path, isa: str | None = None) -> Measured:
    """Measure ceilings and kernels over `buffer_bytes` of memory, which should be several times the last cache.

    `directory`: where tuning.tune remembers.
    Raises NotSupported for an instruction set this machine lacks, Unavailable where there are no threads.
    """
    if isa is not None:
        table.implementations(isa)  # refuses one that is not there
    with _buffer(buffer_bytes) as buffer:
        workers = table.make_workers(threads)
        chosen = tuning.tune(workers, buffer.data, directory, isa=isa)
        one = _ceiling(table.make_workers(1), chosen, buffer)
        all_ = _ceiling(workers, chosen, buffer)
        linear = [_linear(type_, workers, chosen, buffer, all_) for type_ in table.fast_types()]
        fast = [_fast(type_, workers, chosen, buffer, all_) for type_ in table.fast_kind_types()] if all_.bf16 else []
    return Measured(chosen, workers.ahead, buffer_bytes, one, all_, linear, fast)


@contextmanager
def _buffer(size: int) -> Iterator[NDArray[np.uint8]]:
    """Private memory of huge pages where the machine gives them, every byte written."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = _FILL
    yield buffer


def _ceiling(workers: table.Workers, isa: str, buffer: NDArray[np.uint8]) -> Ceiling:

    def sampled(sample: Callable[[], float]) -> Speed:
        return _speed([sample() for _ in range(_SAMPLES)])

    int8, f32 = (sampled(_multiplying(workers, isa, unit)) for unit in ("int8", "f32"))
    bf16 = sampled(_multiplying(workers, isa, "bf16")) if table.fast(None) else None
    return Ceiling(workers.threads, sampled(_reading(workers, isa, buffer)), int8, f32, bf16)


def read_rate(workers: table.Workers, isa: str, data: NDArray[np.uint8]) -> float:
    """Bytes/s with which all workers together read `data` once. Raises NotSupported for a missing instruction set."""
    table.implementations(isa)
    return _native.read_rate(workers=workers, isa=isa, data=data)


def multiply_rate(workers: table.Workers, isa: str, unit: str) -> float:
    """Multiply-adds/s of all workers together, of one of the units in `Ceiling`: one sample of 10 ms.

    Raises NotSupported for a missing instruction set.
    """
    table.implementations(isa)
    return _native.multiply_rate(workers=workers, isa=isa, unit=unit, seconds=_RATE_SECONDS)


def _reading(workers: table.Workers, isa: str, buffer: NDArray[np.uint8]) -> Callable[[], float]:
    return lambda: read_rate(workers, isa, buffer)


def _multiplying(workers: table.Workers, isa: str, unit: str) -> Callable[[], float]:
    return lambda: multiply_rate(workers, isa, unit)


def _linear(type_: str, workers: table.Workers, isa: str, buffer: NDArray[np.uint8], ceiling: Ceiling) -> Linear:
    floats = not BLOCK_TYPES[type_].group
    # One row: as many outputs as the buffer holds. Many rows: what takes the ceiling ten milliseconds, within bounds.
    long = _most_outputs(type_, buffer)
    ten_milliseconds = int((ceiling.f32 if floats else ceiling.int8).median * 0.01 / (MANY_ROWS * COLUMNS))
    square = min(max(ten_milliseconds // BLOCK_ROWS, workers.threads) * BLOCK_ROWS, MOST_OUTPUTS, long)

    def layer(outputs: int, rows: int, amount: int) -> Callable[[], float]:
        plan = table.lower_linear(type_, outputs, COLUMNS, buffer.data, max_rows=rows, workers=workers, isa=isa)
        return lambda: amount / _seconds(plan, rows)

    read, read_share = _in_turns(layer(long, 1, tensor_bytes(type_, long, COLUMNS)), _reading(workers, isa, buffer))
    multiply, multiply_share = _in_turns(
        layer(square, MANY_ROWS, MANY_ROWS * square * COLUMNS), _multiplying(workers, isa, "f32" if floats else "int8")
    )
    return Linear(type_, floats, read, read_share, multiply, multiply_share)


def _most_outputs(type_: str, buffer: NDArray[np.uint8]) -> int:
    """How many outputs of a layer fit the buffer, beside the embedding that every such plan has."""
    room = buffer.nbytes - align(tensor_bytes("F32", BLOCK_ROWS, COLUMNS), mmap.PAGESIZE)
    return room // tensor_bytes(type_, BLOCK_ROWS, COLUMNS) * BLOCK_ROWS


def _fast(type_: str, workers: table.Workers, isa: str, buffer: NDArray[np.uint8], ceiling: Ceiling) -> Fast:
    rate = ceiling.bf16.median if ceiling.bf16 else 0.0
    ten_milliseconds = int(rate * 0.01 / (MAX_ROWS * COLUMNS))
    outputs = min(
        max(ten_milliseconds // BLOCK_ROWS, workers.threads) * BLOCK_ROWS, MOST_OUTPUTS, _most_outputs(type_, buffer)
    )
    plan = table.lower_linear(
        type_, outputs, COLUMNS, buffer.data, max_rows=MAX_ROWS, workers=workers, isa=isa, fast=table.fast(None)
    )
    amount = MAX_ROWS * outputs * COLUMNS

    def layer() -> float:
        return amount / _seconds(plan, MAX_ROWS, "fast")

    return Fast(type_, *_in_turns(layer, _multiplying(workers, isa, "bf16")))


def _seconds(plan: Plan, rows: int, kind: str = "exact") -> float:
    step = StepArgs.alone(rows, kind)
    pool = np.zeros(0, np.uint8)
    began = time.perf_counter()
    plan.forward(step, pool)
    return time.perf_counter() - began


def _in_turns(kernel: Callable[[], float], ceiling: Callable[[], float]) -> tuple[Speed, float]:
    """The kernel's speed, and the median share of the ceiling measured just after it. The first pair only warms up."""
    kernel(), ceiling()
    speeds: list[float] = []
    shares: list[float] = []
    began = time.perf_counter()
    while not speeds or (len(speeds) < _SAMPLES and time.perf_counter() - began < _BUDGET):
        speeds.append(kernel())
        shares.append(speeds[-1] / ceiling())
    return _speed(speeds), statistics.median(shares)


def _speed(samples: list[float]) -> Speed:
    return Speed(statistics.median(samples), min(samples), max(samples))
