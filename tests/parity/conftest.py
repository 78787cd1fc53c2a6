"""What the parity tests work on: tiny synthetic checkpoints, and images burned from them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vai.burn.burn import burn
from vai.burn.synth import synthesize
from vai.rom.segment import attach
from vai.rom.view import Image

collect_ignore = [] if platform.machine() == "x86_64" else ["test_emulated.py"]  # there are no such kernels to emulate

Checkpoint = Callable[[str, str], Path]
Burned = Callable[[str, str], Image]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """checkpoint(shape, type): the GGUF file of a synthetic model, made once a session. Not to be changed."""
    directory = tmp_path_factory.mktemp("checkpoints")

    def make(shape: str, type: str) -> Path:
        path = directory / f"{shape}-{type}.gguf"
        if not path.exists():
            synthesize(path, shape=shape, type=type)
        return path

    return make


@pytest.fixture(scope="session")
def burned(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Burned]:
    """burned(shape, type): the attached image of a synthetic model, burned once a session. Not to be closed."""
    root = tmp_path_factory.mktemp("root")
    root.chmod(0o700)
    images: dict[tuple[str, str], Image] = {}

    def make(shape: str, type: str) -> Image:
        if (shape, type) not in images:
            images[shape, type] = attach(root, burn(checkpoint(shape, type), root).digest)
        return images[shape, type]

    yield make
    for image in images.values():
        image.close()
