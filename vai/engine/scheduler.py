"""Who runs next, and how many tokens of each: one scheduler over all models of an engine.

Models take turns by served cost: the turn goes to the model that has been served least, for a short quantum, so that
under load the order is A A A B B and not A B A B. Nobody waits longer than MAX_WAIT plus a step of each other model.
Inside a model, every decoding sequence has a row in every step, and prompts fill the rest of the step in order of age,
as many of their tokens as the model computes in STEP_WHILE_STREAMING (or STEP, where nobody waits for the next token).

Pages come from one pool for all models. A full page goes into the prefix cache, where every request that begins the
same finds it; when nobody reads it any more it stays until its room is needed. Requests are admitted in order of age
across all models, each with room for its whole prompt; the oldest that does not fit makes the younger wait. A running
sequence that needs a page where none is free takes the pages of the youngest, which is computed again later: the
oldest always gets on, so everybody does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as List

from vai.engine.batch import Batch
from vai.engine.sampler import Draw
from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.errors import BadRequest, NotEnoughRoom, Overloaded, VaiError
from vai.kernels.program import PAGE_TOKENS
from vai.request import Output
from vai.scratchpad.budget import pages_for, slabs_for
from vai.scratchpad.pages import PagePool
from vai.scratchpad.prefix import PrefixCache

QUANTUM = 0.05  # seconds of one turn
MAX_WAIT = 1.0  # seconds that a model with work may be passed over for those served less
MAX_WAITING = 1024  # requests that are not admitted yet
STEP_WHILE_STREAMING = 0.15  # seconds of one step with prompt rows in it, as far as measured rates foretell
STEP = 1.0
SMALLEST_CHUNK = 32  # prompt rows that a step may always have, and the size of the first, which tells the rate


class ModelQueue:
    """The requests of one model, oldest first: `running` have pages, `waiting` have none and are all younger."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.served = 0.0  # seconds of steps, set forward after idle times
        self.passed_over_since = 0.0
        self.tokens = 0  # made since the attach
        self.rows_per_second = 0.0  # in the last step that had prompt rows; 0 before the first


