"""Two thread pools of as many threads as there are cores, in two processes: with the lease on cores and without it.

Run: python bench/cores.py [ROUNDS]. Each process runs steps of 40 linear layers under 8 rows for two seconds; first one
alone, then two at once without the lease, then two with it, in turns. Steps a second, all processes together, and the
longest step; medians with their spread, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from vai.cli.bench.switch import cpu_name
from vai.kernels import table
from vai.kernels.program import StepArgs
from vai.rom.image import tensor_bytes

OUTPUTS, COLUMNS, ROWS, LAYERS = 1024, 1536, 8, 40
SECONDS = 2.0
THREADS = len(os.sched_getaffinity(0))


def work(lease: str) -> None:
    """In a process of its own: say when ready, wait for a line, run, say how many steps and the longest."""
    workers = table.make_workers(THREADS, Path(lease) if lease else None)
    room = tensor_bytes("F32", 16, COLUMNS) + (LAYERS + 1) * (tensor_bytes("Q4_0", OUTPUTS, COLUMNS) + 4096)
    plan = table.lower_linear(
        "Q4_0", OUTPUTS, COLUMNS, memoryview(bytearray(room)), max_rows=ROWS, workers=workers, copies=LAYERS
    )
    step = StepArgs.alone(ROWS)
    pool = np.zeros(0, np.uint8)
    plan.forward(step, pool)
    print("ready", flush=True)
    sys.stdin.readline()
    steps, longest, end = 0, 0.0, time.perf_counter() + SECONDS
    while (began := time.perf_counter()) < end:
        plan.forward(step, pool)
        longest = max(longest, time.perf_counter() - began)
        steps += 1
    print(json.dumps([steps, longest]), flush=True)


def sample(count: int, lease: str) -> tuple[float, float]:
    """Steps a second of `count` processes together, and the longest step of any."""
    words, pipe = [sys.executable, __file__, "--work", lease], subprocess.PIPE
    processes = [subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    for process in processes:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit("A process did not start.")
    for process in processes:
        if process.stdin is not None:
            process.stdin.write("\n")
            process.stdin.flush()
    found = [json.loads(process.communicate()[0]) for process in processes]
    return sum(steps for steps, _ in found) / SECONDS, max(longest for _, longest in found)


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vai-bench-cores-") as place:
        cases = {"one alone": (1, ""), "two, no lease": (2, ""), "two, lease": (2, f"{place}/cores.lock")}
        found: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(rounds):
            for case, (count, lease) in cases.items():
                found[case].append(sample(count, lease))
    print(f"{cpu_name()}, {THREADS} threads a process, {rounds} rounds of {SECONDS:.0f} s")
    for case, values in found.items():
        rates, longest = zip(*values, strict=True)
        spread = f"{statistics.median(rates):7.1f} steps/s ({min(rates):.1f} to {max(rates):.1f})"
        print(f"{case:<15}{spread}, longest step {1e3 * statistics.median(longest):.0f} ms")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    print(json.dumps({"bench": "cores", "date": date, "cpu": cpu_name(), "threads": THREADS, "cases": found}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
