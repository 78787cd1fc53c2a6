"""A checkpoint's metadata becomes a Spec, or is refused by name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vai.burn.synth import SHAPES
from vai.errors import CorruptImage, MalformedFile, UnsupportedModel
from vai.models.spec import Spec, expected_tensors, file_tensors, rope_divisors_tensor, spec_from_gguf

TINY = SHAPES["tiny"]


def metadata(spec: Spec = TINY, **changes: Any) -> dict[str, object]:
    """The keys of a real file of `spec`; a change to None drops the key, "_" stands for "."."""
    keys: dict[str, object] = {
        "block_count": spec.layers,
        "embedding_length": spec.width,
        "feed_forward_length": spec.ffn,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_epsilon,
        "context_length": spec.context,
        "rope.freq_base": spec.rope_base,
        "rope.dimension_count": spec.rope_dims,
        "vocab_size": spec.vocabulary,
    }
    if spec.experts:
        keys |= {"expert_count": spec.experts, "expert_used_count": spec.experts_used}
        if spec.architecture != "llama":
            keys |= {"expert_feed_forward_length": spec.ffn, "feed_forward_length": 3 * spec.ffn}
    if spec.shared_ffn:
        keys |= {"expert_shared_feed_forward_length": spec.shared_ffn}
    if spec.rope_scaling == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": spec.rope_factor}
    if spec.rope_scaling == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": spec.rope_factor}
        keys |= {"rope.scaling.original_context_length": spec.rope_original_context}
    if spec.rope_divisors:
        keys |= {"rope.scaling.original_context_length": spec.context // 2}
        keys |= {"rope.scaling.attn_factor": spec.rope_magnitude}
    if spec.window:
        keys |= {"attention.sliding_window": spec.window, "attention.sliding_window_pattern": spec.full_every}
    if spec.local_rope_base:
        keys |= {"rope.freq_base_swa": spec.local_rope_base}
    if spec.attention_softcap:
        keys |= {"attn_logit_softcapping": spec.attention_softcap, "final_logit_softcapping": spec.logit_softcap}
    keys |= changes.pop("keys", {})
    prefixed = {f"{spec.architecture}.{key}": value for key, value in keys.items() if value is not None}
    return {"general.architecture": spec.architecture, **prefixed}


def shapes(spec: Spec = TINY) -> dict[str, tuple[int, int]]:
    """Tensor shapes as the file gives them."""
    expected = expected_tensors(spec)
    rows = {name: sum(expected[part][0] for part in parts) for name, parts in file_tensors(spec).items()}
    columns = {name: expected[parts[0]][1] for name, parts in file_tensors(spec).items()}
    found = {name: (rows[name], columns[name]) if columns[name] > 1 else (1, rows[name]) for name in rows}
    if spec.rope_divisors:
        found |= dict.fromkeys(("rope_factors_long.weight", "rope_factors_short.weight"), (1, spec.rope_dims // 2))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_the_metadata_of_a_file_gives_back_its_spec(name: str) -> None:
    spec = SHAPES[name]
    assert spec_from_gguf(metadata(spec), shapes(spec), rope_divisors=spec.rope_divisors) == spec


def test_a_field_that_came_later_changes_no_section_that_does_without_it() -> None:
    assert b"qk_norm" not in TINY.to_bytes()
    assert b'"qk_norm":true' in SHAPES["tiny-qwen3"].to_bytes()


@pytest.mark.parametrize("name", SHAPES)
def test_a_spec_survives_its_section_of_the_image(name: str) -> None:
    section = SHAPES[name].to_bytes()
    assert Spec.from_bytes(section) == SHAPES[name]
    assert Spec.from_bytes(section).to_bytes() == section


@pytest.mark.parametrize(
    "section",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        TINY.to_bytes().replace(b'"layers":3', b'"layers":0'),
        TINY.to_bytes().replace(b'"kv_heads":2', b'"kv_heads":5'),
        TINY.to_bytes().replace(b'"llama"', b'"lama"'),
        TINY.to_bytes().replace(b'{"arch', b'{"winter":7,"arch'),
        b"[" * 100_000,
    ],
)
def test_a_damaged_spec_section_is_refused(section: bytes) -> None:
    with pytest.raises(CorruptImage):
        Spec.from_bytes(section)


def test_absent_keys_have_the_defaults_of_the_format() -> None:
    spec = msgspec.structs.replace(TINY, kv_heads=6, rope_base=10_000.0, rope_scaling="none", rope_factor=1.0)
    absent = ["attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base"]
    absent += ["rope.dimension_count", "vocab_size"]
    assert spec_from_gguf(metadata(spec, keys=dict.fromkeys(absent)), shapes(spec)) == spec


def test_the_linear_factor_of_2023_is_understood() -> None:
    old = {"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 4.0}
    assert spec_from_gguf(metadata(keys=old), shapes()).rope_factor == 4.0


def test_a_factor_without_scaling_means_nothing() -> None:
    spec = spec_from_gguf(metadata(keys={"rope.scaling.type": "none"}), shapes())
    assert (spec.rope_scaling, spec.rope_factor) == ("none", 1.0)


def test_yarn_has_its_own_numbers_or_those_for_llama() -> None:
    yarn = {"rope.scaling.type": "yarn"}
    spec = spec_from_gguf(metadata(keys=yarn), shapes())
    assert (spec.rope_scaling, spec.rope_factor, spec.rope_original_context) == ("yarn", 4.0, TINY.context)
    assert (spec.rope_beta_fast, spec.rope_beta_slow, spec.rope_magnitude) == (32.0, 1.0, 1.0)
    own = {"original_context_length": 256, "yarn_beta_fast": 24.0, "yarn_beta_slow": 2.0, "attn_factor": 1.25}
    own |= {"yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
    keys = yarn | {f"rope.scaling.{key}": value for key, value in own.items()}
    spec = spec_from_gguf(metadata(keys=keys), shapes())
    assert spec.rope_original_context == 256
    assert (spec.rope_beta_fast, spec.rope_beta_slow, spec.rope_magnitude) == (24.0, 2.0, 1.25)
    spec = spec_from_gguf(metadata(keys=keys | {"rope.scaling.factor": 1.0}), shapes())
    assert (spec.rope_scaling, spec.rope_original_context, spec.rope_magnitude) == ("none", 0, 1.25)


def test_yarn_beside_frequencies_of_another_kind_is_refused() -> None:
    yarn = {"rope.scaling.type": "yarn"}
    divided = shapes() | {"rope_freqs.weight": (1, 16)}
    with pytest.raises(UnsupportedModel, match="YaRN"):
        spec_from_gguf(metadata(keys=yarn), divided, rope_divisors=[1.0] * 16)
    gemma3 = SHAPES["tiny-gemma3"]
    with pytest.raises(UnsupportedModel, match="YaRN"):
        spec_from_gguf(metadata(gemma3, keys=yarn), shapes(gemma3))


def test_equal_values_for_each_layer_are_one_value() -> None:
    assert spec_from_gguf(metadata(keys={"attention.head_count_kv": [2, 2, 2]}), shapes()) == TINY


def test_llama_3_frequencies_come_with_the_spec() -> None:
    divisors = [1.0 + i for i in range(TINY.rope_dims // 2)]
    tensors = shapes() | {"rope_freqs.weight": (1, TINY.rope_dims // 2)}
    assert spec_from_gguf(metadata(), tensors, rope_divisors=divisors).rope_divisors == tuple(divisors)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_attn_factor": 1.2}, "yarn_attn_factor"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"rope.scaling.attn_factor": 1.2}, "attn_factor"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"expert_weights_scale": 2.0}, "expert_weights_scale"),
        ({"attention.value_length": 64}, "value_length"),
        ({"attention.head_count": [6, 6, 4]}, "head_count"),
        ({"attn_logit_softcapping": 50.0}, "softcapping"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers"),
        ({"attention.causal": False}, "causal"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(keys: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        spec_from_gguf(metadata(keys=keys), shapes())


def test_a_window_is_computed_where_the_family_has_one() -> None:
    spec = spec_from_gguf(metadata(keys={"attention.sliding_window": 32}), shapes())
    assert [spec.has_window(layer) for layer in range(3)] == [True, True, True]
    qwen2 = SHAPES["tiny-qwen2"]
    with pytest.raises(UnsupportedModel, match="sliding_window"):
        spec_from_gguf(metadata(qwen2, keys={"attention.sliding_window": 32}), shapes(qwen2))


@pytest.mark.parametrize(
    ("pattern", "full_every"),
    [(None, 6), (2, 2), ([True, True, False, True], 3), ([True] * 4, 0), ([False] * 4, 1)],
)
def test_which_layers_have_a_window_is_a_number_or_said_for_each(pattern: object, full_every: int) -> None:
    gemma3 = SHAPES["tiny-gemma3"]
    keys = {"attention.sliding_window_pattern": pattern}
    assert spec_from_gguf(metadata(gemma3, keys=keys), shapes(gemma3)).full_every == full_every


def test_a_pattern_of_windows_that_is_not_regular_is_refused_by_name() -> None:
    gemma3 = SHAPES["tiny-gemma3"]
    with pytest.raises(UnsupportedModel, match="sliding_window_pattern"):
        keys = {"attention.sliding_window_pattern": [False, True, True, True]}
        spec_from_gguf(metadata(gemma3, keys=keys), shapes(gemma3))


def test_gemma_s_silent_files_have_the_values_of_its_first_models() -> None:
    gemma2 = SHAPES["tiny-gemma2"]
    silent = ["attention.sliding_window", "attention.sliding_window_pattern"]
    silent += ["attn_logit_softcapping", "final_logit_softcapping"]
    spec = spec_from_gguf(metadata(gemma2, keys=dict.fromkeys(silent)), shapes(gemma2))
    assert (spec.window, spec.full_every, spec.attention_softcap, spec.logit_softcap) == (4096, 2, 50.0, 30.0)
    large = msgspec.structs.replace(gemma2, layers=46)
    assert spec_from_gguf(metadata(large), shapes(large)).attention_scale == pytest.approx((192 / 6) ** -0.5)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*gemma2.*llama, phi3, qwen2"):
        spec_from_gguf({"general.architecture": "mamba"}, {})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"block_count": None}, "lacks llama.block_count"),
        ({"block_count": 0}, "block_count"),
        ({"block_count": 1 << 40}, "block_count"),
        ({"block_count": -1}, "block_count"),
        ({"block_count": True}, "block_count"),
        ({"block_count": "3"}, "block_count"),
        ({"embedding_length": 192.0}, "embedding_length"),
        ({"attention.head_count": [6, 6]}, "head_count"),
        ({"attention.head_count": 0}, "head_count"),
        ({"attention.head_count_kv": 4}, "key-value heads"),
        ({"attention.layer_norm_rms_epsilon": None}, "rms_epsilon"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "rms_epsilon"),
        ({"rope.freq_base": float("inf")}, "freq_base"),
        ({"rope.freq_base": 0.5}, "rope_base"),
        ({"rope.dimension_count": 34}, "RoPE"),
        ({"rope.dimension_count": 31}, "RoPE"),
        ({"rope.scaling.factor": -4.0}, "factor"),
        ({"rope.scaling.type": 3}, "scaling.type"),
        ({"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 0}, "original_context"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_slow": 32.0}, "32 times"),
        ({"vocab_size": 511}, "vocab_size"),
        ({"context_length": None}, "context_length"),
        ({"embedding_length": 160}, "token_embd"),
    ],
)
def test_what_contradicts_itself_is_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(MalformedFile, match=words):
        spec_from_gguf(metadata(keys=keys), shapes())


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.2.ffn_up.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(name: str) -> None:
    tensors = shapes()
    del tensors[name]
    with pytest.raises(MalformedFile, match=name):
        spec_from_gguf(metadata(), tensors)


def test_a_tensor_of_another_shape_is_named() -> None:
    with pytest.raises(MalformedFile, match=r"blk\.1\.attn_k\.weight"):
        spec_from_gguf(metadata(), shapes() | {"blk.1.attn_k.weight": (192, 192)})


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "output.bias", "blk.3.attn_norm.weight", "x\n" * 99])
def test_a_tensor_without_a_place_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        spec_from_gguf(metadata(), shapes() | {name: (1, 192)})
    assert repr(name[:80]) in refused.value.message


def test_frequency_divisors_that_cannot_be_used_are_refused() -> None:
    tensors = shapes() | {"rope_freqs.weight": (1, 16)}
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        spec_from_gguf(metadata(), tensors)
    with pytest.raises(MalformedFile, match="rope_freqs"):
        spec_from_gguf(metadata(), tensors, rope_divisors=[0.0] * 16)
    with pytest.raises(MalformedFile, match="divisors"):
        spec_from_gguf(metadata(), shapes() | {"rope_freqs.weight": (1, 4)}, rope_divisors=[1.0] * 4)
    qwen2 = SHAPES["tiny-qwen2"]
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        spec_from_gguf(metadata(qwen2), shapes(qwen2) | {"rope_freqs.weight": (1, 24)}, rope_divisors=[1.0] * 24)


def test_a_qwen2_without_biases_is_incomplete() -> None:
    qwen2 = SHAPES["tiny-qwen2"]
    tensors = {name: shape for name, shape in shapes(qwen2).items() if not name.endswith(".bias")}
    with pytest.raises(MalformedFile, match=r"attn_q\.bias"):
        spec_from_gguf(metadata(qwen2), tensors)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"expert_count": None}, MalformedFile, "expert_count"),
        ({"expert_used_count": 11}, MalformedFile, "11 of 10 experts"),
        ({"expert_feed_forward_length": 100}, MalformedFile, "whole blocks of 16 rows"),
        ({"expert_count": 5}, MalformedFile, "ffn_gate_inp"),
        ({"expert_gating_func": 2}, UnsupportedModel, "expert_gating_func"),
        ({"expert_shared_count": 1}, UnsupportedModel, "expert_shared_count"),
    ],
)
def test_experts_that_cannot_be_are_refused(keys: dict[str, object], error: type[Exception], words: str) -> None:
    spec = SHAPES["tiny-qwen3moe"]
    with pytest.raises(error, match=words):
        spec_from_gguf(metadata(spec, keys=keys), shapes(spec))


def test_a_llama_with_experts_is_mixtral_and_one_with_none_is_plain() -> None:
    spec = SHAPES["tiny-mixtral"]
    scaled = spec_from_gguf(metadata(spec, keys={"expert_weights_scale": 2.5}), shapes(spec))
    assert scaled == msgspec.structs.replace(spec, expert_scale=2.5)
    plain = spec_from_gguf(metadata(keys={"expert_count": 0, "expert_used_count": 0}), shapes())
    assert (plain, plain.renormalize) == (TINY, False)
    for keys, error, words in (
        ({"expert_used_count": None}, MalformedFile, "expert_used_count"),
        ({"expert_count": 2000}, MalformedFile, "expert_count"),
        ({"expert_count": None, "expert_used_count": None}, MalformedFile, "ffn_gate.weight"),
        ({"expert_gating_func": 2}, UnsupportedModel, "expert_gating_func"),
    ):
        with pytest.raises(error, match=words):
            spec_from_gguf(metadata(spec, keys=keys), shapes(spec))


def test_experts_of_a_family_that_has_none_are_refused_by_name() -> None:
    qwen2 = SHAPES["tiny-qwen2"]
    with pytest.raises(UnsupportedModel, match="expert_count"):
        spec_from_gguf(metadata(qwen2, keys={"expert_count": 8}), shapes(qwen2))


def test_a_shared_expert_that_cannot_be_is_refused() -> None:
    spec = SHAPES["tiny-qwen2moe"]
    unsaid = dict.fromkeys(("expert_shared_feed_forward_length", "feed_forward_length"))
    with pytest.raises(MalformedFile, match="expert_shared_feed_forward_length"):
        spec_from_gguf(metadata(spec, keys=unsaid), shapes(spec))
    with pytest.raises(MalformedFile, match="ffn_gate_shexp"):
        spec_from_gguf(metadata(spec, keys={"expert_shared_feed_forward_length": 320}), shapes(spec))
    with pytest.raises(UnsupportedModel, match="expert_weights_scale"):
        spec_from_gguf(metadata(spec, keys={"expert_weights_scale": 2.0}), shapes(spec))
    with pytest.raises(ValueError, match="models with experts"):
        msgspec.structs.replace(TINY, shared_ffn=64)


def test_experts_are_together_as_wide_as_a_plain_layer_where_a_file_of_qwen2moe_does_not_say_it() -> None:
    spec = msgspec.structs.replace(SHAPES["tiny-qwen2moe"], ffn=64, shared_ffn=256)
    unsaid = dict.fromkeys(("expert_feed_forward_length", "expert_shared_feed_forward_length"))
    assert spec_from_gguf(metadata(spec, keys=unsaid | {"feed_forward_length": 256}), shapes(spec)) == spec
    with pytest.raises(MalformedFile, match="expert_feed_forward_length"):
        spec_from_gguf(metadata(spec, keys=unsaid | {"feed_forward_length": 3}), shapes(spec))


def test_the_fused_matrices_of_phi_are_what_its_file_has() -> None:
    spec = SHAPES["tiny-phi3"]
    tensors = shapes(spec)
    assert tensors["blk.0.attn_qkv.weight"] == (192 + 64 + 64, 192) and tensors["blk.0.ffn_up.weight"] == (704, 192)
    for changes, name in (
        ({"blk.1.ffn_up.weight": (352, 192)}, r"blk\.1\.ffn_up"),
        ({"blk.1.attn_qkv.weight": (192, 192)}, r"blk\.1\.attn_qkv"),
    ):
        with pytest.raises(MalformedFile, match=name):
            spec_from_gguf(metadata(spec), tensors | changes)
    with pytest.raises(UnsupportedModel, match="ffn_gate"):
        spec_from_gguf(metadata(spec), tensors | {"blk.0.ffn_gate.weight": (352, 192)})
    del tensors["blk.0.attn_qkv.weight"]
    with pytest.raises(MalformedFile, match=r"blk\.0\.attn_qkv"):
        spec_from_gguf(metadata(spec), tensors)


def test_longrope_s_long_set_is_for_files_whose_context_was_extended() -> None:
    spec = SHAPES["tiny-longrope"]
    for original, name in ((2048, "long"), (4095, "long"), (4096, "short"), (None, "short")):
        keys = metadata(spec, keys={"rope.scaling.original_context_length": original})
        assert rope_divisors_tensor(keys, shapes(spec)) == f"rope_factors_{name}.weight"
    assert rope_divisors_tensor(metadata(), shapes()) is None
    assert rope_divisors_tensor(metadata(), {"rope_freqs.weight"}) == "rope_freqs.weight"
    named = {"rope.scaling.type": "longrope"}
    assert spec_from_gguf(metadata(spec, keys=named), shapes(spec), rope_divisors=spec.rope_divisors) == spec


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"rope.scaling.type": "yarn"}, UnsupportedModel, "LongRoPE beside RoPE scaling by 1 of type 'yarn'"),
        ({"rope.scaling.factor": 32.0}, UnsupportedModel, "LongRoPE beside RoPE scaling by 32"),
        ({"rope.dimension_count": 24}, MalformedFile, "16 RoPE divisors for 12 pairs"),
        ({"rope.scaling.attn_factor": None}, MalformedFile, "attn_factor"),
    ],
)
def test_longrope_that_cannot_be_is_refused(keys: dict[str, object], error: type[Exception], words: str) -> None:
    spec = SHAPES["tiny-longrope"]
    with pytest.raises(error, match=words):
        spec_from_gguf(metadata(spec, keys=keys), shapes(spec), rope_divisors=spec.rope_divisors)


def test_longrope_lacks_no_set_and_is_of_no_other_family() -> None:
    spec = SHAPES["tiny-longrope"]
    tensors = shapes(spec)
    del tensors["rope_factors_long.weight"]
    with pytest.raises(MalformedFile, match="rope_factors_long"):
        spec_from_gguf(metadata(spec), tensors)
    sets = dict.fromkeys(("rope_factors_long.weight", "rope_factors_short.weight"), (1, 16))
    with pytest.raises(UnsupportedModel, match="rope_factors_short"):
        spec_from_gguf(metadata(), shapes() | sets, rope_divisors=[1.0] * 16)
    with pytest.raises(MalformedFile, match="rope_factors_long"):
        spec_from_gguf(metadata(spec), shapes(spec), rope_divisors=[0.0] * 16)


def test_a_llama_with_biases_has_them() -> None:
    spec = msgspec.structs.replace(TINY, qkv_bias=True)
    assert spec_from_gguf(metadata(spec), shapes(spec)) == spec
