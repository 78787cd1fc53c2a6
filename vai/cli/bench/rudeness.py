"""Loads that are not kind: a long prompt among running streams, clients that leave, and more streams than have room."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

from vai.cli.bench.traffic import Record, Target, send
from vai.cli.bench.workload import Ask

QUICK = 0.003  # seconds after which the first leave
SHORT = 20  # tokens of a running stream's prompt
LONG_ANSWER = 4  # tokens that the long prompt is answered with: the first may be half a character


class Stall(NamedTuple):
    """Seconds: the longest wait for a next token of any stream before a long prompt came, and until its first token.

    A token that ends in half a character counts where the server tells of it; in `text` only text does.
    `first`: the long prompt's own first token; NaN where it had not come when patience was at its end.
    """

    before: float
    during: float
    text: float
    first: float


async def stall(target: Target, ids: Sequence[int], *, streams: int, length: int, before: float, most: float) -> Stall:
    """`streams` running streams, watched for `before` seconds; then a prompt of `length` tokens comes, for at most
    `most` seconds."""
    generator, records = random.Random(0), list[Record]()  # noqa: S311 - a load, not a secret
    model = target.models[0]

    def ask(tokens: int, answer: int) -> Ask:
        return Ask(generator.choices(ids, k=tokens), answer)

    running = [asyncio.ensure_future(send(target, model, ask(SHORT, length), records)) for _ in range(streams)]
    try:
        while not (len(records) == streams and all(record.events for record in records)):
            if failed := [record.error for record in records if record.error is not None]:
                raise ConnectionError(failed[0])
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        await asyncio.sleep(before)
        arrival = time.perf_counter()
        late: list[Record] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(most):
                await send(target, model, ask(length, LONG_ANSWER), late)
        end = late[0].events[0] if late[0].events else time.perf_counter()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    first = end - arrival if late[0].events else float("nan")
    signs, texts = [record.signs for record in records], [record.events for record in records]
    return Stall(_longest(signs, began, arrival), _longest(signs, arrival, end), _longest(texts, arrival, end), first)


def _longest(streams: Sequence[Sequence[float]], begin: float, end: float) -> float:
    """The longest wait for a next moment of any stream that ends in, or is under way at the end of, this time."""
    waits = []
    for moments in streams:
        past = [at for at in moments if at < end]
        waits += [after - before for before, after in pairwise(past) if after >= begin]
        waits.append(end - past[-1])
    return max(waits)


async def gone(
    target: Target, work: Iterator[Ask], *, clients: int, at_once: int, patience: float, seed: int = 0
) -> list[Record]:
    """`clients` that leave at random moments, so many at once: from QUICK to `patience` seconds after their request,
    log-uniform, so that some leave while they wait, some while their prompt is computed, and some amid the answer.
    """
    generator, records = random.Random(seed), list[Record]()  # noqa: S311 - a load, not a secret
    room = asyncio.Semaphore(at_once)

    async def client(model: str, seconds: float) -> None:
        async with room:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await send(target, model, next(work), records)

    models = target.models
    moments = [math.exp(generator.uniform(math.log(QUICK), math.log(patience))) for _ in range(clients)]
    await asyncio.gather(*(client(models[number % len(models)], each) for number, each in enumerate(moments)))
    return records


async def many(target: Target, work: Iterator[Ask], *, streams: int) -> list[Record]:
    """`streams` requests sent together, each to its end."""
    records: list[Record] = []
    models = itertools.islice(itertools.cycle(target.models), streams)
    await asyncio.gather(*(send(target, model, next(work), records) for model in models))
    return records
