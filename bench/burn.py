"""How fast burning is, beside copying the same file into a new file of the same shared-memory filesystem.

Run: python bench/burn.py FILE.gguf [ROUNDS]. Source in page cache; copy and burn alternate; medians with their spread,
and the seconds of processors that each took, which say more than the clock where others use them too. A table for
people, then one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from vai.burn.burn import burn
from vai.cli.bench.stand import warm
from vai.cli.bench.switch import cpu_name

THREADS = 2
COPY_PIECE = 16 << 20


def copy(source: Path, target: Path) -> float:
    """Seconds to copy `source` into a new file, kernel to kernel."""
    start = time.perf_counter()
    with open(source, "rb") as read, open(target, "wb") as write:
        while os.sendfile(write.fileno(), read.fileno(), None, COPY_PIECE):
            pass
    return time.perf_counter() - start


def main(source: Path, rounds: int) -> None:
    copies, burns = [], []
    copying, burning = [], []  # seconds of processors
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="vai-bench-burn-", dir="/dev/shm") as place:
            warm(source)
            before = time.process_time()
            copies.append(copy(source, Path(place) / "copy"))
            copying.append(time.process_time() - before)
            (Path(place) / "copy").unlink()
            root = Path(place) / "root"
            before = time.process_time()
            burns.append(burn(source, root, threads=THREADS).seconds)
            burning.append(time.process_time() - before)
            shutil.rmtree(root)
    size, ratios = source.stat().st_size, [a / b for a, b in zip(copies, burns, strict=True)]
    print(f"{cpu_name()}, {source.name}, {size / 1e6:.0f} MB, {rounds} rounds")
    for name, values, cpu in (("copy", copies, copying), ("burn", burns, burning)):
        rates = sorted(size / each / 1e6 for each in values)
        spread = f"({rates[0]:.0f} to {rates[-1]:.0f})"
        print(f"{name}: {statistics.median(rates):7.0f} MB/s {spread}, {statistics.median(cpu):.2f} s of processors")
    ratio = statistics.median(ratios)
    print(f"burning runs at {ratio:.2f} of the speed of copying ({min(ratios):.2f} to {max(ratios):.2f})")
    answer = {
        "bench": "burn",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "file": source.name,
        "bytes": size,
        "threads": THREADS,
        "copy_seconds": copies,
        "burn_seconds": burns,
        "copy_processor_seconds": copying,
        "burn_processor_seconds": burning,
        "ratio": ratio,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
