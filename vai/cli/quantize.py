"""`vai quantize`: a model file with matrices of fewer bits."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vai.cli.output import progress, size
from vai.errors import BadRequest

File = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("source", type=File)
@click.argument("destination", type=File)
@click.option("--type", "type_", default="Q4_0", show_default=True, help="Of every matrix that no --keep names.")
@click.option("--keep", multiple=True, metavar="PATTERN=TYPE", help="The type of matrices with such names; repeatable.")
@click.option("--allow-requantize", is_flag=True, help="Also take matrices that are quantized already.")
def quantize(source: Path, destination: Path, type_: str, keep: tuple[str, ...], allow_requantize: bool) -> None:
    """Write the GGUF file SOURCE to DESTINATION with quantized matrices.

    Types are Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16 and F32. Scales come from each block's own weights, without a
    search and without sample text; the same file gives the same bytes everywhere. Norms and biases stay as they are.

    \b
    Examples:
      vai quantize model-bf16.gguf model-q4_0.gguf
      vai quantize model-bf16.gguf mixed.gguf --keep 'token_embd.*=Q8_0' --keep 'blk.0.*=Q8_0'
    """
    from vai.burn.quantize import quantize as run

    pairs = []
    for each in keep:
        pattern, equals, wanted = each.rpartition("=")
        if not equals or not pattern:
            raise BadRequest(f"--keep {each} is not PATTERN=TYPE, as in 'token_embd.*=Q8_0'.")
        pairs.append((pattern, wanted.upper()))
    began = time.monotonic()
    with progress(f"quantizing {source.name}") as show:
        done = run(
            source, destination, type=type_.upper(), keep=pairs, allow_requantize=allow_requantize, progress=show
        )
    seconds = time.monotonic() - began
    ratio = done.matrices_before / done.matrices_after if done.matrices_after else 1.0
    click.echo(f"{destination}: {size(done.bytes)}, matrices {ratio:.2f} times smaller, in {seconds:.1f} s")
