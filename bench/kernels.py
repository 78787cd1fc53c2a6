"""The linear kernels alone: every block type under 1 to 512 rows, at the shapes of a 1.5B and of a 7B.

Run: python bench/kernels.py [--threads 2] [--isa ISA] [--types Q4_0,...] [--rows 1,...]. Up to 16 rows the weights are
several copies, together larger than the caches, read one after another with the barrier that a step has between them;
beyond, one copy. Each sample is taken in turns with the ceiling it is compared with: reading up to 16 rows, multiplying
beyond. Other engines have no program that multiplies one matrix from weights in memory; bench/decode.py compares whole
models. GB/s of weights and TOPS (a multiply-add is two), medians with their spread; then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vai.cli.bench.switch import cpu_name
from vai.kernels import ceilings, table, tuning
from vai.kernels.program import StepArgs
from vai.rom.image import BLOCK_TYPES, tensor_bytes

SHAPES = ((8960, 1536), (11008, 4096))  # outputs, columns
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
MEMORY_BOUND = 16  # rows up to which weights come from memory
BUFFER = 256 << 20  # bytes: larger than the last cache of any machine with few cores
SAMPLES, SECONDS = 7, 2.0  # of one case at most
FILL = 0x3C  # as a scale of 1, 2 or 4 bytes small and normal, and so are products of two of them


def case(type_: str, shape: tuple[int, int], rows: int, data: memoryview, workers: table.Workers, isa: str) -> Any:
    """A call that runs every copy once and says the seconds, how many copies there are, and the bytes of one."""
    size = tensor_bytes(type_, *shape)
    copies = max(1, BUFFER // size) if rows <= MEMORY_BOUND else 1
    plan = table.lower_linear(type_, *shape, data, max_rows=rows, workers=workers, isa=isa, copies=copies)
    args = StepArgs.alone(rows)
    pool = np.zeros(0, np.uint8)

    def run() -> float:
        began = time.perf_counter()
        plan.forward(args, pool)
        return time.perf_counter() - began

    return run, copies, size


def measure(run: Callable[[], float], ceiling: Callable[[], float], amount: float) -> tuple[list[float], list[float]]:
    """Samples of amount/s and of their share of the ceiling measured just after each. The first pair only warms up."""
    run(), ceiling()
    speeds: list[float] = []
    shares: list[float] = []
    began = time.perf_counter()
    while not speeds or (len(speeds) < SAMPLES and time.perf_counter() - began < SECONDS):
        speeds.append(amount / run())
        shares.append(speeds[-1] / ceiling())
    return speeds, shares


def spread(values: list[float], unit: float, digits: int) -> str:
    low, middle, high = (each / unit for each in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default=table.isa())
    parser.add_argument("--types", default=",".join(table.fast_types()))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    given = parser.parse_args()
    workers = table.make_workers(given.threads)
    most = max(tensor_bytes(type_, *shape) for type_ in given.types.split(",") for shape in SHAPES)
    memory = mmap.mmap(-1, BUFFER + 2 * most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = FILL
    workers.ahead = tuning.fastest_distance(workers, memoryview(buffer), isa=given.isa)
    print(f"{cpu_name()}, {given.threads} threads, {given.isa}, weights fetched {workers.ahead:,} bytes ahead")
    print(
        f"Shares are of reading up to {MEMORY_BOUND} rows, else of multiplying (F16, BF16, F32: floats, else integers)"
    )
    print(f"{'type':<8}{'outputs x columns':<20}{'rows':<6}{'GB/s of weights':<26}{'TOPS':<28}of ceiling")
    found = []
    for type_ in given.types.split(","):
        unit = "int8" if BLOCK_TYPES[type_].group else "f32"
        for shape in SHAPES:
            for rows in map(int, given.rows.split(",")):
                run, copies, size = case(type_, shape, rows, memoryview(buffer), workers, given.isa)
                products = copies * rows * shape[0] * shape[1]
                if rows <= MEMORY_BOUND:
                    amount, ceiling = copies * size, lambda: ceilings.read_rate(workers, given.isa, buffer)
                else:
                    amount = products

                    def ceiling(unit: str = unit) -> float:
                        return ceilings.multiply_rate(workers, given.isa, unit)

                speeds, shares = measure(run, ceiling, amount)
                bytes_ = [speed * copies * size / amount for speed in speeds]
                operations = [2 * speed * products / amount for speed in speeds]
                shape_text = f"{shape[0]} x {shape[1]}"
                print(
                    f"{type_:<8}{shape_text:<20}{rows:<6}{spread(bytes_, 1e9, 1):<26}{spread(operations, 1e12, 3):<28}"
                    f"{statistics.median(shares):.0%}",
                    flush=True,
                )
                found.append({
                    "type": type_, "shape": shape, "rows": rows, "bytes_per_second": bytes_,
                    "operations_per_second": operations, "shares": shares,
                })  # fmt: skip
    answer = {
        "bench": "kernels",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": given.threads,
        "isa": given.isa,
        "ahead": workers.ahead,
        "cases": found,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
