"""Speculation: guess the next tokens cheaply, compute them all in one step, and keep those that would have come anyway.

A step reads all weights of a model, whether it computes one row or a few. So a decoding sequence may bring guesses
along: its step computes a row for each, and a token is drawn at every one of these rows exactly as if the guesses
before it were the answer (batch.Place): same logits, same penalties, same counter-based draw. A guess stands if it is
what was drawn in its place; the first that is not goes, with all behind it, and the draw in its place is the next
token. That is what plain decoding would have drawn, greedy or not, so answers are the same bit for bit, and everything
decided here is about time.

Where guesses come from: `Lookup`, what followed the last tokens where they stood before (prompt lookup); `Ahead`, a
draft model that runs ahead in a sequence of its own, its shadow, with pages from the same pool. It draws like the
request itself (seed, position, filters, penalties), so that of two models that agree the draws agree too. Its steps
are part of the turn of the model that asks for them, which is charged for them; its pages are the first to go when
requests need them. It is not asked where the tokens stood before, for as long as more of what is looked up stands than
of what it guesses.

How many tokens are guessed is decided for all sequences of a step together (`share`), from the seconds that steps have
taken (`Pace`) and the share of each request's guesses that stood: none where they do not pay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from typing import NamedTuple

from msgspec.structs import replace

from vai.engine.batch import Batch, Place
from vai.engine.ngrams import NgramIndex
from vai.engine.priority import by_rank
from vai.engine.sampler import Draw
from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.errors import VaiError
from vai.request import SamplingParams, Speculate

PIECE = 512  # tokens that may be added to indexes behind a step, where it has fewer rows
CHANCE, WEIGHT = 0.7, 2.0  # a guess's chance to stand before any was tried, and how many trials that is worth
LEAST, LEARN = 0.5, 0.02  # what others' guesses may teach a new request to expect at worst, and how fast, a trial
FORGET = 0.8  # what the trials so far count after the next ones
REST = 8  # steps for which a request is not asked again whether its guesses pay, when they did not
RELAX = 0.15  # how far it has returned by then to the chance it began with
RENEW = 0.25  # weight of the newest step in a mean of seconds
MEMORY = 512  # steps of a model after which a mean that was not renewed is forgotten
CATCH_UP = 32  # rows that a shadow may be behind and still guess in the next round, and its smallest chunk
CHUNK_SECONDS = 0.15  # of a step that catches up

Drawn = Draw | VaiError | None  # None: still to come (masks.py)


class Pace:
    """Seconds that the steps of one model take, by their rows. `rate`: rows a second in its last large step."""

    def __init__(self) -> None:
        self.rate = 0.0  # 0 before the first
        self._notes = 0
        self._means: dict[int, tuple[float, int]] = {}  # rows -> running mean, and when it was renewed

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        self._notes += 1
        mean, _ = self._means.get(rows, (seconds, 0))
        self._means[rows] = mean + RENEW * (seconds - mean), self._notes
        if rows >= CATCH_UP:
            self.rate = rows / max(seconds, 1e-9)

    def seconds(self, first: int, last: int) -> list[float]:
        """What steps of `first` to `last` rows take: zeros where nothing is known, and no more than what is beyond it.

        What was never tried, or long ago, is taken for cheap, so that it will be.
        """
        fresh = sorted((rows, mean) for rows, (mean, at) in self._means.items() if at > self._notes - MEMORY)
        known, least = [], math.inf
        for rows, mean in reversed(fresh):
            least = min(least, mean)  # more rows never take less: a greater mean is out of date
            known.append((rows, least))
        known.append((0, 0.0))
        (left, low), found = known.pop(), []
        for rows in range(first, last + 1):
            while known and known[-1][0] <= rows:
                left, low = known.pop()
            right, high = known[-1] if known else (left + 1, low)
            found.append((high - low) / (right - left) * (rows - left) + low)
        return found


class Offer(NamedTuple):
    """One request's guesses: the chance of each to stand if those before it do, how many there can be at most, and the
    digest of the draft model that has to compute them, if any.
    """

    chance: float
    most: int
    draft: str | None = None


def share(
    offers: List[Offer], seconds: List[float], parties: int, drafting: Mapping[str, List[float]] | None = None
) -> list[int]:
    """How many guesses of each offer the next step should verify.

    `seconds[n]`: of a step with n guesses in it. `drafting`: by draft model, `[n]` of a step of it for n requests.
    `parties`: who waits for the step; all sequences in it, whether they guess or not.

    What everybody's speed is multiplied by, the product over all parties, is made as large as can be: a request gains
    by the tokens it may expect, and the longer step slows down all. The likeliest guesses are taken first.
    """
    steps = []
    for index, offer in enumerate(offers):
        tokens = reach = 1.0
        for depth in range(1, offer.most + 1):
            reach *= offer.chance
            steps.append((math.log1p(reach / tokens), -depth, index))
            tokens += reach
    steps.sort(reverse=True)
    steps = steps[: len(seconds) - 1]
    widths: Counter[tuple[str, int]] = Counter()
    best, taken, gain, drafted = 0.0, 0, 0.0, 0.0
    for count, (value, depth, index) in enumerate(steps, 1):
        gain += value
        draft = offers[index].draft
        if draft is not None and drafting is not None:
            width = widths[draft, depth]
            widths[draft, depth] += 1
            drafted += drafting[draft][width + 1] - (drafting[draft][width] if width else 0.0)
        longer = seconds[count] + drafted
        score = gain - (parties * math.log(longer / seconds[0]) if seconds[0] > 0 else 0.0)
        if score > best:
            best, taken = score, count
    counts = Counter(index for _, _, index in steps[:taken])
    return [counts[index] for index in range(len(offers))]


def kept(draft: List[int], draws: list[Drawn]) -> list[Drawn]:
    """Of one sequence's draws, one more than guesses, those that plain decoding would have made too."""
    for count, (guess, draw) in enumerate(zip(draft, draws, strict=False), 1):
        if not isinstance(draw, Draw) or draw.token != guess:
            return draws[:count]
    return draws


