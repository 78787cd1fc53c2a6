"""How many requests three models carry at once in one pool, and in three fixed thirds of the same memory.

Run: python bench/pool.py [--seed N] [--slabs N]. Requests of random length come one after the other, most of them for
the model that is in demand just then (`share` of them); each takes the pages of its whole length from a real PagePool,
until one does not fit. Of just these requests, three pools of a third each carry those that fit into their model's.
A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics

import numpy as np

from vai.daemon.pool import SLAB, whole_bytes
from vai.kernels.program import CacheGroup
from vai.scratchpad.budget import pages_for
from vai.scratchpad.pages import Owner, PagePool

# Qwen2 0.5B and 1.5B, and a third with the KV shape of Llama 3.2 3B.
SHAPES = (CacheGroup(24, 2, 64), CacheGroup(28, 2, 128), CacheGroup(28, 8, 128))
OWNERS = tuple(Owner(f"{number}" * 64, 0, shape.page_bytes("bf16")) for number, shape in enumerate(SHAPES))
ROUNDS = 200


def make_pool(slabs: int) -> PagePool:
    return PagePool(np.zeros(whole_bytes(slabs * SLAB), np.uint8))


def fits(request: tuple[int, int], pools: list[PagePool]) -> bool:
    """Whether a request (model, tokens) gets its pages, which it then has."""
    model, tokens = request
    return pools[model].allocate(OWNERS[model], pages_for(tokens)) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slabs", type=int, default=96, help="of 16 MiB, in all")
    args = parser.parse_args()
    print(f"pool of {args.slabs * 16} MiB, {ROUNDS} rounds each, prompts log-uniform from 64 to 4,096 tokens")
    print("share of the model in demand    one pool    three thirds    ratio (least, most)")
    answer = {"bench": "pool", "seed": args.seed, "slabs": args.slabs, "rounds": ROUNDS, "results": []}
    for share in (1 / 3, 0.5, 0.7, 0.9, 1.0):
        draw = random.Random(args.seed)
        one, thirds = [], []
        for _ in range(ROUNDS):
            favourite = draw.randrange(3)
            rest = [(1 - share) / 2] * 3
            rest[favourite] = share
            models = draw.choices(range(3), rest, k=20_000)
            requests = [(model, round(64 * 64 ** draw.random())) for model in models]
            pools = [make_pool(args.slabs)] * 3
            demand = list(itertools.takewhile(lambda request, pools=pools: fits(request, pools), requests))
            pools = [make_pool(args.slabs // 3) for _ in SHAPES]
            one.append(len(demand))
            thirds.append(sum(fits(request, pools) for request in demand))
        ratios = [a / b for a, b in zip(one, thirds, strict=True)]
        means = statistics.mean(one), statistics.mean(thirds)
        print(
            f"{share:29.0%} {means[0]:11.1f} {means[1]:15.1f} {means[0] / means[1]:8.2f} "
            f"({min(ratios):.2f}, {max(ratios):.2f})"
        )
        answer["results"].append({"share": share, "one": means[0], "thirds": means[1]})
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
