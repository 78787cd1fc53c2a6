"""`vai bench`: measurements anyone can repeat. Each prints a table for people and ends with one line of JSON."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measure this machine. Every benchmark runs in a private root and leaves nothing behind."""


@bench.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--large", is_flag=True, help="Make a qwen2-1.5b and a deepseek-coder-6.7b with random weights.")
@click.option("--demo", is_flag=True, help="Fewer repetitions: about a minute.")
@click.option(
    "--n", type=click.IntRange(10, 10_000), help="Paired first tokens to measure. Default 100, with --demo 60."
)
@click.option(
    "--peer", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A llama-server to start beside."
)
@click.option(
    "--cache", type=click.Path(file_okay=False, path_type=Path), help="Where made models are kept between runs."
)
def switch(
    files: tuple[Path, ...], large: bool, demo: bool, n: int | None, peer: Path | None, cache: Path | None
) -> None:
    """Two models resident, ten alternating prompts, and what a switch, an attach and a crash cost.

    FILES are two GGUF files. Without them it is the pair of small models that this installation brings. With --large it
    is two of the shapes qwen2-1.5b and deepseek-coder-6.7b in Q4_0, made with seeded random weights, which cost what
    real ones cost.
    """
    from vai.cli.bench.switch import run

    if len(files) not in (0, 2) or (files and large):
        raise click.UsageError("Give two GGUF files, or none, or --large.")
    run(list(files), large=large, demo=demo, pairs=n or (60 if demo else 100), peer=peer, cache=cache)
