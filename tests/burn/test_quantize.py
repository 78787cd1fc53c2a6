"""Quantizing: the bits of the format's own package, everything else copied, and nothing done unasked."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from vai.burn.burn import burn
from vai.burn.gguf import GgufFile, GgufWriter, ValueType
from vai.burn.quantize import DECODERS, ENCODERS, PIECE, decode, encode, quantize
from vai.burn.synth import SHAPES, synthesize
from vai.errors import BadRequest, MalformedFile, ModelNotFound

RNG = np.random.default_rng(5)


def weights(count: int) -> np.ndarray:
    """Blocks of every kind: normal ones, constant, zero, one-sided, tiny, of very different magnitudes, with ties."""
    blocks = RNG.normal(size=(count // 32, 32)).astype(np.float32)
    blocks[::7] = 0
    blocks[1::7] = np.abs(blocks[1::7])
    blocks[2::7] *= np.float32(1e-7)
    blocks[3::7, :5] *= np.float32(1000)
    blocks[4::7] = 0.25
    blocks[5::7] = RNG.integers(-8, 8, blocks[5::7].shape)
    return blocks.reshape(-1)


def write(path: Path, matrices: dict[str, np.ndarray], alignment: int = 32) -> None:
    """A file of F32 matrices, a vector, and metadata of several kinds."""
    with GgufWriter(path, alignment=alignment) as writer:
        writer.add("general.architecture", "llama", ValueType.STRING)
        writer.add("general.file_type", 0, ValueType.UINT32)
        writer.add("some.flags", [True, False], ValueType.BOOL)
        writer.add("some.words", ["a", "", "ü"], ValueType.STRING)
        writer.add("some.small", [1, 2], ValueType.INT8)
        writer.add("some.double", 0.1, ValueType.FLOAT64)
        writer.declare("norm.weight", "F32", (5,))
        for name, matrix in matrices.items():
            writer.declare(name, "F32", matrix.shape)
        writer.write(np.arange(5, dtype="<f4").data)
        for matrix in matrices.values():
            writer.write(np.ascontiguousarray(matrix, "<f4").data)


@pytest.mark.parametrize("type", ENCODERS)
def test_the_bits_are_those_of_the_formats_own_package(type: str) -> None:
    values = weights(32 * 7000)
    expected = oracle.quants.quantize(values.reshape(-1, 32), oracle.GGMLQuantizationType[type])
    assert encode(type, values).tobytes() == expected.tobytes()


@pytest.mark.parametrize("type", sorted(set(DECODERS) & set(ENCODERS)))
def test_what_is_read_back_is_what_the_package_reads(type: str) -> None:
    data = encode(type, weights(32 * 700))
    expected = oracle.quants.dequantize(data.reshape(1, -1), oracle.GGMLQuantizationType[type])
    assert np.array_equal(decode(type, data.reshape(-1)).reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("type", ENCODERS)
def test_a_file_is_copied_but_for_its_matrices(type: str, tmp_path: Path) -> None:
    matrix, stack = weights(PIECE + 6400).reshape(-1, 64), weights(2 * 3 * 32).reshape(2, 3, 32)
    write(tmp_path / "a.gguf", {"one.weight": matrix, "stack.weight": stack}, alignment=64)
    done = quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type=type)
    reader = oracle.GGUFReader(tmp_path / "b.gguf")
    contents = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    number = oracle.LlamaFileType["ALL_F32" if type == "F32" else f"MOSTLY_{type}"]
    assert contents == {
        "general.alignment": 64,
        "general.architecture": "llama",
        "some.flags": [True, False],
        "some.words": ["a", "", "ü"],
        "some.small": [1, 2],
        "some.double": 0.1,
        "general.file_type": number,
        "general.quantization_version": 2,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["norm.weight"].data.tolist() == [0, 1, 2, 3, 4]
    assert tuple(tensors["stack.weight"].shape) == (32, 3, 2)
    kind = oracle.GGMLQuantizationType[type]
    assert tensors["one.weight"].data.tobytes() == oracle.quants.quantize(matrix, kind).tobytes()
    assert tensors["stack.weight"].data.tobytes() == oracle.quants.quantize(stack, kind).tobytes()
    assert done.bytes == (tmp_path / "b.gguf").stat().st_size
    assert (done.matrices_before, set(done.types.values())) == (4 * (matrix.size + stack.size), {type})
    assert done.matrices_after == tensors["one.weight"].n_bytes + tensors["stack.weight"].n_bytes


def test_a_pattern_gives_matrices_another_type_and_the_first_one_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {f"blk.{i}.x.weight": weights(64).reshape(1, 64) for i in range(3)})
    keep = [("blk.0.*", "Q8_0"), ("blk.[01].*", "BF16")]
    done = quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q4_0", keep=keep)
    assert list(done.types.values()) == ["Q8_0", "BF16", "Q4_0"]
    with GgufFile(tmp_path / "b.gguf") as file:
        assert {name: file.tensors[name].type for name in done.types} == done.types


def test_a_router_of_experts_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {n: weights(64).reshape(2, 32) for n in ("blk.0.ffn_gate_inp.weight", "x.weight")})
    assert list(quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q4_0").types) == ["x.weight"]


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q5_1"])
def test_what_was_quantized_is_burned(type: str, tmp_path: Path) -> None:
    synthesize(tmp_path / "a.gguf", shape="tiny", type="BF16")
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type=type)
    burned = burn(tmp_path / "b.gguf", tmp_path / "root")
    assert burned.bytes < burn(tmp_path / "a.gguf", tmp_path / "root").bytes


def test_a_quantized_matrix_is_quantized_again_only_when_asked(tmp_path: Path) -> None:
    synthesize(tmp_path / "a.gguf", shape="tiny", type="Q8_0")
    with pytest.raises(BadRequest, match="--allow-requantize"):
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q4_0")
    assert not (tmp_path / "b.gguf").exists()
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q4_0", allow_requantize=True)
    with GgufFile(tmp_path / "a.gguf") as before, GgufFile(tmp_path / "b.gguf") as after:
        for name in ("token_embd.weight", "blk.2.ffn_down.weight"):
            floats = decode("Q8_0", np.frombuffer(before.data(name), np.uint8).copy()).reshape(-1)
            assert bytes(after.data(name)) == encode("Q4_0", floats).tobytes()


def test_a_matrix_that_has_its_type_already_is_copied(tmp_path: Path) -> None:
    synthesize(tmp_path / "a.gguf", shape="tiny", type="Q4_0")
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q4_0")
    with GgufFile(tmp_path / "a.gguf") as before, GgufFile(tmp_path / "b.gguf") as after:
        assert all(bytes(before.data(name)) == bytes(after.data(name)) for name in before.tensors)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", {f"{i}.weight": np.ones((4096, 1024), np.float32) for i in range(4)})
    tracemalloc.start()
    try:
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q5_1")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20 < (tmp_path / "a.gguf").stat().st_size


@pytest.mark.parametrize(("value", "error"), [(np.nan, MalformedFile), (-np.inf, MalformedFile), (1e9, BadRequest)])
def test_weights_that_no_scale_can_hold_are_refused_by_name(
    value: float, error: type[Exception], tmp_path: Path
) -> None:
    matrix = np.ones((2, 64), np.float32)
    matrix[1, 40] = value
    write(tmp_path / "a.gguf", {"odd.weight": matrix})
    with pytest.raises(error, match=r"odd\.weight"):
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, out = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write(source, {"narrow.weight": np.ones((2, 48), np.float32)})
    for kwargs, words in (
        ({"type": "Q3_K"}, "Q3_K"),
        ({"type": "Q4_0"}, "narrow.weight has 48 columns"),
        ({"type": "F16", "keep": [("blk.*", "Q8_0")]}, "blk"),
        ({"type": "F16", "keep": [("narrow*", "IQ1_S")]}, "IQ1_S"),
    ):
        with pytest.raises(BadRequest, match=words):
            quantize(source, out, **kwargs)  # any of the keywords
    with pytest.raises(BadRequest, match="same file"):
        quantize(source, source, type="F16")
    with pytest.raises(ModelNotFound):
        quantize(tmp_path / "none.gguf", out, type="F16")
    synthesize(source, shape="tiny-256", type="Q6_K")
    with pytest.raises(BadRequest, match="does not quantize again"):
        quantize(source, out, type="Q4_0", allow_requantize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_hostile_file_is_refused_as_the_reader_does(tmp_path: Path) -> None:
    synthesize(tmp_path / "a.gguf", shape=SHAPES["tiny"], type="F16")
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[:-100])
    with pytest.raises(MalformedFile, match="truncated"):
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", type="Q8_0")
