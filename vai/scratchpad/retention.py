"""Which kept pages go first: what it costs to hold a conversation's pages, against what it costs to compute them again.

A conversation is a client's session, or else the chain of pages that one request after another went on with. Between
two requests it pauses, 50 ms for a tool or an hour for a person, and its pages are held for nobody. Holding costs bytes
times seconds, computing again costs tokens times the seconds that its model takes for one. So a conversation is worth

    (seconds per token / bytes per token) * max over T of P(it returns within T) / E[seconds held, at most T]

seconds of computing saved per byte and second (the index of Gittins, 1979, for a reward that comes once), and the pages
worth least go first. Computing has a speed for each kind of page (exact, fast). How long pauses last is learned: the
chance to end in each of SPANS spans of doubling length, of each conversation, leaning on that of all as far as its own
are few. A pause that goes on past what was usual is worth less, one that comes near it more. Where nothing is known the
chance is the same in every span, and the order is that of the longest unused.

A client may know better: pages are pinned for the seconds it names, within a share of the pool. Of pins that are more,
the beginning of the chain is kept. A pin holds against everything but a request that could not run otherwise.

Pins and what was learned outlive the engine beside the pages (headers.py). Whoever pins is known there by digests, and
what is read back is held to the bounds of what a client may ask for.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from hashlib import sha256
from math import log2
from typing import Generic, NamedTuple, TypeVar

from vai.kernels.program import PAGE_TOKENS
from vai.request import MAX_RETAIN

SHORTEST = 1 / 64  # seconds: the end of the first span; every later one ends at twice the seconds of the one before
SPANS = 24  # the last ends after 36 hours
CHANCE = 0.15  # to return within a span, before anything is known
PRIOR = 8.0  # pauses that this is worth
TRUST = 1.0  # pauses of its own that what all conversations do is worth
FADE = 0.8  # what a pause of a conversation still counts after its next one
FADE_OF_ALL = 0.95  # what they count after RENEWED others
TOLD_APART = 3  # the first pauses of a conversation, which other things are known of
BEFORE = -1  # pauses of a stranger: of the one it is in nobody knows when it began, so it teaches nothing
UNKNOWN_SPEED = 1000.0  # tokens per second of a model that has not been measured yet
RENEWED = 16  # pauses after which the chances of all are renewed
STEPS = 2  # for each doubling of worth: what lies within one step goes in the order of the longest unused
CONVERSATIONS = 4096  # that are remembered while they pause
MOST_COUNTED = 1e4  # pauses that what is read back may be worth
FASTEST = 1e9  # tokens per second that may be read back
LEAST_SWEPT = 4 * CONVERSATIONS  # entries of a heap that may be out of date
SESSION_SHARE = 1 / 8  # of the pool, pinned at most
TENANT_SHARE = 1 / 4
PINNED_SHARE = 1 / 2  # by all together

_ENDS = [SHORTEST * 2**span for span in range(SPANS)]
_WIDTHS = [SHORTEST, *_ENDS[:-1]]
_UNKNOWN = [CHANCE] * SPANS
_LEARNED = struct.Struct(f"<2f{2 * SPANS * TOLD_APART}f")
_Key = TypeVar("_Key")
_Entry = TypeVar("_Entry", bound=tuple[object, ...])
_Kind = tuple[str, bool]  # image, and whether its fast pages are meant
_Place = tuple[float, int, int, "Conversation", bool]  # worth but for the price, number of the pause, stamp, kind


class Pauses:
    """How long pauses were: how many got as far as each span, and how many ended in it. Counts fade."""

    __slots__ = ("ended", "lasted")

    def __init__(self) -> None:
        self.ended = [0.0] * SPANS
        self.lasted = [0.0] * SPANS

    def chances(self, prior: List[float]) -> list[float]:
        """For each span the chance of a pause that gets into it to end there, leaning on `prior` with PRIOR pauses."""
        counts = zip(self.ended, self.lasted, prior, strict=True)
        return [min(1.0, (ended + PRIOR * chance) / (lasted + PRIOR)) for ended, lasted, chance in counts]

    def add(self, others: Pauses) -> None:
        self.ended = [own + other for own, other in zip(self.ended, others.ended, strict=True)]
        self.lasted = [own + other for own, other in zip(self.lasted, others.lasted, strict=True)]

    def fade(self, factor: float) -> None:
        self.ended = [count * factor for count in self.ended]
        self.lasted = [count * factor for count in self.lasted]


class Name(NamedTuple):
    """A session as its client names it: `salt` is its tenant's."""

    salt: str
    session: str

    def identity(self) -> Identity:
        """The digests that it is known by."""
        tenant = _digest(b"tenant", self.salt)
        return Identity(tenant, _digest(b"session" + tenant, self.session) if self.session else UNNAMED)


