"""`vai stop`: end daemon, server and engine."""

from __future__ import annotations

import click

from vai import config
from vai.cli.output import duration
from vai.daemon.stop import stop as stop_all


@click.command()
def stop() -> None:
    """End all processes of VAI. The weights stay in memory: the next `vai serve` goes on at once.

    Works without a daemon too. A process that does not end when asked is killed after some seconds.
    """
    stopped = False
    for ended in stop_all(config.load().root):
        stopped = True
        how = "killed, it did not answer" if ended.killed else "ended"
        click.echo(f"{ended.role} (process {ended.pid}) {how} after {duration(ended.seconds)}")
    if not stopped:
        click.echo("Nothing is running.")
