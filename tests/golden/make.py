"""Recompute the golden arrays of this directory with transformers on the dequantized tensors of our synthetic models.

    pip install ".[dev,oracle]" && python tests/golden/make.py [SHAPE ...]

An implementation that shares nothing with ours: the GGUF file is read and dequantized by the `gguf` package, and the
forward pass is transformers' class of the family in binary64 (which computes norms, angles and softmax in binary32 all
the same). Writes SHAPE-TYPE.npz: `tokens`, `rows` (positions), `logits` [rows, vocabulary] in binary32,
and `greedy`, the tokens that follow by greedy decoding. Bits are another matter: see bits.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from vai.burn.synth import SHAPES, synthesize
from vai.models.spec import Spec

HERE = Path(__file__).parent
MODELS = (
    "tiny",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-gemma2",
    "tiny-gemma3",
    "tiny-mistral",
    "tiny-phi3",
    "tiny-longrope",
    "tiny-phi4",
    "tiny-yarn",
    "tiny-qwen3moe",
    "tiny-mixtral",
    "tiny-qwen2moe",
)
ROWS = (0, 1, 2, 7, 15, 16, 31, 32, 33, 39)
GREEDY = 24
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
SANDWICH = {  # Gemma's
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
CLASSES = {
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "llama": "Llama",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen2moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3moe": "Qwen3Moe",
}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}  # Phi's
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def prompt(vocabulary: int) -> list[int]:
    return [(61 * i * i + 17 * i + 7) % vocabulary for i in range(40)]


def transformers_name(name: str, spec: Spec) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    _, layer, part = stem.split(".")
    names = NAMES | (SANDWICH if spec.post_norms else FUSED if spec.architecture == "phi3" else {})
    return f"model.layers.{layer}.{names[part]}.{kind}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the converter's row order of llama's queries and keys: neighbours back to halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def state(path: Path, spec: Spec) -> dict[str, torch.Tensor]:
    tensors, experts = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("rope_factors"):
            continue  # part of the configuration
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if spec.architecture == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            values = unpermute(values, spec.heads if "attn_q" in tensor.name else spec.kv_heads)
        if spec.architecture.startswith("gemma") and "norm" in tensor.name:
            values = values - 1  # the converter adds it
        if tensor.name.endswith("ffn_gate_inp_shexp.weight"):
            values = values[None]  # a matrix of one row there
        if tensor.name.endswith("_exps.weight"):
            experts[tensor.name] = torch.from_numpy(values)
            continue
        tensors[transformers_name(tensor.name, spec)] = torch.from_numpy(np.ascontiguousarray(values))
    for layer in range(spec.layers if experts else 0):
        gate, up, down = (experts[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        to = f"model.layers.{layer}.mlp.experts."
        tensors |= {to + "gate_up_proj": torch.cat([gate, up], dim=1), to + "down_proj": down}
    return tensors


def experts_of(spec: Spec) -> dict[str, object]:
    return {
        "moe_intermediate_size": spec.ffn,
        "num_local_experts" if spec.architecture == "llama" else "num_experts": spec.experts,
        "num_experts_per_tok": spec.experts_used,
        "shared_expert_intermediate_size": spec.shared_ffn,
        "norm_topk_prob": spec.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "experts_implementation": "eager",  # the only one in binary64
    }


def model(path: Path, spec: Spec) -> torch.nn.Module:
    rope = {"rope_theta": spec.rope_base, "rope_type": "default"}
    more: dict[str, object] = {"attn_implementation": "eager"}  # the one that caps scores
    if spec.rope_scaling == "linear":
        rope |= {"rope_type": "linear", "factor": spec.rope_factor}
    if spec.rope_scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": spec.rope_factor}
        rope |= {"original_max_position_embeddings": spec.rope_original_context}
        rope |= {"beta_fast": spec.rope_beta_fast, "beta_slow": spec.rope_beta_slow}
    if spec.rope_divisors:  # those of a context above 1
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": 1, "factor": 1.0}
        rope |= {"attention_factor": spec.rope_magnitude, "long_factor": list(spec.rope_divisors)}
        rope |= {"short_factor": [1.0] * len(spec.rope_divisors)}
        more |= {"original_max_position_embeddings": 1}
    if spec.rope_dims < spec.head_dim:
        rope |= {"partial_rotary_factor": spec.rope_dims / spec.head_dim}
    name = CLASSES[spec.architecture]
    if name == "Llama":
        name = "Mixtral" if spec.experts else "Mistral" if spec.window else name
    if spec.window:
        kinds = ("full_attention", "sliding_attention")
        more |= {"sliding_window": spec.window}
        if name not in ("Mistral", "Phi3"):
            more |= {"layer_types": [kinds[spec.has_window(layer)] for layer in range(spec.layers)]}
    if spec.architecture.startswith("gemma"):
        more |= {
            "query_pre_attn_scalar": spec.head_dim,
            "attn_logit_softcapping": spec.attention_softcap or None,
            "final_logit_softcapping": spec.logit_softcap or None,
        }
    if spec.local_rope_base:
        local = {"rope_theta": spec.local_rope_base, "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": local}
    built = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
            vocab_size=spec.vocabulary,
            hidden_size=spec.width,
            intermediate_size=spec.ffn,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=spec.context,
            rms_norm_eps=spec.norm_epsilon,
            rope_parameters=rope,
            tie_word_embeddings=spec.tied,
            **({} if not spec.experts else experts_of(spec)),
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **more,
        )
    ).double()
    missing, unexpected = built.load_state_dict(state(path, spec), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or ("lm_head.weight" in missing) != spec.tied:
        raise SystemExit(f"{path.name}: missing {missing}, unexpected {unexpected}")
    built.tie_weights()
    return built.eval()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        for shape in sys.argv[1:] or MODELS:
            for type in ("F32", "Q8_0", "Q4_0"):
                path = Path(directory) / f"{shape}-{type}.gguf"
                synthesize(path, shape=shape, type=type)
                spec = SHAPES[shape]
                oracle = model(path, spec)
                tokens = prompt(spec.vocabulary)
                logits = oracle(torch.tensor([tokens])).logits[0]
                sequence = list(tokens)
                for _ in range(GREEDY):
                    sequence.append(int(oracle(torch.tensor([sequence])).logits[0, -1].argmax()))
                np.savez(
                    HERE / f"{shape}-{type}.npz",
                    tokens=np.array(tokens, np.int32),
                    rows=np.array(ROWS, np.int32),
                    logits=logits[list(ROWS)].numpy().astype(np.float32),
                    greedy=np.array(sequence[len(tokens) :], np.int32),
                )
                print(path.stem, "logits std", float(logits.std()))


if __name__ == "__main__":
    main()
