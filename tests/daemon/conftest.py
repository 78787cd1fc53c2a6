"""Small checkpoints to load."""

from __future__ import annotations

from pathlib import Path

import pytest

from vai.burn.synth import synthesize


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of the shape `tiny`."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.gguf"
    synthesize(path, shape="tiny", type="Q4_0", seed=1)
    return path
