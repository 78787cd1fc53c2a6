"""`vai.attach`: the checkpoint's own values, over the image's own bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf import GGUFReader, dequantize

import vai
from vai.burn.burn import burn
from vai.burn.synth import SHAPES, synthesize
from vai.errors import ModelNotFound, Unavailable
from vai.models.spec import Spec
from vai.rom.registry import Name, Registry
from vai.rom.segment import holders, image_path

# Odd sizes: neither rows nor columns fill their last blocks, and q|k|v and gate|up are fused.
SHAPE = msgspec.structs.replace(SHAPES["tiny-qwen2"], layers=1, vocabulary=521, ffn=416)


WIDE = msgspec.structs.replace(SHAPES["tiny-256"], layers=1, vocabulary=521)


@pytest.mark.parametrize(
    ("type", "shape"),
    [(type, SHAPE) for type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "F16", "BF16", "F32")]
    + [(type, WIDE) for type in ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_K_M", "Q2_K", "IQ1_M", "IQ3_S")],
)
def test_every_tensor_has_the_values_that_the_formats_oracle_reads_from_the_checkpoint(
    type: str, shape: Spec, tmp_path: Path
) -> None:
    synthesize(tmp_path / "m.gguf", shape=shape, type=type, seed=3)
    digest = burn(tmp_path / "m.gguf", tmp_path / "root").digest
    reader = GGUFReader(tmp_path / "m.gguf")
    with vai.attach(digest, root=tmp_path / "root", names=tmp_path / "names") as weights:
        assert sorted(weights) == sorted(tensor.name for tensor in reader.tensors)
        for tensor in reader.tensors:
            expected = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            values = weights[tensor.name].numpy()
            assert values.dtype == np.float32
            assert values.shape == weights[tensor.name].shape == expected.shape
            assert np.array_equal(values.view(np.uint32), expected.view(np.uint32)), tensor.name
            assert values.flags.c_contiguous


def test_packed_bytes_and_vectors_are_the_images_own_memory(tiny_root: tuple[Path, Path, dict[str, str]]) -> None:
    root, names, digests = tiny_root
    with vai.attach("tiny-qwen2", root=root, names=names) as weights:
        assert weights.digest == digests["tiny-qwen2"]
        mapped = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if re.search(rf"r--s .*{weights.digest}\.rom", line)
        ]
        views = [tensor.packed for tensor in weights.values()] + [weights["output_norm.weight"].numpy()]
        for view in views:
            address = view.__array_interface__["data"][0]
            assert any(begin <= address < end for begin, end in mapped)
            assert not view.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                view[0] = 0


def test_interleaved_neighbours_share_bytes_without_overlapping(tiny_root: tuple[Path, Path, dict[str, str]]) -> None:
    root, names, _ = tiny_root
    with vai.attach("tiny", root=root, names=names) as weights:
        gate, up = weights["blk.0.ffn_gate.weight"].packed, weights["blk.0.ffn_up.weight"].packed
        assert gate.shape == up.shape == (352 // 16, 192 // 64, 576)
        assert np.may_share_memory(gate, up)
        assert gate.strides[0] == 2 * 3 * 576
        assert not np.shares_memory(gate, up)


def test_a_lease_is_held_until_closed_and_values_stay_readable(tiny_root: tuple[Path, Path, dict[str, str]]) -> None:
    root, names, digests = tiny_root
    path = image_path(root, digests["tiny"])
    before = len(holders(path))
    weights = vai.attach("tiny", root=root, names=names)
    assert len(holders(path)) == before + 1
    tensor = weights["blk.0.attn_q.weight"]
    first = tensor.numpy()
    weights.close()
    assert len(holders(path)) == before
    assert np.array_equal(tensor.numpy(), first)


def test_a_tensor_that_is_not_there_is_a_key_error(tiny_root: tuple[Path, Path, dict[str, str]]) -> None:
    root, names, _ = tiny_root
    with vai.attach("tiny", root=root, names=names) as weights:
        assert "blk.99.attn_q.weight" not in weights
        assert len(weights) == len(list(weights))
        with pytest.raises(KeyError):
            weights["blk.99.attn_q.weight"]


def test_a_model_that_is_not_there_says_what_is(tiny_root: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    root, names, _ = tiny_root
    with pytest.raises(ModelNotFound, match="tiny-qwen2"):
        vai.attach("nobody", root=root, names=names)
    registry = Registry(root, tmp_path)
    registry.put(Name("absent", "absent.gguf", digest="0" * 64))
    with pytest.raises(Unavailable, match="vai load"):
        vai.attach("absent", root=root, names=tmp_path)


def test_attaching_loads_neither_engine_nor_kernels(tiny_root: tuple[Path, Path, dict[str, str]]) -> None:
    root, names, _ = tiny_root
    code = (
        "import sys, vai\n"
        f"vai.attach('tiny', root={str(root)!r}, names={str(names)!r})['output_norm.weight'].numpy()\n"
        "assert not [name for name in sys.modules if name.startswith(('vai.engine', 'vai.kernels', 'vai.text'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
