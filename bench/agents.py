"""Agents that come and go: what the retention of the prefix cache saves, beside plain LRU in the same program.

Run: python bench/agents.py [--seed N] [--minutes M] [--write FILE | --trace FILE]. A trace (one JSON object a line,
made from its seed or replayed from a file) has agents of several kinds on two models; every kind of retention replays
it in virtual time (virtual.py) over the same pool, which holds a part of what all conversations together would need. A
pause counts from the end of an agent's last answer. Recomputed are prompt tokens that an earlier turn of the same
conversation had computed. A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from virtual import VOCABULARY, Asked, LongestUnused, Model, Virtual

from vai.daemon.pool import SLAB
from vai.kernels.program import CacheGroup
from vai.scratchpad.retention import Retention

# KV shapes of Qwen2 0.5B and 1.5B; seconds of the order of what two Zen 3 cores take with Q4_0 weights.
SMALL = Model("small", CacheGroup(24, 2, 64), read=0.016, row=1 / 300)
LARGE = Model("large", CacheGroup(28, 2, 128), read=0.045, row=1 / 90)


@dataclass(frozen=True)
class Turn:
    """One request: so many seconds after the agent's last answer, so many new tokens behind all that was said.

    `stem`: tokens that all conversations of a kind begin with. `last`: nobody goes on with this conversation.
    """

    agent: str
    kind: str
    model: str
    conversation: int
    pause: float
    stem: int
    prompt: int
    answer: int
    last: bool


def coder(draw: random.Random, agent: str) -> Iterator[Turn]:
    """Runs tools, a second or a few each, and now and then waits for a person."""
    for conversation in range(1000):
        turns = draw.randrange(12, 40)
        for turn in range(turns):
            waits = turn == 0 or draw.random() < 0.08
            pause = draw.uniform(60, 400) if waits else draw.lognormvariate(0.6, 0.8)
            prompt = draw.randrange(30, 260) if turn else draw.randrange(400, 900)
            yield Turn(
                agent, "coder", "large", conversation, pause, 1200, prompt, draw.randrange(15, 60), turn == turns - 1
            )


def person(draw: random.Random, agent: str) -> Iterator[Turn]:
    """Reads, thinks and writes."""
    for conversation in range(1000):
        turns = draw.randrange(3, 15)
        for turn in range(turns):
            pause = draw.lognormvariate(3.9, 0.7) if turn else draw.uniform(20, 600)
            yield Turn(
                agent,
                "person",
                "small",
                conversation,
                pause,
                350,
                draw.randrange(20, 300),
                draw.randrange(40, 160),
                turn == turns - 1,
            )


def bot(draw: random.Random, agent: str) -> Iterator[Turn]:
    """Calls quick tools in a burst, and is done."""
    for conversation in range(10_000):
        turns = draw.randrange(5, 14)
        for turn in range(turns):
            pause = draw.uniform(0.05, 0.4) if turn else draw.uniform(20, 90)
            yield Turn(
                agent,
                "bot",
                "small",
                conversation,
                pause,
                600,
                draw.randrange(40, 200),
                draw.randrange(8, 30),
                turn == turns - 1,
            )


def reader(draw: random.Random, agent: str) -> Iterator[Turn]:
    """Asks one question about one long document, each time another."""
    for conversation in range(10_000):
        yield Turn(agent, "reader", "small", conversation, draw.uniform(15, 75), 0, draw.randrange(600, 2400), 24, True)


AGENTS = {coder: 2, person: 12, bot: 3, reader: 2}


def trace(seed: int, seconds: float) -> list[Turn]:
    """The turns of all agents, each agent's in order, as many as its pauses leave room for."""
    turns = []
    for kind, count in AGENTS.items():
        for number in range(count):
            agent, waited = f"{kind.__name__}-{number}", 0.0
            for turn in kind(random.Random(f"{seed}/{agent}"), agent):
                waited += turn.pause
                if waited > seconds:
                    break
                turns.append(turn)
    return turns


