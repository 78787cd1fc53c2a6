"""`vai synth` as people type it: random weights, and a model grown by file and by name."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

from vai.burn.synth import SHAPES, TYPES, synthesize
from vai.rom.registry import Name, Registry

Vai = Callable[..., subprocess.CompletedProcess[str]]


def test_a_model_grows_by_file_and_by_name(vai: Vai, registry: Registry, tmp_path: Path) -> None:
    small = msgspec.structs.replace(SHAPES["tiny"], width=64, heads=4, head_dim=16, rope_dims=16)
    synthesize(tmp_path / "small.gguf", shape=small, type="Q8_0")
    made = vai("synth", "--grow", tmp_path / "small.gguf", "--shape", "tiny-256", tmp_path / "a.gguf")
    assert made.returncode == 0, made.stderr
    assert "the same bits" in made.stdout
    assert "Its vocabulary stays at 512 of the shape's 523" in made.stdout
    registry.put(Name("small", str(tmp_path / "small.gguf")))
    assert vai("synth", "--grow", "small", "--shape", "tiny-256", tmp_path / "b.gguf").returncode == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert "no model 'other'" in vai("synth", "--grow", "other", "--shape", "tiny", tmp_path / "c.gguf").stderr


def test_every_shape_and_every_type_is_in_the_help(vai: Vai) -> None:
    text = re.sub(r"-\n\s*", "-", vai("synth", "--help").stdout)  # a name may be broken at its hyphen
    told = set(re.findall(r"[\w.+-]*\w", text))
    assert set(SHAPES) <= told
    assert set(TYPES) <= told


def test_arguments_that_do_not_go_together_are_explained(vai: Vai, tmp_path: Path) -> None:
    for words, help in (
        (["tiny", "Q4_0"], "vai synth tiny Q4_0"),
        (["--grow", "x", tmp_path / "a.gguf"], "vai synth --grow"),
        (["--grow", "x", "--shape", "tiny", "--seed", "1", tmp_path / "a.gguf"], "vai synth --grow"),
    ):
        refused = vai("synth", *words)
        assert refused.returncode != 0
        assert help in refused.stderr
    assert not list(tmp_path.iterdir())
