"""`vai trace`: where the time of a step goes, operation by operation, beside what this machine can do at most."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from vai import config
from vai.cli.output import json_option, print_json, short, slowness, table
from vai.cli.stages import TOKENS, show, stages_of
from vai.config import Config
from vai.errors import BadRequest
from vai.rom import segment
from vai.rom.registry import Registry

if TYPE_CHECKING:
    from vai.kernels.program import Plan, PlanLine, Program, StepArgs
    from vai.kernels.table import Workers
    from vai.rom.view import Image

SAMPLES = 5

Report = dict[str, Any]


class Rates(NamedTuple):
    """The ceilings beside a sample: bytes/s of reading the image, multiply-adds/s of integers, of floats and in tiles
    (0: the machine has none).
    """

    read: float
    int8: float
    f32: float
    bf16: float


class Model(NamedTuple):
    """An attached image, lowered for this process's workers."""

    image: Image
    program: Program
    plan: Plan
    workers: Workers
    isa: str


@click.command()
@click.argument("name")
@click.option("--rows", default=128, show_default=True, type=click.IntRange(2, 512), help="Rows of the prefill chunk.")
@click.option("--context", default=512, show_default=True, type=click.IntRange(0), help="Tokens before the step.")
@json_option
def trace(name: str, rows: int, context: int, as_json: bool) -> None:
    """Run one decode step and one prefill chunk of the model NAME, and time every operation of its Plan; where prompts
    are computed in a fast kind, a chunk of that, too.

    Each line: the operations of the Program that it came from (by number), median time of five steps, bytes of the
    image that it read (at most, where rows choose experts) and at what speed, multiply-adds, and SHARE, the part of
    that time which this machine's ceiling would have taken: reading or multiplying, whichever is slower. Then the
    stages of a first short request, in an engine of its own. Nothing else should run meanwhile.
    """
    settings = config.load()
    digest = Registry(settings.root, settings.names).find(name)
    with segment.attach(settings.root, digest) as image:
        found = examine(settings, image, rows, context)
        slow, whole = image.table.slow_bytes(), image.header.file_bytes
    found["slow"] = slow
    found["stages"] = stages_of(settings, digest)
    if as_json:
        print_json({"model": name, "digest": digest, **found})
        return
    click.echo(f"{name}: image {short(digest)}, {found['threads']} threads, {found['isa']}")
    if slow:
        click.echo(f"{slowness(slow, whole)}.")
    _show_program(found)
    for step in found["steps"]:
        _show(step)
    click.echo(f"\nA FIRST REQUEST, {TOKENS} tokens:")
    show(found["stages"])


def examine(settings: Config, image: Image, rows: int, context: int) -> Report:
    """Everything `vai trace --json` prints of a model. Raises BadRequest where the model has no room for the step."""
    model = _lowered(settings, image, rows)
    if context + rows > model.program.context:
        raise BadRequest(f"{context} tokens and a chunk of {rows} pass the model's context of {model.program.context}.")
    steps = [("decode", 1, "exact"), ("prefill", rows, "exact")]
    if model.plan.fast:
        steps.append(("prefill", rows, "fast"))
    return {
        "threads": settings.threads,
        "isa": model.isa,
        "fast": model.plan.fast,
        "context": context,
        "program": [str(op) for op in model.program.ops],
        "steps": [_traced(model, what, count, context, kind) for what, count, kind in steps],
    }


def _lowered(settings: Config, image: Image, rows: int) -> Model:
    from vai.kernels import table as kernels
    from vai.kernels import tuning
    from vai.models.decoder import build
    from vai.models.spec import Spec

    program = build(Spec.from_bytes(image.spec))
    workers = kernels.make_workers(settings.threads, settings.root / "run" / "cores.lock")  # in turn with an engine
    isa = tuning.tune(workers, image.data, settings.root / "run", isa=settings.isa)
    plan = kernels.lower(
        program,
        image,
        kv_type=settings.kv_type,
        max_rows=rows,
        max_sequences=1,
        workers=workers,
        isa=isa,
        fast=kernels.fast(settings.fast),
    )
    return Model(image, program, plan, workers, isa)


def _traced(model: Model, what: str, rows: int, context: int, kind: str) -> Report:
    """One sort of step: every line with its times. The first step only warms up."""
    import numpy as np

    lines = model.plan.describe(kind)
    step, pool = _step(model.program, model.plan.kv_type, rows, context, kind)
    model.plan.forward(step, pool)
    samples, rates = [], []
    for _ in range(SAMPLES):
        seconds = np.zeros(len(lines))
        model.plan.forward(step, pool, seconds)
        samples.append(seconds)
        rates.append(_rates(model))
    ceiling = Rates(*(statistics.median(each) for each in zip(*rates, strict=True)))
    times = np.median(np.array(samples), axis=0)
    counts = [len(step.output_rows) if line.outputs else rows for line in lines]
    told = [_line(*each, ceiling) for each in zip(lines, times.tolist(), counts, strict=True)]
    return {
        "kind": what if kind == "exact" else f"{what}, {kind} ({model.plan.fast})",
        "rows": rows,
        "seconds": statistics.median(float(each.sum()) for each in samples),
        "ceiling": {name: rate for name, rate in ceiling._asdict().items() if rate},
        "lines": told,
    }


