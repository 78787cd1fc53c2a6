"""The proof: two models resident, ten short prompts alternating between them, and what switch, attach and crash cost.

What is measured; all but the first on images of 2 MiB pages, which is what a burner leaves behind:
- the engine killed: from SIGKILL to one finished decode step of the new engine, with 4 KiB and, later, 2 MiB pages;
- the table: each prompt sent by a fresh client process: first token, total, tokens per second;
- Δswitch (a): the engine's own time from the scheduler's pick to the native call, switched and not;
- Δswitch (b): paired first tokens, A after B minus A after A, adjacent, in random order, by a raw-socket client;
- attach by new processes: time, private memory, and the shared memory of one and of eight of them;
- everything killed: from `vai serve` to the first answer, and the bytes read from disk;
- beside them, what reloading costs: burning the file again, and a plain start of a peer.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

import vai
from vai.burn.burn import burn
from vai.burn.synth import synthesize
from vai.cli import shipped
from vai.cli.bench import client as fresh_client
from vai.cli.bench.client import Raw
from vai.cli.bench.peer import start as start_peer
from vai.cli.bench.stand import Stand, warm
from vai.cli.bench.stats import median_interval, percentile
from vai.errors import BadRequest, VaiError
from vai.llm import connect
from vai.rom import segment
from vai.rom.registry import Name

LARGE = ("qwen2-1.5b", "deepseek-coder-6.7b")
# Beginnings that a model of code can go on with. They end where a token does: not in a blank, not before a line's end.
PROMPTS = (
    "def factorial(n):\n",
    "class Stack:\n    def __init__(self, items):\n",
    "for index in range(10):\n    print(",
    "def reverse(items):\n    result = []\n    for item in",
    "import os\nimport",
    "def is_prime(n):\n    if n < 2:\n        return",
    "with open(path) as file:\n    for line in",
    "try:\n    value = int(text)\nexcept",
    'def read_file(path):\n    """Read',
    'if __name__ == "__main__":\n',
)
TOKENS = 24
SHOWN = 100  # characters of a prompt and its answer
PEER_FLAGS: tuple[list[str], ...] = ([], ["--no-repack"], ["--load-mode", "none"])


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if abs(seconds) >= 1e-4 else f"{seconds * 1e6:.1f} us"


def title(text: str) -> None:
    click.echo(f"\n{text}\n{'-' * len(text)}")


def files_of(files: list[Path], *, large: bool, cache: Path, folder: Path = shipped.FOLDER) -> list[Path]:
    """`files`, or where none are given the pair in `folder`; if `large`, two of LARGE with random weights, in `cache`.

    Raises BadRequest where there is nothing to take.
    """
    if not large:
        if not files and not (files := shipped.pair(folder)):
            raise BadRequest("This installation brings no models; name two GGUF files, or make two with --large.")
        return files
    cache.mkdir(parents=True, exist_ok=True)
    made = []
    for shape in LARGE:
        path = cache / f"{shape}-q4_0.gguf"
        if not path.exists():
            click.echo(f"Making {path.name}: seeded random weights at their true cost ...")
            partial = path.with_suffix(".partial")
            synthesize(partial, shape=shape, type="Q4_0", seed=0)
            partial.rename(path)
        made.append(path)
    return made


def burn_all(stand: Stand, files: list[Path]) -> dict[str, str]:
    """Burn and name both files; pages stay 4 KiB until `collapse`. Returns name -> digest."""
    named = {}
    for file in files:
        warm(file)
        burned = burn(file, stand.root, threads=2, huge_pages=False)
        name = file.stem
        stand.registry().put(Name(name=name, source=str(file), recipe={}, digest=burned.digest, overrides={}))
        named[name] = burned.digest
        rate = burned.bytes / burned.seconds / 1e6
        click.echo(f"burned {name}: {burned.bytes / 1e6:.0f} MB in {burned.seconds:.2f} s, {rate:.0f} MB/s")
    return named


def collapse(stand: Stand, digest: str) -> None:
    """Rebuild an image of 2 MiB pages. Its mapping in this process ends here: it would count in everybody's share."""
    with segment.attach(stand.root, digest) as image:
        segment.collapse(image)


def table(stand: Stand, models: list[str]) -> list[dict[str, Any]]:
    title("Ten prompts, alternating, each sent by a fresh client process")
    click.echo(f"{'#':>2}  {'model':28} {'first token':>12} {'total':>9} {'tokens/s':>9}")
    rows = []
    for number, prompt in enumerate(PROMPTS, start=1):
        model = models[(number - 1) % 2]
        order = {"host": "127.0.0.1", "port": stand.port, "model": model, "prompt": prompt, "max_tokens": TOKENS}
        command = [sys.executable, fresh_client.__file__, json.dumps(order)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=300).stdout)
        rate = (answer["tokens"] - 1) / (answer["total"] - answer["first"])
        row = {"model": model, "first": answer["first"], "total": answer["total"], "tokens_per_second": rate}
        rows.append({**row, "prompt": prompt, "text": answer["text"]})
        click.echo(f"{number:>2}  {model:28} {answer['first'] * 1e3:>9.1f} ms {answer['total']:>7.2f} s {rate:>9.1f}")
        click.echo("    " + json.dumps(prompt + answer["text"], ensure_ascii=False)[1:-1][:SHOWN])
    return rows


