"""Load runs of `bench/serve.py`: points, what each server made of them, and how they are put down."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from vai.cli.bench.chart import Panel, chart
from vai.cli.bench.figures import Figures, Goal, Quantile, figures
from vai.cli.bench.systems import NAN, System, Vai, peers
from vai.cli.bench.traffic import Record, Target, closed_loop, open_loop, send
from vai.cli.bench.workload import WORKLOADS, Ask, Workload, asks, pauses
from vai.errors import BadRequest, Unavailable

VARIANTS: dict[str, list[str]] = {"llama.cpp": [], "llama.cpp --no-repack": ["--no-repack"]}
SLOT_ROOM = 64  # tokens of a peer's slot beside prompt and answer
TWO = "two"  # the decode workload, alternating between two models


class Point(NamedTuple):
    """`streams` clients in a closed loop, or requests at `rate` a second in an open one."""

    workload: str
    streams: int
    rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> Point:
        """`mixed@16`, `decode@16~0.5` (open loop, half a request a second), `two@16`. Raises BadRequest."""
        name, _, load = text.partition("@")
        streams, _, rate = load.partition("~")
        try:
            point = cls(name, int(streams), float(rate) if rate else None)
        except ValueError:
            raise BadRequest(f"'{text}' is no point: write WORKLOAD@STREAMS or WORKLOAD@STREAMS~RATE.") from None
        if name not in (*WORKLOADS, TWO) or point.streams < 1 or (point.rate is not None and point.rate <= 0):
            raise BadRequest(f"'{text}' is no point: workloads are {', '.join(WORKLOADS)} and {TWO}.")
        return point

    @property
    def load(self) -> Workload:
        return WORKLOADS["decode" if self.workload == TWO else self.workload]

    def __str__(self) -> str:
        return f"{self.workload}@{self.streams}" + (f"~{self.rate:g}" if self.rate else "")


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Shares are CPU seconds over wall x threads; `overhead`: server, and engine outside native calls."""

    point: Point
    system: str
    flags: str
    models: str
    figures: Figures
    cpu: float
    overhead: float
    native: float
    client: float
    tokens: dict[str, int]  # of the answers, by model


@dataclass(frozen=True, slots=True)
class Rules:
    """What all runs of a series share. `ids`: tokens that prompts are made of."""

    seconds: float
    goal: Goal
    threads: int
    ids: Sequence[int]
    seed: int = 0


def measure(system: System, point: Point, rules: Rules) -> Row:
    """One run of a point on a server that has nothing else to do. Raises Unavailable where nothing is answered."""
    uvloop.run(_warm(system.target, rules.ids))
    work = asks(point.load, rules.ids, rules.seed + point.streams)
    used, client = system.use(), time.process_time()
    began = time.perf_counter()
    records = uvloop.run(_load(system.target, point, work, rules))
    seconds = time.perf_counter() - began
    client = time.process_time() - client
    used = system.use().since(used)
    wall = time.perf_counter() - began
    system.rest()
    failed = [record.error for record in records if record.error is not None]
    if failed and len(failed) == len(records):
        raise Unavailable(f"{system.name} answered none of {len(records)} requests; the first: {failed[0]}.")
    room = wall * rules.threads
    return Row(
        point=point,
        system=system.name,
        flags=system.flags,
        models="+".join(system.target.models),
        figures=figures(records, began=began, seconds=seconds, goal=rules.goal),
        cpu=used.cpu / room,
        overhead=(used.server + used.host) / room,
        native=used.native / wall,
        client=client / (seconds * rules.threads),
        tokens={model: _tokens(records, model) for model in system.target.models},
    )


async def _warm(target: Target, ids: Sequence[int]) -> None:
    """One short request to each model: first use is no part of a run."""
    for model in target.models:
        record = await send(target, model, Ask(list(ids[:8]), 2), [])
        if record.error is not None:
            raise Unavailable(f"'{model}' does not answer: {record.error}.")


async def _load(target: Target, point: Point, work: Iterator[Ask], rules: Rules) -> list[Record]:
    if point.rate is None:
        return await closed_loop(target, work, streams=point.streams, seconds=rules.seconds)
    gaps = pauses(point.rate, rules.seed)
    return await open_loop(target, work, pauses=gaps, seconds=rules.seconds)


