"""Recompute pair.json: what the two models that VAI brings write, and SHA-256 of all the logits on the way.

    python tests/golden/pair.py

By the reference alone. An entry: model; prompt; `text`, the COUNT likeliest tokens behind it; sha256 over the
little-endian binary32 logits of every token of the prompt and every token written but the last. They change with the
models, and with nothing else.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from vai.burn.burn import burn
from vai.cli import shipped
from vai.kernels.program import PAGE_TOKENS, Plan, Program, StepArgs
from vai.kernels.reference import ReferencePlan
from vai.llm import LLM
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.registry import Name, Registry
from vai.rom.segment import attach

PAIR = Path(__file__).with_name("pair.json")
PROMPTS = ("with open(path) as file:\n    for line in", "class Stack:\n    def __init__(self, items):\n")
COUNT = 32
ROOM = 96  # tokens of a prompt and what is written behind it


def follow(plan: Plan, program: Program, prompt: list[int]) -> tuple[list[int], str]:
    """(the COUNT likeliest tokens behind the prompt, SHA-256 of the logits)."""
    page, pages = program.groups[0].page_bytes(plan.kv_type), ROOM // PAGE_TOKENS
    pool, logged = np.zeros(pages * page, np.uint8), hashlib.sha256()
    written: list[int] = []
    rows, done = prompt, 0
    while True:
        every = np.arange(len(rows), dtype=np.int32)
        step = StepArgs(
            tokens=np.array(rows, np.int32),
            positions=done + every,
            seq_start=np.array([0, len(rows)], np.int32),
            context=np.array([done], np.int32),
            block_tables=(np.arange(pages, dtype=np.int64)[None] * page,),
            output_rows=every,
        )
        logits = plan.forward(step, pool)
        logged.update(logits.astype("<f4").tobytes())
        written.append(int(logits[-1].argmax()))
        if len(written) == COUNT:
            return written, logged.hexdigest()
        done += len(rows)
        rows = written[-1:]


def main() -> None:
    entries = []
    with tempfile.TemporaryDirectory() as directory:
        root, names = Path(directory) / "root", Path(directory) / "names"
        for file in shipped.pair():
            digest = burn(file, root).digest
            Registry(root, names).put(Name(file.stem, str(file), digest=digest))
            with (
                attach(root, digest) as image,
                LLM(file.stem, root=root, names=names, threads=1, kv_bytes=64 << 20) as llm,
            ):
                program = build(Spec.from_bytes(image.spec))
                plan = ReferencePlan(program, image, kv_type="bf16", max_rows=ROOM, max_sequences=ROOM)
                for prompt in PROMPTS:
                    written, logits = follow(plan, program, llm.encode(prompt))
                    text = llm.decode(written)
                    entries.append({"model": file.stem, "prompt": prompt, "text": text, "sha256": logits})
    PAIR.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
