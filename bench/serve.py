"""VAI under load, beside llama.cpp's server on the same GGUF and threads, point by point in turns.

Run: python bench/serve.py load FILE.gguf [SECOND.gguf] --peer LLAMA_SERVER --points mixed@1,mixed@16,decode@16,two@16
     python bench/serve.py stall FILE.gguf --peer LLAMA_SERVER
     python bench/serve.py gone FILE.gguf
     python bench/serve.py many FILE.gguf

Every server gets the same prompts as token ids, computes answers of the same fixed length, greedily, and streams them
over HTTP. Only one of them is busy at a time; peers are loaded for their runs alone. Each prints a table for people and
ends with one line of JSON; `load --out PREFIX` writes a CSV and curves as SVG.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import uvloop

from vai.cli.bench import serving
from vai.cli.bench.figures import Goal
from vai.cli.bench.rudeness import LONG_ANSWER, SHORT, gone, many, stall
from vai.cli.bench.serving import TWO, Point, Row, Rules
from vai.cli.bench.stand import Stand
from vai.cli.bench.switch import burn_all, collapse, cpu_name, title
from vai.cli.bench.systems import System, Vai, peers
from vai.cli.bench.workload import Workload, asks, text_ids
from vai.errors import VaiError

THREADS = len(os.sched_getaffinity(0))
SETTLE = 2.0  # seconds for a loaded machine to get quiet between servers
LEAVING = Workload(10, 60, 32)
STAYING = Workload(10, 100, 32)

file_argument = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
peer_option = click.option(
    "--peer", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A llama-server to measure beside."
)
kv_option = click.option("--kv", type=click.IntRange(1), default=4, show_default=True, help="GiB of VAI's scratchpad.")


@click.group()
def main() -> None:
    """Load VAI's server, and a peer beside it."""


@contextmanager
def serving_vai(files: Sequence[Path], kv: int) -> Iterator[tuple[Stand, Vai]]:
    """A VAI of its own that has these files burned, on 2 MiB pages, and answers."""
    click.echo(f"{cpu_name()}, {THREADS} threads, {datetime.now(UTC).isoformat(timespec='seconds')}")
    with Stand(threads=THREADS, kv_bytes=kv << 30) as stand:
        named = burn_all(stand, list(files))
        for digest in named.values():
            collapse(stand, digest)
        stand.start()
        for name in named:
            stand.one_token(name, [65])
        yield stand, Vai(stand, list(named))


