"""How far ahead of what they read the kernels fetch weights: measured once a machine, and remembered.

Machines differ, even two of one name: what is best on one costs another a fifth of its speed. No bit depends on it.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from vai.kernels import table
from vai.kernels.program import Plan, StepArgs
from vai.rom.image import BLOCK_ROWS, align, tensor_bytes

DISTANCES = (1152, 1728, 2880, 4608, 6912)  # bytes
WEIGHTS = 256 << 20  # bytes that are read for it: more than caches hold

_TYPES = ("Q4_0", "Q6_K")  # a line of one kind, and a head with lines behind it
_COLUMNS = 4096
_WINDOWS = 4  # what is read at once, the next time something else: no multiple or part of the distances' number
_ROUNDS = 3  # at least
_SECONDS = 0.3  # of rounds
_WORTH = 1.05  # times as fast as the usual distance, or that one stays
_FILE = "tuned.json"
_MOST = 4096  # bytes of it


def tune(workers: table.Workers, weights: memoryview, directory: Path, *, isa: str | None = None) -> None:
    """Set `workers.ahead` to what a file in `directory` says of this instruction set and number of threads.

    Where it says nothing, to what is the fastest over `weights`, which it says from then on. Fewer than `WEIGHTS` bytes
    teach nothing: the usual distance stays. What cannot be written down is measured again.
    Raises NotSupported for an instruction set this machine lacks.
    """
    key = f"{isa or table.isa()}, {workers.threads} threads"
    known = _remembered(directory / _FILE)
    if key not in known:
        if len(weights) < WEIGHTS:
            return
        known[key] = fastest(workers, weights, isa=isa)
        with suppress(OSError):  # a directory that is not ours, or full
            _remember(directory / _FILE, known)
    workers.ahead = known[key]


def fastest(workers: table.Workers, weights: memoryview, *, isa: str | None = None) -> int:
    """The distance at which one row goes fastest through `weights`, whatever they are; the usual one if none is
    worth it.

    Takes a third of a second, or three rounds. Raises BadRequest for weights of no layer, NotSupported.
    """
    part = min(len(weights), WEIGHTS) // (_WINDOWS * len(_TYPES)) // mmap.PAGESIZE * mmap.PAGESIZE
    parts = (weights[index * part : (index + 1) * part] for index in range(_WINDOWS * len(_TYPES)))
    windows = [[_layer(type_, next(parts), workers, isa) for type_ in _TYPES] for _ in range(_WINDOWS)]
    turns = itertools.cycle(windows)  # what one distance has read is in caches: the next one reads something else
    usual = workers.ahead
    best: dict[int, float] = dict.fromkeys((*DISTANCES, usual), math.inf)  # seconds: others only ever add some
    step, pool = StepArgs.alone(1), np.zeros(0, np.uint8)
    began = time.perf_counter()
    try:
        for tried in itertools.count():
            if tried >= _ROUNDS and time.perf_counter() - began > _SECONDS:
                break
            for distance in best:
                workers.ahead = distance
                layers = next(turns)
                before = time.perf_counter()
                for layer in layers:
                    layer.forward(step, pool)
                best[distance] = min(best[distance], time.perf_counter() - before)
    finally:
        workers.ahead = usual
    fastest = min(best, key=lambda distance: best[distance])
    return fastest if best[usual] > _WORTH * best[fastest] else usual


def _layer(type_: str, weights: memoryview, workers: table.Workers, isa: str | None) -> Plan:
    room = len(weights) - align(tensor_bytes("F32", BLOCK_ROWS, _COLUMNS), mmap.PAGESIZE)
    outputs = room // tensor_bytes(type_, BLOCK_ROWS, _COLUMNS) * BLOCK_ROWS
    return table.lower_linear(type_, outputs, _COLUMNS, weights, max_rows=1, workers=workers, isa=isa)


def _remembered(path: Path) -> dict[str, int]:
    """What the file says; nothing where it is not there, or not ours."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(_MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if type(value) is int and value in DISTANCES}


def _remember(path: Path, known: dict[str, int]) -> None:
    partial = path.with_name(f".{os.urandom(8).hex()}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            json.dump(known, file, indent=2)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
