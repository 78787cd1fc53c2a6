"""The pair of small models that an installation may bring: what runs where no model is named."""

from __future__ import annotations

from pathlib import Path

from vai.cli.load import load_file
from vai.config import Config
from vai.errors import ModelNotFound
from vai.rom.registry import Registry

FOLDER = Path(__file__).parents[1] / "shipped"
NAMES = ("vai-mini", "vai-nano")  # of one vocabulary; the second is small enough to guess for the first


def pair(folder: Path = FOLDER) -> list[Path]:
    """Their files, the larger one first; none where this installation brings none."""
    files = [folder / f"{name}.gguf" for name in NAMES]
    return files if all(file.is_file() for file in files) else []


def default(settings: Config, folder: Path = FOLDER) -> str | None:
    """The name of the larger one, loaded if nobody did yet; None where there is none.

    A name of the user's own stays as it is, unless neither its image nor its file is there any more.
    """
    files = pair(folder)
    if not files:
        return None
    registry = Registry(settings.root, settings.names)
    try:
        known = registry.get(NAMES[0])
    except ModelNotFound:
        known = None
    if known is None or not (registry.is_resident(known.digest or "") or Path(known.source).is_file()):
        load_file(settings, files[0], NAMES[0])
    return NAMES[0]


def source(settings: Config, name: str, folder: Path = FOLDER) -> Path:
    """The file of a model by name: what the name was loaded from, or the shipped one. Raises ModelNotFound."""
    try:
        return Path(Registry(settings.root, settings.names).get(name).source)
    except ModelNotFound:
        for file in pair(folder):
            if file.stem == name:
                return file
        raise
