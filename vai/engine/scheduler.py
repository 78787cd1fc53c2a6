"""Who runs next, and how many tokens of each: one scheduler over all models of an engine.

Models take turns by served cost: the turn goes to the model that has been served least, for a short quantum, so that
under load the order is A A A B B and not A B A B. Models with requests of the best priority go first, but no model
waits longer than MAX_WAIT plus a step of each other. Inside a model, every decoding sequence has a row in every step,
and prompts fill the rest of the step, most of it in order of rank (age, less a head start for priority: priority.py,
portions.py), as many of their tokens as the model computes in STEP_WHILE_STREAMING (or STEP, where nobody waits for the
next token): fewer behind a long context than at a beginning (worth.py).

A step is of one kind (kinds.py). Where a model has rows of both, its steps are short and take turns: a fast one, in
which prompts get on and nobody else, then an exact one with every decoding sequence in it.

Pages come from one pool for all models. A full page goes into the prefix cache, where every request that begins the
same finds it; when nobody reads it any more it stays until its room is needed. Requests are admitted in order of rank
across all models, each with room for its whole prompt, or what it needs of that at once (windows.py); the first that
does not fit takes the place of those with lower priority, or makes the others wait. A running sequence that needs a
page where none is free takes the pages of the last, which is computed again later: the first always gets on, so
everybody does.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as List
from functools import partial
from itertools import groupby

from vai.engine import kinds, windows
from vai.engine.batch import Batch, Place
from vai.engine.portions import Prompt, portions
from vai.engine.priority import by_rank, displaced
from vai.engine.sampler import Draw
from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.engine.speculate import Pages, Room, Speculation, Tally
from vai.engine.waiting import Patience
from vai.engine.worth import SMALLEST_CHUNK, Worth
from vai.errors import BadRequest, NotEnoughRoom, Overloaded, VaiError
from vai.kernels.program import PAGE_TOKENS
from vai.request import Output
from vai.scratchpad.budget import bytes_that_hold, pages_at_once
from vai.scratchpad.pages import PagePool
from vai.scratchpad.prefix import GONE, PrefixCache
from vai.scratchpad.retention import Name, Retention

QUANTUM = 0.05  # seconds of one turn
MAX_WAIT = 1.0  # seconds that a model with work may be passed over for those served less
MAX_WAITING = 1024  # requests that are not admitted yet
MAX_WAITING_OF_ONE = 768  # of them, those of one model and tenant: nobody fills the queue alone
STEP_WHILE_STREAMING = 0.15  # seconds of one step with prompt rows in it, as far as measured rates foretell
STEP = 1.0
PROMPT_SHARE = 4  # times as much prompt work as decoding rows a step may have beyond that
STEP_WITH_SHARE = 0.5  # as far as it takes no longer


class PromptTokens:
    """Of one model's prompts since the attach: tokens computed, and tokens found in the cache, in pages of each kind.

    What is computed again after a preemption counts again.
    """

    def __init__(self) -> None:
        self.exact = self.fast = self.cached_exact = self.cached_fast = 0

    def computed(self, tokens: int, fast: bool) -> None:
        if fast:
            self.fast += tokens
        else:
            self.exact += tokens

    def found(self, sequence: Sequence) -> None:
        self.cached_exact += sequence.cached_tokens - sequence.cached_fast
        self.cached_fast += sequence.cached_fast


class ModelQueue:
    """The requests of one model in order of rank: `running` have pages, `waiting` have none, nor have `sleeping`.

    Those wait for a mask, and for nothing else: they hold nobody up.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.waiting: list[Sequence] = []
        self.sleeping: list[Sequence] = []
        self.running: list[Sequence] = []
        self.most_urgent = 0  # the best priority of those that run
        self.served = 0.0  # seconds of steps, set forward after idle times
        self.passed_over_since = 0.0
        self.tokens = 0  # made since the attach
        self.preemptions = 0  # since the attach
        self.prompts = PromptTokens()
        self.worth = Worth()  # of its prompt rows
        self.fast_worth = Worth()  # of those in fast steps
        self.fast_due = entry.fast is not None  # where there are rows of both kinds, it is the turn of the fast ones
        self.patience = Patience()  # for those who find it full

    def enter(self, sequence: Sequence) -> None:
        """It runs from now on."""
        insort(self.running, sequence, key=by_rank)
        self.most_urgent = min(each.priority for each in self.running)

    def leave(self, sequence: Sequence) -> None:
        """It runs no more."""
        self.running.remove(sequence)
        self.most_urgent = min((each.priority for each in self.running), default=0)

    def has_rows(self) -> bool:
        """Whether there is anything to compute: not where all wait for a mask."""
        return any([each.computed < len(each.tokens) for each in self.running])  # noqa: C419 - cheaper, see _whose_turn


