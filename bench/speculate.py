"""What speculation costs and brings: rows of a step, then whole answers with and without guesses, in turns.

Run: python bench/speculate.py [TARGET.gguf DRAFT.gguf] [ROUNDS]. DRAFT, of the same vocabulary, guesses for TARGET, and
both go on with pieces of VAI's own sources. Without files a pair is made that always agrees, the upper bound of what a
draft model can bring: a qwen2-1.5b in which the layers behind the first six add nothing, though they are computed, and
a model of those six. How many guesses stand is what a model makes of a text: on random weights that says nothing about
trained ones, the seconds do.

A table for people, then one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

import vai
from vai.burn.burn import burn
from vai.burn.gguf import GgufFile
from vai.burn.synth import SHAPES, synthesize
from vai.cli.bench.stand import warm
from vai.cli.bench.switch import cpu_name
from vai.engine.engine import Engine
from vai.kernels.program import StepArgs
from vai.llm import LLM
from vai.request import Speculate
from vai.rom.registry import Name, Registry

THREADS = 2
KV_BYTES = 512 << 20
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17)  # a token and its guesses
CONTEXT = 256
TOKENS = 128  # of an answer
PROMPT = 1000  # characters of code
TIMES = 7
RESIDUAL = ("attn_output", "ffn_down")  # what a layer adds comes out of these


def agreeing_pair(place: Path, shape: str = "qwen2-1.5b", layers: int = 6) -> tuple[Path, Path]:
    """(target, draft) in Q4_0: the first `layers` are the same, and what the target has beyond them adds zeros."""
    target, draft = place / f"{shape}-q4_0.gguf", place / f"{shape}-of-{layers}-layers-q4_0.gguf"
    synthesize(target, shape=shape, type="Q4_0", seed=1)
    synthesize(draft, shape=replace(SHAPES[shape], layers=layers), type="Q4_0", seed=1)
    with GgufFile(target) as checkpoint:
        silent = [f"blk.{n}.{part}.weight" for n in range(layers, SHAPES[shape].layers) for part in RESIDUAL]
        places = [(checkpoint.tensors[name].offset, checkpoint.tensors[name].bytes) for name in silent]
    with open(target, "r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(bytes(count))  # blocks with a scale of zero
    return target, draft


def row_seconds(root: Path, digest: str) -> dict[int, float]:
    """Median seconds of a step of one sequence by its rows, all of which give logits; in turns."""
    pool = np.zeros(KV_BYTES, np.uint8)
    engine = Engine(root, threads=THREADS, pool=pool)
    try:
        entry = engine._bank.select(digest)
        pages = -(-(CONTEXT + max(ROWS)) // 32)
        tables = tuple(np.arange(pages, dtype=np.int64)[None] * owner.page_bytes for owner in entry.owners)
        ids = np.random.default_rng(1).integers(0, 256, CONTEXT + max(ROWS)).astype(np.int32)

        def step(begin: int, rows: int, outputs: int) -> float:
            every = np.arange(rows, dtype=np.int32)
            args = StepArgs(
                tokens=ids[begin : begin + rows],
                positions=begin + every,
                seq_start=np.array([0, rows], np.int32),
                context=np.array([begin], np.int32),
                block_tables=tables,
                output_rows=every[rows - outputs :].copy(),
            )
            began = time.perf_counter()
            entry.plan.forward(args, pool)
            return time.perf_counter() - began

        step(0, CONTEXT, 1)
        taken: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for _ in range(TIMES):
            for rows in ROWS:
                taken[rows].append(step(CONTEXT, rows, rows))
        return {rows: statistics.median(seconds) for rows, seconds in taken.items()}
    finally:
        engine.close()


def compare(llm: LLM, prompts: list[list[int]], speculate: Speculate, **sampling: Any) -> dict[str, Any]:
    """Tokens a second with and without guesses for the same answers, and what came of the guesses."""
    rates: dict[str, list[float]] = {"plain": [], "guessing": []}
    guessed = accepted = 0
    for number, prompt in enumerate(prompts):
        params = llm.sampling(max_tokens=TOKENS, seed=number, **sampling)
        answers = {}
        ways = [("plain", Speculate()), ("guessing", speculate)]
        for way, how in ways if number % 2 else ways[::-1]:
            answer = answers[way] = llm.generate(prompt, params, speculate=how)
            decode = answer.timing.decode if answer.timing is not None else 0.0
            rates[way].append((len(answer.token_ids) - 1) / decode)
            guessed, accepted = guessed + answer.guessed, accepted + answer.accepted
        if answers["plain"].token_ids != answers["guessing"].token_ids:
            sys.exit("the answers differ")
    gains = [fast / slow for fast, slow in zip(rates["guessing"], rates["plain"], strict=True)]
    return {
        **{way: statistics.median(each) for way, each in rates.items()},
        "gain": statistics.median(gains),
        "gains": gains,
        "guessed": guessed,
        "accepted": accepted,
    }


def repeating(draw: np.random.Generator) -> list[int]:
    pattern: list[int] = draw.integers(0, 256, 48).tolist()
    return pattern * 6


def unlike(draw: np.random.Generator) -> list[int]:
    ids: list[int] = draw.integers(0, 256, 288).tolist()
    return ids


def code(llm: LLM, draw: np.random.Generator) -> list[int]:
    """The tokens of some lines of a source file of VAI."""
    files = [file for file in sorted(Path(vai.__file__).parent.rglob("*.py")) if file.stat().st_size > 3 * PROMPT]
    text = files[draw.integers(len(files))].read_text()
    begin = text.find("\n\n", draw.integers(len(text) - 2 * PROMPT)) + 2
    return llm.encode(text[begin : begin + PROMPT])


def main(target: Path, draft: Path, rounds: int, *, trained: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="vai-bench-speculate-", dir="/dev/shm") as place:
        root, names = Path(place) / "root", Path(place) / "names"
        digests = {}
        for name, file in (("target", target), ("draft", draft)):
            warm(file)
            digests[name] = burn(file, root, threads=THREADS).digest
            Registry(root, names).put(Name(name, str(file), digest=digests[name]))
        rows = row_seconds(root, digests["target"])
        draft_step = row_seconds(root, digests["draft"])[1]
        lookup, guided = Speculate(kind="ngram"), Speculate(kind="draft", draft=digests["draft"])
        results = {}
        with LLM("target", root=root, names=names, threads=THREADS, kv_bytes=KV_BYTES) as llm:
            one, other = (partial(code, llm),) * 2 if trained else (repeating, unlike)
            cases: dict[str, tuple[Callable[[np.random.Generator], list[int]], Speculate, dict[str, float]]] = {
                f"lookup, {'code' if trained else 'repeating prompt'}, greedy": (one, lookup, {"temperature": 0}),
                f"lookup, {'code' if trained else 'nothing repeats'}, sampled": (other, lookup, {"temperature": 0.7}),
                "draft model, greedy": (other, guided, {"temperature": 0}),
                "draft model, sampled": (other, guided, {"temperature": 0.7}),
            }
            for case, (prompt, speculate, sampling) in cases.items():
                draw = np.random.default_rng(0 if trained else len(results))  # the same code for all
                results[case] = compare(llm, [prompt(draw) for _ in range(rounds)], speculate, **sampling)
    print(f"{cpu_name()}, {target.name}, draft {draft.name}, {THREADS} threads, {rounds} rounds")
    print("\nrows of a step   " + "".join(f"{count:8d}" for count in rows))
    print("milliseconds     " + "".join(f"{1e3 * each:8.1f}" for each in rows.values()))
    print("against one row  " + "".join(f"{each / rows[1]:8.2f}" for each in rows.values()))
    print(f"a step of the draft model: {1e3 * draft_step:.1f} ms, {draft_step / rows[1]:.2f} of one of the target\n")
    print(f"{'':34s}{'plain':>9s}{'guessing':>10s}{'gain':>7s}{'  (from, to)':14s}{'guessed':>9s}{'stood':>8s}")
    for case, found in results.items():
        stood = f"{100 * found['accepted'] / found['guessed']:.0f} %" if found["guessed"] else "-"
        spread = f"  ({min(found['gains']):.2f}, {max(found['gains']):.2f})"
        print(
            f"{case:34s}{found['plain']:9.1f}{found['guessing']:10.1f}{found['gain']:7.2f}{spread:14s}"
            f"{found['guessed']:9d}{stood:>8s}"
        )
    answer = {
        "bench": "speculate",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "target": target.name,
        "draft": draft.name,
        "threads": THREADS,
        "row_seconds": rows,
        "draft_step_seconds": draft_step,
        "tokens_per_second": results,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    files = [Path(argument) for argument in sys.argv[1:] if argument.endswith(".gguf")]
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    with tempfile.TemporaryDirectory(prefix="vai-bench-speculate-") as made:
        pair = files or agreeing_pair(Path(made))
        main(pair[0], pair[-1], numbers[0] if numbers else 3, trained=bool(files))