class Identity(NamedTuple):
    """A session as it can be written down, 16 bytes each. `session` is UNNAMED for conversations without a name."""

    tenant: bytes
    session: bytes


UNNAMED = bytes(16)
NOBODY = Identity(bytes(16), UNNAMED)


def _digest(what: bytes, text: str) -> bytes:
    return sha256(b"vai " + what + b"\0" + text.encode("utf-8", "surrogatepass")).digest()[:16]


class Conversation:
    """Requests that go on with each other's pages, for one model.

    `active`: requests under way; without any it pauses, since `paused_at`, by now in `span`; `pause` numbers the pauses
    of all. `leaves`: pages of it that nobody holds and none depends on, the longest unused first; exact ones, then fast
    ones. `worth`: what they are worth but for their price, None where that has to be found again. `stamps` tell its
    places in the rankings of both kinds.
    """

    __slots__ = (
        "active",
        "identity",
        "image",
        "leaves",
        "pause",
        "paused_at",
        "pauses",
        "span",
        "stamps",
        "tail",
        "turns",
        "worth",
    )

    def __init__(self, image: str, identity: Identity) -> None:
        self.image = image
        self.identity = identity
        self.active = 0
        self.paused_at = 0.0
        self.pauses: Pauses | None = None  # most conversations have one request
        self.turns = 0  # pauses so far
        self.span = 0
        self.pause = 0
        self.worth: float | None = None
        self.stamps = [0, 0]
        self.tail: bytes | None = None  # the key of its last page
        self.leaves: tuple[dict[Kept, None], dict[Kept, None]] = ({}, {})


class Kept:
    """What retention knows of a page. `fast`: its kind. `shared`: more than one conversation has read it."""

    __slots__ = ("bytes", "conversation", "fast", "pinned_by", "pinned_until", "shared")

    def __init__(self, bytes: int, *, fast: bool) -> None:
        self.bytes = bytes  # of memory
        self.fast = fast
        self.conversation: Conversation | None = None  # the last that read it
        self.shared = False
        self.pinned_until = 0.0
        self.pinned_by: Identity | None = None


class _Heap(Generic[_Entry]):
    """A heap in which entries may be out of date: they go before they are most of it, at a constant cost a push."""

    def __init__(self, fresh: Callable[[_Entry], bool]) -> None:
        self.entries: list[_Entry] = []
        self._fresh = fresh
        self._most = LEAST_SWEPT

    def push(self, entry: _Entry) -> None:
        heapq.heappush(self.entries, entry)
        if len(self.entries) > self._most:
            self.entries = [each for each in self.entries if self._fresh(each)]
            heapq.heapify(self.entries)
            self._most = max(LEAST_SWEPT, 2 * len(self.entries))