def alternating_steps(stand: Stand, models: list[str], steps: int) -> dict[str, Any]:
    """Δswitch (a): one-token prompts in random order until the engine has timed `steps` steps."""
    title("Δswitch (a): from the scheduler's pick to the native call, engine timer")

    async def switches() -> Any:
        port = connect(stand.root / "run/engine.sock")
        try:
            return await port.switches()
        finally:
            await port.close()

    asyncio.run(switches())
    raw, generator = Raw("127.0.0.1", stand.port), random.Random(1)  # noqa: S311 - an order, not a secret
    for _ in range(steps):
        raw.post("/v1/completions", one_token(generator.choice(models), generator.randrange(256)))
    raw.close()
    timed = asyncio.run(switches())
    result: dict[str, Any] = {}
    for name, values in (("same", timed.same), ("switched", timed.switched)):
        p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
        result[name] = {"n": len(values), "p50": p50, "p99": p99}
        click.echo(f"{name:>9}: p50 {milliseconds(p50)}, p99 {milliseconds(p99)}, n = {len(values)}")
    return result


def one_token(model: str, token: int) -> dict[str, Any]:
    return {"model": model, "prompt": [token], "max_tokens": 1, "temperature": 0, "cache_prompt": False}


def paired(stand: Stand, models: list[str], pairs: int) -> dict[str, Any]:
    """Δswitch (b) for both models: adjacent pairs in random order, one-token prompts, no prefix to reuse."""
    title("Δswitch (b): first token of A after B minus A after A, paired")
    raw, generator, result = Raw("127.0.0.1", stand.port), random.Random(2), {}  # noqa: S311 - an order, not a secret

    def first_token_after(before: str, model: str) -> float:
        raw.post("/v1/completions", one_token(before, generator.randrange(256)))
        return raw.post("/v1/completions", one_token(model, generator.randrange(256)))[0]

    for model, other in (models, models[::-1]):
        for _ in range(5):
            first_token_after(other, model)
        differences, plain = [], []
        for _ in range(pairs):
            orders = [other, model]
            generator.shuffle(orders)
            seconds = {before: first_token_after(before, model) for before in orders}
            differences.append(seconds[other] - seconds[model])
            plain.append(seconds[model])
        middle, low, high = median_interval(differences)
        first = statistics.median(plain)
        result[model] = {"n": pairs, "median": middle, "low": low, "high": high, "first_token": first}
        share = f"{100 * high / first:.2f} % of the first token ({milliseconds(first)})"
        click.echo(
            f"{model:28} median {milliseconds(middle)}, 95 % [{milliseconds(low)}, {milliseconds(high)}], n = {pairs}; "
            f"upper end {share}"
        )
    raw.close()
    return result


