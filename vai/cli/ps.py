"""`vai ps`: the processes of VAI and what the engine works on."""

from __future__ import annotations

import click

from vai import config
from vai.cli import report
from vai.cli.output import duration, json_option, print_json, short, size, table
from vai.rom.registry import Registry


@click.command()
@json_option
def ps(as_json: bool) -> None:
    """List the running processes, and the models the engine has attached with their requests."""
    settings = config.load()
    every = report.processes(settings.root, report.daemon(settings.root))
    processes = {role: told for role, told in every.items() if told["pid"] is not None}
    engine = report.engine(settings.root)
    models = [] if engine is None else engine["models"]
    if as_json:
        print_json({"processes": processes, "models": models})
        return
    if not processes:
        click.echo("Nothing is running. Start it: vai serve")
        return
    rows = []
    for role, told in processes.items():
        private = size(told["private_bytes"]) if told.get("private_bytes") else "-"
        rows.append([role, str(told["pid"]), told["state"], duration(told["uptime"]), private])
    table(("PROCESS", "PID", "STATE", "UP", "OWN MEMORY"), rows)
    click.echo()
    if not models:
        click.echo("No model is attached: the first request to one attaches it.")
        return
    names = Registry(settings.root, settings.names).names()
    rows = []
    for model in models:
        called = ", ".join(name.name for name in names if name.digest == model["image"]) or "-"
        counts = [str(model[key]) for key in ("running", "waiting", "pages", "tokens")]
        rows.append([called, short(model["image"]), *counts])
    table(("MODEL", "IMAGE", "RUNNING", "WAITING", "PAGES", "TOKENS"), rows)
