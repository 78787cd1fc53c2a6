"""Drawing one token from 152,000 logits, case by case, beside what reading them takes.

Run: python bench/sampler.py [--vocabulary 151936] [--threads 1] [--isa ISA] [--seconds 1]. Peaked logits are like
those of a trained model (a few tokens share nearly all probability), flat ones those of random weights. The ceiling,
measured in turns with the cases, is reading the logits (and a mask) once, at the rate of memory; logits that a cache
holds are read faster. Microseconds a row: the best, the median and the 90th percentile; then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vai.cli.bench.switch import cpu_name
from vai.kernels import ceilings, table
from vai.kernels.program import Adjustments, Masks, SampleArgs

BUFFER = 256 << 20  # bytes: larger than the last cache
SEEN = 1000  # tokens that penalties weigh


def peaked(draw: np.random.Generator, count: int) -> NDArray[np.float32]:
    """A hundred tokens far above a wide rest."""
    logits = draw.normal(0, 2, count).astype(np.float32)
    logits[draw.choice(count, 100, replace=False)] += np.linspace(22, 8, 100, dtype=np.float32)
    return logits


def flat(draw: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Nearly uniform."""
    return draw.normal(0, 0.5, count).astype(np.float32)


SHAPES = {"peaked": peaked, "flat": flat}


def settings(count: int, draw: np.random.Generator) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, fields of SampleArgs, bytes that it reads besides the logits) of every case."""
    yield "greedy", {"temperature": 0.0}, 0
    yield "temperature", {}, 0
    yield "top-k 40", {"top_k": 40}, 0
    yield "top-p 0.9", {"top_p": 0.9}, 0
    yield "top-p 0.95", {"top_p": 0.95}, 0
    yield "top-k 40, top-p 0.95", {"top_k": 40, "top_p": 0.95}, 0
    yield "min-p 0.05", {"min_p": 0.05}, 0
    ids = draw.choice(count, SEEN, replace=False).astype(np.int32)
    none, zero = np.zeros(0, np.int32), np.zeros(2, np.int64)
    penalties = Adjustments(
        repetition=np.array([1.1], np.float32),
        presence=np.array([0.2], np.float32),
        frequency=np.array([0.1], np.float32),
        bias_start=zero,
        bias_ids=none,
        biases=np.zeros(0, np.float32),
        seen_start=np.array([0, SEEN], np.int64),
        seen_ids=ids,
        made=np.ones(SEEN, np.int32),
    )
    yield "penalties, top-k 40", {"top_k": 40, "adjustments": penalties}, 0
    bits = np.packbits(draw.random((1, -(-count // 8) * 8)) < 0.5, axis=1)
    yield "mask, greedy", {"temperature": 0.0, "masks": Masks(bits, np.zeros(1, np.int32))}, bits.nbytes
    yield "greedy, 5 logprobs", {"temperature": 0.0, "logprobs": 5}, 0
    yield "temperature, 5 logprobs", {"logprobs": 5}, 0


def arguments(position: int, fields: dict[str, Any]) -> SampleArgs:
    types = {
        "temperature": (0.8, np.float32), "top_k": (0, np.int32), "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32), "seed": (7, np.uint64), "choice": (0, np.uint32),
        "position": (position, np.uint32), "logprobs": (-1, np.int32),
    }  # fmt: skip
    arrays = {name: np.array([fields.get(name, usual)], kind) for name, (usual, kind) in types.items()}
    return SampleArgs(**arrays, adjustments=fields.get("adjustments"), masks=fields.get("masks"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=1, help="of the ceiling; one row is drawn by one thread")
    parser.add_argument("--isa", default=table.isa())
    parser.add_argument("--seconds", type=float, default=1.0, help="of one case")
    given = parser.parse_args()
    workers = table.make_workers(given.threads)
    buffer = np.full(BUFFER, 1, np.uint8)
    draw = np.random.default_rng(1)
    print(f"{cpu_name()}, one thread a row, {given.isa}, {given.vocabulary:,} logits; microseconds a row")
    print(f"{'logits':<8}{'case':<26}{'best':>8}{'p50':>8}{'p90':>8}{'ceiling':>9}{'of it':>7}")
    found = []
    for shape, make in SHAPES.items():
        logits = make(draw, given.vocabulary)[None]
        for name, fields, more in settings(given.vocabulary, draw):
            seconds: list[float] = []
            reading: list[float] = []
            end = time.perf_counter() + given.seconds
            while time.perf_counter() < end or len(seconds) < 5:
                reading.append((logits.nbytes + more) / ceilings.read_rate(workers, given.isa, buffer))
                for position in range(len(seconds), len(seconds) + 20):
                    args = arguments(position, fields)
                    began = time.perf_counter()
                    table.sample(logits, args, isa=given.isa)
                    seconds.append(time.perf_counter() - began)
            times = np.array(seconds) * 1e6
            best, middle, high, ceiling = (
                times.min(),
                np.median(times),
                np.percentile(times, 90),
                np.median(reading) * 1e6,
            )
            share = ceiling / best
            print(f"{shape:<8}{name:<26}{best:8.0f}{middle:8.0f}{high:8.0f}{ceiling:9.0f}{share:7.0%}", flush=True)
            found.append({"logits": shape, "case": name, "best": best, "p50": middle, "p90": high, "ceiling": ceiling})
    print(json.dumps({
        "bench": "sampler", "date": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": cpu_name(),
        "isa": given.isa, "vocabulary": given.vocabulary, "cases": found,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
