"""`vai synth`: a model file of any shape with seeded random weights, or with a trained model inside."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vai import config
from vai.cli import shipped
from vai.cli.output import size


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[SHAPE TYPE] PATH")
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help="Of the random weights; default 0.")
@click.option(
    "--grow", "source", metavar="SOURCE", help="Embed this model, a name or a GGUF file, in a larger --shape."
)
@click.option("--shape", help="The shape to grow to.")
def synth(words: tuple[str, ...], seed: int | None, source: str | None, shape: str | None) -> None:
    """Write a GGUF file of SHAPE with random weights of TYPE to PATH; or a trained model, grown.

    A model of random weights speaks nonsense, at the true cost of a real one. Shapes are qwen2-0.5b, qwen2-1.5b,
    qwen3-0.6b, qwen3-30b-a3b-4-layers, deepseek-coder-1.3b, deepseek-coder-6.7b and, for tests of each family, tiny,
    tiny-256, tiny-qwen2, tiny-qwen3, tiny-gemma2, tiny-gemma3, tiny-mistral, tiny-phi3, tiny-longrope, tiny-phi4,
    tiny-yarn, tiny-mixtral, tiny-qwen2moe and tiny-qwen3moe; types are F32, F16, BF16, Q8_0, Q4_0, Q4_1,
    Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS,
    IQ3_S, TQ1_0, TQ2_0 and, mixed as people's files are, Q4_K_M, Q5_K_M and Q4_0+Q6_K. One seed gives the same file
    everywhere.

    A grown model writes what the small one writes and costs what the large shape costs, its vocabulary apart.

    \b
    Examples:
      vai synth tiny Q4_0 tiny.gguf
      vai synth qwen2-1.5b Q4_0 qwen2-1.5b.gguf --seed 7
      vai synth --grow small.gguf --shape qwen2-1.5b large.gguf
    """
    if source is None:
        if len(words) != 3 or shape is not None:
            raise click.UsageError("Give a shape, a type and a path: vai synth tiny Q4_0 tiny.gguf")
        _random(words[0], words[1], Path(words[2]), seed or 0)
    else:
        if len(words) != 1 or shape is None or seed is not None:
            raise click.UsageError("Give a shape and a path: vai synth --grow small.gguf --shape qwen2-1.5b large.gguf")
        _grow(source, shape, Path(words[0]))


def _random(shape: str, type: str, path: Path, seed: int) -> None:
    from vai.burn.synth import synthesize

    began = time.monotonic()
    count = synthesize(path, shape=shape, type=type.upper(), seed=seed)
    click.echo(f"{path}: {size(count)} in {time.monotonic() - began:.1f} s")


def _grow(source: str, shape: str, path: Path) -> None:
    """Say what it is, and what the vocabulary that stays small leaves out of the shape's cost."""
    from vai.burn.grow import grow
    from vai.burn.synth import SHAPES

    settings = config.load()
    file = Path(source)
    if not file.is_file():
        file = shipped.source(settings, source)
    began = time.monotonic()
    grown = grow(file, path, shape=shape)
    click.echo(f"{path}: {size(grown.bytes)} in {time.monotonic() - began:.1f} s")
    bits = "the same bits" if grown.exact else "the same but for the last bits of its norms"
    click.echo(f"Its logits are {bits}: what is added is zeros.")
    click.echo(
        f"Its vocabulary stays at {grown.spec.vocabulary:,} of the shape's {SHAPES[shape].vocabulary:,}: "
        f"{(SHAPES[shape].vocabulary - grown.spec.vocabulary) * grown.spec.width / 1e6:,.0f} million products a token "
        "fewer than the shape has."
    )
