"""The page pool: exact accounts, no promise that is not kept, slabs that come back."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest

from vai.daemon import pool as memory
from vai.daemon.pool import SLAB
from vai.errors import BadRequest
from vai.scratchpad.pages import Owner, PagePool, map_pool

SMALL = Owner("a" * 64, 0, 4096 * 3)  # does not divide a slab
LARGE = Owner("b" * 64, 0, SLAB + 4096)  # two slabs a page
WHOLE = Owner("c" * 64, 0, SLAB)


def make_pool(slabs: int) -> PagePool:
    """A pool with so many slabs of pages, behind one of headers."""
    return PagePool(np.zeros(memory.whole_bytes(slabs * SLAB), np.uint8))


def test_pages_are_distinct_and_inside_one_slab_of_the_pool() -> None:
    pool = make_pool(4)
    pages = pool.allocate(SMALL, 2 * SMALL.pages_per_cut)
    assert pages is not None and len(set(pages)) == 2 * SMALL.pages_per_cut
    assert all(page // SLAB == (page + SMALL.page_bytes - 1) // SLAB < 5 for page in pages)
    assert pool.used_bytes == len(pages) * SMALL.page_bytes
    assert pool.free_slabs == 2


def test_what_is_not_there_is_not_promised_and_nothing_changes() -> None:
    pool = make_pool(3)
    assert pool.allocate(SMALL, 3 * SMALL.pages_per_cut + 1) is None
    assert (pool.free_slabs, pool.used_bytes) == (3, 0)
    assert pool.allocate(LARGE, 2) is None
    assert pool.allocate(LARGE, 1) is not None
    assert pool.allocate(WHOLE, 2) is None
    assert pool.allocate(WHOLE, 1) is not None
    assert pool.allocate(SMALL, 1) is None


def test_a_slab_goes_back_with_its_last_page_and_may_then_have_another_owner() -> None:
    pool = make_pool(1)
    first = pool.allocate(SMALL, 3)
    assert first is not None
    pool.free(SMALL, first[:2])
    assert pool.allocate(WHOLE, 1) is None
    pool.free(SMALL, first[2:])
    assert pool.allocate(WHOLE, 1) == [SLAB]


def test_a_page_that_is_only_kept_counts_as_free_until_it_is_used_again() -> None:
    pool = make_pool(2)
    pages = pool.allocate(SMALL, 3)
    assert pages is not None
    pool.rest(SMALL)
    assert (pool.used_bytes, pool.cached_bytes, pool.held(SMALL.image)) == (2 * SMALL.page_bytes, SMALL.page_bytes, 2)
    assert pool.available_bytes - pool.cached_bytes == pool.free_bytes == pool.size - 3 * SMALL.page_bytes
    pool.wake(SMALL)
    assert (pool.cached_bytes, pool.held(SMALL.image)) == (0, 3)
    with pytest.raises(AssertionError, match="rests"):
        pool.wake(SMALL)


def test_freeing_a_page_twice_is_noticed() -> None:
    pool = make_pool(1)
    pages = pool.allocate(SMALL, 2)
    assert pages is not None
    pool.free(SMALL, pages[:1])
    with pytest.raises(AssertionError, match="free already"):
        pool.free(SMALL, pages[:1])


def test_large_pages_take_consecutive_slabs_that_singles_do_not_split() -> None:
    pool = make_pool(6)
    singles = pool.allocate(WHOLE, 2)
    larges = pool.allocate(LARGE, 2)
    assert singles == [SLAB, 2 * SLAB]
    assert larges is not None and sorted(larges) == [3 * SLAB, 5 * SLAB]
    pool.free(LARGE, larges)
    assert pool.free_slabs == 4


@pytest.mark.parametrize("seed", range(5))
def test_accounts_are_exact_over_random_allocations_of_many_owners(seed: int) -> None:
    draw = random.Random(seed)
    pool = make_pool(12)
    owners = [SMALL, LARGE, WHOLE, Owner("a" * 64, 1, 1 << 20), Owner("d" * 64, 0, 5 << 20)]
    held: dict[Owner, list[int]] = {owner: [] for owner in owners}
    for _ in range(400):
        owner = draw.choice(owners)
        if draw.random() < 0.5:
            held[owner] += pool.allocate(owner, draw.randrange(1, 8)) or []
        elif held[owner]:
            draw.shuffle(held[owner])
            cut = draw.randrange(len(held[owner]) + 1)
            pool.free(owner, held[owner][cut:])
            del held[owner][cut:]
        spans = sorted((page, page + each.page_bytes) for each, pages in held.items() for page in pages)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert not spans or SLAB <= spans[0][0] < spans[-1][1] <= SLAB + pool.size
        assert pool.used_bytes == sum(end - begin for begin, end in spans)
        assert pool.held("a" * 64) == len(held[owners[0]]) + len(held[owners[3]])
    for owner, pages in held.items():
        pool.free(owner, pages)
    assert (pool.free_slabs, pool.used_bytes) == (12, 0)


def test_the_pool_is_the_memory_of_its_descriptor() -> None:
    descriptor = memory.create(SLAB + 1)
    try:
        first, second = map_pool(descriptor), map_pool(descriptor)
        assert first.nbytes == 3 * SLAB and first.ctypes.data % (2 << 20) == 0
        first[SLAB + 5] = 7
        assert second[SLAB + 5] == 7
    finally:
        os.close(descriptor)
    assert np.count_nonzero(second) == 1  # the mapping outlives the descriptor


def test_memory_that_could_shrink_under_its_reader_is_refused() -> None:
    descriptor = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, SLAB)
        with pytest.raises(BadRequest, match="sealed size"):
            map_pool(descriptor)
    finally:
        os.close(descriptor)
    with pytest.raises(BadRequest, match="not a scratchpad pool"):
        map_pool(descriptor)
