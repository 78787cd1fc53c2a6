"""What fits is known before anything is allocated, and is exactly what the pool then gives."""

from __future__ import annotations

import numpy as np
import pytest

from vai.daemon.pool import SLAB, whole_bytes
from vai.kernels.program import PAGE_TOKENS
from vai.scratchpad.budget import pages_at_once, pages_for, tokens_that_fit
from vai.scratchpad.pages import Owner, PagePool


@pytest.mark.parametrize("page_bytes", [[4096], [917504], [SLAB], [SLAB + 1], [1 << 20, 3 << 20], [8192, 40 << 20]])
@pytest.mark.parametrize("slabs", [1, 3, 17])
def test_the_longest_sequence_is_what_an_empty_pool_can_allocate(page_bytes: list[int], slabs: int) -> None:
    owners = [Owner("a" * 64, group, size) for group, size in enumerate(page_bytes)]
    tokens = tokens_that_fit(slabs * SLAB, owners)
    assert tokens is not None

    def fits(pages: int) -> bool:
        pool = PagePool(np.zeros(whole_bytes(slabs * SLAB), np.uint8))
        return all(pool.allocate(owner, pages) is not None for owner in owners)

    assert fits(tokens // PAGE_TOKENS)
    assert not fits(tokens // PAGE_TOKENS + 1)


def test_a_group_with_a_window_takes_no_more_than_a_sequence_needs_of_it_at_once() -> None:
    full, windowed = Owner("a" * 64, 0, SLAB // 8), Owner("a" * 64, 1, SLAB // 4)
    at_once = [pages_at_once(None, 4), pages_at_once(100, 4)]
    assert at_once[1] == 4 + 4
    assert tokens_that_fit(4 * SLAB, [full, windowed]) == 8 * PAGE_TOKENS
    assert tokens_that_fit(4 * SLAB, [full, windowed], at_once) == 16 * PAGE_TOKENS
    assert tokens_that_fit(2 * SLAB, [full, windowed], at_once) == 4 * PAGE_TOKENS  # less than the window
    assert tokens_that_fit(2 * SLAB, [windowed], at_once[1:]) is None
    assert tokens_that_fit(1 * SLAB, [windowed], at_once[1:]) == 4 * PAGE_TOKENS


def test_a_model_that_keeps_nothing_fits_at_any_length() -> None:
    assert tokens_that_fit(SLAB, []) is None


def test_the_first_token_of_a_page_takes_the_page() -> None:
    assert [pages_for(tokens) for tokens in (0, 1, 32, 33)] == [0, 1, 1, 2]