class Scheduler:
    """Requests in, batches out, outputs out. Not thread-safe."""

    def __init__(
        self, pool: PagePool, *, max_rows: int, max_sequences: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`max_rows`: most rows of a step. `max_sequences`: sequences of one model that run at once."""
        self._pool = pool
        self._cache = PrefixCache(pool)
        self._clock = clock
        self._max_rows = max_rows
        self._max_sequences = min(max_sequences, max_rows)  # so that a step has a row for each
        self._queues: dict[str, ModelQueue] = {}
        self._by_id: dict[str, Sequence] = {}
        self._turn: ModelQueue | None = None
        self._turn_used = 0.0
        self._floor = 0.0  # what the least served model with work has been served; never falls
        self._outputs: list[Output] = []

    def add(self, sequence: Sequence) -> None:
        """Put a request in the queue of its model. Raises BadRequest for an id in use, Overloaded for a full queue."""
        identity = sequence.request.id
        if identity in self._by_id:
            raise BadRequest(f"A request with the id '{identity}' is already running.", param="id")
        waiting = sum(len(queue.waiting) for queue in self._queues.values())
        if waiting >= MAX_WAITING:
            raise Overloaded(f"{waiting} requests are waiting already, which is as many as may; try again soon.")
        self._by_id[identity] = sequence
        queue = self._queues.setdefault(sequence.entry.digest, ModelQueue(sequence.entry))
        queue.waiting.append(sequence)

    def abort(self, identity: str) -> None:
        """End a request now: its pages are free at once. One that is not there (any more) is fine."""
        sequence = self._by_id.get(identity)
        if sequence is not None:
            self._end(sequence, "abort")

    def forget(self, image: str) -> None:
        """Abort every request of a model, free its cached pages, and forget the model."""
        queue = self._queues.get(image)
        if queue is None:
            return
        for sequence in [*queue.running, *queue.waiting]:
            self._end(sequence, "abort")
        self._cache.forget(image)
        del self._queues[image]
        if self._turn is queue:
            self._turn = None

    def has_work(self) -> bool:
        """Whether any request is unfinished, or any output not taken."""
        return bool(self._by_id or self._outputs)

    def take_outputs(self) -> list[Output]:
        """What happened to requests since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def counts(self, image: str) -> tuple[int, int, int]:
        """(running, waiting, tokens made) of a model."""
        queue = self._queues.get(image)
        return (len(queue.running), len(queue.waiting), queue.tokens) if queue is not None else (0, 0, 0)

    def pick(self) -> Batch | None:
        """The next step, or None where nobody has anything to compute."""
        self._admit(self._clock())  # the price of a new request, not of choosing a model
        picked_at = self._clock()
        while (queue := self._choose(picked_at)) is not None:
            batch = self._fill(queue, picked_at)
            if batch.rows:
                return batch
        return None

    def commit(self, batch: Batch, draws: List[Draw | VaiError]) -> None:
        """Take the results of a step: one draw, or the reason why there is none, for each of `batch.drawing`."""
        now = self._clock()
        queue = self._charge(batch, now)
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.computed += count
            self._seal(sequence)
        for sequence, draw in zip(batch.drawing, draws, strict=True):
            if isinstance(draw, VaiError):
                self._end(sequence, "error", draw)
                continue
            output = sequence.append(draw.token, draw.logprob, now)
            queue.tokens += 1
            if output.finish is not None:
                self._leave(sequence)
            self._outputs.append(output)

    def fail(self, batch: Batch, error: VaiError) -> None:
        """A step could not be computed: its requests end, everybody else goes on."""
        self._charge(batch, self._clock())
        for sequence in batch.sequences:
            self._end(sequence, "error", error)

    # Turns

    def _choose(self, now: float) -> ModelQueue | None:
        ready = [queue for queue in self._queues.values() if queue.running]
        if not ready:
            return None
        self._floor = max(self._floor, min(queue.served for queue in ready))
        longest = min(ready, key=lambda queue: queue.passed_over_since)
        if now - longest.passed_over_since > MAX_WAIT:
            chosen = longest
        elif self._turn is not None and self._turn.running and self._turn_used < QUANTUM:
            chosen = self._turn
        else:
            chosen = min(ready, key=lambda queue: (queue.served, queue.passed_over_since))
        if chosen is not self._turn:
            self._turn, self._turn_used = chosen, 0.0
        return chosen

    def _charge(self, batch: Batch, now: float) -> ModelQueue:
        queue = self._queues[batch.entry.digest]
        seconds = now - batch.picked_at
        queue.served += seconds
        if batch.rows >= SMALLEST_CHUNK:
            queue.rows_per_second = batch.rows / max(seconds, 1e-9)
        queue.passed_over_since = now
        self._turn_used += seconds
        return queue

    def _fill(self, queue: ModelQueue, picked_at: float) -> Batch:
        """One row of every decoding sequence, then prompts up to the budget."""
        batch = Batch(queue.entry, picked_at)
        for sequence in [sequence for sequence in queue.running if sequence.uncomputed == 1]:
            if sequence.running and self._grow(sequence):  # growing may have preempted those after it
                batch.add(sequence, 1)
        room = self._prompt_rows(queue, batch.rows)
        coming: set[bytes] = set()  # keys of the pages that this step goes on with
        for sequence in queue.running:
            if room and sequence.uncomputed > 1:
                self._take_up(sequence)  # what somebody computed since it was admitted
                key = sequence.next_key
                if key in coming and self._may_take_up(sequence):
                    continue  # prompts that begin the same, as the choices of one request do, are computed once
                if key is not None:
                    coming.add(key)
                count = min(room, sequence.uncomputed)
                batch.add(sequence, count)
                room -= count
        return batch

    def _prompt_rows(self, queue: ModelQueue, decoding: int) -> int:
        """How many prompt rows may join `decoding` rows in this step."""
        streaming = any(each.uncomputed == 1 for other in self._queues.values() for each in other.running)
        seconds = STEP_WHILE_STREAMING if streaming else STEP
        rows = min(int(seconds * queue.rows_per_second), self._max_rows) - decoding
        return min(max(rows, SMALLEST_CHUNK), self._max_rows - decoding)

    # Pages

    def _admit(self, now: float) -> None:
        """Let in the oldest requests, across all models, for as long as the pool has room for their prompts."""
        while True:
            queues = [q for q in self._queues.values() if q.waiting and len(q.running) < self._max_sequences]
            if not queues:
                return
            queue = min(queues, key=lambda queue: queue.waiting[0].arrival)
            sequence = queue.waiting[0]
            if not self._make_room(sequence):
                return
            if not queue.running:  # it has work again, and idling saves nothing up
                queue.served = max(queue.served, self._floor)
                queue.passed_over_since = now
            queue.running.append(queue.waiting.popleft())
            sequence.admit(now)

    def _make_room(self, sequence: Sequence) -> bool:
        """Cached pages for the beginning of a waiting sequence, own ones for the rest of it and one more token."""
        self._take_up(sequence)
        if self._reserve(sequence, len(sequence.tokens) + 1):
            return True
        self._free(sequence)
        if any(queue.running for queue in self._queues.values()):
            return False
        self._empty_cache()  # nobody uses a page, so what is in the way is where the cached ones lie
        return self._reserve(sequence, len(sequence.tokens) + 1)

    def _take_up(self, sequence: Sequence) -> None:
        """Go on behind the cached pages that hold what comes next, before the page that holds the last token."""
        while self._may_take_up(sequence):
            key = sequence.next_key
            page = None if key is None else self._cache.take(key)
            if page is None:
                return
            index = len(sequence.shared)
            for owner, table in zip(sequence.entry.owners, sequence.block_table, strict=True):
                self._pool.free(owner, table[index : index + 1].tolist())
            sequence.share(page)

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
                return
            own = tuple(table[len(sequence.shared)] for table in sequence.block_table)
            sequence.share(self._cache.put(key, sequence.entry.owners, own))

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for the first `tokens` tokens of a sequence in every cache group; all or nothing.

        Cached pages that nobody uses make room, as many as it takes, where they can be enough.
        """
        pages = pages_for(tokens)
        groups = zip(sequence.entry.owners, sequence.block_table, strict=True)
        needed = sum(owner.page_bytes * (pages - len(table)) for owner, table in groups)
        if needed <= 0:
            return True
        if needed > self._pool.available_bytes:
            return False
        while not self._allocate(sequence, pages):
            if not self._cache.evict():
                return False
        return True

    def _empty_cache(self) -> None:
        while self._cache.evict():
            pass

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        """Pages that are free until a sequence has `count` in every cache group; all or nothing."""
        taken: list[list[int]] = []
        for owner, table in zip(sequence.entry.owners, sequence.block_table, strict=True):
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
        """Pages for one more token, from the youngest if there is no other way. False where it lost its own."""
        while not self._reserve(sequence, sequence.computed + 1):
            youngest = max(
                (each for queue in self._queues.values() for each in queue.running), key=lambda each: each.arrival
            )
            if youngest is not sequence:
                self._preempt(youngest)
            elif any(each.running for each in self._by_id.values() if each is not sequence):
                self._preempt(sequence)
                return False
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
        """Whether an empty pool holds a sequence with its next token."""
        pages = pages_for(sequence.computed + 1)
        return sum(slabs_for(owner, pages) for owner in sequence.entry.owners) <= self._pool.slabs

    def _preempt(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.entry.digest]
        queue.running.remove(sequence)
        queue.waiting.appendleft(sequence)  # everything that waits there is younger
        self._free(sequence)
        sequence.running = False

    def _free(self, sequence: Sequence) -> None:
        """Give every page back; what was computed stays in the cache, as far as it is there."""
        for owner, table in zip(sequence.entry.owners, sequence.block_table, strict=True):
            self._pool.free(owner, table[len(sequence.shared) :].tolist())
            del table[:]
        self._cache.give(sequence.shared)
        sequence.shared.clear()
        sequence.computed = 0

    # Ends

    def _end(self, sequence: Sequence, finish: str, error: VaiError | None = None) -> None:
        self._leave(sequence)
        reason = None if error is None else (error.code, error.message)
        timing = sequence.timing(self._clock())
        self._outputs.append(Output(id=sequence.request.id, finish=finish, error=reason, timing=timing))

    def _leave(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.entry.digest]
        if sequence.running:
            queue.running.remove(sequence)
        else:
            queue.waiting.remove(sequence)
        sequence.running = False
        self._free(sequence)
        del self._by_id[sequence.request.id]
