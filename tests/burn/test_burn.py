"""A burned image holds what its checkpoint says, is named by it alone, and is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf as oracle
import msgspec
import numpy as np
import pytest

from vai.burn.burn import Progress, burn, preview
from vai.burn.gguf import GgufFile, GgufWriter, ValueType
from vai.burn.pack import unpack
from vai.burn.synth import SHAPES, synthesize
from vai.errors import Interrupted, MalformedFile, ModelNotFound, NotSupported, UnsupportedModel
from vai.models.spec import Spec, file_tensors
from vai.rom import segment
from vai.rom.image import VECTOR
from vai.rom.view import Image

TYPES = ("Q4_0", "Q8_0", "F16", "BF16", "F32")


@dataclass
class Checkpoint:
    """A GGUF file taken apart, to be written again with a change. tensors: name -> (type, dimensions, bytes)."""

    metadata: dict[str, tuple[object, ValueType]]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        reader = oracle.GGUFReader(path)
        metadata = {
            field.name: (field.contents(), ValueType(field.types[-1]))
            for field in reader.fields.values()
            if not field.name.startswith("GGUF.")
        }
        with GgufFile(path) as gguf:
            tensors = {
                name: (tensor.type, tuple(reversed(tensor.dimensions)), bytes(gguf.data(name)))
                for name, tensor in gguf.tensors.items()
            }
        return cls(metadata, tensors)

    def write(self, path: Path) -> Path:
        with GgufWriter(path) as writer:
            for key, (value, type) in self.metadata.items():
                writer.add(key, value, type)  # whatever the reader gave
            for name, (kind, shape, _) in self.tensors.items():
                writer.declare(name, kind, shape)
            for _, _, data in self.tensors.values():
                writer.write(data)
        return path

    def convert(self, name: str, type: str) -> None:
        """Give a tensor another type."""
        kind, shape, data = self.tensors[name]
        raw = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
        weights = oracle.quants.dequantize(raw, oracle.GGMLQuantizationType[kind])
        again = oracle.quants.quantize(weights, oracle.GGMLQuantizationType[type])
        self.tensors[name] = (type, shape, again.tobytes())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny Qwen2 checkpoint (with biases) of each type."""
    directory = tmp_path_factory.mktemp("tiny")
    for type in TYPES:
        synthesize(directory / f"{type}.gguf", shape="tiny-qwen2", type=type)
    return {type: directory / f"{type}.gguf" for type in TYPES}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def images(root: Path) -> list[Path]:
    """Everything there is under images, hidden or not."""
    return sorted((root / "images").iterdir()) if root.exists() else []


def rows_of(image: Image, gguf: GgufFile, name: str, source: str | None = None) -> bytes:
    stored, part, data = image.tensor(name)
    return unpack(stored, part, gguf.tensors[source or name].type, data)


@pytest.fixture
def changed(tiny: Mapping[str, Path], tmp_path: Path) -> Iterator[Checkpoint]:
    yield Checkpoint.read(tiny["Q4_0"])


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_every_tensor_comes_back_bit_for_bit(type: str, tiny: Mapping[str, Path], root: Path) -> None:
    burned = burn(tiny[type], root)
    with segment.attach(root, burned.digest) as image, GgufFile(tiny[type]) as gguf:
        segment.verify(image)
        assert image.weights == burned.weights
        assert image.path.stat().st_size == burned.bytes
        for name in gguf.tensors:
            assert rows_of(image, gguf, name) == bytes(gguf.data(name)), name