class Scheduler:
    """Requests in, batches out, outputs out. Not thread-safe."""

    def __init__(
        self, pool: PagePool, *, max_rows: int, max_sequences: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`max_rows`: most rows of a step. `max_sequences`: sequences of one model that run at once."""
        self._pool = pool
        self.retention = Retention(pool.size, clock)
        self.cache = PrefixCache(pool, self.retention)
        self._clock = clock
        self._max_rows = max_rows
        self._max_sequences = min(max_sequences, max_rows)  # so that a step has a row for each
        self._queues: dict[str, ModelQueue] = {}
        self._by_id: dict[str, Sequence] = {}
        self._turn: ModelQueue | None = None
        self._turn_used = 0.0
        self._floor = 0.0  # what the least served model with work has been served; never falls
        self._outputs: list[Output] = []
        self._speculation = Speculation(Pages(self._spare, self._take_up, self._seal, self._free), max_rows=max_rows)

    def add(self, sequence: Sequence) -> None:
        """Put a request in the queue of its model. Raises BadRequest for an id in use, Overloaded for a full queue."""
        identity = sequence.request.id
        if identity in self._by_id:
            raise BadRequest(f"A request with the id '{identity}' is already running.", param="id")
        now = self._clock()
        waiting = sum(len(queue.waiting) + len(queue.sleeping) for queue in self._queues.values())
        if waiting >= MAX_WAITING:
            raise Overloaded(
                f"{waiting} requests are waiting already, which is as many as may; try again soon.",
                retry_after=min(
                    queue.patience.retry_after(now)
                    for queue in self._queues.values()
                    if queue.waiting or queue.sleeping
                ),
            )
        queue = self._queues.setdefault(sequence.entry.digest, ModelQueue(sequence.entry))
        salt = sequence.request.cache_salt
        if sum(each.request.cache_salt == salt for each in [*queue.waiting, *queue.sleeping]) >= MAX_WAITING_OF_ONE:
            raise Overloaded(
                f"{MAX_WAITING_OF_ONE} requests for this model are waiting already, which is as many as may of one "
                "client; try again soon.",
                retry_after=queue.patience.retry_after(now),
            )
        self._by_id[identity] = sequence
        kinds.fix(sequence, self.cache)
        if sequence.request.cache and sequence.entry.owners:
            name = Name(salt, sequence.request.session)
            sequence.conversation = self.cache.resume(sequence.entry.digest, name, sequence.page_keys())
        self._queue_up(sequence)

    def abort(self, identity: str) -> None:
        """End a request now: its pages are free at once. One that is not there (any more) is fine."""
        sequence = self._by_id.get(identity)
        if sequence is not None:
            self._end(sequence, "abort")

    def forget(self, image: str) -> None:
        """Abort every request of a model and forget it; what is cached of it stays."""
        queue = self._queues.get(image)
        if queue is not None:
            for sequence in [*queue.running, *queue.waiting, *queue.sleeping]:
                self._end(sequence, "abort")
            del self._queues[image]
            if self._turn is queue:
                self._turn = None
        for sequence in self._by_id.values():
            if sequence.draft is not None and sequence.draft.digest == image:
                self._speculation.retire(sequence)
        self._speculation.forget(image)

    def has_work(self) -> bool:
        """Whether any request is unfinished, or any output not taken."""
        return bool(self._by_id or self._outputs)

    def take_outputs(self) -> list[Output]:
        """What happened to requests since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def counts(self, image: str) -> tuple[int, int, int, int]:
        """(running, waiting, tokens made, preemptions) of a model."""
        queue = self._queues.get(image)
        if queue is None:
            return 0, 0, 0, 0
        return len(queue.running), len(queue.waiting) + len(queue.sleeping), queue.tokens, queue.preemptions

    def prompts(self, image: str) -> PromptTokens:
        """What was computed of a model's prompts, and what was found."""
        queue = self._queues.get(image)
        return PromptTokens() if queue is None else queue.prompts

    def tally(self, image: str) -> Tally:
        """What came of the guesses for a model's requests."""
        return self._speculation.tally(image)

    def pick(self) -> Batch | None:
        """The next step, or None where nobody has anything to compute."""
        self._admit(self._clock())  # the price of a new request, not of choosing a model
        picked_at = self._clock()
        while (queue := self._choose(picked_at)) is not None:
            batch = self._fill(queue, picked_at)
            if batch.rows:
                return batch
            self._admit(self._clock())  # who found no page for the next row has given up all it had
        return None

    def find(self, identity: str) -> Sequence | None:
        """An unfinished request."""
        return self._by_id.get(identity)

    def suspend(self, sequence: Sequence) -> None:
        """Take the pages of one whose mask does not come: others may need them."""
        self._preempt(sequence)

    def wake(self, sequence: Sequence) -> None:
        """Its mask has come."""
        queue = self._queues[sequence.entry.digest]
        if sequence in queue.sleeping:
            queue.sleeping.remove(sequence)
            self._queue_up(sequence)

    def end(self, sequence: Sequence, error: VaiError) -> None:
        """End a request by an error."""
        self._end(sequence, "error", error)

    def commit(self, batch: Batch, draws: List[Draw | VaiError | None]) -> None:
        """Take the results of a step: for each of `batch.places` as `take` does."""
        self._charge(batch, self._clock())
        if batch.drafting:
            self._speculation.take(batch, draws)
            return
        prompts = self._queues[batch.turn].prompts
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            if sequence.computed < sequence.prompt:
                prompts.computed(min(count, sequence.prompt - sequence.computed), batch.fast)
            sequence.computed += count
            self._seal(sequence)
        self.take(batch.places, draws)
        self._speculation.read(batch)

    def take(self, places: List[Place], draws: List[Draw | VaiError | None]) -> None:
        """One draw for each of `places`, or the reason why there is none, or None where it is still to come."""
        now = self._clock()
        for sequence, own in groupby(zip(places, draws, strict=True), key=lambda each: each[0].sequence):
            standing, guessed = self._speculation.judge(sequence, list(own))
            drawn = [draw for draw in standing if isinstance(draw, Draw)]
            finish = None
            if drawn:
                tokens, logprobs = [draw.token for draw in drawn], [draw.logprob for draw in drawn]
                output = sequence.append(tokens, logprobs, now, guessed)
                queue = self._queues[sequence.entry.digest]
                queue.tokens += len(output.tokens)
                if output.seed is not None:  # its first
                    queue.prompts.found(sequence)
                self._outputs.append(output)
                finish = output.finish
            if finish is not None:
                self._seal(sequence)
                self._leave(sequence)
            elif isinstance(error := standing[-1], VaiError):
                self._end(sequence, "error", error)
            elif guessed:
                self._seal(sequence)

    def fail(self, batch: Batch, error: VaiError) -> None:
        """A step could not be computed: its requests end, everybody else goes on."""
        self._charge(batch, self._clock())
        if batch.drafting:
            self._speculation.fail(batch)
            return
        for sequence in batch.sequences:
            self._end(sequence, "error", error)

    # Turns

    def _choose(self, now: float) -> ModelQueue | None:
        ready = [queue for queue in self._queues.values() if queue.has_rows()]
        if len(ready) > 1:
            chosen = self._whose_turn(ready, now)
        elif ready:
            chosen = ready[0]
            self._floor = chosen.served = max(chosen.served, self._floor)
        else:
            return None
        if chosen is not self._turn:
            self._turn, self._turn_used = chosen, 0.0
        return chosen

    def _whose_turn(self, ready: List[ModelQueue], now: float) -> ModelQueue:
        """One of several models with work. This runs before every step, when all that it looks at has been driven out
        of the caches by gigabytes of weights: plain loops over few fields, and no generators.
        """
        longest, best = ready[0], ready[0].most_urgent
        for queue in ready:
            if queue.served < self._floor:  # who waits for better priorities saves nothing up by it
                queue.served = self._floor
            if queue.passed_over_since < longest.passed_over_since:
                longest = queue
            if queue.most_urgent < best:
                best = queue.most_urgent
        first = [queue for queue in ready if queue.most_urgent == best]
        least = first[0]
        for queue in first:
            if (queue.served, queue.passed_over_since) < (least.served, least.passed_over_since):
                least = queue
        self._floor = least.served
        if now - longest.passed_over_since > MAX_WAIT:
            return longest
        if self._turn is not None and self._turn_used < QUANTUM and self._turn in first:
            return self._turn
        return least

    def _charge(self, batch: Batch, now: float) -> ModelQueue:
        queue = self._queues[batch.turn]
        seconds = now - batch.picked_at
        queue.served += seconds
        if not batch.fast:
            self._speculation.note(batch, seconds)
        if batch.rows > len(batch.places) and not batch.drafting:  # there are prompts in it
            worth = queue.fast_worth if batch.fast else queue.worth
            worth.note(batch.rows, batch.reads(), seconds)
            if worth.speed:
                self.retention.measured(queue.entry.digest, worth.speed, fast=batch.fast)
        queue.passed_over_since = now
        self._turn_used += seconds
        return queue

    def _fill(self, queue: ModelQueue, picked_at: float) -> Batch:
        """One row of every decoding sequence, and those of its guesses, then prompts up to the budget.

        Where guesses are still to be made, the step of a draft model that makes them.
        """
        batch = Batch(queue.entry, picked_at)
        ready = [each for each in queue.running if len(each.tokens) - each.computed == 1]
        prompting = len(ready) < len(queue.running)
        if prompting and queue.fast_due:
            fast = self._fill_fast(queue, picked_at)
            if fast.rows:
                return fast
            ready = [each for each in queue.running if len(each.tokens) - each.computed == 1]
        full = [each for each in ready if each.page_is_full()]
        if prompting:
            full += [each for each in queue.running if each.windows and each.uncomputed > 1 and each.page_is_full()]
        if full:
            for each in full:
                if each.running:
                    self._grow(each)
            ready = [each for each in ready if each.running]  # growing may have preempted some
        if any([each.guesses for each in ready]):  # noqa: C419 - cheaper, see _whose_turn
            room = partial(self._room, queue, ready)
            drafting = self._speculation.next_step(queue.entry, ready, room, picked_at)
            if drafting is not None:
                return drafting
            for sequence, draft in zip(ready, self._speculation.drafts(queue.entry, ready), strict=True):
                fits = draft and self._reserve(sequence, sequence.computed + 1 + len(draft))
                batch.add(sequence, 1, draft if fits else [])
        else:
            for sequence in ready:
                batch.add(sequence, 1)
        if prompting:
            self._fill_up(queue, batch)
            if queue.entry.fast is not None or any(each.kinds for each in queue.running):
                if not batch.rows:
                    return self._fill_fast(queue, picked_at)
                queue.fast_due = True
        return batch

    def _fill_fast(self, queue: ModelQueue, picked_at: float) -> Batch:
        """The rows of fast pages that prompts have next, up to the budget; perhaps none."""
        batch = Batch(queue.entry, picked_at, fast=True)
        for each in [each for each in queue.running if each.windows and each.uncomputed > 1 and each.page_is_full()]:
            if each.running:
                self._grow(each)
        self._fill_up(queue, batch)
        queue.fast_due = False
        return batch

    def _fill_up(self, queue: ModelQueue, batch: Batch) -> None:
        """Prompts for the rest of a step, as far as they are of its kind."""
        most = self._max_rows - batch.rows
        worth = queue.fast_worth if batch.fast else queue.worth
        prompts = self._prompts(queue, batch.fast) if most else []
        needs = [Prompt(sequence.rows_ahead()[1], sequence.priority, sequence.computed) for sequence in prompts]
        room = self._prompt_work(queue, worth, batch.rows, batch.reads())
        for sequence, count in zip(prompts, portions(needs, room, most, worth.slope), strict=True):
            if sequence.windows:
                count = min(count, sequence.rows_with_pages())
            if count:
                batch.add(sequence, count)

    def _prompts(self, queue: ModelQueue, fast: bool) -> list[Sequence]:
        """Whose prompts a step of one kind may go on with, in order of rank."""
        prompts: list[Sequence] = []
        coming: set[bytes] = set()  # keys of the pages that they go on with
        for sequence in [sequence for sequence in queue.running if sequence.uncomputed > 1]:
            self._take_up(sequence)  # what somebody computed since it was admitted
            if sequence.windows and sequence.page_is_full():
                continue  # it comes to its next pages at the beginning of a step
            if (fast or sequence.kinds) and sequence.rows_ahead()[0] != fast:
                continue
            key = sequence.next_key
            if key in coming and self._may_take_up(sequence):
                continue  # prompts that begin the same, as the choices of one request do, are computed once
            if key is not None:
                coming.add(key)
            prompts.append(sequence)
        return prompts

    def _room(self, queue: ModelQueue, ready: List[Sequence]) -> Room:
        """What may join the rows of the decoding sequences in the next step: prompts, and guesses."""
        prompting = [each for each in queue.running if not (each.kinds and each.rows_ahead()[0])]
        prompts = sum(max(0, each.uncomputed - 1) for each in prompting)
        rows = min(prompts, int(self._prompt_work(queue, queue.worth, len(ready), 0)), self._max_rows - len(ready))
        left = (self._max_rows - len(ready)) // (2 if prompts else 1)
        return Room(rows, min(left, self._max_sequences - len(queue.running)))

    def _prompt_work(self, queue: ModelQueue, worth: Worth, decoding: int, reads: int) -> float:
        """How much work prompts may add to `decoding` rows, whose contexts have `reads` tokens, in this step.

        A step is short where rows of the other kind wait for it, too.

        Many streams would leave a first token next to nothing on a machine that decodes them no faster than the
        budget. So it is PROMPT_SHARE times their rows where that takes no longer than STEP_WITH_SHARE, and never less
        than they are, without their contexts.
        """
        streaming = any(each.uncomputed <= 1 for other in self._queues.values() for each in other.running)
        both = (
            not streaming and queue.entry.fast is not None and len({each.rows_ahead()[0] for each in queue.running}) > 1
        )
        seconds = STEP_WHILE_STREAMING if streaming or both else STEP
        share = max(decoding, min(PROMPT_SHARE * decoding, STEP_WITH_SHARE * worth.speed - decoding))
        return max(seconds * worth.speed - decoding - worth.slope * reads, SMALLEST_CHUNK, share)

    # Pages

    def _admit(self, now: float) -> None:
        """Let in the first requests, across all models, for as long as the pool has room for their prompts."""
        while True:
            queues = [queue for queue in self._queues.values() if queue.waiting and self._has_place(queue)]
            if not queues:
                return
            queue = min(queues, key=lambda queue: queue.waiting[0].rank)
            sequence = queue.waiting[0]
            if not self._make_room(sequence):
                return
            if not queue.running:  # it has work again, and idling saves nothing up
                queue.served = max(queue.served, self._floor)
                queue.passed_over_since = now
            if len(queue.running) >= self._max_sequences:
                self._preempt(displaced(sequence, queue.running)[0])
            queue.waiting.remove(sequence)
            queue.enter(sequence)
            sequence.admit(now)

    def _has_place(self, queue: ModelQueue) -> bool:
        """Whether the first that waits may run beside the others of its model, or in the place of one of them."""
        return len(queue.running) < self._max_sequences or bool(displaced(queue.waiting[0], queue.running))

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for a waiting sequence, from those with lower priority where that is enough and nothing else is."""
        if self._find_room(sequence):
            return True
        worse = displaced(sequence, self._running())
        taken = sum(each.bytes_of_pages(map(len, each.block_table)) for each in worse)
        needed = sequence.bytes_of_pages(windows.lengths(sequence, len(sequence.tokens) + 1))
        if needed > self._pool.available_bytes + taken:
            return False
        for each in worse:
            self._preempt(each)
            if self._find_room(sequence):
                return True
        return False

    def _find_room(self, sequence: Sequence) -> bool:
        """Cached pages for the beginning of a waiting sequence, own ones for the rest of it and one more token."""
        self._take_up(sequence)
        while True:
            if self._reserve(sequence, len(sequence.tokens) + 1):
                return True
            if not self._speculation.give_back():
                break
        self._free(sequence)
        if self._running():
            return False
        while self.cache.evict(pinned=True):  # nobody uses a page, so what is in the way is where the cached ones lie
            if self._reserve(sequence, len(sequence.tokens) + 1):
                return True
        return False

    def _take_up(self, sequence: Sequence) -> None:
        """Go on behind the cached pages that hold what comes next, before the page that holds the last token."""
        pages = windows.reach(sequence, self.cache)
        while self._may_take_up(sequence) and len(sequence.shared) < pages:
            key = sequence.next_key
            page = None if key is None else self.cache.take(key)
            if page is None:
                break
            index = len(sequence.shared)
            for owner, table in zip(sequence.entry.owners, sequence.block_table, strict=True):
                self._pool.free(owner, table[index : index + 1].tolist())
            sequence.share(page)
        self._leave_behind(sequence)

    def _leave_behind(self, sequence: Sequence) -> None:
        """Let go of what is behind the windows, and have a prompt that goes on take as much further on at once, before
        anybody else does.
        """
        if sequence.windows:
            windows.leave_behind(sequence, self.cache, self._pool)
            if sequence.running and sequence.uncomputed > 1:
                self._reserve(sequence, len(sequence.tokens) + 1)

    @staticmethod
    def _may_take_up(sequence: Sequence) -> bool:
        """Whether the next page may be found: nothing of it is computed yet, and it does not hold the last token."""
        done = len(sequence.shared)
        return done < (len(sequence.tokens) - 1) // PAGE_TOKENS and sequence.computed == done * PAGE_TOKENS

    def _seal(self, sequence: Sequence) -> None:
        """Move the pages that became full, and so will not be written any more, into the cache."""
        while (len(sequence.shared) + 1) * PAGE_TOKENS <= sequence.computed:
            key = sequence.next_key
            if key is None:
                break
            own = tuple(table[len(sequence.shared)] for table in sequence.block_table)
            before, number = sequence.last_key, len(sequence.shared)
            fast = sequence.kinds[number : number + 1] == b"\1"
            sequence.share(self.cache.put(key, before, number, sequence.entry.owners, own, fast=fast))
        self._leave_behind(sequence)

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for the first `tokens` tokens of a sequence in every cache group, of one with a window as many of them
        as it needs at once; all or nothing.

        Cached pages that nobody uses make room, as many as it takes, where they can be enough.
        """
        lengths = windows.lengths(sequence, tokens)
        groups = zip(sequence.entry.owners, sequence.block_table, lengths, strict=True)
        needed = sum(owner.page_bytes * max(0, length - len(table)) for owner, table, length in groups)
        if needed <= 0:
            return True
        if needed > self._pool.available_bytes:
            return False
        while not self._allocate(sequence, lengths):
            if not self.cache.evict():
                return False
        return True

    def _spare(self, shadow: Sequence, tokens: int) -> bool:
        """Pages that a draft model may have: what nobody waits for."""
        waiting = any(queue.waiting for queue in self._queues.values())
        return not waiting and self._reserve(shadow, tokens)

    def _empty_cache(self) -> None:
        while self.cache.evict(pinned=True):
            pass

    def _allocate(self, sequence: Sequence, lengths: List[int]) -> bool:
        """Pages that are free until a sequence's block tables have these lengths; all or nothing."""
        taken: list[list[int]] = []
        for owner, table, count in zip(sequence.entry.owners, sequence.block_table, lengths, strict=True):
            pages = self._pool.allocate(owner, count - len(table)) if len(table) < count else []
            if pages is None:
                for earlier, group in zip(taken, sequence.entry.owners, strict=False):
                    self._pool.free(group, earlier)
                return False
            taken.append(pages)
        for pages, table in zip(taken, sequence.block_table, strict=True):
            table.extend(pages)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for one more token, from the last in rank if need be. False where it lost its own."""
        while not self._reserve(sequence, sequence.computed + 1):
            if self._speculation.give_back():
                continue
            victim = max(self._running(), key=by_rank)
            if victim is not sequence:
                self._preempt(victim)
            elif any(each.running for each in self._by_id.values() if each is not sequence):
                self._preempt(sequence)
                return False
            elif self.cache.evict(pinned=True):
                continue
            elif self._fits_alone(sequence):  # but its pages lie scattered; computed again, they will not
                self._preempt(sequence)
                self._empty_cache()
                return False
            else:
                room = NotEnoughRoom(
                    f"The scratchpad of {self._pool.size} bytes cannot hold {len(sequence.tokens)} tokens of this "
                    "model; start VAI with a larger one (VAI_KV), or ask for fewer tokens."
                )
                self._end(sequence, "error", room)
                return False
        return True

    def _fits_alone(self, sequence: Sequence) -> bool:
        """Whether an empty pool holds a sequence, from its beginning, with its next token."""
        at_once = [pages_at_once(group.window, 1) for group in sequence.entry.program.groups]
        return bytes_that_hold(len(sequence.tokens), sequence.entry.owners, at_once) <= self._pool.size

    def _running(self) -> List[Sequence]:
        return [each for queue in self._queues.values() for each in queue.running]

    def _queue_up(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.entry.digest]
        if sequence.windows:
            sequence.ahead = windows.widest_steps(sequence, self._pool.size, self._max_rows)
        if not queue.waiting and not queue.sleeping:
            queue.patience.began(self._clock())
        if sequence.request.constrained and sequence.mask is None:
            queue.sleeping.append(sequence)
        else:
            insort(queue.waiting, sequence, key=by_rank)

    def _preempt(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.entry.digest]
        queue.leave(sequence)
        queue.preemptions += 1
        self._queue_up(sequence)
        self._free(sequence)
        self._speculation.pause(sequence)
        sequence.running = False

    def _free(self, sequence: Sequence) -> None:
        """Give every page back; what was computed stays in the cache, as far as it is there."""
        for owner, table in zip(sequence.entry.owners, sequence.block_table, strict=True):
            self._pool.free(owner, [page for page in table[len(sequence.shared) :] if page != GONE])
            del table[:]
        self.cache.give(sequence.shared, sequence.conversation, sequence.behind)
        sequence.behind = [0] * len(sequence.behind)
        sequence.shared.clear()
        sequence.computed = 0
        sequence.held = None

    # Ends

    def _end(self, sequence: Sequence, finish: str, error: VaiError | None = None) -> None:
        self._leave(sequence)
        reason = None if error is None else (error.code, error.message)
        timing = sequence.timing(self._clock())
        self._outputs.append(Output(id=sequence.request.id, finish=finish, error=reason, timing=timing))

    def _leave(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.entry.digest]
        if sequence.running:
            queue.leave(sequence)
        elif sequence in queue.sleeping:
            queue.sleeping.remove(sequence)
        else:
            queue.waiting.remove(sequence)
        queue.patience.left(self._clock())
        sequence.running = False
        chain = sequence.shared[:]
        self._free(sequence)
        if sequence.conversation is not None:
            self.cache.pause(sequence.conversation, chain, sequence.request.retain)
        self._speculation.retire(sequence)
        del self._by_id[sequence.request.id]
