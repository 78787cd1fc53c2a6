"""The pair of models that an installation may bring, with stand-ins in a folder: found, loaded once, not missed."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from vai import config
from vai.burn.synth import synthesize
from vai.cli import shipped
from vai.cli.bench.switch import make_files
from vai.cli.run import meant
from vai.config import Config
from vai.errors import ModelNotFound
from vai.rom.registry import Name, Registry


@pytest.fixture
def settings(environment: dict[str, str]) -> Config:
    return config.load(environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an installation with models looks like."""
    out = tmp_path / "shipped"
    out.mkdir()
    for seed, name in enumerate(shipped.NAMES):
        synthesize(out / f"{name}.gguf", shape="tiny", type="Q4_0", seed=seed)
    return out


def test_the_larger_one_answers_where_no_model_is_named(settings: Config, folder: Path) -> None:
    assert meant(settings, None, None, folder) == ("vai-mini", None)
    registry = Registry(settings.root, settings.names)
    assert registry.is_resident(registry.find("vai-mini"))
    assert [name.name for name in registry.names()] == ["vai-mini"]


def test_a_lone_argument_that_cannot_be_a_name_is_a_prompt(settings: Config, folder: Path) -> None:
    assert meant(settings, "def square(n):", None, folder) == ("vai-mini", "def square(n):")
    assert meant(settings, "qwen", None, folder) == ("qwen", None)
    assert meant(settings, "def square(n):", "and a prompt", folder) == ("def square(n):", "and a prompt")


def test_it_is_loaded_once_and_again_when_nothing_of_it_is_left(
    settings: Config, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        shipped.default(settings, folder)
    assert capfd.readouterr().err.count("is in memory") == 1
    registry = Registry(settings.root, settings.names)
    registry.put(Name("vai-mini", str(folder / "gone.gguf"), digest="0" * 64))
    assert shipped.default(settings, folder) == "vai-mini"
    assert registry.is_resident(registry.find("vai-mini"))


def test_a_name_of_the_user_s_own_stays(settings: Config, folder: Path) -> None:
    own = Name("vai-mini", str(folder / "vai-nano.gguf"))
    registry = Registry(settings.root, settings.names)
    registry.put(own)
    assert shipped.default(settings, folder) == "vai-mini"
    assert registry.get("vai-mini") == own


@pytest.mark.parametrize("left", [0, 1])
def test_an_installation_without_the_pair_asks_for_a_name(settings: Config, folder: Path, left: int) -> None:
    for name in shipped.NAMES[left:]:
        (folder / f"{name}.gguf").unlink()
    assert shipped.pair(folder) == []
    with pytest.raises(click.UsageError, match="NAME"):
        meant(settings, None, None, folder)
    assert meant(settings, "not a name", None, folder) == ("not a name", None)


def test_the_benchmark_alternates_between_the_pair_unless_files_are_given(folder: Path, tmp_path: Path) -> None:
    pair = [folder / "vai-mini.gguf", folder / "vai-nano.gguf"]
    assert make_files([], demo=True, cache=tmp_path / "cache", folder=folder) == pair
    assert make_files([tmp_path], demo=True, cache=tmp_path / "cache", folder=folder) == [tmp_path]
    assert not (tmp_path / "cache").exists()


def test_its_files_have_their_names_unless_the_user_gave_them_away(settings: Config, folder: Path) -> None:
    assert shipped.source(settings, "vai-nano", folder) == folder / "vai-nano.gguf"
    Registry(settings.root, settings.names).put(Name("vai-nano", "/own.gguf"))
    assert shipped.source(settings, "vai-nano", folder) == Path("/own.gguf")
    with pytest.raises(ModelNotFound, match="other"):
        shipped.source(settings, "other", folder)