def _step(program: Program, kv_type: str, rows: int, context: int, kind: str) -> tuple[StepArgs, Any]:
    """A step of one sequence, and pages for it; what stands in them does not change how long it takes."""
    import numpy as np

    from vai.kernels.program import PAGE_TOKENS, StepArgs

    pages = -(-(context + rows) // PAGE_TOKENS)
    sizes = [group.page_bytes(kv_type) for group in program.groups]
    firsts = [pages * sum(sizes[:group]) for group in range(len(sizes))]
    step = StepArgs(
        tokens=np.arange(rows, dtype=np.int32) % program.vocabulary,
        positions=np.arange(context, context + rows, dtype=np.int32),
        seq_start=np.array([0, rows], np.int32),
        context=np.array([context], np.int32),
        block_tables=tuple(
            first + np.arange(pages, dtype=np.int64)[None, :] * size for first, size in zip(firsts, sizes, strict=True)
        ),
        output_rows=np.array([rows - 1] if kind == "exact" else [], np.int32),
        kind=kind,
    )
    return step, np.zeros(pages * sum(sizes), np.uint8)


def _rates(model: Model) -> Rates:
    import numpy as np

    from vai.kernels import ceilings

    data = np.frombuffer(model.image.data, np.uint8)
    int8, f32 = (ceilings.multiply_rate(model.workers, model.isa, unit) for unit in ("int8", "f32"))
    bf16 = ceilings.multiply_rate(model.workers, model.isa, "bf16") if model.plan.fast == "amx" else 0.0
    return Rates(ceilings.read_rate(model.workers, model.isa, data), int8, f32, bf16)


def _line(line: PlanLine, seconds: float, rows: int, ceiling: Rates) -> Report:
    """share: of `seconds`, what the ceiling needs; None for what neither reads much nor multiplies with weights, and
    where there is no such ceiling.
    """
    products, rate = line.products * rows, getattr(ceiling, line.unit)
    read = min(line.image_bytes * rows, line.most_bytes)
    least = max(read / ceiling.read, products / rate) if rate else 0.0
    return {
        "kind": line.kind,
        "text": line.text,
        "origin": list(line.origin),
        "seconds": seconds,
        "image_bytes": read,
        "products": products,
        "share": least / seconds if line.products and rate and seconds > 0 else None,
    }


def _show_program(found: Report) -> None:
    click.echo("\nPROGRAM")
    for number, op in enumerate(found["program"], 1):
        click.echo(f"{number:>5}  {op if len(op) <= 150 else op[:147] + '...'}")


def _show(step: Report) -> None:
    ceiling = step["ceiling"]
    limits = f"read {ceiling['read'] / 1e9:.1f} GB/s, int8 {_tops(ceiling['int8'])}, f32 {_tops(ceiling['f32'])}"
    limits += f", bf16 {_tops(ceiling['bf16'])} TOPS" if "bf16" in ceiling else " TOPS"
    rows = f"{step['rows']} row{'s' if step['rows'] > 1 else ''}"
    click.echo(f"\n{step['kind'].upper()}, {rows}: {_ms(step['seconds'])} ms")
    click.echo(f"ceilings of the same seconds: {limits}\n")
    lines = step["lines"]
    table(("LINE", "KIND", "WHAT", "FROM", *_HEAD), [_cells(str(i), [line], step) for i, line in enumerate(lines, 1)])
    click.echo()
    kinds = {line["kind"]: [each for each in lines if each["kind"] == line["kind"]] for line in lines}
    ordered = sorted(kinds.values(), key=lambda own: -sum(line["seconds"] for line in own))
    table(("LINES", "KIND", *_HEAD), [_sum(own, step) for own in ordered])


_HEAD = ("MS", "OF STEP", "BYTES", "GB/S", "GMAC", "SHARE")


def _cells(number: str, lines: list[Report], step: Report) -> tuple[str, ...]:
    line = lines[0]
    return (number, line["kind"], line["text"], _ranges(line["origin"]), *_figures(lines, step))


def _sum(lines: list[Report], step: Report) -> tuple[str, ...]:
    return (str(len(lines)), lines[0]["kind"], *_figures(lines, step))


def _figures(lines: list[Report], step: Report) -> tuple[str, ...]:
    seconds, count = sum(line["seconds"] for line in lines), sum(line["image_bytes"] for line in lines)
    shares = [line["share"] * line["seconds"] for line in lines if line["share"] is not None]
    return (
        _ms(seconds),
        f"{seconds / step['seconds']:.1%}",
        f"{count:,}",
        f"{count / seconds / 1e9:.1f}" if seconds > 0 else "-",
        f"{sum(line['products'] for line in lines) / 1e9:.3f}",
        f"{sum(shares) / seconds:.0%}" if shares and seconds > 0 else "-",
    )


def _ranges(numbers: Iterable[int]) -> str:
    """3-5,9 for 3, 4, 5 and 9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _tops(products: float) -> str:
    return f"{2 * products / 1e12:.3f}"
