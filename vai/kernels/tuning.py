"""What is fastest on this machine: how far ahead weights are fetched, whether tiles pay. Measured once, and remembered.

Machines differ, even two of one name: what is best on one costs another a fifth of its speed. No bit depends on it.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from vai.kernels import table
from vai.kernels.program import StepArgs
from vai.rom.image import BLOCK_ROWS, align, tensor_bytes

DISTANCES = (1152, 1728, 2880, 4608, 6912)  # bytes
WEIGHTS = 256 << 20  # bytes that are read for it: more than caches hold

_TYPES = ("Q4_0", "Q6_K")  # a line of one kind, and a head with lines behind it
_COLUMNS = 4096
_MANY_ROWS = 16  # the fewest that fill tiles
_WINDOWS = 4  # what is read at once, the next time something else: no multiple or part of the number of cases
_ROUNDS = 3  # at least
_SECONDS = 0.3  # of rounds
_WORTH, _TILES_WORTH = 1.05, 1.15  # times as fast as the usual choice, or that one stays
_FILE = "tuned.json"
_MOST = 4096  # bytes of it

Choice = TypeVar("Choice", int, str)


def tune(workers: table.Workers, weights: memoryview, directory: Path, *, isa: str | None = None) -> str:
    """The instruction set to use: `isa`, or if that is None the fastest. Sets `workers.ahead` to what is best for it.

    Says what a file in `directory` says, of this number of threads. Where it says nothing, what is the fastest over
    `weights`, and the file says so from then on. Fewer than `WEIGHTS` bytes teach nothing: the usual choice stays. What
    cannot be written down is measured again. Raises NotSupported for an instruction set this machine lacks.
    """
    threads = f"{workers.threads} threads"
    known = _remembered(directory / _FILE)
    before = dict(known)
    enough = len(weights) >= WEIGHTS
    if isa is None:
        if enough and table.TILES in table.isas() and threads not in known:
            known[threads] = fastest_isa(workers, weights)
        isa = str(known.get(threads, table.isa()))
    table.implementations(isa)  # refuses one that is not there
    key = f"{isa}, {threads}"
    if enough and key not in known:
        known[key] = fastest_distance(workers, weights, isa=isa)
    if known != before:
        with suppress(OSError):  # a directory that is not ours, or full
            _remember(directory / _FILE, known)
    workers.ahead = int(known.get(key, workers.ahead))
    return isa


def fastest_isa(workers: table.Workers, weights: memoryview) -> str:
    """Tiles if they pay under 16 rows, or what they are over. Takes as long as `fastest_distance`, and raises that."""
    usual = table.isa()
    # Half the windows apart, or one would find in caches what the other has read.
    apart = itertools.islice(_windows(workers, weights, _MANY_ROWS, table.TILES), _WINDOWS // 2, None)
    return _fastest({usual: _windows(workers, weights, _MANY_ROWS, usual), table.TILES: apart}, usual, _TILES_WORTH)


def fastest_distance(workers: table.Workers, weights: memoryview, *, isa: str) -> int:
    """The distance at which one row goes fastest through `weights`, whatever they are.

    Takes a third of a second, or three rounds. Raises BadRequest for weights of no layer, NotSupported.
    """
    usual = workers.ahead
    windows = _windows(workers, weights, 1, isa)

    def at(distance: int) -> Iterator[Callable[[], None]]:
        while True:
            workers.ahead = distance
            yield next(windows)

    try:
        return _fastest({distance: at(distance) for distance in (*DISTANCES, usual)}, usual, _WORTH)
    finally:
        workers.ahead = usual


def _fastest(cases: dict[Choice, Iterator[Callable[[], None]]], usual: Choice, worth: float) -> Choice:
    """The case whose work was done fastest in turns, if it is worth it. Others on the machine only ever add time."""
    best = dict.fromkeys(cases, math.inf)
    began = time.perf_counter()
    for tried in itertools.count():
        if tried >= _ROUNDS and time.perf_counter() - began > _SECONDS:
            break
        for case, turns in cases.items():
            work = next(turns)
            before = time.perf_counter()
            work()
            best[case] = min(best[case], time.perf_counter() - before)
    first = min(best, key=lambda case: best[case])
    return first if best[usual] > worth * best[first] else usual


def _windows(workers: table.Workers, weights: memoryview, rows: int, isa: str) -> Iterator[Callable[[], None]]:
    """Layers over parts of the weights, for ever, each time another part: the last one's is in caches."""
    part = min(len(weights), WEIGHTS) // (_WINDOWS * len(_TYPES)) // mmap.PAGESIZE * mmap.PAGESIZE
    room = part - align(tensor_bytes("F32", BLOCK_ROWS, _COLUMNS), mmap.PAGESIZE)
    step, pool = StepArgs.alone(rows), np.zeros(0, np.uint8)

    def layer(index: int, type_: str) -> Callable[[], object]:
        outputs = room // tensor_bytes(type_, BLOCK_ROWS, _COLUMNS) * BLOCK_ROWS
        own = weights[index * part : (index + 1) * part]
        plan = table.lower_linear(type_, outputs, _COLUMNS, own, max_rows=rows, workers=workers, isa=isa)
        return partial(plan.forward, step, pool)

    def all_of(window: int) -> Callable[[], None]:
        layers = [layer(window * len(_TYPES) + index, type_) for index, type_ in enumerate(_TYPES)]

        def run() -> None:
            for each in layers:
                each()

        return run

    return itertools.cycle([all_of(window) for window in range(_WINDOWS)])


def _remembered(path: Path) -> dict[str, int | str]:
    """What the file says; nothing where it is not there, or not ours."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    isas = table.isas()

    def can_be(key: str, value: object) -> bool:
        if ", " in key:  # of an instruction set
            return type(value) is int and value in DISTANCES
        return type(value) is str and value in isas

    return {key: value for key, value in found.items() if can_be(key, value)}


def _remember(path: Path, known: dict[str, int | str]) -> None:
    partial = path.with_name(f".{os.urandom(8).hex()}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            json.dump(known, file, indent=2)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