def told(bench: str, files: Sequence[Path], **values: Any) -> None:
    """The line for machines."""
    facts = {"bench": f"serve {bench}", "date": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": cpu_name()}
    values |= {"threads": THREADS, "files": [file.name for file in files]}
    click.echo(json.dumps(known({**facts, **values}), allow_nan=False))


def known(value: Any) -> Any:
    """The same with null for every number that is none: JSON has no other word for it."""
    if isinstance(value, dict):
        return {name: known(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@peer_option
@kv_option
@click.option("--points", default="mixed,decode,prefill", show_default=True, help="Workloads, or WORKLOAD@STREAMS.")
@click.option("--streams", default="1,4,16,64", show_default=True, help="For workloads named without streams.")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Of one run of one server.")
@click.option("--first", type=float, default=5.0, show_default=True, help="Goal: seconds to the first token.")
@click.option("--between", type=float, default=0.25, show_default=True, help="Goal: seconds a token after it.")
@click.option("--out", type=click.Path(path_type=Path), help="Prefix of the CSV and SVG files to write.")
def load(
    files: tuple[Path, ...],
    peer: Path | None,
    kv: int,
    points: str,
    streams: str,
    seconds: float,
    first: float,
    between: float,
    out: Path | None,
) -> None:
    """Throughput and latency at every point: WORKLOAD@STREAMS closed loop, WORKLOAD@STREAMS~RATE open loop.

    Workloads: mixed (10 to 4,000 tokens in, 64 out), decode (10 to 100 in, 128 out), prefill (1,000 to 4,000 in, 16
    out), two (decode, alternating between FILES, of which it needs two).
    """
    chosen = [each for name in points.split(",") for each in expand(name, streams)]
    if len(files) < 2 and any(point.workload == TWO for point in chosen):
        raise click.UsageError("The workload 'two' needs two files.")
    ids = sorted(set.intersection(*(set(text_ids(file)) for file in files)))
    rules = Rules(seconds, Goal(first, between), THREADS, ids)
    click.echo(
        f"about {minutes(chosen, seconds, peer is not None):.0f} minutes; goal: first token within {first:g} s, "
        f"{between:g} s a token after it"
    )
    rows: list[Row] = []
    summary: dict[str, Any] = {}
    with serving_vai(files, kv) as (_, vai):
        title("Load")
        click.echo(serving.header())
        for point in chosen:
            rows += (own := serving.run_point(point, vai, files, peer, rules, say))
            if (ratios := serving.ratios(own)) is not None:
                summary[str(point)] = ratios._asdict()
            if point.workload == TWO:
                alone, split = serving.run_alone(own[0], vai, files, rules, rows, say)
                rows += alone
                summary.setdefault(str(point), {}).update(split._asdict())
    report(rows, summary)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in serving.write(out, rows, cpu_name()):
            click.echo(f"written: {path}")
    told(
        "load", files, seconds=seconds, goal=rules.goal._asdict(), ratios=summary, rows=[serving.flat(r) for r in rows]
    )


def expand(name: str, streams: str) -> list[Point]:
    """`mixed` at each of `streams`, or the one point that has its own. Raises BadRequest."""
    return [Point.parse(each) for each in ([name] if "@" in name else [f"{name}@{n}" for n in streams.split(",")])]


def minutes(points: Sequence[Point], seconds: float, peer: bool) -> float:
    """How long it will take, starts and stops included."""
    runs = sum((1 + 2 * peer) + 4 * (point.workload == TWO) for point in points)
    starts = 2 * peer * len(points)
    return (40 + runs * (seconds + SETTLE + 1) + starts * 6) / 60


def say(row: Row) -> None:
    click.echo(serving.line(row))
    time.sleep(SETTLE)


def report(rows: Sequence[Row], summary: dict[str, Any]) -> None:
    title("VAI over the best of the peer's settings, figure by figure")
    for point, values in summary.items():
        shown = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        click.echo(f"{point:12} {shown.replace('nan', '-')}")
    title("Flags")
    for flags in dict.fromkeys((row.system, row.flags) for row in rows):
        click.echo(f"{flags[0]:23} {flags[1]}")


@main.command("stall")
@file_argument
@peer_option
@kv_option
@click.option("--streams", type=click.IntRange(1), default=4, show_default=True, help="Running streams.")
@click.option("--length", type=click.IntRange(100), default=8000, show_default=True, help="Tokens of the long prompt.")
@click.option("--before", type=float, default=10.0, show_default=True, help="Seconds watched before it comes.")
@click.option("--most", type=float, default=120.0, show_default=True, help="Seconds its first token may take.")
def stalling(file: Path, peer: Path | None, kv: int, streams: int, length: int, before: float, most: float) -> None:
    """The worst wait between two tokens of running streams, before a long prompt arrives and while it is computed."""
    ids = text_ids(file)
    result: dict[str, dict[str, float]] = {}

    def one(system: System) -> None:
        target = system.target
        found = uvloop.run(stall(target, ids, streams=streams, length=length, before=before, most=most))
        system.rest()
        result[system.name] = found._asdict()
        waits = f"{found.before:14.3f} {found.during:14.3f} {found.text:14.3f} {found.first:18.2f}"
        click.echo(f"{system.name:23} {waits}   {system.flags}")

    with serving_vai([file], kv) as (_, vai):
        title(f"Longest wait for a token of {streams} streams, seconds, around the arrival of {length} tokens")
        click.echo(f"{'server':23} {'before':>14} {'during':>14} {'for text':>14} {'its first token':>18}")
        one(vai)
        slot = length + max(SHORT, LONG_ANSWER) + serving.SLOT_ROOM
        for name in serving.VARIANTS if peer is not None else ():
            with peers(peer, [file], name=name, words=serving.peer_words(streams + 1, slot, THREADS, name)) as system:
                one(system)
    told("stall", [file], streams=streams, length=length, **result)


@main.command("gone")
@file_argument
@kv_option
@click.option("--clients", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--at-once", type=click.IntRange(1), default=32, show_default=True)
@click.option("--patience", type=float, default=10.0, show_default=True, help="Seconds until the last of them leaves.")
def leaving(file: Path, kv: int, clients: int, at_once: int, patience: float) -> None:
    """Clients that disconnect at random moments: every page back, counters agree."""
    with serving_vai([file], kv) as (_, vai):
        work = asks(LEAVING, text_ids(file), seed=1)
        before = vai.counters()
        began = time.perf_counter()
        records = uvloop.run(gone(vai.target, work, clients=clients, at_once=at_once, patience=patience))
        seconds = time.perf_counter() - began
        vai.rest()  # raises where a page or a request is left behind
        found = vai.counters().since(before)
    complete = sum(record.complete for record in records)
    errors = sum(record.error is not None for record in records)
    click.echo(f"{clients} clients in {seconds:.1f} s: {complete} had their whole answer, {errors} an error")
    click.echo(
        f"server: {found.ended} ended, {found.whole} of them whole, {found.aborted} left early; "
        f"open connections {found.connections:+d}; tokens: server {found.tokens}, engine {found.engine_tokens}"
    )
    wrong = found.disagreements(clients=clients, complete=complete)
    click.echo("every page is back and the counters agree" if not wrong else f"WRONG: {'; '.join(wrong)}")
    told("gone", [file], clients=clients, complete=complete, errors=errors, server=found._asdict(), wrong=wrong)
    sys.exit(bool(wrong or errors))


@main.command("many")
@file_argument
@kv_option
@click.option("--streams", type=click.IntRange(1), default=256, show_default=True)
def staying(file: Path, kv: int, streams: int) -> None:
    """Streams that begin together, each to its end."""
    with serving_vai([file], kv) as (_, vai):
        began = time.perf_counter()
        records = uvloop.run(many(vai.target, asks(STAYING, text_ids(file), seed=2), streams=streams))
        seconds = time.perf_counter() - began
        vai.rest()
    whole = sum(record.complete and record.tokens == STAYING.answer for record in records)
    click.echo(f"{whole} of {streams} streams ran to their end in {seconds:.1f} s")
    told("many", [file], streams=streams, whole=whole, seconds=seconds, errors=[r.error for r in records if r.error])
    sys.exit(whole != streams)


if __name__ == "__main__":
    try:
        main()
    except VaiError as error:
        sys.exit(error.message)
