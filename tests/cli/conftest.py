"""The command line as people use it: real processes, in directories of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vai.burn.burn import burn
from vai.daemon.stop import stop
from vai.rom.registry import Name, Registry

Vai = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def checkpoint(tiny_root: tuple[Path, Path, dict[str, str]]) -> Path:
    """A GGUF file of the shape `tiny`."""
    root, names, _ = tiny_root
    return Path(Registry(root, names).get("tiny").source)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with nothing yet."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("VAI_", "XDG_"))}
    own = {"VAI_ROOT": tmp_path / "root", "XDG_DATA_HOME": tmp_path / "data", "XDG_STATE_HOME": tmp_path / "state"}
    return {**inherited, **{key: str(value) for key, value in own.items()}}


@pytest.fixture
def vai(environment: dict[str, str]) -> Iterator[Vai]:
    """Run `vai` with arguments, to its end. Whatever it started is ended after the test."""

    def run(*arguments: str | Path, input: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vai", *map(str, arguments)],
            input=input,
            capture_output=True,
            text=True,
            timeout=250,
            env={**environment, **more},
        )

    yield run
    list(stop(Path(environment["VAI_ROOT"])))


@pytest.fixture
def registry(environment: dict[str, str]) -> Registry:
    """The names and images that those commands see."""
    return Registry(Path(environment["VAI_ROOT"]), Path(environment["XDG_DATA_HOME"]) / "vai/names")


@pytest.fixture
def loaded(registry: Registry, checkpoint: Path) -> str:
    """The digest of a model that was loaded under the name m."""
    digest = burn(checkpoint, registry.root).digest
    registry.put(Name("m", str(checkpoint), digest=digest))
    return digest