class Guesser:
    """One request's guesses: how often they stood, and those that its next step will verify."""

    def __init__(self, usual: float = CHANCE) -> None:
        """`usual`: the chance of guesses like these, in earlier requests."""
        self.wanted = 0  # guesses of this round
        self.draft: list[int] = []  # those of them that are there
        self.rest = 0  # steps before it is asked for more
        self._usual = usual
        self._trials = WEIGHT
        self._stood = WEIGHT * usual

    @property
    def chance(self) -> float:
        """Of a guess to stand if those before it do."""
        return self._stood / self._trials

    @property
    def source(self) -> Guesser:
        """Whose guesses those of this round are."""
        return self

    def look_up(self, tokens: List[int], most: int) -> list[int]:
        """At most `most` guesses at what follows `tokens`, from them alone; they only grow between calls."""
        raise NotImplementedError

    def judge(self, guesses: int, stood: int) -> None:
        """So many guesses were verified, of which the first `stood` stood."""
        self._trials = FORGET * self._trials + stood + (stood < guesses)
        self._stood = FORGET * self._stood + stood

    def decline(self) -> None:
        """Nothing was tried, because it would not have paid: what is known of it loses weight."""
        self.rest = REST
        self._trials += RELAX * (WEIGHT - self._trials)
        self._stood += RELAX * (WEIGHT * self._usual - self._stood)


class Lookup(Guesser):
    """Guesses that the text goes on as it did where its last tokens stood before (prompt lookup; Saxena, 2023)."""

    def __init__(self, usual: float = CHANCE, ngrams: NgramIndex | None = None) -> None:
        """`ngrams`: of the request's tokens, as far as somebody has read them."""
        super().__init__(usual)
        self._ngrams = NgramIndex() if ngrams is None else ngrams

    def look_up(self, tokens: List[int], most: int) -> list[int]:
        return self._ngrams.go_on(tokens, most)