def pss_shmem(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Shmem:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss_Shmem")


def attach(stand: Stand, digest: str) -> dict[str, Any]:
    """Attach by new processes, every page touched: one, then eight at a time. The engine must be stopped."""
    title("Attach by new processes, every page touched")
    result: dict[str, Any] = {}
    for count in (1, 8):
        command = [sys.executable, "-m", "vai.cli.bench.attach", str(stand.root), digest]
        readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
        answers = [json.loads(reader.stdout.readline()) for reader in readers if reader.stdout]
        shared = sum(pss_shmem(reader.pid) for reader in readers)
        for reader in readers:
            reader.communicate()
        bytes_ = answers[0]["bytes"]
        result[str(count)] = {
            "attach": statistics.median(answer["attach"] for answer in answers),
            "rss_anon_growth": max(answer["rss_anon_growth"] for answer in answers),
            "pss_shmem": shared,
            "bytes": bytes_,
        }
        of_one = result[str(count)]
        click.echo(
            f"{count} process{'es' if count > 1 else ''}: attach {milliseconds(of_one['attach'])}, private growth "
            f"{of_one['rss_anon_growth'] / 1e3:.0f} kB, shared memory together {shared / 1e6:.1f} MB "
            f"= {100 * shared / bytes_:.2f} % of one image"
        )
    return result


def engine_killed(stand: Stand, models: list[str], times: int) -> dict[str, Any]:
    """Median seconds from SIGKILL to the new engine's first decode step of each model, less a warm one."""
    result = {}
    for model in models:
        seconds = []
        for _ in range(times):
            warm = statistics.median(stand.one_token(model, [65]) for _ in range(3))
            start = time.perf_counter()
            stand.kill("engine")
            stand.one_token(model, [65])
            seconds.append(time.perf_counter() - start - warm)
        result[model] = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        click.echo(f"{model:28} {result[model]:.2f} s ({spread}, n = {times})")
    return result


def read_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError(f"/proc/{pid}/io has no read_bytes")


def everything_killed(stand: Stand, models: list[str]) -> dict[str, Any]:
    title("Everything killed with SIGKILL, then `vai serve` again")
    stand.kill()
    start = time.perf_counter()
    stand.start()
    stand.one_token(models[0], [65])
    first = time.perf_counter() - start
    stand.one_token(models[1], [65])
    both = time.perf_counter() - start
    read = read_bytes(stand.pids()["engine"])
    click.echo(
        f"first answer after {first:.2f} s, both models after {both:.2f} s; "
        f"bytes its engine read from disk, of whatever file: {read}"
    )
    return {"first_answer": first, "both": both, "read_bytes": read}


def reload(stand: Stand, files: list[Path], peer: Path | None) -> dict[str, Any]:
    title("Beside it: what reloading costs")
    result: dict[str, Any] = {}
    for file in files:
        warm(file)
        with tempfile.TemporaryDirectory(prefix="vai-bench-reload-", dir="/dev/shm") as root:
            burned = burn(file, Path(root), threads=2)
        result[file.stem] = {"burn": burned.seconds, "bytes": burned.bytes}
        click.echo(f"{file.stem:28} burning the file again: {burned.seconds:.2f} s")
        if peer is None:
            continue
        runs = [start_peer(peer, file, stand.threads, flags) for flags in PEER_FLAGS]
        for run_ in runs:
            click.echo(
                f"{'':28} {peer.name} ready {run_['ready']:.2f} s, first answer {run_['first_answer']:.2f} s, "
                f"holds {run_['pss'] / 1e6:.0f} MB, {run_['tokens_per_second']:.1f} tokens/s  [{run_['flags']}]"
            )
        result[file.stem]["peer"] = runs
    return result


def own_rate(stand: Stand, models: list[str], tokens: int = 32) -> dict[str, float]:
    """Decode tokens per second at one stream, median of three."""
    rates: dict[str, float] = {}
    for model in models:
        runs = []
        for _ in range(3):
            answer = fresh_client.stream("127.0.0.1", stand.port, model, PROMPTS[0], tokens)
            runs.append((answer["tokens"] - 1) / (answer["total"] - answer["first"]))
        rates[model] = statistics.median(runs)
        click.echo(f"{model:28} one stream: {rates[model]:.1f} tokens/s")
    return rates


def run(files: list[Path], *, large: bool, demo: bool, pairs: int, peer: Path | None, cache: Path | None) -> None:
    """The whole benchmark, printed as it goes. Raises VaiError."""
    threads = len(os.sched_getaffinity(0))
    own_cache = Path(tempfile.mkdtemp(prefix="vai-bench-models-")) if cache is None and large else None
    result: dict[str, Any] = {
        "bench": "switch",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": threads,
        "vai": vai.__version__,
    }
    click.echo(f"{result['cpu']}, {threads} threads, {result['date']}")
    try:
        sources = files_of(files, large=large, cache=cache or own_cache or Path())
        with Stand(threads=threads, kv_bytes=1 << 30) as stand:
            result |= measure(
                stand, sources, pairs=pairs, times=3 if demo else 5, steps=2400 if not demo else 200, peer=peer
            )
    finally:
        if own_cache:
            shutil.rmtree(own_cache, ignore_errors=True)
    click.echo(json.dumps(result))


def measure(
    stand: Stand, files: list[Path], *, pairs: int, times: int, steps: int, peer: Path | None
) -> dict[str, Any]:
    named = burn_all(stand, files)
    models = list(named)
    stand.start()
    for model in models:
        stand.one_token(model, [65])
    title("The engine killed with SIGKILL, 4 KiB pages")
    small = engine_killed(stand, models, times)
    for digest in named.values():  # as every burner does when it has published
        collapse(stand, digest)
    parts: dict[str, Callable[[], Any]] = {
        "table": lambda: table(stand, models),
        "rate": lambda: own_rate(stand, models),
        "pick_to_call": lambda: alternating_steps(stand, models, steps),
        "paired": lambda: paired(stand, models, pairs),
    }
    result: dict[str, Any] = {"models": named} | {name: part() for name, part in parts.items()}
    result["engine_killed_small_pages"] = small
    title("The engine killed with SIGKILL, 2 MiB pages")
    huge = result["engine_killed_huge_pages"] = engine_killed(stand, models, times)
    ratio = huge[models[1]] / huge[models[0]]
    result["engine_killed_ratio"] = ratio
    click.echo(f"the second model takes {ratio:.2f} times the first")
    result["everything_killed"] = everything_killed(stand, models)
    stand.stop()
    result["attach"] = attach(stand, named[models[1]])
    try:
        result["reload"] = reload(stand, files, peer)
    except VaiError as error:
        click.echo(f"not measured: {error.message}")
    return result
