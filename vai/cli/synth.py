"""`vai synth`: a model file of any shape with seeded random weights."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vai.cli.output import size


@click.command()
@click.argument("shape")
@click.argument("type")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), default=0, show_default=True)
def synth(shape: str, type: str, path: Path, seed: int) -> None:
    """Write a GGUF file of SHAPE with random weights of TYPE to PATH.

    Such a model speaks nonsense, at the true cost of a real one. Shapes are tiny, tiny-qwen2, tiny-256, qwen2-1.5b and
    deepseek-coder-6.7b; types are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K and, mixed as people's
    files are, Q4_K_M, Q5_K_M and Q4_0+Q6_K. One seed gives the same file everywhere.

    \b
    Examples:
      vai synth tiny Q4_0 tiny.gguf
      vai synth qwen2-1.5b Q4_0 qwen2-1.5b.gguf --seed 7
    """
    from vai.burn.synth import synthesize

    began = time.monotonic()
    count = synthesize(path, shape=shape, type=type.upper(), seed=seed)
    click.echo(f"{path}: {size(count)} in {time.monotonic() - began:.1f} s")
