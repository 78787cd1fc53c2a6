"""`vai load`: burn a model file into memory, with progress, and name it."""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import click

from vai import config
from vai.cli import shipped
from vai.cli.output import Show, progress, short, size
from vai.config import Config
from vai.daemon.loads import burn_argv, parse, renamed, wish
from vai.daemon.supervise import last_line, open_log
from vai.errors import BadRequest, Interrupted, by_code
from vai.rom import segment
from vai.rom.registry import Registry


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="What to call it; default: the file's name without .gguf.")
@click.option("--draft", metavar="NAME", help="A smaller model in memory, with the same tokenizer, that guesses ahead.")
def load(file: Path | None, name: str | None, draft: str | None) -> None:
    """Burn a GGUF FILE into memory and give it a name. No server has to run.

    The file is read once. What is in memory then is shared by every process that uses the model, and stays until
    `vai rm` or a reboot. Without FILE, a model that is named but not in memory is burned again, and so is one that this
    installation brings: vai-mini, vai-nano.

    \b
    Examples:
      vai load qwen2-1.5b-q4_0.gguf --name qwen
      vai load --name qwen                  (again, after a reboot)
      vai load qwen2-7b.gguf --name large --draft qwen
    """
    settings = config.load()
    if file is not None:
        name = name or file.name.removesuffix(".gguf")
        load_file(settings, file, name)
    elif name is not None:
        load_again(settings, name)
    else:
        raise BadRequest("Say which file to load: vai load FILE [--name NAME].")
    if draft is not None:
        _set_draft(settings, name, draft)


def load_again(settings: Config, name: str, folder: Path = shipped.FOLDER) -> None:
    """Burn what a name stands for, or would if this installation brings it. Raises ModelNotFound, BadRequest where its
    file is gone."""
    file = shipped.source(settings, name, folder)
    if not file.is_file():
        raise BadRequest(f"The file of '{name}' is gone ({file}); load it from elsewhere: vai load FILE --name {name}")
    load_file(settings, file, name)


def _set_draft(settings: Config, name: str, draft: str) -> None:
    """Have the model `draft` guess for `name` from now on. Raises ModelNotFound, Unavailable, BadRequest."""
    from vai.llm import Library  # heavy, and nobody else's need here

    library = Library(settings.root, settings.names)
    try:
        library.draft(library.open(name), draft)
    finally:
        library.close()
    registry = Registry(settings.root, settings.names)
    known = registry.get(name)
    registry.put(replace(known, overrides={**known.overrides, "draft": draft}))


def load_file(settings: Config, file: Path, name: str) -> None:
    """Burn a file and name the image. Raises the VaiError of the burner."""
    registry, source = Registry(settings.root, settings.names), str(file.resolve())
    began = time.monotonic()
    with wish(registry, name, source), progress(f"burning {file.name}") as show:
        digest = _burn(settings.root, source, settings.logs / "burn.log", show)
    registry.put(renamed(registry, name, source, digest))
    seconds = time.monotonic() - began
    count = segment.read_header(registry.root, digest).file_bytes
    click.echo(
        f"{name} is in memory: {size(count)} as image {short(digest)}, "
        f"{seconds:.1f} s ({count / seconds / 1e9:.2f} GB/s).",
        err=True,
    )


def _burn(root: Path, source: str, output: Path, show: Show) -> str:
    """Run the burner until the image is published and return its digest. Raises the VaiError it reports.

    It then goes on by itself for a while, at idle priority, to give the image huge pages.
    """
    with open_log(output) as log:
        argv = burn_argv(root, source)
        burner = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
    with burner.stdout or contextlib.nullcontext(()) as lines:
        for line in lines:
            message = parse(line)
            if "digest" in message:
                burner.returncode = 0  # published: not ours to wait for
                return str(message["digest"])
            if isinstance(error := message.get("error"), dict):
                burner.wait()
                raise by_code(str(error.get("code")))(str(error.get("message")))
            if "total" in message:
                show(int(message["done"]), int(message["total"]))
    raise Interrupted(f"The burn of {source} ended early (exit code {burner.wait()}): {last_line(output)}")
