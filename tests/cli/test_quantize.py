"""`vai quantize` as people type it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from vai.burn.gguf import GgufFile
from vai.burn.synth import synthesize

Vai = Callable[..., subprocess.CompletedProcess[str]]


def test_a_model_is_quantized_with_some_matrices_kept_wider(vai: Vai, tmp_path: Path) -> None:
    synthesize(tmp_path / "a.gguf", shape="tiny", type="F16")
    done = vai("quantize", tmp_path / "a.gguf", tmp_path / "b.gguf", "--type", "q4_0", "--keep", "*attn_v*=q8_0")
    assert done.returncode == 0, done.stderr
    with GgufFile(tmp_path / "b.gguf") as file:
        types = {name: file.tensors[name].type for name in ("blk.0.attn_v.weight", "blk.0.attn_q.weight")}
    assert types == {"blk.0.attn_v.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_0"}
    assert vai("load", tmp_path / "b.gguf", "--name", "b").returncode == 0


def test_what_is_wrong_is_said(vai: Vai, tmp_path: Path) -> None:
    synthesize(tmp_path / "a.gguf", shape="tiny", type="Q8_0")
    again = vai("quantize", tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert again.returncode != 0
    assert "--allow-requantize" in again.stderr
    odd = vai("quantize", tmp_path / "a.gguf", tmp_path / "b.gguf", "--keep", "Q8_0")
    assert "PATTERN=TYPE" in odd.stderr
