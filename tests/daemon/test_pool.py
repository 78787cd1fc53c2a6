"""The scratchpad's memory outlives whoever uses it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from vai.daemon import pool


def test_a_pool_has_whole_slabs_and_cannot_shrink() -> None:
    descriptor = pool.create(pool.SLAB + 1)
    try:
        assert os.fstat(descriptor).st_size == 3 * pool.SLAB
        assert pool.page_bytes(3 * pool.SLAB) == 2 * pool.SLAB
        for size in (0, 2 * pool.SLAB, 4 * pool.SLAB):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def test_a_pool_is_had_back_from_the_process_that_uses_it() -> None:
    ours = pool.create(pool.SLAB)
    os.pwrite(ours, b"a sealed page", 4096)
    argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=(ours,)) as user:
        os.close(ours)
        again = pool.reopen(user.pid)
        user.communicate()
    assert again is not None
    try:
        with mmap.mmap(again, 0) as memory:
            assert memory[4096:4109] == b"a sealed page"
    finally:
        os.close(again)


def test_a_process_without_a_pool_gives_none() -> None:
    argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        assert pool.reopen(process.pid) is None
        process.communicate()
    assert pool.reopen(process.pid) is None


def test_the_default_is_a_quarter_of_what_is_free_within_bounds() -> None:
    assert pool.default_bytes(1 << 30) == 256 << 20
    assert pool.default_bytes(1 << 40) == pool.MOST_BY_DEFAULT
    assert pool.default_bytes(0) == pool.SLAB
