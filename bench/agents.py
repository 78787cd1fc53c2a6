"""Agents that come and go: what the retention of the prefix cache saves, beside plain LRU in the same program.

Run: python bench/agents.py [--seed N ...] [--repeats K] [--minutes M] [--write FILE | --trace FILE]. A trace (one JSON
object a line, made from its seed or replayed from a file) has agents of several kinds on two models; every kind of
retention replays it in virtual time (virtual.py) over the same pool, which holds a part of what all conversations
together would need. A pause counts from the end of an agent's last answer. Recomputed are prompt tokens that an earlier
turn of the same conversation had computed. A table for people, then one line of JSON.

One replay tells little: where the pool is short, models that are slower by a ten-thousandth can make one and the same
policy recompute twice as much, or half: what comes too late for one turn comes too late for those after it. So each
trace is replayed K times, each time with models slower by that, and the table has the sums, and the least and the most
that the ratio to plain LRU was, and that of plain LRU to itself.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
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


def replay(turns: list[Turn], slabs: int, policy: type[Retention], *, hints: bool, slower: float = 1.0) -> Result:
    """Have every agent say its turns. `hints`: each names its conversation, and says which turn is its last.

    `slower`: what a row takes, in times of what it does.
    """
    engine = Virtual([replace(model, row=model.row * slower) for model in (SMALL, LARGE)], slabs, policy)
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


def table_row(name: str, found: List[Result], kinds: List[str]) -> dict[str, Any]:
    """Print what some replays came to, and return it."""
    recomputed, repeated = sum(each.recomputed for each in found), sum(each.repeated for each in found)
    busy, ended = sum(each.busy for each in found), sum(each.ended for each in found)
    first = {kind: [seconds for each in found for seconds in each.first[kind]] for kind in kinds}
    p50, p99 = np.percentile(np.concatenate([*first.values()]), [50, 99])
    tails = [float(np.percentile(first[kind], 99)) for kind in kinds]
    print(
        f"  {name:18} {recomputed:12,} {recomputed / repeated:10.1%} {busy:11,.0f} {p50:10.2f} {p99:7.2f}  "
        + " ".join(f"{tail:7.2f}" for tail in tails)
    )
    return {
        "policy": name,
        "recomputed": [each.recomputed for each in found],
        "computed": [each.computed for each in found],
        "repeated": [each.repeated for each in found],
        "computing": [round(each.busy, 1) for each in found],
        "busy": busy / ended,
        "p50": float(p50),
        "p99": float(p99),
    }


def ratios(pairs: Iterable[tuple[Result, Result]]) -> str:
    """What the second of two replays recomputed, in times of what the first did: the least and the most."""
    found = [other.recomputed / max(1, one.recomputed) for one, other in pairs]
    return f"{min(found):.2f} to {max(found):.2f}" if found else "(one repeat)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--pool", type=int, nargs="+", default=[384, 512, 640], help="MiB")
    parser.add_argument("--trace", type=Path, help="replay this file")
    parser.add_argument("--write", type=Path, help="write the trace, and nothing else")
    args = parser.parse_args()
    traces = [trace(seed, args.minutes * 60) for seed in args.seed]
    if args.trace:
        traces = [[Turn(**json.loads(line)) for line in args.trace.read_text().splitlines()]]
    if args.write:
        args.write.write_text("".join(json.dumps(asdict(turn)) + "\n" for turn in traces[0]))
        return
    print(
        f"{sum(map(len, traces))} turns of {len({turn.agent for turn in traces[0]})} agents, seeds {args.seed}, "
        f"{args.repeats} repeats, virtual time"
    )
    kinds = list(dict.fromkeys(turn.kind for turn in traces[0]))
    answer: dict[str, Any] = {"bench": "agents", "seeds": args.seed, "repeats": args.repeats, "results": []}
    for megabytes in args.pool:
        print(
            f"\n{megabytes} MiB of pool: recomputed tokens, their share of those repeated; seconds of computing; "
            f"seconds to the first token: p50, p99; p99 of {', '.join(kinds)}"
        )
        runs: dict[str, list[Result]] = {}
        for name, policy, hints in (
            ("plain LRU", LongestUnused, False),
            ("retention", Retention, False),
            ("plain LRU, hints", LongestUnused, True),
            ("retention, hints", Retention, True),
        ):
            runs[name] = [
                replay(turns, megabytes * (1 << 20) // SLAB, policy, hints=hints, slower=1 + repeat * 1e-4)
                for turns in traces
                for repeat in range(args.repeats)
            ]
            answer["results"].append({"pool_mib": megabytes, **table_row(name, runs[name], kinds)})
        for hints in ("", ", hints"):
            lru, other = runs["plain LRU" + hints], runs["retention" + hints]
            repeats = [pair for number, pair in enumerate(pairwise(lru), 1) if number % args.repeats]
            print(
                f"  recomputed{hints}: retention {ratios(zip(lru, other, strict=True))} times plain LRU, which is "
                f"{ratios(repeats)} times its own repeat before"
            )
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
