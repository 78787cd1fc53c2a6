"""Whole models beside llama.cpp: decode steps of 1, 4, 8 and 16 rows and prompts of 96, 500, 512 and 4,096 tokens.

Run: python bench/decode.py FILE.gguf... --peers FOLDER, where FOLDER has llama-bench and llama-batched-bench. VAI runs
the forward pass of its Plan, llama.cpp its own programs with default settings and with repacking off; the same files,
the same threads, in turns: VAI, the one, VAI, the other, and again, so that VAI's samples enclose each of theirs. What
both leave out: sampling and text. Each of VAI's samples has the ceiling measured beside it: reading for decode, integer
products for prompts, bfloat16 tiles where whole pages are computed in those; exact ones have lines of their own.
With --openvino PYTHON, which has `openvino-genai`, OpenVINO takes its turn too: prompts, and decode of one row. Medians
with their spread, a ratio to the better of the two settings, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vai.burn.burn import burn
from vai.cli.bench.stand import warm
from vai.cli.bench.switch import cpu_name
from vai.engine.kinds import FEWEST
from vai.kernels import ceilings, table, tuning
from vai.kernels.program import MAX_ROWS, PAGE_TOKENS, StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom import segment

DECODE, PREFILL, LONG = (1, 4, 8, 16), (96, 500, 512), 4096
EXACT = ", exact"  # what a work's name ends in where VAI could have computed some of it in the fast kind
CONTEXT, STEPS = 8, 16  # tokens before the first decode step, and how many steps
WARM_UP = 8  # tokens of a prompt that is not counted; the peer's own warm-up is as long as what it measures
SETTINGS = {"llama.cpp default": ([], []), "llama.cpp no repack": (["--repack", "0"], ["--no-repack"])}

Samples = dict[str, dict[str, list[float]]]  # work -> who -> tokens/s


class Vai:
    """One file, burned and lowered."""

    def __init__(self, file: Path, root: Path, threads: int, isa: str | None) -> None:
        self.image = segment.attach(root, burn(file, root, threads=threads).digest)
        segment.collapse(self.image)
        self.program = build(Spec.from_bytes(self.image.spec))
        self.workers = table.make_workers(threads)
        self.isa = tuning.tune(self.workers, self.image.data, root / "run", isa=isa)
        self.plan = table.lower(
            self.program,
            self.image,
            max_rows=MAX_ROWS,
            max_sequences=max(DECODE),
            workers=self.workers,
            isa=self.isa,
            fast=None if isa else table.fast(None),
        )
        self.page = self.program.groups[0].page_bytes("bf16")
        self.pool = np.zeros(self.page * (LONG // PAGE_TOKENS), np.uint8)
        self.data = np.frombuffer(self.image.data, np.uint8)
        self.weight_bytes = sum(line.image_bytes for line in self.plan.describe() if line.products)
        self.products = sum(line.products for line in self.plan.describe() if not line.outputs)

    def step(self, rows: int, sequences: int, context: int, *, last: bool = True, fast: bool = False) -> StepArgs:
        """`sequences` of `rows` rows each, every one with `context` tokens before. last: of its prompt."""
        pages = self.pool.nbytes // self.page // sequences
        positions = np.tile(np.arange(context, context + rows, dtype=np.int32), sequences)
        return StepArgs(
            tokens=(np.arange(rows * sequences, dtype=np.int32) * 31 + context) % self.program.vocabulary,
            positions=positions,
            seq_start=np.arange(0, rows * sequences + 1, rows, dtype=np.int32),
            context=np.full(sequences, context, np.int32),
            block_tables=(np.arange(sequences * pages, dtype=np.int64).reshape(sequences, pages) * self.page,),
            output_rows=np.arange(rows - 1, rows * sequences if last else 0, rows, dtype=np.int32),
            kind="fast" if fast else "exact",
        )

    def decode(self, rows: int) -> float:
        """Tokens/s of STEPS steps."""
        began = time.perf_counter()
        for i in range(STEPS):
            self.plan.forward(self.step(1, rows, CONTEXT + i), self.pool)
        return rows * STEPS / (time.perf_counter() - began)

    def fast_tokens(self, tokens: int) -> int:
        """How many of a prompt are computed in the fast kind unless it is to be exact: the engine's rule."""
        pages = (tokens - 1) // PAGE_TOKENS
        return pages * PAGE_TOKENS if self.plan.fast and pages >= FEWEST else 0

    def prefill(self, tokens: int, fast: int) -> float:
        """Tokens/s of one prompt, in chunks as the engine makes them, of which the first `fast` tokens are fast."""
        began = time.perf_counter()
        first = 0
        while first < tokens:
            rows = min(MAX_ROWS, (fast if first < fast else tokens) - first)
            self.plan.forward(self.step(rows, 1, first, last=first + rows == tokens, fast=first < fast), self.pool)
            first += rows
        return tokens / (time.perf_counter() - began)

    def run(self, samples: Samples, shares: dict[str, list[float]], prompts: tuple[int, ...], decode: bool) -> None:
        """One sample of each work, and its share of the ceiling measured just after it."""
        for rows in DECODE if decode else ():
            speed = self.decode(rows)
            samples[f"decode {rows}"]["VAI"].append(speed)
            read = ceilings.read_rate(self.workers, self.isa, self.data)
            shares[f"decode {rows}"].append(speed / rows * self.weight_bytes / read)
        for tokens in prompts:
            name, fast = f"prefill {tokens}", self.fast_tokens(tokens)
            for work, own in ((name, fast), (name + EXACT, 0)) if fast else ((name, 0),):
                speed = self.prefill(tokens, own)
                samples[work]["VAI"].append(speed)
                rate = ceilings.multiply_rate(self.workers, self.isa, "bf16" if own else "int8")
                shares[work].append(speed * self.products / rate)


