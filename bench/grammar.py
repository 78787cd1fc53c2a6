"""Structured output: what a grammar costs to compile, a mask to make, and a token under it to wait.

Run: python bench/grammar.py [FILE.gguf] [--tokens 96] [--seed 1]. Without a file, a qwen2-0.5b with random weights
and a vocabulary of 152,000 is made. Masks are made for an answer drawn at random from what the grammar allows, so that
all of its parts come up. Through the engine, the same model answers in turns with and without the grammar, greedy, one
stream without guesses: a mask travels while the step that needs it computes, so what is left could not be hidden.

A table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vai.burn.burn import burn
from vai.burn.synth import synthesize
from vai.cli.bench.switch import cpu_name
from vai.llm import LLM
from vai.models.spec import Spec
from vai.request import SamplingParams, Speculate
from vai.rom import segment
from vai.rom.registry import Name, Registry
from vai.text.grammar import Grammars, GrammarSpec

ROUNDS = 3
PLAIN = Speculate(kind="none")
TEXT = {"type": "string"}
SCHEMAS: dict[str, Any] = {
    "flat": {
        "type": "object",
        "properties": {"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 200},
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"id": {"type": "integer"}, "price": {"type": "number"}, "tags": {"type": "array"}},
                    "required": ["id", "price", "tags"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["title", "items"],
        "additionalProperties": False,
    },
    "200 properties": {
        "type": "object",
        "properties": {f"property_{number}": TEXT for number in range(200)},
        "required": [f"property_{number}" for number in range(200)],
        "additionalProperties": False,
    },
    "enum of 1,000": {"enum": [f"value {number}" for number in range(1000)]},
    "any JSON": {"type": "object"},
}
SPECS = {
    **{name: GrammarSpec("json_schema", json.dumps(schema)) for name, schema in SCHEMAS.items()},
    "date (regex)": GrammarSpec("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}( [0-9]{2}:[0-9]{2})?"),
}


def allowed(bits: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))


def masks(grammars: Grammars, spec: GrammarSpec, vocabulary: int, tokens: int, dice: random.Random) -> list[float]:
    """Seconds of every next mask, over as many answers as it takes."""
    seconds: list[float] = []
    while len(seconds) < tokens:
        matcher = grammars.matcher(spec, vocabulary)
        while not matcher.finished and len(seconds) < tokens:
            token = int(dice.choice(allowed(matcher.bits)))
            began = time.perf_counter()
            matcher.accept(token)
            seconds.append(time.perf_counter() - began)
        matcher.close()
    return seconds


def gaps(model: LLM, spec: GrammarSpec | None, tokens: int) -> list[float]:
    """Seconds between the tokens of one answer."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=0 if spec else tokens)
    times = [time.perf_counter() for _ in model.stream("Answer:", sampling, grammar=spec, speculate=PLAIN)]
    return [float(each) for each in np.diff(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, and masks of a grammar")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    dice = random.Random(given.seed)
    answer: dict[str, Any] = {"bench": "grammar", "date": datetime.now(UTC).isoformat(timespec="seconds")}
    answer |= {"cpu": cpu_name(), "grammars": []}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vai-bench-") as place:
        file = given.file
        if file is None:
            file = Path(place) / "qwen2-0.5b-q4_0.gguf"
            synthesize(file, shape="qwen2-0.5b", type="Q4_0", seed=given.seed)
        root, names = Path(place) / "root", Path(place) / "names"
        digest = burn(file, root).digest
        Registry(root, names).put(Name("model", str(file), digest=digest))
        with segment.attach(root, digest) as image:
            sections = image.section("tokenizer"), image.section("template")
            vocabulary = Spec.from_bytes(image.spec).vocabulary
        print(
            f"{cpu_name()}, {given.threads} threads, {file.name}: {vocabulary:,} tokens, {vocabulary // 8:,} B a mask"
        )
        print(
            f"{'grammar':<16}{'first ms':>10}{'again ms':>10}{'mask p50 us':>13}{'p99 us':>10}"
            f"{'token p50 ms':>14}{'plain':>8}"
        )
        grammars = Grammars(lambda: sections)
        with LLM("model", root=root, names=names, threads=given.threads) as model:
            began = time.perf_counter()
            grammars.matcher(GrammarSpec("regex", "x"), vocabulary).close()
            answer["index_seconds"] = time.perf_counter() - began
            for name, spec in SPECS.items():
                times = []
                for _ in range(2):
                    began = time.perf_counter()
                    grammars.matcher(spec, vocabulary).close()
                    times.append(time.perf_counter() - began)
                made = np.array(masks(grammars, spec, vocabulary, given.tokens, dice))
                under, plain = list[float](), list[float]()
                for _ in range(ROUNDS):
                    under += gaps(model, spec, given.tokens)
                    plain += gaps(model, None, given.tokens)
                p50, p99 = np.percentile(made, [50, 99])
                row = {
                    "grammar": name, "first": times[0], "again": times[1], "mask_p50": float(p50),
                    "mask_p99": float(p99), "masks": len(made), "token_p50": float(np.median(under or [np.nan])),
                    "token_p99": float(np.percentile(under or [np.nan], 99)), "plain_p50": float(np.median(plain)),
                    "plain_p99": float(np.percentile(plain, 99)),
                }  # fmt: skip
                answer["grammars"].append(row)
                print(
                    f"{name:<16}{times[0] * 1e3:>10.1f}{times[1] * 1e3:>10.1f}{p50 * 1e6:>13.0f}{p99 * 1e6:>10.0f}"
                    f"{row['token_p50'] * 1e3:>14.1f}{row['plain_p50'] * 1e3:>8.1f}",
                    flush=True,
                )
        grammars.close()
    print(f"the first grammar of all, which indexes the vocabulary: {answer['index_seconds']:.2f} s")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
