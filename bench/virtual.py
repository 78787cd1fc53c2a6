"""The engine's real scheduler, page pool and prefix cache in virtual time: an hour of agents in seconds.

Only the computing is left out: a step takes `read` seconds (its weights are read once) or `row` seconds for each of its
rows, whatever is more. Everything that decides which page is kept runs as in the engine.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vai.daemon.pool import SLAB, whole_bytes
from vai.engine.sampler import Draw
from vai.engine.scheduler import Scheduler
from vai.engine.select import Entry
from vai.engine.sequence import Sequence
from vai.kernels.program import MAX_ROWS, MAX_SEQUENCES, CacheGroup, Program
from vai.request import Output, Request, SamplingParams
from vai.scratchpad.pages import Owner, PagePool
from vai.scratchpad.prefix import PrefixCache
from vai.scratchpad.retention import Conversation, Retention

VOCABULARY = 151_936


@dataclass(frozen=True)
class Model:
    """One model: its KV shape, and what a step of it takes."""

    name: str
    group: CacheGroup
    read: float
    row: float

    def entry(self) -> Entry:
        digest = self.name.encode().hex().ljust(64, "0")[:64]
        program = Program((), (self.group,), {}, {}, width=1, vocabulary=VOCABULARY, context=1 << 20)
        return Entry(digest, program, NoPlan(), (Owner(digest, 0, self.group.page_bytes("bf16")),), 0.0, self.name)


class NoPlan:
    """A Plan that computes nothing."""

    workspace_bytes = 0
    kv_type = "bf16"


class LongestUnused(Retention):
    """Plain LRU in the same program: every page that nobody waits for is worth the same."""

    def _worth(self, conversation: Conversation) -> float:
        return 1.0 if conversation.active else 0.0

    def _price(self, page: object) -> float:
        return 1.0


@dataclass
class Asked:
    """A request on its way and what became of it. Seconds since its submission, tokens."""

    submitted: float
    prompt: list[int]
    whenever: Callable[[Asked], None]
    cached: int = 0
    first: float = 0.0
    answer: list[int] = field(default_factory=list)


class Virtual:
    """An engine whose clock, `now`, is moved by what its steps take, and by waiting for the next event."""

    def __init__(self, models: list[Model], slabs: int, policy: type[Retention] = Retention) -> None:
        self.now = 0.0
        self.models = {model.name: model for model in models}
        self.entries = {model.name: model.entry() for model in models}
        self._of_digest = {entry.digest: self.models[name] for name, entry in self.entries.items()}
        self.pool = PagePool(np.zeros(whole_bytes(slabs * SLAB), np.uint8))
        self.scheduler = Scheduler(self.pool, max_rows=MAX_ROWS, max_sequences=MAX_SEQUENCES, clock=lambda: self.now)
        self.scheduler.retention = policy(self.pool.size, lambda: self.now)
        self.scheduler.cache = PrefixCache(self.pool, self.scheduler.retention)
        self._asked: dict[str, Asked] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.busy = 0.0
        self.rows = 0

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Have something happen at a time."""
        heapq.heappush(self._events, (seconds, next(self._numbers), event))

    def ask(self, model: str, prompt: list[int], answer: int, whenever: Callable[[Asked], None], **how: object) -> None:
        """Submit a request; `whenever` is called when it is over."""
        number, entry = next(self._numbers), self.entries[model]
        request = Request(
            id=str(number), image=entry.digest, tokens=prompt, sampling=SamplingParams(max_tokens=answer), **how
        )
        self._asked[request.id] = Asked(self.now, prompt, whenever)
        self.scheduler.add(Sequence(request, entry, arrival=number, limit=len(prompt) + answer, now=self.now))

    def run(self, until: float = float("inf")) -> None:
        """Until nothing is left to do, or a time."""
        while self.now < until:
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            if self.scheduler.has_work() and self._step():
                continue
            if self._events:
                self.now = self._events[0][0]
            elif self.scheduler.has_work():
                raise RuntimeError("A request waits for pages that nothing will free: the pool is too small for it.")
            else:
                return

    def _step(self) -> bool:
        """One step, if there is any to be done: whether anything happened."""
        batch = self.scheduler.pick()
        if batch is not None:
            model = self._of_digest[batch.entry.digest]
            seconds = max(model.read, model.row * batch.rows)
            self.now += seconds
            self.busy += seconds
            self.rows += batch.rows
            self.scheduler.commit(batch, [Draw(self._token(place.sequence), None) for place in batch.places])
        outputs = self.scheduler.take_outputs()
        for output in outputs:
            self._take(output)
        return batch is not None or bool(outputs)

    @staticmethod
    def _token(sequence: Sequence) -> int:
        """What the answer says next: something that only this conversation says."""
        return (sum(sequence.tokens[-3:]) * 48_271 + 11) % VOCABULARY

    def _take(self, output: Output) -> None:
        asked = self._asked[output.id]
        if output.error is not None:
            raise RuntimeError(output.error[1])
        if not asked.answer:
            asked.first = self.now - asked.submitted
        asked.cached += output.cached_tokens
        asked.answer += output.tokens
        if output.finish is not None:
            del self._asked[output.id]
            asked.whenever(asked)