def output_of(words: list[str]) -> list[dict[str, Any]]:
    """The JSON lines that a peer's program prints."""
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in found if line.startswith("{")]


class Peer:
    """llama.cpp with one setting."""

    def __init__(self, folder: Path, file: Path, threads: int, setting: str) -> None:
        bench, batched = SETTINGS[setting]
        self.setting = setting
        self.bench = [f"{folder}/llama-bench", "-m", f"{file}", "-t", f"{threads}", "-n", "0", "-r", "1"]
        self.bench += ["--no-warmup", *bench]
        self.batched = [f"{folder}/llama-batched-bench", "-m", f"{file}", "-t", f"{threads}", *batched]
        self.batched += ["-c", "2048", "-b", "2048", "-ub", "512", "-npp", str(CONTEXT), "-ntg", str(STEPS)]
        self.batched += ["-npl", ",".join(map(str, DECODE))]

    def run(self, samples: Samples, prompts: tuple[int, ...], decode: bool) -> None:
        """One sample of each work."""
        if decode:
            for found in output_of([*self.batched, "--output-format", "jsonl"]):
                samples[f"decode {found['pl']}"][self.setting].append(found["speed_tg"])
        if prompts:
            sizes = ",".join(map(str, (WARM_UP, *prompts)))
            for found in output_of([*self.bench, "-p", sizes, "-o", "jsonl"]):
                if found["n_prompt"] != WARM_UP:
                    samples[f"prefill {found['n_prompt']}"][self.setting].append(found["avg_ts"])

    def flags(self) -> dict[str, str]:
        """What was run, without machine paths."""
        return {"decode": " ".join(self.batched[3:]), "prefill": " ".join(self.bench[3:])}


class OpenVino:
    """OpenVINO GenAI, in a process that stays: it compiles the model when it starts."""

    setting = "OpenVINO"

    def __init__(self, python: Path, file: Path, threads: int) -> None:
        words = [f"{python}", f"{Path(__file__).with_name('openvino_peer.py')}", f"{file}", f"{threads}"]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer("ready")

    def run(self, samples: Samples, prompts: tuple[int, ...], decode: bool) -> None:
        """One sample of each work it can do."""
        if decode:
            samples["decode 1"][self.setting].append(self._ask(f"decode {STEPS}"))
        for tokens in prompts:
            samples[f"prefill {tokens}"][self.setting].append(self._ask(f"prefill {tokens}"))

    def flags(self) -> dict[str, str]:
        """How it was set."""
        return {"both": "CPU, INFERENCE_NUM_THREADS as ours"}

    def close(self) -> None:
        """End its process."""
        self._process.terminate()
        self._process.wait()

    def _ask(self, work: str) -> float:
        self._process.stdin.write(work + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self, wanted: str = "") -> str:
        """The next line that it prints of its own accord, which other lines may stand before."""
        for line in self._process.stdout:
            if line.strip() == wanted or (not wanted and line[:1].isdigit()):
                return line
        raise RuntimeError("OpenVINO's process ended; what it said stands above.")