class Ahead(Guesser):
    """Guesses of the draft model `entry`, which computes the request in `shadow`, or of `lookup` in its place."""

    def __init__(self, sequence: Sequence, entry: Entry, usual: float = CHANCE, lookup: Lookup | None = None) -> None:
        super().__init__(usual)
        self.entry = entry
        self.lookup = Lookup() if lookup is None else lookup
        self.looked_up = False  # this round's guesses are
        self.resting = False  # in this round the draft model is not asked
        self._silent = False  # nor the lookup
        self.since = sequence.made  # tokens that were there when the shadow had nothing
        self._agreed = len(sequence.tokens)  # tokens that the shadow surely has
        twin = replace(
            sequence.request,
            image=entry.digest,
            tokens=sequence.tokens,
            sampling=SamplingParams(seed=sequence.seed),
            emitted=0,
            speculate=Speculate(),
            page_kinds=None,  # of the request's own pages: a shadow's are exact
        )
        self.shadow = Sequence(twin, entry, arrival=sequence.arrival, limit=0, now=0.0)

    @property
    def source(self) -> Guesser:
        return self.lookup if self.looked_up else self

    def begin(self) -> None:
        """A round begins."""
        self.resting, self._silent = bool(self.rest), bool(self.lookup.rest)
        self.rest -= self.resting
        self.lookup.rest -= self._silent

    def look_up(self, tokens: List[int], most: int) -> list[int]:
        """None where what the draft model guesses is likelier to stand."""
        if self._silent or (self.chance > self.lookup.chance and not self.resting):
            return []
        return self.lookup.look_up(tokens, most)

    @property
    def behind(self) -> int:
        """Rows that the shadow has to compute before it can guess."""
        return self.shadow.uncomputed

    def follow(self, tokens: List[int]) -> None:
        """Have the shadow hold `tokens`, the request's, and nothing else; what it computed of them stays."""
        own, agreed = self.shadow.tokens, self._agreed
        while agreed < min(len(own), len(tokens)) and own[agreed] == tokens[agreed]:
            agreed += 1
        own[agreed:] = tokens[agreed:]
        self.shadow.computed = min(self.shadow.computed, agreed)
        self._agreed = len(tokens)


class Pages(NamedTuple):
    """What the scheduler does with pages, for shadows.

    `spare`: pages for so many tokens of it, only where no request needs them. `take_up`, `seal`, `free`: what is cached
    of it, what it has that can be, and all of it.
    """

    spare: Callable[[Sequence, int], bool]
    take_up: Callable[[Sequence], None]
    seal: Callable[[Sequence], None]
    free: Callable[[Sequence], None]


class Room(NamedTuple):
    """What may join the rows of the decoding sequences in a step: rows of prompts that will, and guesses at most."""

    prompt_rows: int
    guesses: int


class Tally:
    """Of one model's requests: guesses that were verified, and those of them that stood."""

    def __init__(self) -> None:
        self.guessed = self.accepted = 0