@pytest.mark.parametrize(
    ("shape", "mix"),
    [(shape, mix) for shape in ("tiny-256", "tiny-qwen2") for mix in ("Q4_K_M", "Q5_K_M", "Q4_0+Q6_K")]
    + [("tiny-256", type) for type in ("IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "IQ2_XXS")],
)
def test_files_mixed_as_people_s_are_come_back_bit_for_bit(mix: str, shape: str, tmp_path: Path, root: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape=shape, type=mix)
    with segment.attach(root, burn(tmp_path / "m.gguf", root).digest) as image, GgufFile(tmp_path / "m.gguf") as gguf:
        segment.verify(image)
        stored = {tensor.name for tensor in image.table.tensors}
        for name in gguf.tensors:
            assert rows_of(image, gguf, name) == bytes(gguf.data(name)), name
        for layer in range(SHAPES[shape].layers):
            kinds = {gguf.tensors[f"blk.{layer}.attn_{part}.weight"].type for part in "qkv"}
            assert (f"blk.{layer}.attn_qkv.weight" in stored) == (len(kinds) == 1)


@pytest.mark.parametrize(("type", "ffn"), [("Q4_0", 352), ("Q4_K_M", 512), ("F32", 360)])  # the last: no whole blocks
def test_matrices_that_the_file_fused_come_back_bit_for_bit(type: str, ffn: int, tmp_path: Path, root: Path) -> None:
    shape = msgspec.structs.replace(SHAPES["tiny-phi3"], width=256, ffn=ffn)
    synthesize(tmp_path / "m.gguf", shape=shape, type=type)
    with segment.attach(root, burn(tmp_path / "m.gguf", root).digest) as image, GgufFile(tmp_path / "m.gguf") as gguf:
        segment.verify(image)
        stored = {tensor.name for tensor in image.table.tensors}
        assert {"blk.1.attn_qkv.weight", "blk.1.ffn_gate_up.weight"} < stored
        for name, parts in file_tensors(shape).items():
            rows = [rows_of(image, gguf, part, name) for part in parts]
            assert b"".join(rows) == bytes(gguf.data(name)), name


def test_divisors_of_frequencies_become_those_of_the_spec(tmp_path: Path, root: Path) -> None:
    path, key = tmp_path / "m.gguf", "phi3.rope.scaling.original_context_length"
    spec = SHAPES["tiny-longrope"]
    synthesize(path, shape=spec, type="F32")
    changed = Checkpoint.read(path)
    for original, divisors in ((spec.context // 2, spec.rope_divisors), (spec.context, (1.0,) * 16)):
        changed.metadata[key] = (original, ValueType.UINT32)
        with segment.attach(root, burn(changed.write(path), root).digest) as image:
            assert Spec.from_bytes(image.spec) == msgspec.structs.replace(spec, rope_divisors=divisors)
            assert not any("rope" in tensor.name for tensor in image.table.tensors)
    llama = msgspec.structs.replace(SHAPES["tiny"], rope_divisors=spec.rope_divisors)
    synthesize(path, shape=llama, type="F32")
    assert preview(path).spec == llama
    changed.convert("rope_factors_short.weight", "F16")
    with pytest.raises(MalformedFile, match=r"rope_factors_short\.weight must be F32"):
        burn(changed.write(path), root)


def test_neighbours_of_one_type_are_stored_as_one(tiny: Mapping[str, Path], root: Path) -> None:
    with segment.attach(root, burn(tiny["Q4_0"], root).digest) as image:
        names = [tensor.name for tensor in image.table.tensors]
        first = [name for name in names if name.startswith("blk.0.")]
        assert names[0] == "token_embd.weight"
        assert first == [
            "blk.0.attn_norm.weight",
            "blk.0.attn_qkv.weight",
            "blk.0.attn_output.weight",
            "blk.0.ffn_norm.weight",
            "blk.0.ffn_gate_up.weight",
            "blk.0.ffn_down.weight",
            "blk.0.attn_qkv.bias",
        ]
        gate, up = (image.table.find(f"blk.0.ffn_{half}.weight")[1] for half in ("gate", "up"))
        assert [(gate.first_block, gate.block_step), (up.first_block, up.block_step)] == [(0, 2), (1, 2)]
        bias, matrix = (image.table.find(f"blk.0.attn_k.{kind}")[1] for kind in ("bias", "weight"))
        assert bias[1:] == matrix[1:], "a bias has the mapping of its matrix"


def test_neighbours_of_different_types_stay_apart(changed: Checkpoint, tmp_path: Path, root: Path) -> None:
    changed.convert("blk.0.attn_v.weight", "Q8_0")
    changed.convert("blk.1.ffn_up.weight", "F16")
    path = changed.write(tmp_path / "mixed.gguf")
    with segment.attach(root, burn(path, root).digest) as image, GgufFile(path) as gguf:
        stored = {tensor.name: tensor.type for tensor in image.table.tensors}
        assert [stored[f"blk.0.attn_{part}.weight"] for part in "qkv"] == ["Q4_0", "Q4_0", "Q8_0"]
        assert all(stored[f"blk.0.attn_{part}.bias"] == VECTOR for part in "qkv")
        assert (stored["blk.1.ffn_gate.weight"], stored["blk.1.ffn_up.weight"]) == ("Q4_0", "F16")
        assert "blk.1.attn_qkv.weight" in stored
        for name in gguf.tensors:
            assert rows_of(image, gguf, name) == bytes(gguf.data(name)), name


@pytest.mark.parametrize("type", ["F16", "BF16"])
def test_vectors_of_short_floats_become_binary32(type: str, changed: Checkpoint, tmp_path: Path, root: Path) -> None:
    changed.convert("blk.0.attn_norm.weight", type)
    path = changed.write(tmp_path / "short.gguf")
    kind, _, data = changed.tensors["blk.0.attn_norm.weight"]
    expected = oracle.quants.dequantize(np.frombuffer(data, np.uint8), oracle.GGMLQuantizationType[kind])
    with segment.attach(root, burn(path, root).digest) as image:
        stored, _, values = image.tensor("blk.0.attn_norm.weight")
        assert stored.type == VECTOR
        assert bytes(values[: expected.nbytes]) == expected.astype("<f4").tobytes()


def test_provenance_is_content_only(tiny: Mapping[str, Path], root: Path) -> None:
    with segment.attach(root, burn(tiny["Q4_0"], root).digest) as image, GgufFile(tiny["Q4_0"]) as gguf:
        provenance = json.loads(image.section("provenance"))
        assert set(provenance) == {"format", "recipe", "source_header_sha256", "vai_format", "general"}
        assert provenance["source_header_sha256"] == gguf.header_sha256()
        assert provenance["general"]["architecture"] == "qwen2"
        assert str(tiny["Q4_0"].parent) not in str(provenance)
        assert json.loads(image.section("defaults")) == {}


# --- identity ---------------------------------------------------------------------------------------------------------


def test_one_checkpoint_gives_one_digest_whatever_it_is_called_and_however_many_burn(
    tiny: Mapping[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "other name.gguf"
    copy.write_bytes(tiny["Q8_0"].read_bytes())
    found = {
        burn(source, tmp_path / f"root{index}", threads=threads).digest
        for index, (source, threads) in enumerate([(tiny["Q8_0"], 1), (tiny["Q8_0"], 2), (copy, 3)])
    }
    assert len(found) == 1


def test_the_order_of_tensors_in_the_file_does_not_change_the_weights(
    changed: Checkpoint, tiny: Mapping[str, Path], tmp_path: Path, root: Path
) -> None:
    changed.tensors = dict(reversed(changed.tensors.items()))
    path = changed.write(tmp_path / "reversed.gguf")
    assert burn(path, root).weights == burn(tiny["Q4_0"], root).weights


def test_wrong_weights_of_equal_shape_have_another_digest(
    changed: Checkpoint, tiny: Mapping[str, Path], tmp_path: Path, root: Path
) -> None:
    right = burn(tiny["Q4_0"], root)
    kind, shape, data = changed.tensors["blk.1.ffn_down.weight"]
    changed.tensors["blk.1.ffn_down.weight"] = (kind, shape, data[:-1] + bytes([data[-1] ^ 0x10]))
    wrong = burn(changed.write(tmp_path / "wrong.gguf"), root)
    assert wrong.bytes == right.bytes
    assert wrong.digest != right.digest
    assert wrong.weights != right.weights


def test_burning_again_keeps_the_image_that_is_there(tiny: Mapping[str, Path], root: Path) -> None:
    first = burn(tiny["F16"], root)
    [path] = images(root)
    before = path.stat()
    assert burn(tiny["F16"], root).digest == first.digest
    assert images(root) == [path]
    assert path.stat().st_ino == before.st_ino


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(changed: Checkpoint, tmp_path: Path, root: Path) -> None:
    del changed.tensors["blk.1.ffn_down.weight"]
    with pytest.raises(MalformedFile, match=r"lacks the tensor blk\.1\.ffn_down\.weight"):
        burn(changed.write(tmp_path / "a.gguf"), root)
    assert images(root) == []


def test_an_unknown_tensor_is_named(changed: Checkpoint, tmp_path: Path, root: Path) -> None:
    changed.tensors["blk.0.attn_sinks.weight"] = ("F32", (4,), bytes(16))
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_sinks\.weight"):
        burn(changed.write(tmp_path / "a.gguf"), root)
    assert images(root) == []


def test_a_tensor_of_the_wrong_shape_is_named(changed: Checkpoint, tmp_path: Path, root: Path) -> None:
    kind, (rows, columns), data = changed.tensors["blk.0.ffn_down.weight"]
    changed.tensors["blk.0.ffn_down.weight"] = (kind, (columns, rows), data)
    assert rows != columns
    with pytest.raises(MalformedFile, match=r"blk\.0\.ffn_down\.weight has shape"):
        burn(changed.write(tmp_path / "a.gguf"), root)


def test_a_matrix_of_three_dimensions_is_named(changed: Checkpoint, tmp_path: Path, root: Path) -> None:
    kind, (rows, columns), data = changed.tensors["blk.0.ffn_down.weight"]
    changed.tensors["blk.0.ffn_down.weight"] = (kind, (2, rows // 2, columns), data)
    with pytest.raises(MalformedFile, match=r"blk\.0\.ffn_down\.weight has 3 dimensions"):
        burn(changed.write(tmp_path / "a.gguf"), root)


def test_experts_that_are_not_one_matrix_each_are_named(tmp_path: Path, root: Path) -> None:
    synthesize(tmp_path / "moe.gguf", shape="tiny-qwen3moe", type="Q4_0")
    changed = Checkpoint.read(tmp_path / "moe.gguf")
    kind, (experts, rows, columns), data = changed.tensors["blk.1.ffn_down_exps.weight"]
    for shape in ((experts * rows, columns), (rows, experts, columns)):
        changed.tensors["blk.1.ffn_down_exps.weight"] = (kind, shape, data)
        with pytest.raises(MalformedFile, match=r"blk\.1\.ffn_down_exps\.weight is not 10 matrices"):
            burn(changed.write(tmp_path / "a.gguf"), root)


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Checkpoint]:
    """A Mixtral file as they are made, and one as they were: a tensor for each expert, in an order of its own."""
    synthesize(tmp_path / "whole.gguf", shape="tiny-mixtral", type="Q4_0")
    file = Checkpoint.read(tmp_path / "whole.gguf")
    for name in [name for name in file.tensors if "_exps." in name]:
        kind, (experts, rows, columns), data = file.tensors.pop(name)
        size = len(data) // experts
        for expert in reversed(range(experts)):
            piece = data[expert * size : (expert + 1) * size]
            file.tensors[name.replace("_exps.", f".{expert}.")] = (kind, (rows, columns), piece)
    return tmp_path / "whole.gguf", file


def test_experts_in_tensors_of_their_own_give_the_same_weights(
    apart: tuple[Path, Checkpoint], tmp_path: Path, root: Path
) -> None:
    whole, file = apart
    digests = [burn(path, root).digest for path in (whole, file.write(tmp_path / "apart.gguf"))]
    with segment.attach(root, digests[0]) as one, segment.attach(root, digests[1]) as other:
        assert one.weights == other.weights  # a hash of tensors, their bytes and the spec


def test_what_is_wrong_with_one_of_the_experts_is_named(
    apart: tuple[Path, Checkpoint], tmp_path: Path, root: Path
) -> None:
    _, file = apart
    kind, (rows, columns), data = file.tensors["blk.1.ffn_up.4.weight"]
    file.tensors["blk.1.ffn_up.4.weight"] = (kind, (rows // 2, columns), data[: len(data) // 2])
    with pytest.raises(MalformedFile, match=r"blk\.1\.ffn_up\.4\.weight is missing or is no matrix of 224 x 192"):
        burn(file.write(tmp_path / "a.gguf"), root)
    file.tensors["blk.1.ffn_up.4.weight"] = (kind, (rows, columns), data)
    file.convert("blk.1.ffn_up.4.weight", "Q8_0")
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_up\.4\.weight is Q8_0 and .* Convert"):
        burn(file.write(tmp_path / "a.gguf"), root)
    del file.tensors["blk.1.ffn_up.4.weight"]
    with pytest.raises(MalformedFile, match=r"blk\.1\.ffn_up\.4\.weight is missing"):
        burn(file.write(tmp_path / "a.gguf"), root)


def test_a_quantized_vector_is_named(changed: Checkpoint, tmp_path: Path, root: Path) -> None:
    changed.convert("output_norm.weight", "Q8_0")
    with pytest.raises(UnsupportedModel, match=r"output_norm\.weight has the type Q8_0"):
        burn(changed.write(tmp_path / "a.gguf"), root)


def test_a_missing_file_is_told(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ModelNotFound, match="no file"):
        burn(tmp_path / "absent.gguf", root)


def test_a_recipe_that_cannot_be_applied_is_refused(tiny: Mapping[str, Path], root: Path) -> None:
    with pytest.raises(NotSupported, match="quantize"):
        burn(tiny["F16"], root, recipe={"quantize": "Q4_0"})


# --- progress and interruption ----------------------------------------------------------------------------------------


def test_progress_counts_every_byte(tiny: Mapping[str, Path], root: Path) -> None:
    seen: list[Progress] = []
    burn(tiny["F32"], root, progress=seen.append)
    assert [step.phase for step in seen[:2]] == ["reading", "packing"]
    assert seen[-1].phase == "publishing"
    assert seen[-1].done == seen[-1].total > 0
    done = [step.done for step in seen]
    assert done == sorted(done)


@pytest.mark.parametrize("step", range(4))
def test_interrupted_at_any_step_nothing_is_left(step: int, tiny: Mapping[str, Path], root: Path) -> None:
    """Steps of this file: reading, packing nothing yet, packing its one chunk, publishing."""
    seen = []

    def interrupt(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == step + 1:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        burn(tiny["F32"], root, progress=interrupt)
    assert images(root) == []


@pytest.mark.parametrize(
    ("advice", "defaults"),
    [
        ({}, {}),
        ({"temp": 0.6, "top_p": 0.95, "min_p": 0.05}, {"temperature": 0.6, "top_p": 0.95, "min_p": 0.05}),
        ({"top_k": 20, "penalty_repeat": 1.1}, {"top_k": 20, "repetition_penalty": 1.1}),
        ({"top_k": -1, "temp": 1e-7, "mirostat": 2}, {"temperature": 1e-7}),
    ],
)
def test_the_sampling_that_a_file_recommends_goes_into_the_image(
    advice: dict[str, float], defaults: dict[str, float], changed: Checkpoint, tmp_path: Path, root: Path
) -> None:
    for key, value in advice.items():
        kind = ValueType.INT32 if isinstance(value, int) else ValueType.FLOAT32
        changed.metadata[f"general.sampling.{key}"] = (value, kind)
    burned = burn(changed.write(tmp_path / "advised.gguf"), root)
    with segment.attach(root, burned.digest) as image:
        assert json.loads(image.section("defaults")) == defaults


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("temp", float("nan"), ValueType.FLOAT32),
        ("temp", float("inf"), ValueType.FLOAT32),
        ("temp", -1.0, ValueType.FLOAT32),
        ("temp", 3e38, ValueType.FLOAT32),
        ("top_p", 0.0, ValueType.FLOAT32),
        ("top_k", 1 << 40, ValueType.UINT64),
        ("min_p", "a lot", ValueType.STRING),
        ("penalty_repeat", True, ValueType.BOOL),
    ],
)
def test_a_recommendation_that_no_request_could_have_is_refused(
    key: str, value: object, kind: ValueType, changed: Checkpoint, tmp_path: Path, root: Path
) -> None:
    changed.metadata[f"general.sampling.{key}"] = (value, kind)
    with pytest.raises(MalformedFile, match=r"sampling|temperature|top_p"):
        burn(changed.write(tmp_path / "advised.gguf"), root)