def _tokens(records: Iterable[Record], model: str) -> int:
    return sum(record.tokens or len(record.events) for record in records if record.model == model)


def peer_words(streams: int, slot: int, threads: int, variant: str) -> list[str]:
    """A llama-server's best flags for so many slots of so many tokens."""
    words = ["-t", str(threads), "-tb", str(threads), "-np", str(streams), "-c", str(streams * slot)]
    return [*words, "-fa", "on", "--cache-reuse", "256", "--cache-ram", "0", *VARIANTS[variant]]


def systems(
    point: Point, vai: Vai, files: Sequence[Path], binary: Path | None, threads: int
) -> Iterator[AbstractContextManager[System]]:
    """VAI, and the peer with each of its settings, every one loaded only while it is its turn."""
    yield nullcontext(vai.of([file.stem for file in files]))
    if binary is None:
        return
    slot = point.load.longest + point.load.answer + SLOT_ROOM
    for name in VARIANTS:
        words = peer_words(-(-point.streams // len(files)), slot, threads, name)
        yield peers(binary, files, name=name, words=words)


def run_point(
    point: Point, vai: Vai, files: Sequence[Path], binary: Path | None, rules: Rules, say: Callable[[Row], None]
) -> list[Row]:
    """Every server at one point, one after another."""
    rows = []
    chosen = files if point.workload == TWO else files[:1]
    for system in systems(point, vai, chosen, binary, rules.threads):
        with system as running:
            rows.append(measure(running, point, rules))
        say(rows[-1])
    return rows


class Alternation(NamedTuple):
    """Two models in turns, against each alone with as many streams as it had.

    efficiency: the time that their tokens take alone, in batches of the same size, over the time they took; 1: a switch
    costs nothing. halved: how much longer the tokens take in those batches than in ones of all streams.
    """

    efficiency: float
    halved: float


def run_alone(
    together: Row, vai: Vai, files: Sequence[Path], rules: Rules, known: Sequence[Row], say: Callable[[Row], None]
) -> tuple[list[Row], Alternation]:
    """What of a two-model run is the price of halved batches: each model alone, with half and with all streams.

    `known`: runs that need not be made again. Returns the new ones.
    """
    rows: list[Row] = []
    streams = together.point.streams
    half, all_ = 0.0, 0.0

    def rate(model: str, count: int) -> float:
        point = Point("decode", count)
        wanted = ("vai", model, point)
        row = next((row for row in (*known, *rows) if (row.system, row.models, row.point) == wanted), None)
        if row is None:
            row = measure(vai.of([model]), point, rules)
            rows.append(row)
            say(row)
        return max(row.figures.output_rate, 1e-9)

    for file in files:
        tokens = together.tokens[file.stem]
        half += tokens / rate(file.stem, max(1, streams // 2))
        all_ += tokens / rate(file.stem, streams)
    return rows, Alternation(half / together.figures.seconds, half / max(all_, 1e-9))


# -- what is put down --------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("point", 12, lambda row: str(row.point)),
    ("server", 23, lambda row: row.system),
    ("model", 34, lambda row: row.models),
    ("sent", 5, lambda row: row.figures.sent),
    ("done", 5, lambda row: row.figures.complete),
    ("err", 4, lambda row: row.figures.errors),
    ("in tok/s", 9, lambda row: f"{row.figures.prompt_rate:.1f}"),
    ("out tok/s", 10, lambda row: f"{row.figures.output_rate:.1f}"),
    ("TTFT p50", 9, lambda row: row.figures.first_p50),
    ("p99", 8, lambda row: row.figures.first_p99),
    ("ITL p50", 8, lambda row: f"{row.figures.between_p50:.3f}"),
    ("p99", 7, lambda row: f"{row.figures.between_p99:.3f}"),
    ("max", 7, lambda row: f"{row.figures.between_max:.2f}"),
    ("TPOT", 7, lambda row: f"{row.figures.per_token_p50:.3f}"),
    ("good/s", 7, lambda row: f"{row.figures.goodput:.2f}"),
    ("cpu", 5, lambda row: f"{row.cpu:.0%}"),
    ("over", 6, lambda row: f"{row.overhead:.2%}"),
    ("native", 7, lambda row: f"{row.native:.1%}"),
    ("client", 7, lambda row: f"{row.client:.2%}"),
)


def header() -> str:
    return "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS)


def line(row: Row) -> str:
    """A row of the table. Seconds; `>`: a lower bound, as requests were still waiting; NaN: not known of a peer."""
    return "".join(f"{show(row)!s:>{width}}" for _, width, show in _COLUMNS).replace("nan%", "-").replace("nan", "-")


class Ratios(NamedTuple):
    """VAI over the best of the peer's settings in that figure; NaN where nobody knows.

    Of first tokens it is unknown where ours is a lower bound, and an upper bound where theirs is.
    """

    total: float
    output: float
    first_p50: float
    first_p99: float
    between_p99: float
    goodput: float


def ratios(rows: Sequence[Row]) -> Ratios | None:
    """Of the rows of one point, VAI's first; None without a peer."""
    ours, theirs = rows[0].figures, [row.figures for row in rows[1:]]
    if not theirs:
        return None
    return Ratios(
        total=_over(ours.total_rate, max(each.total_rate for each in theirs)),
        output=_over(ours.output_rate, max(each.output_rate for each in theirs)),
        first_p50=_over_first(ours.first_p50, [each.first_p50 for each in theirs]),
        first_p99=_over_first(ours.first_p99, [each.first_p99 for each in theirs]),
        between_p99=_over(ours.between_p99, _least(each.between_p99 for each in theirs)),
        goodput=_over(ours.goodput, max(each.goodput for each in theirs)),
    )


def _over(ours: float, best: float) -> float:
    return ours / best if best else NAN


def _over_first(ours: Quantile, theirs: Sequence[Quantile]) -> float:
    return NAN if ours.at_least else _over(ours.seconds, _least(each.seconds for each in theirs))


def _least(values: Iterable[float]) -> float:
    """The smallest of those that are numbers."""
    return min((value for value in values if not math.isnan(value)), default=NAN)


def flat(row: Row) -> dict[str, Any]:
    """A row as one level of names and values, for CSV and JSON."""
    told: dict[str, Any] = {"point": str(row.point), "workload": row.point.workload, "streams": row.point.streams}
    told |= {name: getattr(row, name) for name in ("system", "models", "cpu", "overhead", "native", "client")}
    for name, value in dataclasses.asdict(row.figures).items():
        if name.startswith("first_"):
            told[name], told[f"{name}_at_least"] = value
        else:
            told[name] = value
    return {**told, "total_rate": row.figures.total_rate, "flags": row.flags}


def write(out: Path, rows: Sequence[Row], title: str) -> list[Path]:
    """OUT.csv, and OUT-WORKLOAD.svg for every workload that was run with several numbers of streams."""
    table = out.with_name(out.name + ".csv")
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(flat(rows[0])))
        writer.writeheader()
        writer.writerows(flat(row) for row in rows)
    written = [table]
    first_model = rows[0].models
    for workload in dict.fromkeys(row.point.workload for row in rows):
        own = [row for row in rows if row.point.workload == workload and row.point.rate is None]
        own = [row for row in own if row.models in (first_model, own[0].models)]
        if len({row.point.streams for row in own}) > 1:
            written.append(out.with_name(f"{out.name}-{workload}.svg"))
            written[-1].write_text(chart(f"{title}, {workload}, {own[0].models}", list(_panels(own))))
    return written


def _panels(rows: Sequence[Row]) -> Iterator[Panel]:
    shown: tuple[tuple[str, str, Callable[[Figures], float], bool], ...] = (
        ("Throughput, prompt and answer", "tokens a second", lambda each: each.total_rate, False),
        ("Answer tokens", "tokens a second", lambda each: each.output_rate, False),
        ("First token, p50", "seconds", lambda each: each.first_p50.seconds, True),
        ("First token, p99", "seconds", lambda each: each.first_p99.seconds, True),
        ("Between tokens, p99", "seconds", lambda each: each.between_p99, True),
    )
    for title, label, value, log in shown:
        series: dict[str, dict[int, float]] = {}
        for row in rows:
            series.setdefault(row.system, {}).setdefault(row.point.streams, value(row.figures))
        yield Panel(title, "streams", label, {name: list(points.items()) for name, points in series.items()}, log)