class Speculation:
    """The guesses of all requests of an engine.

    The steps of a model that has requests with guesses come in rounds: `next_step` until it is None, which are steps of
    draft models, then a step of the model itself with the `drafts`.
    """

    def __init__(self, pages: Pages, *, max_rows: int) -> None:
        self._pages = pages
        self._max_rows = max_rows
        self._guessers: dict[Sequence, Guesser] = {}
        self._ngrams: dict[Sequence, NgramIndex] = {}
        self._paces: dict[str, Pace] = {}
        self._usual: dict[tuple[str, str | None], float] = {}  # model and draft model -> chance of a guess to stand
        self._tallies: dict[str, Tally] = {}
        self._planned: set[str] = set()  # models whose round has begun
        self._caught_up: set[str] = set()  # models for which a shadow computed a chunk since their last step

    # What happened

    def note(self, batch: Batch, seconds: float) -> None:
        """A step took so long."""
        self._paces.setdefault(batch.entry.digest, Pace()).note(batch.rows, seconds)

    def read(self, batch: Batch) -> None:
        """Go on with the indexes of those in a step, behind it: not while the next native call waits.

        By no more tokens than the step had rows, or PIECE: who finds a long prompt cached does without for some steps.
        """
        left = max(batch.rows, PIECE)
        for sequence in batch.sequences:
            if sequence.guesses:
                left -= self._ngrams.setdefault(sequence, NgramIndex()).read(sequence.tokens, left)

    def take(self, batch: Batch, draws: List[Drawn]) -> None:
        """The results of a step of a draft model."""
        for shadow, count in zip(batch.sequences, batch.counts, strict=True):
            shadow.computed += count
        for place, draw in zip(batch.places, draws, strict=True):
            ahead = self._guessers[place.sequence]
            if not isinstance(ahead, Ahead) or not isinstance(draw, Draw):
                self.retire(place.sequence)
                continue
            ahead.shadow.tokens.append(draw.token)
            ahead.draft.append(draw.token)
            if draw.token in place.sequence.stop_ids:  # nothing comes behind it
                ahead.wanted = len(ahead.draft)

    def fail(self, batch: Batch) -> None:
        """A step of a draft model failed: the requests it was for go on without it."""
        for sequence, guesser in list(self._guessers.items()):
            if isinstance(guesser, Ahead) and guesser.shadow in batch.sequences:
                self.retire(sequence)

    def judge(self, sequence: Sequence, own: list[tuple[Place, Drawn]]) -> tuple[list[Drawn], int]:
        """(What stands of a sequence's draws in one step, how many guesses were verified in it)."""
        guesses = own[-1][0].ahead
        standing = kept(guesses, [draw for _, draw in own])
        if guesses:
            stood = len(standing) - 1
            source, trials = self._guessers[sequence].source, stood + (stood < len(guesses))
            source.judge(len(guesses), stood)
            pair = _pair(sequence.entry, source)
            usual = self._usual.get(pair, CHANCE)
            self._usual[pair] = max(LEAST, usual + LEARN * (stood - trials * usual))
            tally = self.tally(sequence.entry.digest)
            tally.guessed += len(guesses)
            tally.accepted += stood
        return standing, len(guesses)

    def tally(self, image: str) -> Tally:
        """What came of the guesses for a model's requests."""
        return self._tallies.setdefault(image, Tally())

    # Comings and goings

    def pause(self, sequence: Sequence) -> None:
        """The request lost its pages, or its shadow has to: what its shadow has is free."""
        guesser = self._guessers.get(sequence)
        if guesser is None:
            return
        guesser.wanted = len(guesser.draft)
        if isinstance(guesser, Ahead):
            guesser.since = sequence.made
            self._pages.free(guesser.shadow)

    def retire(self, sequence: Sequence) -> None:
        """The request guesses no more: it has ended, or its draft model has."""
        self.pause(sequence)
        self._guessers.pop(sequence, None)
        self._ngrams.pop(sequence, None)
        sequence.guesses, sequence.draft = False, None

    def forget(self, image: str) -> None:
        """A model is there no more: no request runs on it or has it guess."""
        self._usual = {pair: usual for pair, usual in self._usual.items() if image not in pair}
        self._paces.pop(image, None)
        self._tallies.pop(image, None)
        self._planned.discard(image)
        self._caught_up.discard(image)

    def give_back(self) -> bool:
        """Free the pages of the shadow of the last in rank; False where no shadow has any."""
        holders = [
            sequence
            for sequence, guesser in self._guessers.items()
            if isinstance(guesser, Ahead) and any(guesser.shadow.block_table)
        ]
        if not holders:
            return False
        self.pause(max(holders, key=by_rank))
        return True

    # Rounds

    def next_step(
        self, entry: Entry, ready: List[Sequence], room: Callable[[], Room], picked_at: float
    ) -> Batch | None:
        """The step of a draft model that comes before the next of `entry`, or None: then `drafts` are due.

        `ready`: the decoding sequences that are in that step. `room`: asked where there is something to guess.
        """
        begun = entry.digest in self._planned
        mine = []
        for sequence in ready:
            guesser = self._guesser(sequence)
            if isinstance(guesser, Ahead) and not begun:
                guesser.begin()
            elif guesser is not None and guesser.rest and not begun:
                guesser.rest -= 1
                continue
            if guesser is not None:
                mine.append((sequence, guesser))
        if not mine:
            return None
        if not begun:
            catching_up = self._catch_up(entry, mine, len(ready), picked_at)
            if catching_up is not None:
                return catching_up
            self._planned.add(entry.digest)
            self._plan(entry, mine, len(ready), room)
        behind = [
            (sequence, guesser)
            for sequence, guesser in mine
            if isinstance(guesser, Ahead) and len(guesser.draft) < guesser.wanted
        ]
        return self._draft(entry, behind, picked_at)

    def drafts(self, entry: Entry, ready: List[Sequence]) -> list[list[int]]:
        """What is guessed for each of `ready`; their round ends."""
        self._planned.discard(entry.digest)
        self._caught_up.discard(entry.digest)
        drafts = []
        for sequence in ready:
            guesser = self._guessers.get(sequence)
            draft: list[int] = []
            if guesser is not None:
                draft, guesser.draft, guesser.wanted = guesser.draft, [], 0
            drafts.append(draft)
        return drafts

    def _guesser(self, sequence: Sequence) -> Guesser | None:
        """Who guesses for a request; None for nobody."""
        found = self._guessers.get(sequence)
        if found is None and sequence.guesses:
            model, draft = sequence.entry.digest, sequence.draft
            ngrams = self._ngrams.setdefault(sequence, NgramIndex())
            found = lookup = Lookup(self._usual.get((model, None), CHANCE), ngrams)
            if draft is not None:
                found = Ahead(sequence, draft, self._usual.get((model, draft.digest), CHANCE), lookup)
            self._guessers[sequence] = found
        return found

    def _plan(
        self, entry: Entry, mine: List[tuple[Sequence, Guesser]], ready: int, find_room: Callable[[], Room]
    ) -> None:
        """Decide how much each request guesses in this round, beside all that are `ready`."""
        offers, found = [], []
        for sequence, guesser in mine:
            most, draft = _most(sequence), None
            looked_up = _until_stop(guesser.look_up(sequence.tokens, most), sequence.stop_ids) if most else []
            guesses = len(looked_up)
            if isinstance(guesser, Ahead):
                guesser.looked_up = bool(looked_up)
                if not looked_up and not guesser.resting:
                    guesses, draft = _most(sequence, guesser), guesser.entry.digest
            offers.append(Offer(guesser.source.chance, guesses, draft))
            found.append(looked_up)
        if not any(offer.most for offer in offers):
            return
        room = find_room()
        rows, most = ready + room.prompt_rows, max(0, min(room.guesses, sum(offer.most for offer in offers)))
        seconds = self._pace(entry.digest).seconds(rows, rows + most)
        drafting = {
            offer.draft: self._pace(offer.draft).seconds(0, len(mine)) for offer in offers if offer.draft is not None
        }
        shares = share(offers, seconds, ready + bool(room.prompt_rows), drafting)
        for (_, guesser), count, offer, looked_up in zip(mine, shares, offers, found, strict=True):
            guesser.wanted, guesser.draft = count, looked_up[:count]
            if offer.most and not count:
                guesser.source.decline()

    def _draft(self, entry: Entry, behind: List[tuple[Sequence, Ahead]], picked_at: float) -> Batch | None:
        """One step of a draft model for all of `behind` that have it, or None where there is nothing to compute."""
        batch: Batch | None = None
        for sequence, ahead in behind:
            if batch is None:
                batch = Batch(ahead.entry, picked_at, turn=entry.digest)
            if batch.entry is not ahead.entry:
                continue
            shadow, count = ahead.shadow, min(ahead.behind, self._max_rows - batch.rows)
            if count and self._pages.spare(shadow, shadow.computed + count):
                batch.add_ahead(shadow, count, sequence, ahead.draft)
            elif count:
                self.pause(sequence)
        return batch if batch is not None and batch.rows else None

    def _catch_up(
        self, entry: Entry, mine: List[tuple[Sequence, Guesser]], ready: int, picked_at: float
    ) -> Batch | None:
        """A chunk of what a shadow is behind, if that pays; at most one before each step of the model itself."""
        for sequence, ahead in mine:
            if not isinstance(ahead, Ahead) or ahead.resting:
                continue
            ahead.follow(sequence.tokens)
            self._pages.seal(ahead.shadow)
            if ahead.behind <= CATCH_UP or entry.digest in self._caught_up or ahead.look_up(sequence.tokens, 1):
                continue
            if not self._pages.spare(ahead.shadow, ahead.shadow.computed):
                continue
            self._pages.take_up(ahead.shadow)
            if ahead.behind > CATCH_UP and self._pays(sequence, ahead, ready):
                rate = self._pace(ahead.entry.digest).rate
                chunk = min(max(int(rate * CHUNK_SECONDS), CATCH_UP), self._max_rows, ahead.behind - 1)
                if self._pages.spare(ahead.shadow, ahead.shadow.computed + chunk):
                    self._caught_up.add(entry.digest)
                    batch = Batch(ahead.entry, picked_at, turn=entry.digest)
                    batch.add_ahead(ahead.shadow, chunk, sequence, [])
                    return batch
                self.pause(sequence)
            elif ahead.behind > CATCH_UP:
                ahead.rest = REST
        return None

    def _pays(self, sequence: Sequence, ahead: Ahead, parties: int) -> bool:
        """Whether catching up is worth the time of all `parties` that wait for it, if the answer goes on for as long as
        it has.

        Who decides so never loses more than as much again as who knew how long the answer would be.
        """
        rate, guesses = self._pace(ahead.entry.digest).rate, _most(sequence, ahead, caught_up=True)
        seconds = self._pace(sequence.entry.digest).seconds(1, 1 + guesses)
        if not rate or not seconds[0]:
            return True
        drafting = self._pace(ahead.entry.digest).seconds(1, 1)[0]
        tokens = reach = 1.0
        fastest = seconds[0]
        for count in range(1, guesses + 1):
            reach *= ahead.chance
            tokens += reach
            fastest = min(fastest, (seconds[count] + count * drafting) / tokens)
        return (sequence.made - ahead.since + 1) * (seconds[0] - fastest) >= parties * ahead.behind / rate

    def _pace(self, image: str) -> Pace:
        return self._paces.setdefault(image, Pace())


def _pair(entry: Entry, source: Guesser) -> tuple[str, str | None]:
    return entry.digest, source.entry.digest if isinstance(source, Ahead) else None


def _most(sequence: Sequence, ahead: Ahead | None = None, *, caught_up: bool = False) -> int:
    """How many guesses could be of use, of a draft model if there is one; none for a shadow that is too far behind."""
    length = len(sequence.tokens)
    most = min(sequence.request.speculate.max_tokens, sequence.limit - length - 1)
    if ahead is not None:
        if ahead.behind > CATCH_UP and not caught_up:
            return 0
        most = min(most, ahead.entry.program.context - length)
    return max(most, 0)


def _until_stop(guesses: list[int], stop_ids: frozenset[int]) -> list[int]:
    """The guesses up to the first stop id: nothing comes behind it."""
    for count, guess in enumerate(guesses, 1):
        if guess in stop_ids:
            return guesses[:count]
    return guesses
