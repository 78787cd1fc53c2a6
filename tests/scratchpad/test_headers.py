"""What an engine leaves in the pool when it is killed: the next goes on with what is true, and with nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vai.daemon.pool import HEADERS, SLAB, header_slabs, page_bytes, whole_bytes
from vai.scratchpad.headers import RECORD, PageHeaders
from vai.scratchpad.pages import Owner, PagePool
from vai.scratchpad.prefix import PrefixCache, page_key, root_key
from vai.scratchpad.retention import Retention

MODELS = {
    "a": (Owner("a" * 64, 0, SLAB // 5), Owner("a" * 64, 1, 4096 * 3)),
    "b": (Owner("b" * 64, 0, SLAB + 4096),),  # two slabs a page
    "c": (Owner("c" * 64, 0, SLAB // 4),),
}


def make_memory(slabs: int = 12) -> np.ndarray:
    memory = np.zeros(whole_bytes(slabs * SLAB), np.uint8)
    memory[: slabs * HEADERS] = 0xFF
    return memory


class Bench:
    """A cache over a memory that outlives it."""

    def __init__(self, memory: np.ndarray, adopt: str = "") -> None:
        self.pool = PagePool(memory)
        self.cache = PrefixCache(self.pool, Retention(self.pool.size, lambda: 0.0))
        self.cache.adopt([MODELS[letter] for letter in adopt])

    def fill(self, letter: str, tokens: list[int], *, seal: int | None = None, let_go: bool = True) -> list[int]:
        """Compute pages, one for each of `tokens`, the first `seal` of which become full; offsets of group 0."""
        owners, key, chain = MODELS[letter], root_key(letter, "bf16", ""), []
        offsets = []
        for number, token in enumerate(tokens):
            pages = []
            for owner in owners:
                taken = self.pool.allocate(owner, 1)
                assert taken is not None
                pages += taken
            offsets.append(pages[0])
            before, key = key, page_key(key, [token] * 32)
            if seal is None or number < seal:
                chain.append(self.cache.put(key, before, number, owners, tuple(pages)))
        if let_go:
            self.cache.give(chain, None)
        return offsets

    def found(self, letter: str, tokens: list[int]) -> list[int]:
        """Offsets of group 0 of the pages that are found, from the first on."""
        key, chain = root_key(letter, "bf16", ""), []
        for token in tokens:
            key = page_key(key, [token] * 32)
            page = self.cache.take(key)
            if page is None:
                break
            chain.append(page)
        self.cache.give(chain, None)
        return [page.pages[0] for page in chain]

    def check_that_everything_can_be_had(self, slabs: int) -> None:
        while self.cache.evict(pinned=True):
            pass
        assert (self.pool.used_bytes, self.pool.cached_bytes, self.pool.free_slabs) == (0, 0, slabs)


def record(memory: np.ndarray, owner: Owner, page: int) -> np.ndarray:
    """The header of a page."""
    slab, inside = divmod(page, SLAB)
    first = header_slabs(memory.nbytes // SLAB)
    begin = (slab - first) * HEADERS + (inside // owner.page_bytes + 1) * RECORD
    return memory[begin : begin + RECORD]


@pytest.mark.parametrize("slabs", [1, 2, 255, 256, 257, 512, 513, 1000])
def test_headers_take_slabs_of_their_own_that_hold_one_for_every_page(slabs: int) -> None:
    whole = whole_bytes(slabs * SLAB)
    assert page_bytes(whole) == slabs * SLAB
    assert header_slabs(whole // SLAB) * SLAB >= slabs * HEADERS
    assert whole - slabs * SLAB < SLAB + slabs * HEADERS


def test_what_was_sealed_is_found_by_the_next_engine_and_what_was_not_is_free() -> None:
    memory = make_memory()
    first = Bench(memory, adopt="ab")
    assert (first.cache.adopted, first.pool.free_slabs) == (0, 12)
    pages = first.fill("a", [1, 2, 3, 4], let_go=False)  # of a request that was running
    torn = first.fill("a", [1, 2, 9], seal=2)
    large = first.fill("b", [1, 2])
    second = Bench(memory, adopt="ab")
    assert second.cache.adopted == 6
    assert second.found("a", [1, 2, 3, 4]) == pages
    assert second.found("b", [1, 2, 3]) == large
    assert second.found("a", [1, 2, 9]) == pages[:2] != torn[:2]
    assert second.pool.used_bytes == 0
    second.fill("a", [5, 6])
    second.check_that_everything_can_be_had(12)


def test_pages_of_models_that_are_gone_are_free() -> None:
    memory = make_memory()
    first = Bench(memory)
    first.fill("a", [1, 2])
    first.fill("b", [1, 2])
    second = Bench(memory, adopt="b")
    assert (second.found("a", [1]), len(second.found("b", [1, 2]))) == ([], 2)
    second.check_that_everything_can_be_had(12)


def test_a_page_that_was_freed_or_given_to_another_is_not_found_again() -> None:
    memory = make_memory(4)
    first = Bench(memory)
    first.fill("a", [1, 2])
    assert first.cache.evict()
    assert len(Bench(memory, adopt="a").found("a", [1, 2])) == 1
    assert first.cache.evict()
    first.fill("b", [7, 8], let_go=False)  # all of the pool
    second = Bench(memory, adopt="ab")
    assert (second.found("a", [1]), len(second.found("b", [7, 8]))) == ([], 2)


def test_of_a_chain_with_a_hole_the_beginning_is_kept() -> None:
    for hole in range(4):
        memory = make_memory()
        pages = Bench(memory).fill("a", [1, 2, 3, 4])
        record(memory, MODELS["a"][0], pages[hole])[:] = 0
        second = Bench(memory, adopt="a")
        assert second.found("a", [1, 2, 3, 4]) == pages[:hole]
        assert second.cache.adopted == hole
        second.check_that_everything_can_be_had(12)


def test_a_page_needs_every_one_of_its_groups() -> None:
    memory = make_memory()
    first = Bench(memory)
    first.fill("a", [1, 2])
    key = page_key(page_key(root_key("a", "bf16", ""), [1] * 32), [2] * 32)
    record(memory, MODELS["a"][1], first.cache._pages[key].pages[1])[:] = 0
    assert len(Bench(memory, adopt="a").found("a", [1, 2])) == 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_stands_in_the_headers_pages_are_found_as_they_were_sealed_or_not_at_all(seed: int) -> None:
    draw = random.Random(seed)
    memory = make_memory()
    first = Bench(memory)
    sealed = {letter: first.fill(letter, [1, 2, 3]) for letter in "ab"}
    headers = memory[: header_slabs(memory.nbytes // SLAB) * SLAB]
    interesting = np.flatnonzero(headers[: 12 * HEADERS])
    for _ in range(draw.randrange(1, 40)):
        at = int(interesting[draw.randrange(len(interesting))])
        match draw.randrange(3):
            case 0:
                headers[at] ^= 1 << draw.randrange(8)
            case 1:
                headers[at : at + draw.randrange(1, 200)] = draw.randrange(256)
            case 2:  # a record in another place
                block, other = draw.randrange(12) * HEADERS, draw.randrange(12) * HEADERS
                headers[block : block + 5 * RECORD] = headers[other : other + 5 * RECORD].copy()
    second = Bench(memory, adopt="ab")
    for letter, pages in sealed.items():
        found = second.found(letter, [1, 2, 3])
        assert found == pages[: len(found)]
    second.fill("a", [11, 12])
    second.check_that_everything_can_be_had(12)


def test_records_that_lie_about_their_chain_are_free() -> None:
    """Correctly written, and yet: a circle, a number that does not follow, slabs that overlap or lie outside."""
    memory = make_memory()
    headers = PageHeaders(memory)
    a, b, one = (MODELS[letter][0] for letter in "abc")
    keys = [bytes([n]) * 32 for n in range(8)]
    headers.cut(1, 1, one.image, 0, one.page_bytes)
    headers.seal(1 * SLAB, one.page_bytes, keys[0], keys[1], 1)
    headers.seal(1 * SLAB + one.page_bytes, one.page_bytes, keys[1], keys[0], 1)
    headers.seal(1 * SLAB + 2 * one.page_bytes, one.page_bytes, keys[2], keys[3], 0)
    headers.seal(1 * SLAB + 3 * one.page_bytes, one.page_bytes, keys[4], keys[2], 7)
    headers.cut(2, 2, b.image, 0, b.page_bytes)
    headers.seal(2 * SLAB, b.page_bytes, keys[5], keys[3], 0)
    headers.cut(12, 1, b.image, 0, b.page_bytes)  # its second half would lie outside
    headers.seal(12 * SLAB, b.page_bytes, keys[6], keys[3], 0)
    headers._write(
        headers._block(3), bytes(memory[headers._block(2) : headers._block(2) + 56])
    )  # within the one before
    headers.cut(5, 1, a.image, 9, 1 << 62)
    bench = Bench(memory, adopt="abc")
    assert set(bench.cache._pages) == {keys[2], keys[5]}
    bench.check_that_everything_can_be_had(12)


def test_a_page_whose_header_changed_under_us_is_computed_again() -> None:
    memory = make_memory()
    bench = Bench(memory)
    pages = bench.fill("a", [1, 2, 3])
    record(memory, MODELS["a"][0], pages[1])[3] ^= 1
    assert bench.found("a", [1, 2, 3]) == pages[:1]
    again = bench.fill("a", [1, 2, 3])
    assert again[1] not in pages
    assert bench.found("a", [1, 2, 3]) == [pages[0], again[1], pages[2]]
    bench.check_that_everything_can_be_had(12)


def test_a_generation_is_newer_than_all_that_were_found() -> None:
    memory = make_memory()
    Bench(memory).fill("a", [1, 2, 3])
    second = Bench(memory, adopt="a")
    second.fill("a", [9])
    newest = max(second.cache._pages.values(), key=lambda page: page.generations)
    assert newest.before == root_key("a", "bf16", "")
    assert min(newest.generations) > 6