@dataclass
class Result:
    """What a replay took. Seconds to the first token of each turn, by kind of agent."""

    recomputed: int
    computed: int
    repeated: int
    busy: float
    ended: float
    first: dict[str, list[float]]


def replay(turns: list[Turn], slabs: int, policy: type[Retention], *, hints: bool) -> Result:
    """Have every agent say its turns. `hints`: each names its conversation, and says which turn is its last."""
    engine = Virtual([SMALL, LARGE], slabs, policy)
    by_agent: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        by_agent[turn.agent].append(turn)
    result = Result(0, 0, 0, 0.0, 0.0, defaultdict(list))

    def next_turn(agent: str, number: int, said: list[int]) -> None:
        if number == len(by_agent[agent]):
            return
        turn = by_agent[agent][number]
        engine.at(engine.now + turn.pause, lambda: say(agent, number, said))

    def say(agent: str, number: int, said: list[int]) -> None:
        turn = by_agent[agent][number]
        new = random.Random(f"{agent}/{number}")
        known = len(said)
        prompt = said or [(7 * n + len(turn.kind)) % VOCABULARY for n in range(turn.stem)]
        prompt = [*prompt, *(new.randrange(VOCABULARY) for _ in range(turn.prompt))]

        def over(asked: Asked) -> None:
            result.first[turn.kind].append(asked.first)
            result.computed += len(prompt) - asked.cached
            result.repeated += known
            result.recomputed += max(0, known - asked.cached)
            next_turn(agent, number + 1, [] if turn.last else [*prompt, *asked.answer])

        how: dict[str, Any] = {}
        if hints:
            how = {"session": f"{agent}/{turn.conversation}", "retain": 0 if turn.last else None}
        engine.ask(turn.model, prompt, turn.answer, over, **how)

    for agent in by_agent:
        next_turn(agent, 0, [])
    engine.run()
    result.busy, result.ended = engine.busy, engine.now
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--pool", type=int, nargs="+", default=[384, 512, 640], help="MiB")
    parser.add_argument("--trace", type=Path, help="replay this file")
    parser.add_argument("--write", type=Path, help="write the trace, and nothing else")
    args = parser.parse_args()
    turns = trace(args.seed, args.minutes * 60)
    if args.trace:
        turns = [Turn(**json.loads(line)) for line in args.trace.read_text().splitlines()]
    if args.write:
        args.write.write_text("".join(json.dumps(asdict(turn)) + "\n" for turn in turns))
        return
    print(f"{len(turns)} turns of {len({turn.agent for turn in turns})} agents, seed {args.seed}, virtual time")
    kinds = list(dict.fromkeys(turn.kind for turn in turns))
    answer: dict[str, Any] = {"bench": "agents", "seed": args.seed, "turns": len(turns), "results": []}
    for megabytes in args.pool:
        print(
            f"\npool of {megabytes} MiB: recomputed tokens, their share of those repeated; seconds to the first token: "
            f"p50, p99; p99 of {', '.join(kinds)}"
        )
        for name, policy, hints in (
            ("plain LRU", LongestUnused, False),
            ("retention", Retention, False),
            ("plain LRU, hints", LongestUnused, True),
            ("retention, hints", Retention, True),
        ):
            found = replay(turns, megabytes * (1 << 20) // SLAB, policy, hints=hints)
            every = [first for kind in found.first.values() for first in kind]
            p50, p99 = np.percentile(every, [50, 99])
            tails = [float(np.percentile(found.first[kind], 99)) for kind in kinds]
            print(
                f"  {name:18} {found.recomputed:12,} {found.recomputed / found.repeated:10.1%} {p50:13.2f} {p99:7.2f}  "
                + " ".join(f"{tail:7.2f}" for tail in tails)
            )
            answer["results"].append(
                {
                    "pool_mib": megabytes,
                    "policy": name,
                    "recomputed": found.recomputed,
                    "computed": found.computed,
                    "repeated": found.repeated,
                    "p50": float(p50),
                    "p99": float(p99),
                    "busy": found.busy / found.ended,
                }
            )
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