class Retention:
    """The order in which pages go. Times are seconds of `clock`; a pool has `size` bytes."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self._size = size
        self._clock = clock
        self._common = Pauses()
        self._alike: dict[tuple[str, int], Pauses] = {}  # by image and number of the pause, up to TOLD_APART
        self._chances: dict[tuple[str, int], list[float]] = {}  # to return in a span, the same way
        self._until_renewed = RENEWED
        self._renewed = False  # since `take_learned`
        self._speeds: dict[_Kind, float] = {}  # tokens of a prompt per second
        self._serial = itertools.count()
        self._rankings: dict[_Kind, _Heap[_Place]] = {}
        self._edges: list[tuple[float, int, int, Conversation]] = []  # a heap: when a pause gets into its next span
        self._sessions: dict[Identity, dict[str, Conversation]] = {}  # by image
        self._tails: dict[bytes, Conversation] = {}
        self._paused: OrderedDict[Conversation, None] = OrderedDict()  # and remembered, the longest pause first
        self._pins = _Heap[tuple[float, int, Kept]](lambda pin: pin[2].pinned_until == pin[0])  # by the end
        self._pinned_leaves: dict[Kept, None] = {}
        self._pinned: dict[Identity, int] = {}  # bytes
        self._pinned_of: dict[bytes, int] = {}  # bytes of a tenant

    def measured(self, image: str, tokens_per_second: float, *, fast: bool = False) -> None:
        """How fast a model computes the pages of a prompt that are of one kind."""
        self._speeds[image, fast] = tokens_per_second

    # Conversations

    def resume(self, image: str, name: Name, keys: List[bytes]) -> Conversation:
        """The conversation that a new request goes on with: its session's, or the one whose last page is among its own.

        `keys` are those of its pages.
        """
        self._advance()
        identity = name.identity()
        if name.session:
            conversation = self._of_session(image, identity)
        else:
            known = (self._tails[key] for key in reversed(keys) if key in self._tails)
            conversation = next(known, None) or Conversation(image, identity)
        if conversation in self._paused:
            del self._paused[conversation]
            self._returned(conversation)
        if conversation.tail is not None:
            self._tails.pop(conversation.tail, None)
        conversation.active += 1
        self._rank_anew(conversation)
        return conversation

    def pause(self, conversation: Conversation, tail: bytes | None) -> None:
        """A request of a conversation is over. `tail`: the key of its last page, where it has one."""
        conversation.active -= 1
        if tail is not None:
            conversation.tail = tail
        if conversation.active:
            return
        self._advance()
        now = self._clock()
        conversation.paused_at, conversation.span, conversation.pause = now, 0, next(self._serial)
        conversation.turns = min(conversation.turns + 1, TOLD_APART)
        if conversation.pauses is not None:
            conversation.pauses.fade(FADE)
        self._entered(conversation)
        if conversation.turns:
            self._renew()
        self._remember(conversation)
        self._expect_next_span(conversation)
        self._rank_anew(conversation)

    def stranger(self, image: str, tail: bytes, identity: Identity = NOBODY) -> Conversation:
        """A conversation that pauses from now on, of which nothing is known but where its pages end, and whose it is
        where it has a name.
        """
        named = identity.session != UNNAMED
        conversation = self._of_session(image, identity) if named else Conversation(image, identity)
        if conversation not in self._paused:
            conversation.active += 1
            conversation.turns = BEFORE
            self.pause(conversation, tail)
        return conversation

    def close(self, name: Name) -> list[Conversation]:
        """Forget a session; its conversations, which are to be finished: nobody will ask for their pages again."""
        return list(self._sessions.pop(name.identity(), {}).values())

    def finish(self, conversation: Conversation) -> list[Kept]:
        """Forget a conversation, its pins too; the pages that are not pinned any more.

        Pages that others have read too stay, as those of a stranger.
        """
        self._forget(conversation)
        conversation.pauses = None
        own = {page: None for _, _, page in self._pins.entries if page.conversation is conversation and not page.shared}
        unpinned = [page for page in own if page.pinned_by is not None]
        for page in unpinned:
            self.unpin(page)
        return unpinned

    def own_leaf(self, conversation: Conversation) -> Kept | None:
        """A page that may go and that no other conversation has read."""
        return next((page for leaves in conversation.leaves for page in leaves if not page.shared), None)

    # Pages

    def read(self, page: Kept, conversation: Conversation) -> None:
        """A conversation has read a page, which may not go before `add`."""
        if page.conversation is not conversation:
            page.shared = page.shared or page.conversation is not None
            page.conversation = conversation

    def add(self, page: Kept) -> None:
        """A page may go: nobody holds it, and none depends on it."""
        conversation = page.conversation
        if conversation is None:
            raise AssertionError("a page that nobody has read cannot be let go")
        if page.pinned_until:
            self._pinned_leaves[page] = None
            return
        leaves = conversation.leaves[page.fast]
        leaves[page] = None
        if len(leaves) == 1:
            self._rank(conversation, page.fast)

    def remove(self, page: Kept) -> None:
        """A page may not go any more, or is gone. One that could not go before is fine."""
        self._pinned_leaves.pop(page, None)
        conversation = page.conversation
        if conversation is not None:
            conversation.leaves[page.fast].pop(page, None)

    def victim(self, *, pinned: bool) -> Kept | None:
        """The page worth least, of those that may go; with `pinned`, where there is none, one that is pinned."""
        self._advance()
        places = [place for kind in [*self._rankings] if (place := self._first(kind)) is not None]
        if places:
            pages = [(next(iter(place[3].leaves[place[4]])), place) for place in places]
            return min(pages, key=lambda each: (self._price(each[0]) * each[1][0], each[1][1]))[0]
        return next(iter(self._pinned_leaves), None) if pinned else None

    # Pins

    @property
    def pinned_bytes(self) -> int:
        """Bytes of all pages that are pinned, whether held or not."""
        self._advance()
        return sum(self._pinned.values())

    def pin(self, pages: Iterable[Kept], identity: Identity, seconds: float) -> list[Kept]:
        """Keep pages of a chain, the first ones first, as far as the shares of session, tenant and pins allow; those
        whose pin is new.
        """
        self._advance()
        until = self._clock() + seconds
        pinned = []
        for page in pages:
            if page.pinned_until >= until:
                continue
            if page.pinned_by != identity and not self._may_pin(identity, page.bytes, page):
                break
            conversation = page.conversation
            leaf = page in self._pinned_leaves or (conversation is not None and page in conversation.leaves[page.fast])
            self.remove(page)
            self._pin(page, identity, until)
            pinned.append(page)
            if leaf:
                self.add(page)
        return pinned

    def restore_pin(self, page: Kept, identity: Identity, until: float) -> None:
        """Pin a page that nobody has read yet as it was by an engine before this one: for no longer than anybody could
        ask for now, and within the same shares.
        """
        now = self._clock()
        if page.pinned_by is None and now < until <= now + MAX_RETAIN and self._may_pin(identity, page.bytes, page):
            self._pin(page, identity, until)

    def unpin(self, page: Kept) -> None:
        """A page is like any other again."""
        self._account(page, -page.bytes)
        page.pinned_by, page.pinned_until = None, 0.0
        if page in self._pinned_leaves:
            self.remove(page)
            self.add(page)

    # What outlives the engine

    def take_learned(self) -> list[tuple[str, bytes]]:
        """What is known of each image and its conversations' pauses, where it was renewed since the last call."""
        if not self._renewed:
            return []
        self._renewed = False
        learned = []
        for image in {image for image, _ in self._alike}:
            kinds = [self._alike.get((image, turns)) or Pauses() for turns in range(1, TOLD_APART + 1)]
            counts = [count for pauses in kinds for count in (*pauses.ended, *pauses.lasted)]
            speeds = (self._speeds.get((image, fast), 0.0) for fast in (False, True))
            learned.append((image, _LEARNED.pack(*speeds, *counts)))
        return learned

    def restore_learned(self, image: str, learned: bytes) -> None:
        """Go on with what an engine before this one knew of an image; nonsense changes nothing."""
        if len(learned) != _LEARNED.size:
            return
        exact, fast, *counts = _LEARNED.unpack(learned)
        kinds = [counts[at : at + 2 * SPANS] for at in range(0, len(counts), 2 * SPANS)]
        every = [each for kind in kinds for each in zip(kind[:SPANS], kind[SPANS:], strict=True)]
        if not all(0 <= ended <= lasted <= MOST_COUNTED for ended, lasted in every):
            return
        for each, speed in ((False, exact), (True, fast)):
            if 0 < speed < FASTEST:
                self._speeds[image, each] = speed
        for turns, kind in enumerate(kinds, 1):
            pauses = self._alike[image, turns] = Pauses()
            pauses.ended, pauses.lasted = list(kind[:SPANS]), list(kind[SPANS:])
            self._common.add(pauses)
        self._share()

    # Within

    def _of_session(self, image: str, identity: Identity) -> Conversation:
        of_session = self._sessions.setdefault(identity, {})
        if image not in of_session:
            of_session[image] = Conversation(image, identity)
        return of_session[image]

    def _remember(self, conversation: Conversation) -> None:
        self._paused[conversation] = None
        if conversation.tail is not None and conversation.identity.session == UNNAMED:
            self._tails[conversation.tail] = conversation
        if len(self._paused) > CONVERSATIONS:
            self._forget(next(iter(self._paused)))

    def _forget(self, conversation: Conversation) -> None:
        self._paused.pop(conversation, None)
        if conversation.tail is not None and self._tails.get(conversation.tail) is conversation:
            del self._tails[conversation.tail]
        of_session = self._sessions.get(conversation.identity, {})
        if of_session.get(conversation.image) is conversation:
            del of_session[conversation.image]
            if not of_session:
                del self._sessions[conversation.identity]

    def _advance(self) -> None:
        """Move pauses into the spans that they have reached by now, and end the pins that are over."""
        now = self._clock()
        while self._edges and self._edges[0][0] <= now:
            _, _, pause, conversation = heapq.heappop(self._edges)
            if conversation.active or conversation.pause != pause:
                continue  # it returned, and this is the edge of a pause that is over
            conversation.span += 1
            self._entered(conversation)
            self._expect_next_span(conversation)
            self._rank_anew(conversation)
        while self._pins.entries and self._pins.entries[0][0] <= now:
            until, _, page = heapq.heappop(self._pins.entries)
            if page.pinned_until == until:
                self.unpin(page)

    def _expect_next_span(self, conversation: Conversation) -> None:
        if conversation.span < SPANS - 1 and (conversation in self._paused or any(conversation.leaves)):
            at = conversation.paused_at + _ENDS[conversation.span]
            heapq.heappush(self._edges, (at, next(self._serial), conversation.pause, conversation))

    def _entered(self, conversation: Conversation) -> None:
        """A pause got into its span."""
        if not conversation.turns:
            return
        for counts in (self._common, self._of_kind(conversation), conversation.pauses):
            if counts is not None:
                counts.lasted[conversation.span] += 1

    def _returned(self, conversation: Conversation) -> None:
        """A pause ended in its span."""
        if not conversation.turns:
            return
        if conversation.pauses is None:
            conversation.pauses = Pauses()
            conversation.pauses.lasted[: conversation.span + 1] = [1.0] * (conversation.span + 1)
        for counts in (self._common, self._of_kind(conversation), conversation.pauses):
            counts.ended[conversation.span] += 1

    def _of_kind(self, conversation: Conversation) -> Pauses:
        """The pauses of conversations of the same model that had as many before."""
        return self._alike.setdefault((conversation.image, conversation.turns), Pauses())

    def _rank_anew(self, conversation: Conversation) -> None:
        """What a conversation is worth has changed."""
        conversation.worth = None
        for fast in (False, True):
            if conversation.leaves[fast]:
                self._rank(conversation, fast)

    def _rank(self, conversation: Conversation, fast: bool) -> None:
        """Give a conversation its place among those whose pages of this kind may go."""
        if conversation.worth is None:
            conversation.worth = self._worth(conversation)
        stamp = conversation.stamps[fast] = next(self._serial)
        ranking = self._rankings.get((conversation.image, fast))
        if ranking is None:
            ranking = self._rankings[conversation.image, fast] = _Heap(_stands)
        ranking.push((conversation.worth, conversation.pause, stamp, conversation, fast))

    def _first(self, kind: _Kind) -> _Place | None:
        """The place of the conversation whose pages of this kind are worth least; None where none of them may go."""
        places = self._rankings[kind].entries
        while places:
            if _stands(places[0]):
                return places[0]
            heapq.heappop(places)
        del self._rankings[kind]
        return None

    def _price(self, page: Kept) -> float:
        """Seconds per byte to compute a page of a conversation again, by the other kind where its own is not known."""
        image = "" if page.conversation is None else page.conversation.image
        other = self._speeds.get((image, not page.fast), UNKNOWN_SPEED)
        return PAGE_TOKENS / self._speeds.get((image, page.fast), other) / page.bytes

    def _worth(self, conversation: Conversation) -> float:
        """Returns for each second of holding its pages."""
        if conversation.active:
            return 1 / SHORTEST  # a request of it waits for room, and reads its pages next
        alive, returned, held, best = 1.0, 0.0, 0.0, 0.0
        own, alike = conversation.pauses, self._chances.get((conversation.image, conversation.turns or 1), _UNKNOWN)
        for span in range(conversation.span, SPANS):
            chance = alike[span]
            if own is not None:
                chance = min(1.0, (own.ended[span] + TRUST * chance) / (own.lasted[span] + TRUST))
            returning = alive * chance
            returned += returning
            held += (alive - returning / 2) * _WIDTHS[span]  # those that return do so in the middle of the span
            alive -= returning
            best = max(best, returned / held)
        return float(2 ** (round(STEPS * log2(best)) / STEPS))

    def _renew(self) -> None:
        """After some pauses, what all conversations do: in between, equals stay equal."""
        self._until_renewed -= 1
        if not self._until_renewed:
            self._until_renewed = RENEWED
            self._renewed = True
            for pauses in (self._common, *self._alike.values()):
                pauses.fade(FADE_OF_ALL)
            self._share()

    def _share(self) -> None:
        common = self._common.chances(_UNKNOWN)
        for kind, pauses in self._alike.items():
            self._chances[kind] = pauses.chances(common)

    def _pin(self, page: Kept, identity: Identity, until: float) -> None:
        self._account(page, -page.bytes)
        page.pinned_by, page.pinned_until = identity, until
        self._account(page, page.bytes)
        self._pins.push((until, next(self._serial), page))

    def _may_pin(self, identity: Identity, bytes: int, page: Kept) -> bool:
        tenant = self._pinned_of.get(identity.tenant, 0)
        if page.pinned_by is not None and page.pinned_by.tenant == identity.tenant:
            tenant -= page.bytes
        others = sum(self._pinned_of.values()) - (page.bytes if page.pinned_by is not None else 0)
        return (
            self._pinned.get(identity, 0) + bytes <= SESSION_SHARE * self._size
            and tenant + bytes <= TENANT_SHARE * self._size
            and others + bytes <= PINNED_SHARE * self._size
        )

    def _account(self, page: Kept, bytes: int) -> None:
        if page.pinned_by is not None:
            _add(self._pinned, page.pinned_by, bytes)
            _add(self._pinned_of, page.pinned_by.tenant, bytes)


def _stands(place: _Place) -> bool:
    """Whether a place in a ranking is still that of its conversation."""
    return place[2] == place[3].stamps[place[4]] and bool(place[3].leaves[place[4]])


def _add(account: dict[_Key, int], key: _Key, bytes: int) -> None:
    account[key] = account.get(key, 0) + bytes
    if not account[key]:
        del account[key]
