"""Which matrices deserve more bits: measured on held-out text, chosen under a budget, beside the uniform choices.

Run: python -m train.quantize MODEL.gguf CORPUS OUT [--budget BYTES]. MODEL.gguf has float matrices (train.export). Each
unit (matrices that VAI stores together, one layer's) is narrowed alone, all others of the widest type, and the text's
loss is measured with VAI's own kernels. Then units are widened from the narrowest type, always the one with the
greatest measured gain a byte, as long as the file stays under the budget. That effects add up is an assumption; the
table shows how far it holds, on other documents than those that decided.

OUT gets recipe.json, table.json and a GGUF file for each line of the table; measured.jsonl, so that the same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.evaluate import held_out
from train.score import Score, score
from vai.burn.gguf import GgufFile, GgufTensor, tensor_bytes
from vai.burn.quantize import FLOATS, matrices, quantize

TYPES = ("Q4_0", "Q5_0", "Q8_0")
ALL = "all"  # as a unit: every matrix
# Stored together where their types are equal (vai/burn/pack.py): they get one type.
TOGETHER = {
    "attn_q": "attn_qkv",
    "attn_k": "attn_qkv",
    "attn_v": "attn_qkv",
    "ffn_gate": "gate_up",
    "ffn_up": "gate_up",
}

Units = Mapping[str, Sequence[GgufTensor]]
Losses = Mapping[tuple[str, str], float]  # (unit, type) -> bits of the whole text


class Choice(NamedTuple):
    """The type of each unit, and the bytes of all their matrices."""

    types: Mapping[str, str]
    bytes: int


def units(file: GgufFile) -> dict[str, list[GgufTensor]]:
    """Matrices by the unit they belong to. Raises SystemExit where some are quantized already."""
    found: dict[str, list[GgufTensor]] = {}
    for tensor in matrices(file):
        if tensor.type not in FLOATS:
            raise SystemExit(f"{tensor.name} is {tensor.type}; give a file of floats, as train.export writes it.")
        layer, member = re.fullmatch(r"(blk\.\d+\.)?(.+)\.weight", tensor.name).groups()
        found.setdefault((layer or "") + TOGETHER.get(member, member), []).append(tensor)
    return found


def bytes_of(unit: Sequence[GgufTensor], type: str) -> int:
    return sum(tensor_bytes(type, tensor.shape) for tensor in unit)


def choose(found: Units, losses: Losses, types: Sequence[str], budget: int) -> Choice:
    """Types under which the matrices fit `budget` bytes, from the narrowest type by gain a byte.

    types: from narrow to wide. Raises SystemExit where not even the narrowest fit.
    """
    chosen = dict.fromkeys(found, types[0])
    total = sum(bytes_of(unit, types[0]) for unit in found.values())
    if total > budget:
        raise SystemExit(f"Not even {types[0]} fits: the matrices take {total:,} bytes of {budget:,}.")
    while True:
        best: tuple[float, str, str, int] | None = None
        for name, unit in found.items():
            for type in types[types.index(chosen[name]) + 1 :]:
                more = bytes_of(unit, type) - bytes_of(unit, chosen[name])
                gain = (losses[name, chosen[name]] - losses[name, type]) / more
                if total + more <= budget and gain > 0 and (best is None or gain > best[0]):
                    best = (gain, name, type, more)
        if best is None:
            return Choice(chosen, total)
        _, name, type, more = best
        chosen[name] = type
        total += more


def keep(found: Units, types: Mapping[str, str]) -> list[tuple[str, str]]:
    """What `quantize` is to be told, matrix by matrix."""
    return [(tensor.name, types[name]) for name, unit in found.items() for tensor in unit if name in types]


def measure(
    model: Path, found: Units, types: Sequence[str], tokens: np.ndarray, out: Path
) -> dict[tuple[str, str], float]:
    """Bits of the text with one unit of each type and all others of the widest. What OUT/measured.jsonl knows is not
    done again if it was measured with the same model and text."""
    key = hashlib.sha256(model.read_bytes() + tokens.tobytes() + types[-1].encode()).hexdigest()
    log = out / "measured.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(line["unit"], line["type"]): line["bits"] for line in lines if line["of"] == key}
    wanted = [(name, type) for name in found for type in types[:-1]]
    for number, (name, type) in enumerate([(ALL, types[-1]), *wanted], start=1):
        if (name, type) in known:
            continue
        trial = out / "trial.gguf"
        quantize(model, trial, type=types[-1], keep=keep(found, {name: type}))
        known[name, type] = score(trial, tokens).bits
        trial.unlink()
        with log.open("a") as file:
            file.write(json.dumps({"of": key, "unit": name, "type": type, "bits": known[name, type]}) + "\n")
        print(f"{number}/{len(wanted) + 1}  {name:24} {type:5} {known[name, type]:.1f} bits", flush=True)
    return known | {(name, types[-1]): known[ALL, types[-1]] for name in found}


def table(files: Mapping[str, Path], tokens: np.ndarray, size: int) -> dict[str, dict[str, float]]:
    """Bytes, bits a byte of text, and the share of places where the likeliest token is that of the first file."""
    rows: dict[str, dict[str, float]] = {}
    first: Score | None = None
    for name, path in files.items():
        found = score(path, tokens)
        first = first or found
        agreement = float((found.greedy == first.greedy).mean())
        rows[name] = {"bytes": path.stat().st_size, "bits_per_byte": found.bits / size, "agreement": agreement}
        print(
            f"{name:10} {path.stat().st_size:12,} bytes  {found.bits / size:7.4f} bits a byte  "
            f"{100 * agreement:6.2f} % of the greedy tokens",
            flush=True,
        )
    return rows


def run(
    model: Path, corpus: Path, out: Path, *, types: Sequence[str], budget: int | None, tried: int, reported: int
) -> None:
    """Measure on the first `tried` bytes of the held-out text, report on `reported` bytes behind them. budget: bytes of
    the whole file; None: halfway between all matrices narrow and all wide. Raises SystemExit where no text is left."""
    out.mkdir(parents=True, exist_ok=True)
    deciding, tokens = held_out(corpus, tried)
    text, reporting = held_out(corpus, len(deciding) + reported)
    text, reporting = text[len(deciding) :], reporting[len(tokens) :]
    if not text:
        raise SystemExit("No held-out text is left to report on; give fewer --bytes or more --report-bytes.")
    with GgufFile(model) as file:
        found = units(file)
        others = model.stat().st_size - sum(tensor.bytes for unit in found.values() for tensor in unit)
    narrow, wide = (sum(bytes_of(unit, type) for unit in found.values()) for type in (types[0], types[-1]))
    matrices_budget = (narrow + wide) // 2 if budget is None else budget - others
    losses = measure(model, found, types, tokens, out)
    choice = choose(found, losses, types, matrices_budget)
    files = {"float": model}
    for name, kept in (*((type, []) for type in types), ("mixed", keep(found, choice.types))):
        files[name] = out / f"{name.lower()}.gguf"
        quantize(model, files[name], type=types[0] if kept else name, keep=kept)
    recipe = {
        "model": hashlib.sha256(model.read_bytes()).hexdigest(),
        "type": types[0],
        "keep": [list(pair) for pair in keep(found, choice.types) if pair[1] != types[0]],
    }
    (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    rows = table(files, reporting, len(text))
    (out / "table.json").write_text(json.dumps({"bytes_of_text": len(text), "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose the type of each matrix by its measured effect.")
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="from narrow to wide")
    parser.add_argument("--budget", type=int, help="bytes of the mixed file; halfway if not given")
    parser.add_argument("--bytes", type=int, default=64 << 10, help="of held-out text to measure one matrix with")
    parser.add_argument(
        "--report-bytes", type=int, default=1 << 20, help="of the held-out text behind that, for the table"
    )
    args = parser.parse_args()
    run(
        args.model,
        args.corpus,
        args.out,
        types=args.types,
        budget=args.budget,
        tried=args.bytes,
        reported=args.report_bytes,
    )


if __name__ == "__main__":
    main()
