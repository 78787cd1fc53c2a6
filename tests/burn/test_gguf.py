"""Our GGUF reader and writer against the format's own package, in both directions."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest

from vai.burn.gguf import TENSOR_TYPES, GgufFile, GgufWriter, ValueType

VALUES: dict[str, tuple[Any, ValueType]] = {
    "t.u8": (200, ValueType.UINT8),
    "t.i8": (-100, ValueType.INT8),
    "t.u16": (60_000, ValueType.UINT16),
    "t.i16": (-30_000, ValueType.INT16),
    "t.u32": (4_000_000_000, ValueType.UINT32),
    "t.i32": (-2_000_000_000, ValueType.INT32),
    "t.u64": ((1 << 64) - 1, ValueType.UINT64),
    "t.i64": (-(1 << 63), ValueType.INT64),
    "t.f32": (0.5, ValueType.FLOAT32),
    "t.f64": (0.1, ValueType.FLOAT64),
    "t.true": (True, ValueType.BOOL),
    "t.false": (False, ValueType.BOOL),
    "t.text": ("naïve 你好 \n\x00 👩‍👧", ValueType.STRING),
    "t.empty": ("", ValueType.STRING),
    "t.numbers": ([1, 2, 3], ValueType.INT32),
    "t.floats": ([0.25, -1.5], ValueType.FLOAT32),
    "t.flags": ([True, False], ValueType.BOOL),
    "t.texts": (["a", "", "ä\tb"], ValueType.STRING),
}
SHAPES = {"Q4_0": (3, 64), "Q8_0": (5, 96), "F16": (2, 7), "BF16": (7, 3), "F32": (4, 5)}


def payload(type: str, shape: tuple[int, ...]) -> bytes:
    size = oracle.GGML_QUANT_SIZES[oracle.GGMLQuantizationType[type]]
    return np.random.default_rng(len(type)).bytes(int(np.prod(shape)) // size[0] * size[1])


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_what_we_write_the_package_reads(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "ours.gguf"
    with GgufWriter(path, alignment=alignment) as writer:
        for key, (value, type) in VALUES.items():
            writer.add(key, value, type)
        for type, shape in SHAPES.items():
            writer.declare(type, type, shape)
        writer.declare("vector", "F32", (3,))
        for type, shape in SHAPES.items():
            raw = payload(type, shape)
            writer.write(raw[:7])
            writer.write(memoryview(raw)[7:])
        writer.write(np.arange(3, dtype="<f4").data)
    reader = oracle.GGUFReader(path)
    for key, (value, _) in VALUES.items():
        if isinstance(value, float | list) and key != "t.texts":
            assert np.array_equal(reader.fields[key].contents(), value)
        else:
            assert reader.fields[key].contents() == value, key
    found = {tensor.name: tensor for tensor in reader.tensors}
    for type, shape in SHAPES.items():
        assert tuple(found[type].shape) == tuple(reversed(shape))
        assert found[type].tensor_type.name == type
        assert found[type].data.tobytes() == payload(type, shape)
    assert all(tensor.data_offset % alignment == 0 for tensor in reader.tensors)
    assert tuple(found["vector"].shape) == (3,)


def test_what_the_package_writes_we_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = oracle.GGUFWriter(path, "llama")
    for key, (value, type) in VALUES.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, oracle.GGUFValueType(type))
    weights = np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
    kinds = {type: oracle.GGMLQuantizationType[type] for type in TENSOR_TYPES}
    written = {}
    for type, kind in kinds.items():
        if type.endswith("_K") or type.startswith(("IQ", "TQ")):  # the package reads these and cannot make them
            raw = np.random.default_rng(2).integers(
                0, 256, oracle.quants.quant_shape_to_byte_shape((4, 256), kind), dtype=np.uint8
            )
        else:
            raw = oracle.quants.quantize(weights, kind)
        writer.add_tensor(type, raw, raw_dtype=None if type in ("F32", "F16") else kind)
        written[type] = raw.tobytes()
    writer.add_tensor("vector", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(path) as ours:
        assert ours.metadata["general.architecture"] == "llama"
        for key, (value, _) in VALUES.items():
            assert ours.metadata[key] == value, key
        for type in kinds:
            assert ours.tensors[type].type == type
            assert ours.tensors[type].shape == (4, 256)
            assert bytes(ours.data(type)) == written[type]
        assert ours.tensors["vector"].shape == (1, 256)


def test_a_large_vocabulary_is_read_in_well_under_a_second(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    tokens = [f"tok{index}é" for index in range(152_000)]
    with GgufWriter(path) as writer:
        writer.add("t.tokens", tokens, ValueType.STRING)
        writer.add("t.types", [1] * len(tokens), ValueType.INT32)
    before = time.process_time()
    with GgufFile(path) as gguf:
        spent = time.process_time() - before
        assert gguf.metadata["t.tokens"] == tokens
    assert spent < 1


def test_a_v2_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    with GgufWriter(path) as writer:
        writer.add("a", 1, ValueType.UINT32)
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path.write_bytes(raw)
    with GgufFile(path) as gguf:
        assert (gguf.version, gguf.metadata) == (2, {"a": 1})


def test_a_file_that_was_not_finished_does_not_appear(tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    with pytest.raises(ValueError, match="lacks 12 bytes"), GgufWriter(path) as writer:
        writer.declare("t", "F32", (4,))
        writer.write(bytes(4))
    with pytest.raises(RuntimeError), GgufWriter(path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_would_make_a_broken_file(tmp_path: Path) -> None:
    with GgufWriter(tmp_path / "a.gguf") as writer:
        writer.add("a", 1, ValueType.UINT32)
        with pytest.raises(ValueError, match="there already"):
            writer.add("a", 1, ValueType.UINT32)
        with pytest.raises(ValueError, match="not whole Q4_0 blocks"):
            writer.declare("t", "Q4_0", (4, 33))
        writer.declare("t", "F32", (4,))
        with pytest.raises(ValueError, match="there already"):
            writer.declare("t", "F32", (4,))
        with pytest.raises(ValueError, match="more than"):
            writer.write(bytes(17))
        with pytest.raises(ValueError, match="before tensor bytes"):
            writer.declare("u", "F32", (4,))
        writer.write(bytes(16))
    with pytest.raises(ValueError, match="power of two"):
        GgufWriter(tmp_path / "b.gguf", alignment=48)
