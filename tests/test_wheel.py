"""What a wheel carries: everything a user needs offline, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_BYTES = 16_000_000  # of the two demonstration models together


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree without its native modules, which take minutes and are tested as they are installed."""
    folder = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    argv += ["--disable-pip-version-check", "-C", "wheel.cmake=false", "-w", str(folder), str(ROOT)]
    subprocess.run(argv, check=True, timeout=120)
    (path,) = folder.iterdir()
    return zipfile.ZipFile(path)


def test_the_demonstration_models_travel_with_it_and_are_small(wheel: zipfile.ZipFile) -> None:
    models = {each.filename: each.file_size for each in wheel.infolist() if each.filename.endswith(".gguf")}
    assert set(models) == {"vai/shipped/vai-mini.gguf", "vai/shipped/vai-nano.gguf"}
    assert sum(models.values()) < MOST_BYTES
    for name in models:
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_every_module_and_data_file_of_the_package_is_in_it_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tracked = subprocess.run(["git", "ls-files", "vai"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    carried = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert carried == set(tracked.split())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
