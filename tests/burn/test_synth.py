"""Synthetic checkpoints: of the asked shape, the same everywhere, read by others, refused where they cannot be."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest

from vai.burn.burn import burn
from vai.burn.gguf import TENSOR_TYPES, GgufFile
from vai.burn.synth import SHAPES, synthesize
from vai.errors import BadRequest
from vai.kernels.program import StepArgs
from vai.kernels.reference import ReferencePlan
from vai.models.decoder import build
from vai.models.spec import Spec, spec_from_gguf
from vai.rom.segment import attach

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")
WIDE_TYPES = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")  # blocks of 256 columns
SLOW_TYPES = ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0")
MIXES = ("Q4_K_M", "Q5_K_M", "Q4_0+Q6_K")
# SHA-256 over the tensors' bytes: the golden logits hold for these weights and no others.
TENSORS = {
    ("tiny", "Q4_0"): "fef71ef6e2e4a90c8407c5bb8a01b859f84d2d5e6e3da2ece8bbe23b1c35fcdb",
    ("tiny-qwen2", "Q8_0"): "0efc9746de9f8c454c7bfcca0d178e6cea0b10296fb38ba89cee425b2f06d6ab",
    ("tiny-256", "Q4_K_M"): "b4531a8f433bbdaae2225374f154119919d95a1944700b1a75f7e58dab3b6af7",
    ("tiny-256", "Q5_K"): "ab67dcb9cbd1fbe6814e3f1ab41052bb8a3f4a48de9006453cab598c2f0e1ef9",
    ("tiny-qwen2", "Q5_1"): "024fe6c248e224f19e04215edfcfcc6f5b7c07560727ba84e3c5e27d0ee68899",
    ("tiny-qwen2", "F16"): "310691a1c82a6bd1b7d0b4652b439530c3753c6eab1b663929f5bfc2fbde49ec",
}


def read(path: Path) -> tuple[Spec, dict[str, object], str]:
    with GgufFile(path) as file:
        digest = hashlib.sha256()
        for name in file.tensors:
            with file.data(name) as data:
                digest.update(data)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        return spec_from_gguf(file.metadata, shapes), dict(file.metadata), digest.hexdigest()


@pytest.mark.parametrize(
    ("shape", "type"),
    [(shape, type) for shape in ("tiny", "tiny-qwen2") for type in TYPES + MIXES]
    + [("tiny-256", type) for type in WIDE_TYPES + MIXES],
)
def test_a_checkpoint_has_the_shape_and_the_size_that_was_asked_for(shape: str, type: str, tmp_path: Path) -> None:
    size = synthesize(tmp_path / "m.gguf", shape=shape, type=type)
    spec, metadata, _ = read(tmp_path / "m.gguf")
    assert spec == SHAPES[shape]
    assert len(metadata["tokenizer.ggml.tokens"]) == spec.vocabulary  # a list, as read
    assert size == (tmp_path / "m.gguf").stat().st_size < 5_000_000


@pytest.mark.parametrize(("shape", "type"), TENSORS)
def test_the_same_arguments_give_the_same_weights_everywhere(shape: str, type: str, tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape=shape, type=type)
    assert read(tmp_path / "m.gguf")[2] == TENSORS[shape, type]


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    synthesize(tmp_path / "a.gguf", shape="tiny", type="Q4_0", seed=0)
    synthesize(tmp_path / "b.gguf", shape="tiny", type="Q4_0", seed=1)
    assert read(tmp_path / "a.gguf")[2] != read(tmp_path / "b.gguf")[2]


@pytest.mark.parametrize("type", TYPES + WIDE_TYPES + SLOW_TYPES)
def test_weights_are_normal_of_the_width_that_keeps_activations_alive(type: str, tmp_path: Path) -> None:
    shape = "tiny-256" if type in WIDE_TYPES + SLOW_TYPES else "tiny-qwen2"
    synthesize(tmp_path / "m.gguf", shape=shape, type=type)
    spec = SHAPES[shape]
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    gate, bias, norm = (tensors[f"blk.1.{name}"] for name in ("ffn_gate.weight", "attn_k.bias", "ffn_norm.weight"))
    assert gate.std() == pytest.approx(1 / math.sqrt(spec.width), rel=0.03)
    assert abs(gate.mean()) < 5 * gate.std() / math.sqrt(gate.size)
    assert abs(np.corrcoef(gate[:-1].ravel(), gate[1:].ravel())[0, 1]) < 5 / math.sqrt(gate.size)
    assert bias.std() == pytest.approx(0.3, rel=0.3)
    assert norm.mean() == pytest.approx(1, abs=0.15) and norm.std() == pytest.approx(0.3, rel=0.3)


@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen2"])
def test_activations_neither_vanish_nor_explode_in_32_layers(shape: str, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(
        SHAPES[shape], layers=32, width=128, ffn=352, heads=4, head_dim=32, rope_dims=32, norm_epsilon=1e-6
    )
    synthesize(tmp_path / "m.gguf", shape=spec, type="Q4_0")
    program, rows = build(spec), np.arange(8, dtype=np.int32)
    with attach(tmp_path / "root", burn(tmp_path / "m.gguf", tmp_path / "root").digest) as image:
        plan = ReferencePlan(program, image, kv_type="bf16", max_rows=8, max_sequences=8)
    step = StepArgs(7 * rows, rows, np.array([0, 8], np.int32), rows[:1], (np.zeros((1, 1), np.int64),), rows)
    logits = plan.forward(step, np.zeros(program.groups[0].page_bytes("bf16"), np.uint8))
    assert 2 < logits.std() < 4
    assert len(set(logits.argmax(axis=1))) > 2


@pytest.mark.parametrize(("type", "low", "high"), [("Q4_0", -8, 7), ("Q8_0", -128, 127)])
def test_block_types_use_their_whole_range_of_codes_and_both_signs_of_scale(
    type: str, low: int, high: int, tmp_path: Path
) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny", type=type)
    with GgufFile(tmp_path / "m.gguf") as file, file.data("output.weight") as data:
        blocks = np.frombuffer(data, np.uint8).reshape(-1, 18 if type == "Q4_0" else 34).copy()
    scales, codes = blocks[:, :2].copy().view("<f2"), blocks[:, 2:]
    codes = np.stack([codes & 15, codes >> 4]).astype(int) - 8 if type == "Q4_0" else codes.view(np.int8)
    assert (codes.min(), codes.max()) == (low, high)
    assert (scales > 0).any() and (scales < 0).any() and np.isfinite(scales).all()


@pytest.mark.parametrize("type", WIDE_TYPES)
def test_superblocks_use_every_code_and_every_bit_of_their_scales(type: str, tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-256", type=type)
    with GgufFile(tmp_path / "m.gguf") as file, file.data("output.weight") as data:
        blocks = np.frombuffer(data, np.uint8).reshape(-1, TENSOR_TYPES[type].bytes).copy()
        ones, zeros = np.bitwise_or.reduce(blocks, axis=0), np.bitwise_and.reduce(blocks, axis=0)
    d = {"Q6_K": slice(208, 210), "IQ4_XS": slice(0, 2)}.get(type, slice(0, 4))
    halves = blocks[:, d].copy().view("<f2")
    assert (halves > 0).any() and (halves < 0).any() and np.isfinite(halves).all()
    for bits in (np.delete(ones, d), np.delete(~zeros, d)):
        assert (bits == 0xFF).all()


def test_mixes_have_the_types_that_people_s_files_have(tmp_path: Path) -> None:
    def types(shape: str, mix: str) -> dict[str, str]:
        synthesize(tmp_path / "m.gguf", shape=shape, type=mix)
        with GgufFile(tmp_path / "m.gguf") as file:
            return {name.removesuffix(".weight"): tensor.type for name, tensor in file.tensors.items()}

    medium = types("tiny-256", "Q4_K_M")
    six = {name for name, type in medium.items() if type == "Q6_K"}
    assert six == {"output", "blk.2.attn_v", "blk.2.ffn_down", "blk.3.attn_v", "blk.3.ffn_down"}
    assert set(medium.values()) == {"Q4_K", "Q6_K", "F32"}
    assert {name for name, type in types("tiny-256", "Q4_0+Q6_K").items() if type == "Q6_K"} == {"output"}
    narrow = types("tiny-qwen2", "Q4_K_M")  # no whole blocks of 256, and the table of tokens is the output
    assert narrow["token_embd"] == narrow["blk.1.attn_v"] == "Q8_0" and narrow["blk.0.attn_v"] == "Q5_0"


def test_any_shape_can_be_made(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SHAPES["tiny"], layers=1, vocabulary=300, qkv_bias=True, rope_dims=16)
    synthesize(tmp_path / "m.gguf", shape=spec, type="Q8_0")
    assert read(tmp_path / "m.gguf")[0] == spec


def test_the_shapes_of_real_models_have_their_sizes() -> None:
    def parameters(spec: Spec) -> int:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        block = spec.width * (2 * q + 2 * kv + 3 * spec.ffn + 2) + spec.qkv_bias * (q + 2 * kv)
        return spec.layers * block + spec.width + spec.vocabulary * spec.width * (1 if spec.tied else 2)

    assert parameters(SHAPES["qwen2-1.5b"]) == 1_543_714_304
    assert parameters(SHAPES["deepseek-coder-6.7b"]) == 6_740_512_768


@pytest.mark.parametrize(
    ("shape", "type", "words"),
    [
        ("tiny", "Q8_K", "Q8_K"),
        ("tiny", "Q4_K", "192 columns.*Q4_K"),
        ("huge", "Q4_0", "'huge'.*tiny"),
        ("deepseek-coder-6.7b", "F16", "13.5 GB"),
        (msgspec.structs.replace(SHAPES["tiny"], ffn=40), "Q8_0", "ffn_down.*40 columns"),
        (msgspec.structs.replace(SHAPES["tiny"], vocabulary=100), "Q8_0", "vocabulary"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(
    shape: str | Spec, type: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=words):
        synthesize(tmp_path / "m.gguf", shape=shape, type=type)
    assert not list(tmp_path.iterdir())
