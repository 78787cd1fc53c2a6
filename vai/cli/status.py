"""`vai status`: what is in memory, who uses it, and what runs."""

from __future__ import annotations

import sys
from typing import Any

import click

from vai import config
from vai.cli import report
from vai.cli.output import duration, json_option, print_json, short, size, table

Row = list[str]
_HEADER = ("MODEL", "IMAGE", "BYTES", "LAYERS", "WIDTH", "VOCABULARY", "BURNED IN", "RESIDENT", "HUGE PAGES", "LEASES")


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show memory, models, leases and processes.

    Everything is read from files, locks and whoever answers, so it works with every process of VAI dead too.
    RESIDENT is the share of an image that is in memory, HUGE PAGES the share that a new process maps in 2 MiB pages.
    LEASES are the processes that use it.
    """
    found = report.status(config.load())
    if as_json:
        print_json(found)
        return
    click.echo(f"VAI in {found['root']}\n")
    table(("PROCESS", "PID", "STATE", "UP", ""), [_process(role, told) for role, told in found["processes"].items()])
    click.echo()
    if found["images"]:
        _images([_image(image) for image in found["images"]])
    else:
        click.echo("No model is in memory. Burn one: vai load model.gguf --name NAME")
    for image in found["images"]:
        if image["problem"]:
            click.echo(f"{short(image['digest'])}: {image['problem']}")
    click.echo()
    for line in _rest(found):
        click.echo(line)


def _process(role: str, told: dict[str, Any]) -> Row:
    notes = [told["address"]] if told.get("address") and role == "server" else []
    if told.get("restarts"):
        notes.append(f"restarted {told['restarts']} times, last end: {told['last_exit']}")
    if told.get("next_start") is not None:
        notes.append(f"next start in {duration(told['next_start'])}")
    up = duration(told["uptime"]) if told.get("uptime") is not None and told["pid"] else "-"
    return [role, str(told["pid"] or "-"), told["state"], up, ", ".join(notes)]


def _image(image: dict[str, Any]) -> Row:
    spec = image.get("spec", {})
    leases = [f"{_program(lease['command'])} ({lease['pid']})" for lease in image["leases"]]
    return [
        ", ".join(image["names"]) or "-",
        short(image["digest"]),
        size(image["bytes"]),
        str(spec.get("layers", "-")),
        f"{spec['width']:,}" if "width" in spec else "-",
        f"{spec['vocabulary']:,}" if "vocabulary" in spec else "-",
        duration(image["burn_seconds"]) if "burn_seconds" in image else "-",
        f"{image['resident']:.0%}" if "resident" in image else "damaged",
        f"{image['huge']:.0%}" if "huge" in image else "-",
        ", ".join(leases) or "none",
    ]


def _program(command: str) -> str:
    """What a command line runs, in a word or two: engine, burn, or the program and its first argument."""
    words = command.split()
    if words[1:2] == ["-m"] and words[2:]:
        return words[2].removeprefix("vai.").removesuffix(".service")
    return " ".join([words[0].rpartition("/")[2], *words[1:2]])[:40]


def _images(rows: list[Row]) -> None:
    """The table of models: with rules on a terminal, plain elsewhere."""
    if not sys.stdout.isatty():
        table(_HEADER, rows)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, title="ROM: weights in shared memory", title_justify="left")
    for i, title in enumerate(_HEADER):
        drawn.add_column(title, justify="right" if 2 <= i <= 8 else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def _rest(found: dict[str, Any]) -> list[str]:
    lines = [_load(load) for load in found["loads"]]
    if found["absent"]:
        lines.append("Named, not in memory: " + ", ".join(name["name"] for name in found["absent"]))
    if (engine := found["engine"]) is not None:
        fast = f", fast kind {engine['fast']}" if engine["fast"] else ""
        busy = sum(model["running"] + model["waiting"] for model in engine["models"])
        lines.append(
            f"Scratchpad: {size(engine['pool_used'])} of {size(engine['pool_bytes'])} used, "
            f"{size(engine['pool_cached'])} cached, {size(engine['pool_free'])} free, {busy} requests "
            f"({engine['isa']}{fast}, {engine['threads']} threads, KV {engine['kv_type']})"
        )
        lines += _prompts(engine["models"])
        if engine["adopted_pages"] or engine["pool_pinned"]:
            lines.append(
                f"Pages kept: {engine['adopted_pages']:,} taken over from the engine before, "
                f"{size(engine['pool_pinned'])} pinned by clients"
            )
    return [*lines, f"Room for more: {size(found['room']['free'])} ({found['room']['limit']})"]


def _prompts(models: list[dict[str, Any]]) -> list[str]:
    """How the prompts' tokens came about, once there were any."""
    told = [
        f"{sum(counts):,} {how}" + (f" ({counts[1] / sum(counts):.0%} in the fast kind)" if counts[1] else "")
        for how, what in (("computed", "prompt"), ("from the cache", "cached"))
        if sum(counts := [sum(model[f"{what}_{kind}"] for model in models) for kind in ("exact", "fast")])
    ]
    return [f"Tokens of prompts: {', '.join(told)}"] if told else []


def _load(load: dict[str, Any]) -> str:
    if load["state"] == "failed":
        return f"Load of {load['source']} failed: {load['error']}"
    share = f" {load['done'] / load['total']:.0%}" if load["total"] else ""
    left = f", {duration(load['eta'])} left" if load["eta"] is not None else ""
    return f"Load of {load['source']}: {load['state']}{share}{left}"
