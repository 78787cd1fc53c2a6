"""The thread pool among others: its priority, and its turns on the cores with the pools of other processes."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vai.config import ISAS
from vai.kernels import table
from vai.kernels.program import Plan, StepArgs
from vai.rom.image import tensor_bytes

DEADLINE = 60.0
CORES = os.sysconf("SC_NPROCESSORS_ONLN")
LAYOUT = "hhqqi4x"  # struct flock: type, whence, start, length, pid


@pytest.fixture
def lease(tmp_path: Path) -> Path:
    return tmp_path / "cores.lock"


def plan(workers: table.Workers) -> Plan:
    room = tensor_bytes("F32", 16, 32) + (1 << 20)
    return table.lower_linear("Q4_0", 64, 32, memoryview(bytearray(room)), max_rows=1, workers=workers)


def step() -> StepArgs:
    one, none = np.zeros(1, np.int32), np.zeros(0, np.int32)
    return StepArgs(one, one, np.array([0, 1], np.int32), one, (), none)


@contextmanager
def held(lease: Path, first: int, count: int) -> Iterator[None]:
    """Bytes of the file locked as another process would."""
    with open(lease, "a+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(LAYOUT, fcntl.F_WRLCK, os.SEEK_SET, first, count, 0))
        yield


def is_held(lease: Path, byte: int) -> bool:
    with open(lease, "a+b") as file:
        asked = struct.pack(LAYOUT, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        found = struct.unpack(LAYOUT, fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0]
    return bool(found != fcntl.F_UNLCK)


def test_workers_are_nicer_than_those_who_talk() -> None:
    script = """
import os
from vai.kernels import table
before = set(os.listdir("/proc/self/task"))
workers = table.make_workers(3)
own = os.getpriority(os.PRIO_PROCESS, 0)
while True:  # a thread gives itself its priority when it starts
    made = set(os.listdir("/proc/self/task")) - before
    nices = [os.getpriority(os.PRIO_PROCESS, int(task)) for task in made]
    if nices == [min(own + 5, 19)] * 3:
        break
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=DEADLINE)


def test_a_step_waits_for_its_cores_and_is_next_in_turn(lease: Path) -> None:
    own = plan(table.make_workers(CORES, lease))
    thread = threading.Thread(target=own.forward, args=(step(), np.zeros(0, np.uint8)))
    with held(lease, 0, CORES):
        thread.start()
        until = time.monotonic() + DEADLINE
        while not is_held(lease, CORES):  # the turn: it waits
            assert time.monotonic() < until
        assert thread.is_alive()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert not any(is_held(lease, byte) for byte in range(CORES + 1))


def test_a_pool_of_fewer_threads_takes_the_cores_that_are_free(lease: Path) -> None:
    own = plan(table.make_workers(1, lease))
    with held(lease, 0, CORES - 1):
        began = time.monotonic()
        own.forward(step(), np.zeros(0, np.uint8))
    assert time.monotonic() - began < 1.5 or CORES == 1


def test_a_holder_that_never_goes_on_costs_one_wait(lease: Path) -> None:
    own = plan(table.make_workers(CORES, lease))
    with held(lease, 0, CORES):
        began = time.monotonic()
        own.forward(step(), np.zeros(0, np.uint8))
        waited = time.monotonic()
        for _ in range(3):
            own.forward(step(), np.zeros(0, np.uint8))
        assert time.monotonic() - waited < 2 * (waited - began)
    own.forward(step(), np.zeros(0, np.uint8))
    with held(lease, 0, CORES):  # free once in between: worth waiting for again
        began = time.monotonic()
        own.forward(step(), np.zeros(0, np.uint8))
        assert time.monotonic() - began > 1


def test_a_killed_holder_holds_nothing(lease: Path) -> None:
    script = f"""
import fcntl, os, struct, sys, time
file = open(sys.argv[1], "a+b")
fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack({LAYOUT!r}, fcntl.F_WRLCK, os.SEEK_SET, 0, {CORES + 1}, 0))
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, lease], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert is_held(lease, CORES)
        holder.kill()
        holder.wait()
        assert not is_held(lease, CORES)
    plan(table.make_workers(CORES, lease)).forward(step(), np.zeros(0, np.uint8))


def test_without_a_usable_file_there_is_no_lease(tmp_path: Path) -> None:
    plan(table.make_workers(CORES, tmp_path / "absent" / "cores.lock")).forward(step(), np.zeros(0, np.uint8))


def test_what_is_used_passes_the_self_test_and_the_rest_does_not() -> None:
    assert [name for name in ISAS if table.self_test(name) == ""] == table.isas()
    assert table.refused() == []
    assert table.self_test("abacus") == "it was not built"
