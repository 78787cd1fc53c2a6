"""The pair of small models that an installation may bring: what runs where no model is named, or one of them is."""

from __future__ import annotations

from pathlib import Path

from vai.config import Config
from vai.errors import ModelNotFound
from vai.rom.registry import Registry

FOLDER = Path(__file__).parents[1] / "shipped"
NAMES = ("vai-mini", "vai-nano")  # of one vocabulary; the second is small enough to guess for the first


def pair(folder: Path = FOLDER) -> list[Path]:
    """Their files, the larger one first; none where this installation brings none."""
    files = [folder / f"{name}.gguf" for name in NAMES]
    return files if all(file.is_file() for file in files) else []


def source(settings: Config, name: str, folder: Path = FOLDER) -> Path:
    """The file of a model by name: what the name was loaded from, or where that is unknown or gone, the shipped one.

    Raises ModelNotFound for a name that is neither loaded nor shipped. The file a name was loaded from may be gone.
    """
    own = next((file for file in pair(folder) if file.stem == name), None)
    try:
        known = Path(Registry(settings.root, settings.names).get(name).source)
    except ModelNotFound:
        if own is None:
            raise
        return own
    return known if own is None or known.is_file() else own