def measure(file: Path, given: argparse.Namespace, until: float, long: bool) -> dict[str, Any]:
    """All works of one file: as many rounds as are asked for, or as begin before `until` on the clock."""
    warm(file)
    samples: Samples = defaultdict(lambda: defaultdict(list))
    shares: dict[str, list[float]] = defaultdict(list)
    peers: list[Peer | OpenVino] = [Peer(given.peers, file, given.threads, setting) for setting in SETTINGS]
    if given.openvino:
        peers.append(OpenVino(given.openvino, file, given.threads))
    with tempfile.TemporaryDirectory(prefix="vai-bench-decode-", dir="/dev/shm") as place:
        vai = Vai(file, Path(place) / "root", given.threads, given.isa)
        vai.decode(1), vai.prefill(256, vai.fast_tokens(256))
        for done in range(given.rounds):
            if done and time.monotonic() > until:
                break
            for peer in peers:
                vai.run(samples, shares, PREFILL, decode=True)
                peer.run(samples, PREFILL, decode=True)
        vai.run(samples, shares, PREFILL, decode=True)
        if long:
            prompt = f"prefill {PREFILL[-1]}"
            best = max(peers[: len(SETTINGS)], key=lambda peer: statistics.median(samples[prompt][peer.setting]))
            for peer in [best, *peers[len(SETTINGS) :]]:
                vai.run(samples, shares, (LONG,), decode=False)
                peer.run(samples, (LONG,), decode=False)
            vai.run(samples, shares, (LONG,), decode=False)
        isa_used, fast_used = vai.isa, vai.plan.fast
        vai.image.close()
    for peer in peers:
        if isinstance(peer, OpenVino):
            peer.close()
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "isa": isa_used,
        "fast": fast_used,
        "flags": {peer.setting: peer.flags() for peer in peers},
        "samples": {work: dict(by) for work, by in samples.items()},
        "shares": dict(shares),
    }


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):7.1f} ({min(values):.1f} to {max(values):.1f})"


def ratio(by: dict[str, list[float]], *peers: str) -> str:
    """VAI's median to the best of these peers'."""
    medians = [statistics.median(by[peer]) for peer in peers if by.get(peer)]
    return f"{statistics.median(by['VAI']) / max(medians):.2f}x" if medians else "-"


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['file']}, {found['bytes'] / 1e6:.0f} MB, VAI on {found['isa']}, fast kind: {found['fast']}")
    for setting, flags in found["flags"].items():
        for work, words in flags.items():
            print(f"  {setting}, {work}: {words}")
    heads = "".join(f"{who:<26}" for who in found["flags"])
    print(f"{'tokens/s':<22}{'VAI':<26}{'of ceiling':<12}{heads}to llama.cpp at its better  to OpenVINO")
    for work, by in found["samples"].items():
        share = f"{statistics.median(found['shares'][work]):.0%}"
        by = found["samples"][work.removesuffix(EXACT)] | by  # peers have one kind
        cells = "".join(f"{spread(by.get(who, [])):<26}" for who in found["flags"])
        ratios = f"{ratio(by, *SETTINGS):<28}{ratio(by, OpenVino.setting)}"
        print(f"{work:<22}{spread(by['VAI']):<26}{share:<12}{cells}{ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--openvino", type=Path, help="a Python that has openvino-genai")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="force a lower instruction set on our side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=9.0, help="when no other round of a file begins")
    parser.add_argument("--long", action="store_true", help=f"also {LONG} tokens, of the first file")
    given = parser.parse_args()
    began = time.monotonic()
    print(f"{cpu_name()}, {given.threads} threads, up to {given.rounds} rounds")
    results = []
    for number, file in enumerate(given.files, 1):
        until = began + 60 * given.minutes * (number - 0.5) / len(given.files)
        results.append(measure(file, given, until, given.long and number == 1))
        show(results[-1])
    answer = {
        "bench": "decode",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": given.threads,
        "context": CONTEXT,
        "steps": STEPS,
        "files": results,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
