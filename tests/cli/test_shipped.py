"""The pair of models that an installation may bring, with stand-ins in a folder: found, loaded once, not missed."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from vai import config
from vai.burn.synth import synthesize
from vai.cli import shipped
from vai.cli.bench.switch import files_of
from vai.cli.run import make_resident, meant
from vai.config import Config
from vai.errors import BadRequest, ModelNotFound
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


def test_the_larger_one_answers_where_no_model_is_named(folder: Path) -> None:
    assert meant(None, None, folder) == ("vai-mini", None)


def test_a_lone_argument_that_cannot_be_a_name_is_a_prompt(folder: Path) -> None:
    assert meant("def square(n):", None, folder) == ("vai-mini", "def square(n):")
    assert meant("qwen", None, folder) == ("qwen", None)
    assert meant("def square(n):", "and a prompt", folder) == ("def square(n):", "and a prompt")


@pytest.mark.parametrize("name", shipped.NAMES)
def test_either_is_loaded_by_its_name_alone_once_and_again_when_nothing_of_it_is_left(
    settings: Config, folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    for _ in range(2):
        make_resident(settings, name, folder)
    assert capfd.readouterr().err.count("is in memory") == 1
    registry = Registry(settings.root, settings.names)
    assert [each.name for each in registry.names()] == [name]
    registry.put(Name(name, str(folder / "gone.gguf"), digest="0" * 64))
    make_resident(settings, name, folder)
    assert registry.is_resident(registry.find(name))


def test_a_name_of_the_user_s_own_stays(settings: Config, folder: Path) -> None:
    own = Name("vai-mini", str(folder / "vai-nano.gguf"), digest=None)
    registry = Registry(settings.root, settings.names)
    registry.put(own)
    make_resident(settings, "vai-mini", folder)
    assert registry.get("vai-mini").source == own.source


def test_a_name_that_nobody_knows_is_not_loaded(settings: Config, folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="qwen"):
        make_resident(settings, "qwen", folder)


@pytest.mark.parametrize("left", [0, 1])
def test_an_installation_without_the_pair_asks_for_a_name(folder: Path, left: int) -> None:
    for name in shipped.NAMES[left:]:
        (folder / f"{name}.gguf").unlink()
    assert shipped.pair(folder) == []
    with pytest.raises(click.UsageError, match="NAME"):
        meant(None, None, folder)
    assert meant("not a name", None, folder) == ("not a name", None)


def test_the_benchmark_alternates_between_the_pair_unless_others_are_asked_for(folder: Path, tmp_path: Path) -> None:
    pair = [folder / "vai-mini.gguf", folder / "vai-nano.gguf"]
    assert files_of([], large=False, cache=tmp_path / "cache", folder=folder) == pair
    assert files_of([tmp_path], large=False, cache=tmp_path / "cache", folder=folder) == [tmp_path]
    assert not (tmp_path / "cache").exists()
    pair[1].unlink()
    with pytest.raises(BadRequest, match="--large"):
        files_of([], large=False, cache=tmp_path / "cache", folder=folder)


def test_its_files_have_their_names_unless_the_user_gave_them_away(settings: Config, folder: Path) -> None:
    assert shipped.source(settings, "vai-nano", folder) == folder / "vai-nano.gguf"
    own = folder.parent / "own.gguf"
    own.touch()
    Registry(settings.root, settings.names).put(Name("vai-nano", str(own)))
    assert shipped.source(settings, "vai-nano", folder) == own
    with pytest.raises(ModelNotFound, match="other"):
        shipped.source(settings, "other", folder)
