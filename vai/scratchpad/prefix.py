"""The prefix cache: full pages of any request, known by what they hold, for every later request that begins the same.

A page's key is a chain: SHA-256 over the key before it, the kind of arithmetic, and its 32 tokens; the first follows
`root_key`. Equal keys mean equal bits, so a page found by its key is as good as one computed again. Walking the chain
from its root is the radix tree: a key can only be asked for by who knows all tokens before it.

Whoever holds a page holds every page before it. Among the pages that nobody holds, those without a page behind them may
go, and which of them goes first is a question of what it is worth (retention.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from vai.kernels.program import KERNEL_ABI
from vai.scratchpad.headers import Pin, Sealed
from vai.scratchpad.pages import Owner, PagePool
from vai.scratchpad.retention import NOBODY, UNNAMED, Conversation, Identity, Kept, Name, Retention

GONE = -1  # in the place of a page that is behind the window of its cache group
_EXACT, _FAST = b"\0", b"\1"  # the kind of arithmetic that a page was computed in


def root_key(weights: str, kv_type: str, salt: str) -> bytes:
    """The key before a sequence's first page: whatever else its bits, and the right to see them, depend on.

    `weights`: the image's weights id. `salt` keeps tenants apart: pages are found under the salt they were made with.
    """
    digest = sha256(b"vai page\0" + KERNEL_ABI.to_bytes(4, "little"))
    for part in (weights, "", kv_type, salt):  # "": no adapter
        text = part.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(4, "little") + text)
    return digest.digest()


def page_key(before: bytes, tokens: Sequence[int] | NDArray[np.uint32], fast: str | None = None) -> bytes:
    """The key of a page that holds `tokens`, after the page (or root) with the key `before`.

    `fast`: the implementation of the fast kind that computed it, as different ones may give different bits; None where
    it is exact.
    """
    kind = _EXACT if fast is None else _FAST + fast.encode()
    return sha256(before + kind + np.array(tokens, "<u4").tobytes()).digest()


class CachedPage(Kept):
    """One page of every cache group of a model, sealed: `pages` are their offsets, in the order of `owners`.

    `behind`: for each group, how many of the holders have it behind their window. Where all have, it is GONE.
    """

    __slots__ = ("before", "behind", "generations", "holders", "key", "owners", "pages")

    def __init__(
        self,
        key: bytes,
        before: bytes,
        owners: tuple[Owner, ...],
        pages: tuple[int, ...],
        generations: tuple[int, ...],
        *,
        fast: bool,
    ) -> None:
        """`before`: the key of the page before it. `generations`: of the headers of `pages`. `fast`: its kind."""
        super().__init__(sum(owner.page_bytes for owner in owners), fast=fast)
        self.key = key
        self.before = before
        self.owners = owners
        self.pages = list(pages)
        self.generations = list(generations)
        self.behind = [0] * len(owners)
        self.holders = 0

    def parts(self) -> list[tuple[Owner, int]]:
        """(owner, offset) of all that is there of it."""
        return [part for part in zip(self.owners, self.pages, strict=True) if part[1] != GONE]


class PrefixCache:
    """Sealed pages by key, with a count of holders. Those without one stay until their room is needed."""

    def __init__(self, pool: PagePool, retention: Retention) -> None:
        self._pool = pool
        self._retention = retention
        self._pages: dict[bytes, CachedPage] = {}
        self._behind: dict[bytes, int] = {}  # by key: how many pages come right after it
        self.adopted = 0  # pages of an engine before this one

    def __len__(self) -> int:
        """Pages, held or not."""
        return len(self._pages)

    # Conversations

    def resume(self, image: str, name: Name, keys: Sequence[bytes]) -> Conversation:
        """The conversation that a request begins or goes on with; `keys` are those of its full pages."""
        return self._retention.resume(image, name, keys)

    def pause(self, conversation: Conversation, chain: Sequence[CachedPage], retain: float | None) -> None:
        """A request is over, of which `chain` were the pages. `retain`: seconds to pin them; 0: nobody comes back."""
        self._retention.pause(conversation, chain[-1].key if chain else None)
        for image, learned in self._retention.take_learned():
            self._pool.headers.learn(image, learned)
        if retain == 0:
            self._finish(conversation)
        elif retain is not None:
            self._write_pins(self._retention.pin(chain, conversation.identity, retain))

    def end(self, name: Name) -> int:
        """Forget a session and free the pages that only it has read; how many."""
        return sum(map(self._finish, self._retention.close(name)))

    # Pages

    def look(self, key: bytes) -> CachedPage | None:
        """The page with this key, of which the caller is no holder; None where there is none."""
        page = self._pages.get(key)
        return page if page is not None and self._is_intact(page) else None

    def take(self, key: bytes) -> CachedPage | None:
        """The page with this key, of which the caller is now a holder; None where there is none.

        The caller holds every page before it, and has what is GONE of it behind.
        """
        page = self.look(key)
        if page is None:
            return None
        if page.holders == 0:
            self._retention.remove(page)
            for owner, _ in page.parts():
                self._pool.wake(owner)
        page.holders += 1
        for group, offset in enumerate(page.pages):
            page.behind[group] += offset == GONE
        return page

    def leave_behind(self, page: CachedPage, group: int) -> None:
        """A holder does not read the part of a page in a cache group any more."""
        page.behind[group] += 1
        self._free_behind(page, group)

    def put(
        self,
        key: bytes,
        before: bytes,
        number: int,
        owners: tuple[Owner, ...],
        pages: tuple[int, ...],
        *,
        fast: bool = False,
    ) -> CachedPage:
        """Seal pages of the caller's that will not be written any more; the caller is a holder of what comes back.

        `number` in its chain, behind the page with the key `before`. `fast`: the kind that it was computed in, which
        its key tells apart. Where the key is there already, the pages given are freed, and the answer is the one that
        everybody has.
        """
        found = self.take(key)
        if found is not None:
            for group, (owner, page) in enumerate(zip(owners, pages, strict=True)):
                if found.pages[group] == GONE:  # for the others, but the caller still reads it
                    found.behind[group] -= 1
                    found.owners = (*found.owners[:group], owner, *found.owners[group + 1 :])
                    found.pages[group] = page
                    found.generations[group] = self._pool.headers.seal(
                        page, owner.page_bytes, key, before, number, fast=fast
                    )
                    self._write_pins([found])
                else:
                    self._pool.free(owner, [page])
            return found
        damaged = self._pages.get(key)
        if damaged is not None:
            self._drop(damaged)
        generations = tuple(
            self._pool.headers.seal(page, owner.page_bytes, key, before, number, fast=fast)
            for owner, page in zip(owners, pages, strict=True)
        )
        sealed = CachedPage(key, before, owners, pages, generations, fast=fast)
        sealed.holders = 1
        self._insert(sealed)
        return sealed

    def give(self, chain: Sequence[CachedPage], conversation: Conversation | None, behind: Sequence[int] = ()) -> None:
        """Let go of a chain that begins at its root, and that a conversation (None: one that is not told) has read.

        `behind`: for each cache group, how many of its first pages are behind the holder's window.
        """
        if not chain:
            return
        if conversation is None:
            conversation = self._retention.stranger(chain[-1].owners[0].image, chain[-1].key)
        for index in reversed(range(len(chain))):
            page = chain[index]
            self._retention.read(page, conversation)
            page.holders -= 1
            for group, first in enumerate(behind):
                page.behind[group] -= index < first
                self._free_behind(page, group)
            if page.holders == 0:
                for owner, _ in page.parts():
                    self._pool.rest(owner)
                if self._pages.get(page.key) is not page:
                    self._free(page)
                elif page.key not in self._behind:
                    self._retention.add(page)

    def evict(self, *, pinned: bool = False) -> bool:
        """Free the page that is worth least; False where every page has a holder or, unless `pinned`, a pin."""
        page = self._retention.victim(pinned=pinned)
        if not isinstance(page, CachedPage):
            return False
        self._drop(page)
        return True

    def forget(self, image: str) -> None:
        """Free every page of an image that has no holder."""
        for page in [*self._pages.values()]:
            if page.holders == 0 and page.owners[0].image == image:
                self._drop(page)

    def adopt(self, models: Collection[tuple[Owner, ...]]) -> None:
        """Take over what an engine before this one has sealed; nothing may be allocated yet.

        `models`: the owners of each model that there is. What is of others, or cannot be reached from the beginning of
        its chain, is free.
        """
        handed_out = self._restore({owner for owners in models for owner in owners})
        found: dict[tuple[str, bytes], dict[Owner, Sealed]] = {}
        for owner, sealed in handed_out:
            found.setdefault((owner.image, sealed.key), {}).setdefault(owner, sealed)
        of_image = {owners[0].image: owners for owners in models if owners}
        chains: dict[tuple[str, bytes], int] = {}  # number of each page that is reached
        pins: list[tuple[CachedPage, Pin]] = []  # the beginnings of chains first
        kept: set[tuple[Owner, int]] = set()
        for (image, key), parts in sorted(found.items(), key=lambda item: next(iter(item[1].values())).number):
            owners, first = of_image[image], next(iter(parts.values()))
            whole = len(parts) == len(owners) and all(part[1:4] == first[1:4] for part in parts.values())
            reached = first.number == 0 or chains.get((image, first.before)) == first.number - 1
            if whole and reached and key not in self._pages:
                chains[image, key] = first.number
                kept.update((owner, parts[owner].offset) for owner in owners)
                page = self._restored(key, owners, [parts[owner] for owner in owners])
                if first.pin is not None:
                    pins.append((page, first.pin))
        for owner, sealed in handed_out:
            if (owner, sealed.offset) not in kept:
                self._pool.free(owner, [sealed.offset])
        for image, learned in self._pool.headers.learned(of_image).items():
            self._retention.restore_learned(image, learned)
        for page, pin in pins:
            self._retention.restore_pin(page, Identity(pin.tenant, pin.session), pin.until)
        self._name_chains()
        self.adopted = len(self._pages)

    # Within

    def _restore(self, known: Collection[Owner]) -> list[tuple[Owner, Sealed]]:
        """Hand out every page that a header in a slab of a known owner speaks of."""
        handed_out = []
        for slab, image, group, page_bytes in self._pool.headers.cuts():
            owner = Owner(image, group, page_bytes)
            sealed = self._pool.headers.sealed(slab, page_bytes) if owner in known else []
            if sealed and self._pool.restore(owner, slab, [each.offset for each in sealed]):
                handed_out += [(owner, each) for each in sealed]
        return handed_out

    def _restored(self, key: bytes, owners: tuple[Owner, ...], parts: Sequence[Sealed]) -> CachedPage:
        offsets, generations = tuple(part.offset for part in parts), tuple(part.generation for part in parts)
        page = CachedPage(key, parts[0].before, owners, offsets, generations, fast=parts[0].fast)
        self._insert(page)
        for owner in owners:
            self._pool.rest(owner)
        return page

    def _name_chains(self) -> None:
        """Say whose the chains are that were taken over. Where a session has pinned one, up to a last page, that and
        what follows is its own; of the others nothing is known: each is that of a conversation without a past.
        """
        pinned = [(page, page.pinned_by) for page in self._pages.values() if page.pinned_by is not None]
        inner = {(page.before, identity) for page, identity in pinned}
        own = set()
        for page, identity in pinned:
            if identity.session != UNNAMED and (page.key, identity) not in inner:
                self._name_chain(page, identity)
                own.add(page)
        for leaf in [page for key, page in self._pages.items() if key not in self._behind]:
            if leaf.conversation is None:
                self._name_chain(leaf, NOBODY, own)
            self._retention.add(leaf)

    def _name_chain(self, end: CachedPage, identity: Identity, own: Collection[CachedPage] = ()) -> None:
        """Whose the pages are up to one; behind one of `own`, they are those of its conversation."""
        pages, page = [end], self._pages.get(end.before)
        while page is not None and page.conversation is None:
            pages.append(page)
            page = self._pages.get(page.before)
        conversation = page.conversation if page is not None and page in own and not page.shared else None
        if conversation is None:
            conversation = self._retention.stranger(end.owners[0].image, end.key, identity)
        for each in [*pages, *([] if page is None else [page])]:
            self._retention.read(each, conversation)

    def _insert(self, page: CachedPage) -> None:
        self._pages[page.key] = page
        self._behind[page.before] = self._behind.get(page.before, 0) + 1

    def _drop(self, page: CachedPage) -> None:
        """Nobody finds a page any more; one that has a holder is freed when it has none."""
        del self._pages[page.key]
        self._retention.remove(page)
        if page.pinned_by is not None:
            self._retention.unpin(page)
        self._behind[page.before] -= 1
        if not self._behind[page.before]:
            del self._behind[page.before]
            parent = self._pages.get(page.before)
            if parent is not None and parent.holders == 0:
                self._retention.add(parent)
        if page.holders == 0:
            self._free(page)

    def _free_behind(self, page: CachedPage, group: int) -> None:
        if page.holders and page.behind[group] == page.holders and page.pages[group] != GONE:
            self._pool.free(page.owners[group], [page.pages[group]])
            page.pages[group] = GONE

    def _free(self, page: CachedPage) -> None:
        for owner, offset in page.parts():
            self._pool.wake(owner)
            self._pool.free(owner, [offset])

    def _write_pins(self, pages: Iterable[Kept]) -> None:
        """Have the headers say until when pages are pinned, and by whom, so that the next engine knows."""
        for page in pages:
            if isinstance(page, CachedPage) and page.pages[0] != GONE:
                pin = None if page.pinned_by is None else Pin(page.pinned_until, *page.pinned_by)
                self._pool.headers.pin(page.pages[0], page.owners[0].page_bytes, pin)

    def _finish(self, conversation: Conversation) -> int:
        """Forget a conversation, and free the pages that only it has read and that nobody holds; how many."""
        self._write_pins(self._retention.finish(conversation))
        freed = 0
        while isinstance(page := self._retention.own_leaf(conversation), CachedPage):
            self._drop(page)
            freed += 1
        return freed

    def _is_intact(self, page: CachedPage) -> bool:
        """Whether the pool still has this page where it was sealed."""
        return all(
            self._pool.headers.says(offset, owner.page_bytes, page.key, generation)
            for owner, offset, generation in zip(page.owners, page.pages, page.generations, strict=True)
            if offset != GONE
        )
