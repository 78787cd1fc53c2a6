"""Which pages go first: by the longest unused where nothing is known, and by what was learned or said where it is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest

from vai.daemon.pool import HEADERS, SLAB, whole_bytes
from vai.scratchpad import retention
from vai.scratchpad.headers import LEARNED, MOST_LEARNED, RECORD, Pin
from vai.scratchpad.pages import Owner, PagePool
from vai.scratchpad.prefix import CachedPage, PrefixCache, page_key, root_key
from vai.scratchpad.retention import Conversation, Name, Retention

PAGE = SLAB // 16
SLABS = 4


@dataclass
class Cache:
    """A prefix cache of a pool of SLABS * 16 pages, whose clock moves by hand, and agents that talk with it."""

    now: float = 0.0
    memory: np.ndarray = field(default_factory=lambda: np.zeros(whole_bytes(SLABS * SLAB), np.uint8))

    def __post_init__(self) -> None:
        self.pool = PagePool(self.memory)
        self.retention = Retention(self.pool.size, lambda: self.now)
        self.cache = PrefixCache(self.pool, self.retention)

    def request(
        self,
        tokens: Iterable[int],
        *,
        session: str = "",
        salt: str = "",
        retain: float | None = None,
        seconds: float = 0.0,
        letter: str = "a",
        page: int = PAGE,
        fast: int = 0,
    ) -> tuple[int, Conversation]:
        """A request whose pages each hold one of `tokens`, many times: how many were found, and whose it was.

        The first `fast` pages are of the fast kind.
        """
        owner = Owner(letter * 64, 0, page)
        keys = [root_key(letter, "bf16", salt)]
        for number, token in enumerate(tokens):
            keys.append(page_key(keys[-1], [token] * 32, "portable" if number < fast else None))
        conversation = self.cache.resume(owner.image, Name(salt, session), keys[1:])
        chain: list[CachedPage] = []
        for key in keys[1:]:
            found = self.cache.take(key)
            if found is None:
                break
            chain.append(found)
        hits = len(chain)
        for number in range(hits, len(keys) - 1):
            while (pages := self.pool.allocate(owner, 1)) is None:
                assert self.cache.evict(pinned=True)
            chain.append(
                self.cache.put(keys[number + 1], keys[number], number, (owner,), tuple(pages), fast=number < fast)
            )
        self.now += seconds
        self.cache.give(chain, conversation)
        self.cache.pause(conversation, chain, retain)
        return hits, conversation

    def found(self, tokens: Iterable[int], salt: str = "", letter: str = "a", fast: int = 0) -> int:
        """How many pages of a chain are there, without a look that anybody remembers."""
        key, found = root_key(letter, "bf16", salt), 0
        for number, token in enumerate(tokens):
            key = page_key(key, [token] * 32, "portable" if number < fast else None)
            if key not in self.cache._pages:
                break
            found += 1
        return found

    def killed(self, *letters: str) -> Cache:
        """The cache of the next engine, of which this one knew nothing."""
        after = Cache(self.now, self.memory)
        after.cache.adopt([(Owner(letter * 64, 0, PAGE),) for letter in letters or "a"])
        return after

    def evict_all(self) -> None:
        while self.cache.evict(pinned=True):
            pass

    def evict(self, count: int) -> None:
        for _ in range(count):
            assert self.cache.evict()


def test_where_nothing_is_known_the_longest_unused_goes_first_and_a_chain_from_its_end() -> None:
    cache = Cache()
    chains = [[n, n + 100, n + 200] for n in range(5)]
    for chain in chains:
        cache.request(chain)
        cache.now += 10
    cache.request(chains[0])
    cache.now += 1
    cache.evict(7)
    assert [cache.found(chain) for chain in chains] == [3, 0, 0, 2, 3]


def test_a_conversation_is_known_by_where_it_went_on_and_by_its_name() -> None:
    cache = Cache()
    _, first = cache.request([1, 2])
    _, other = cache.request([1, 3])
    _, again = cache.request([1, 2, 4, 5])
    assert again is first is not other
    while cache.cache.evict():
        pass
    hits, still = cache.request([1, 2, 4, 5, 6])  # nothing of it is there, and yet it is the same
    assert hits == 0 and still is first
    _, named = cache.request([7], session="s")
    _, renamed = cache.request([8, 9], session="s")
    _, stranger = cache.request([7], session="s", salt="x")
    assert named is renamed is not stranger
    assert cache.request([7], session="s", letter="b")[1] is not named


def test_a_conversation_that_comes_back_soon_outlives_one_that_does_not_though_it_is_unused_for_longer() -> None:
    cache = Cache()
    for _ in range(6):  # one agent waits for tools, the other for a person
        cache.request([1, 2], session="quick")
        cache.now += 0.5
        cache.request([3, 4], session="slow", seconds=0.0)
        for _ in range(4):
            cache.request([1, 2], session="quick")
            cache.now += 0.5
        cache.now += 500
    cache.request([1, 2], session="quick")
    cache.now += 0.1
    cache.request([3, 4], session="slow")
    cache.now += 0.1
    cache.evict(2)
    assert (cache.found([1, 2]), cache.found([3, 4])) == (2, 0)


def test_a_pause_that_outlasts_what_was_usual_is_worth_less_than_one_that_does_not() -> None:
    cache = Cache()
    for _ in range(8):
        cache.request([3, 4], session="due")  # always after a minute
        for _ in range(60):
            cache.now += 1
            cache.request([1, 2], session="late")  # always after a second
    cache.request([3, 4], session="due")
    cache.now += 8
    cache.request([1, 2], session="late")
    cache.now += 24
    cache.evict(1)
    assert (cache.found([1, 2]), cache.found([3, 4])) == (1, 2)


def test_pages_that_cost_more_to_compute_for_each_byte_are_kept() -> None:
    cache = Cache()
    cache.retention.measured("a" * 64, 50.0)
    cache.retention.measured("b" * 64, 1000.0)
    cache.request([1, 2], letter="a")
    cache.now += 0.001
    cache.request([1, 2], letter="b")
    cache.evict(1)
    assert (cache.found([1, 2], letter="a"), cache.found([1, 2], letter="b")) == (2, 1)
    cache.retention.measured("a" * 64, 20_000.0)  # by now it is quick
    cache.evict(1)
    assert (cache.found([1, 2], letter="a"), cache.found([1, 2], letter="b")) == (1, 1)


@pytest.mark.parametrize("killed", [False, True])
def test_a_page_is_weighed_with_the_speed_of_its_own_kind(killed: bool) -> None:
    cache = Cache()
    cache.retention.measured("a" * 64, 50.0)
    cache.retention.measured("a" * 64, 1000.0, fast=True)
    for number in range(retention.RENEWED):  # then what is known is written down
        cache.request([number], retain=0)
    cache.request([1, 2])
    cache.request([3, 4], fast=2)
    if killed:
        cache = cache.killed()
    cache.evict(2)
    assert (cache.found([1, 2]), cache.found([3, 4], fast=2)) == (2, 0)
    cache.retention.measured("a" * 64, 1e6)
    cache.request([3, 4], fast=2)
    cache.evict(2)
    assert (cache.found([1, 2]), cache.found([3, 4], fast=2)) == (0, 2)


def test_a_kind_that_was_not_measured_is_taken_to_be_as_fast_as_the_other() -> None:
    cache = Cache()
    cache.retention.measured("a" * 64, 50.0)
    cache.retention.measured("b" * 64, 1000.0, fast=True)
    cache.request([1, 2], fast=2)
    cache.request([1, 2], letter="b")
    cache.evict(2)
    assert (cache.found([1, 2], fast=2), cache.found([1, 2], letter="b")) == (2, 0)


def test_what_is_pinned_goes_last_until_its_time_is_over() -> None:
    cache = Cache()
    cache.request([1, 2], retain=300)
    cache.now += 100
    cache.request([3, 4])
    assert cache.retention.pinned_bytes == 2 * PAGE
    cache.evict(2)
    assert (cache.found([1, 2]), cache.found([3, 4])) == (2, 0)
    assert not cache.cache.evict()
    cache.now += 201
    assert cache.retention.pinned_bytes == 0
    cache.evict(2)
    assert len(cache.cache) == cache.pool.cached_bytes == 0


def test_a_pin_is_renewed_by_use_and_taken_only_where_nothing_else_is_left() -> None:
    cache = Cache()
    cache.request([1, 2], retain=300)
    cache.now += 299
    cache.request([1, 2, 3], retain=300)
    cache.now += 299
    assert cache.retention.pinned_bytes == 3 * PAGE
    assert not cache.cache.evict()
    assert cache.cache.evict(pinned=True)
    assert (cache.found([1, 2, 3]), cache.retention.pinned_bytes) == (2, 2 * PAGE)


def test_pins_have_a_share_of_the_pool_for_each_session_tenant_and_all_together() -> None:
    cache = Cache()
    pages = SLABS * 16
    session, tenant, every = pages // 8, pages // 4, pages // 2
    cache.request(range(12), session="a", retain=60)
    assert cache.retention.pinned_bytes == session * PAGE
    cache.evict(12 - session)
    assert cache.found(range(12)) == session  # its beginning
    for name in "bc":
        cache.request(range(100 * ord(name), 100 * ord(name) + 9), session=name, retain=60)
    assert cache.retention.pinned_bytes == tenant * PAGE
    for salt in "xyz":
        for name in "ab":
            cache.request(range(8), session=name, salt=salt, retain=60)
            cache.request(range(50, 58), session=name, salt=salt, retain=60)
    assert cache.retention.pinned_bytes == every * PAGE
    cache.now += 61
    assert cache.retention.pinned_bytes == 0
    assert cache.retention._pinned == cache.retention._pinned_of == {}


def test_a_pin_that_is_renewed_again_and_again_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "LEAST_SWEPT", 32)
    cache = Cache()
    for _ in range(500):
        cache.request([1, 2, 3], session="s", retain=86400)
        cache.now += 1
    assert len(cache.retention._pins.entries) <= 32
    assert cache.retention.pinned_bytes == 3 * PAGE
    cache.now += 86398
    assert cache.retention.pinned_bytes == 3 * PAGE
    cache.now += 1
    assert cache.retention.pinned_bytes == 0


def test_the_end_of_a_conversation_frees_what_only_it_has_read_pinned_or_not() -> None:
    cache = Cache()
    cache.request([1, 2, 3], session="s", retain=600)
    cache.request([1, 2, 4])
    assert cache.request([1, 2, 3, 5], session="s", retain=0)[0] == 3
    assert (cache.found([1, 2, 3]), cache.found([1, 2, 4])) == (2, 3)
    cache.request([6, 7], session="s", retain=60)
    cache.request([6, 7, 8], session="s", letter="b")
    assert cache.cache.end(Name("", "s")) == 5
    assert cache.cache.end(Name("", "s")) == cache.cache.end(Name("", "t")) == 0
    assert cache.found([6, 7]) == cache.found([6, 7, 8], letter="b") == 0
    assert len(cache.cache) == 3
    assert cache.retention.pinned_bytes <= 2 * PAGE  # of the beginning that another conversation reads


def test_a_pin_outlives_its_engine_and_not_its_time() -> None:
    cache = Cache()
    cache.request([1, 2, 3], session="s", retain=300)
    cache.request([7, 8], retain=200)
    cache.now += 100
    cache.request([4, 5, 6])
    after = cache.killed()
    assert after.retention.pinned_bytes == 5 * PAGE
    after.evict(3)
    assert not after.cache.evict()
    assert (after.found([1, 2, 3]), after.found([7, 8])) == (3, 2)
    after.now += 99
    again = after.killed()
    assert again.retention.pinned_bytes == 5 * PAGE
    again.now += 2
    assert again.retention.pinned_bytes == 3 * PAGE
    again.evict(2)
    assert not again.cache.evict()
    again.now += 100
    assert again.killed().retention.pinned_bytes == again.retention.pinned_bytes == 0


def test_a_session_that_goes_on_after_its_engine_has_one_share_for_what_it_pinned_before_and_after() -> None:
    cache, share = Cache(), SLABS * 16 // 8
    cache.request(range(share - 2), session="s", salt="x", retain=300)
    cache.request(range(50, 50 + share), session="t", salt="x", retain=300)
    cache.now += 10
    after = cache.killed()
    assert after.request(range(share + 4), session="s", salt="x", retain=300)[0] == share - 2
    assert after.retention.pinned_bytes == 2 * share * PAGE  # the tenant's
    after.request([90], session="u", salt="x", retain=300)
    assert after.retention.pinned_bytes == 2 * share * PAGE
    after.now += 291
    assert after.retention.pinned_bytes == share * PAGE


def test_the_end_of_a_session_after_its_engine_frees_what_it_pinned_and_what_came_behind() -> None:
    cache, share = Cache(), SLABS * 16 // 8
    cache.request([40, 41], session="s", letter="b", retain=300)
    cache.request(range(share + 3), session="s", retain=300)  # more than may be pinned
    cache.request([0, 1, 70], session="t", retain=300)
    after = cache.killed("a", "b")
    assert after.cache.end(Name("x", "s")) == 0
    assert after.cache.end(Name("", "s")) == share + 3 - 2 + 2
    assert (after.found(range(share)), after.found([0, 1, 70]), after.found([40], letter="b")) == (2, 3, 0)
    assert after.retention.pinned_bytes == 3 * PAGE
    assert after.killed("a", "b").retention.pinned_bytes == 3 * PAGE
    assert after.cache.end(Name("", "t")) > 0


def test_what_was_unpinned_is_not_pinned_for_the_next_engine_either() -> None:
    cache = Cache()
    cache.request([1, 2], session="s", retain=300)
    page = next(iter(cache.cache._pages.values()))
    held = cache.cache.take(page.key)  # by a request of the same session
    assert cache.cache.end(Name("", "s")) == 1 and held is page
    assert (cache.found([1, 2]), cache.killed().retention.pinned_bytes) == (1, 0)


def pin_record(cache: Cache, number: int) -> tuple[CachedPage, Callable[..., None]]:
    """A page, and what writes a pin behind its header that nothing is wrong with but what it says."""
    page = list(cache.cache._pages.values())[number]

    def write(until: float, tenant: bytes = b"t" * 16, session: bytes = b"s" * 16) -> None:
        cache.pool.headers.pin(page.pages[0], PAGE, Pin(until, tenant, session))

    return page, write


@pytest.mark.parametrize("until", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 999.0, 1e300, 1000 + 86401])
def test_a_pin_that_nobody_could_have_asked_for_is_none(until: float) -> None:
    cache = Cache(1000.0)
    cache.request([1, 2, 3])
    pin_record(cache, 1)[1](1000 + 86399)
    pin_record(cache, 0)[1](until)
    after = cache.killed()
    assert (len(after.cache), after.retention.pinned_bytes) == (3, PAGE)


def test_pins_that_are_read_back_have_the_shares_of_any_other() -> None:
    cache, pages = Cache(), SLABS * 16
    for first in range(0, pages, 8):
        cache.request(range(first, first + 8))
    for number in range(pages):
        pin_record(cache, number)[1](100.0)
    assert cache.killed().retention.pinned_bytes == pages // 8 * PAGE
    for number in range(pages):
        pin_record(cache, number)[1](100.0, session=number.to_bytes(16, "little"))
    assert cache.killed().retention.pinned_bytes == pages // 4 * PAGE
    for number in range(pages):
        pin_record(cache, number)[1](100.0, tenant=number.to_bytes(16, "little"))
    after = cache.killed()
    assert after.retention.pinned_bytes == pages // 2 * PAGE
    while after.cache.evict(pinned=True):
        pass
    assert after.retention._pinned == after.retention._pinned_of == {}


def test_a_pin_holds_for_the_page_it_was_made_for_and_no_other() -> None:
    cache = Cache()
    cache.request([1, 2], retain=300)
    place = cache.pool.headers._place(next(iter(cache.cache._pages.values())).pages[0], PAGE)
    assert place is not None
    pin = cache.memory[place + 88 : place + RECORD].copy()
    cache.evict_all()
    cache.request([3, 4])  # in the same places
    assert cache.memory[place : place + 88].any() and not cache.memory[place + 88 : place + RECORD].any()
    cache.memory[place + 88 : place + RECORD] = pin
    assert cache.killed().retention.pinned_bytes == 0


def learned() -> Cache:
    """A cache that knows: conversations of one model come back at once, those of the other after a minute."""
    cache = Cache(1.0)
    for number in range(40):
        for letter, pause in (("a", 0.5), ("b", 60.0)):
            cache.request([number], letter=letter)
            cache.now += pause
            cache.request([number, number], letter=letter, retain=0)
    cache.evict_all()
    return cache


def test_what_was_learned_of_pauses_outlives_the_engine() -> None:
    kept = []
    for cache in (Cache(1.0), learned(), learned().killed("a", "b")):
        cache.request([1, 2], letter="b")
        cache.now += 1.0
        cache.request([1, 2], letter="a")
        cache.now += 30.0  # who would come back at once is not coming any more
        cache.evict(2)
        kept.append(cache.found([1, 2], letter="b"))
    assert kept == [0, 2, 2]


def test_the_pauses_of_pages_that_were_taken_over_teach_nothing() -> None:
    cache = learned()
    for number in range(20):
        cache.request([100 + number])
    before = PagePool(cache.memory).headers.learned(["a" * 64, "b" * 64])
    after = cache.killed("a", "b")
    after.now += 3600
    assert after.cache.resume("a" * 64, Name("", ""), [*after.cache._pages]).turns == 0
    after.retention._renewed = True
    assert dict(after.retention.take_learned()) == before != {}


@pytest.mark.parametrize("seed", range(8))
def test_nonsense_that_is_read_back_of_pauses_is_not_learned(seed: int) -> None:
    draw, cache = random.Random(seed), learned()
    image, (good, size) = "a" * 64, (retention._LEARNED, retention._LEARNED.size)
    nonsense = [-1.0, float("nan"), float("inf"), -float("inf"), 1e30, draw.random()]
    wrong = [0.0] * (size // 4)
    wrong[draw.randrange(len(wrong))] = nonsense[seed % len(nonsense)]  # the last: more ended than got there, or none
    bodies = [good.pack(*wrong), draw.randbytes(size), b"", draw.randbytes(size - 4), draw.randbytes(MOST_LEARNED)]
    for body in bodies:
        cache.pool.headers.learn(image, body)
        after = cache.killed("a", "b")
        chances = after.retention._chances.get((image, 1))
        assert chances is None or all(0 < chance <= 1 for chance in chances)
        after.request([1, 2])
        after.evict(2)
    torn = cache.memory[: SLABS * HEADERS].reshape(-1, HEADERS)[:, -LEARNED:]
    torn[:, draw.randrange(8, 500)] ^= 1
    assert cache.killed("a", "b").pool.headers.learned(["a" * 64, "b" * 64]) == {}


def test_there_is_room_for_what_was_learned_of_one_image_a_slab() -> None:
    cache = Cache()
    for letter in "cabdef":
        cache.pool.headers.learn(letter * 64, letter.encode())
    after = PagePool(cache.memory).headers
    assert after.learned(["c" * 64]) == {"c" * 64: b"c"}
    after.learn("f" * 64, b"f")  # in the place of one that is not there any more
    assert PagePool(cache.memory).headers.learned([letter * 64 for letter in "cf"]) == {
        "c" * 64: b"c",
        "f" * 64: b"f",
    }


@pytest.mark.parametrize("seed", range(4))
def test_accounts_are_right_whatever_conversations_do(seed: int) -> None:
    draw, cache = random.Random(seed), Cache()
    said: dict[str, list[int]] = {}
    for _ in range(600):
        name = f"s{draw.randrange(12)}"
        tokens = [*draw.choice([[1], [1, 2], [3]]), *said.get(name, [])][:12]
        said[name] = [*tokens, draw.randrange(1000)]
        if draw.random() < 0.2:
            said[name] = said[name][: draw.randrange(1, 5)]
        retain = draw.choice([None, None, None, 0, 5, 200])
        session = name if draw.random() < 0.5 else ""
        cache.request(said[name], session=session, salt=draw.choice("xy"), retain=retain, letter=draw.choice("ab"))
        cache.now += draw.choice([0, 0.01, 1, 90])
        if draw.random() < 0.1:
            cache.cache.end(Name("x", name))
        pages = cache.cache._pages.values()
        assert cache.pool.cached_bytes == len(pages) * PAGE
        assert all(page.before in cache.cache._pages for page in pages if page.before not in ROOTS)
        assert cache.retention.pinned_bytes == sum(page.bytes for page in pages if page.pinned_by is not None)
        leaves = {page for page in pages if page.key not in cache.cache._behind}
        assert leaves == {
            page for page in pages if page.conversation and page in page.conversation.leaves[page.fast]
        } | set(cache.retention._pinned_leaves)
    while cache.cache.evict(pinned=True):
        pass
    assert len(cache.cache) == cache.pool.used_bytes + cache.pool.cached_bytes == 0
    assert cache.pool.free_slabs == SLABS


ROOTS = {root_key(letter, "bf16", salt) for letter in "ab" for salt in "xy"}


def test_so_many_conversations_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "CONVERSATIONS", 10)
    cache = Cache()
    for n in range(40):
        cache.request([n], session=f"s{n}")
        cache.request([100 + n])
    assert len(cache.retention._paused) == 10
    assert len(cache.retention._sessions) == len(cache.retention._tails) == 5


def test_the_cost_of_an_eviction_does_not_grow_with_what_is_kept() -> None:
    cache = Cache()
    cache.now = 1.0
    small = 4096
    for n in range(2000):
        cache.request(range(10 * n, 10 * n + 6), page=small)
        cache.now += 0.01
    began = time.process_time()
    cache.evict(11_000)
    assert (time.process_time() - began) / 11_000 < 300e-6  # 12,000 pages of 2,000 conversations are kept
