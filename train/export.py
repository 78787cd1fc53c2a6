"""A trained checkpoint as a GGUF file that `vai load` takes.

Run: python -m train.export CHECKPOINT TOKENIZER_JSON OUT.gguf [--name NAME] [--type BF16].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from train.model import Decoder
from train.tokenizer import END, PRE, SPECIALS
from train.train import load
from vai.burn import recommended
from vai.burn.gguf import FILE_TYPES, GgufWriter, ValueType
from vai.models.spec import Spec, expected_tensors
from vai.text.vocabulary import CONTROL, NORMAL

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where a request says nothing: small models wander where every token is possible, and repeat themselves where one is.
SAMPLING = {"temp": 0.6, "top_p": 0.9, "penalty_repeat": 1.1}
# The model only goes on with a text: a conversation is its messages, line after line, and roles are not said.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)


def export(model: Decoder, tokenizer: Path, out: Path, *, name: str, type: str) -> None:
    """Write model and tokenizer.json as GGUF: matrices of `type` (a key of TYPES), vectors of F32."""
    tensors = expected_tensors(model.spec)
    weights = dict(model.named_parameters())
    with GgufWriter(out) as writer:
        _write_metadata(writer, model.spec, name, type)
        _write_tokenizer(writer, tokenizer)
        for tensor, (rows, columns) in tensors.items():
            writer.declare(tensor, *(("F32", (rows,)) if columns == 1 else (type, (rows, columns))))
        for tensor, (_, columns) in tensors.items():
            writer.write(_bytes(weights[tensor], "F32" if columns == 1 else type))


def _bytes(weight: Tensor, type: str) -> bytes:
    return weight.detach().cpu().to(TYPES[type]).contiguous().view(torch.uint8).numpy().tobytes()


def _write_metadata(writer: GgufWriter, spec: Spec, name: str, type: str) -> None:
    prefix = spec.architecture
    writer.add("general.architecture", prefix, ValueType.STRING)
    writer.add("general.name", name, ValueType.STRING)
    writer.add("general.file_type", FILE_TYPES[type], ValueType.UINT32)
    for key, value in SAMPLING.items():
        writer.add(recommended.PREFIX + key, value, ValueType.FLOAT32)
    integers = {
        "vocab_size": spec.vocabulary,
        "context_length": spec.context,
        "embedding_length": spec.width,
        "block_count": spec.layers,
        "feed_forward_length": spec.ffn,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "rope.dimension_count": spec.rope_dims,
    }
    for key, value in integers.items():
        writer.add(f"{prefix}.{key}", value, ValueType.UINT32)
    writer.add(f"{prefix}.attention.layer_norm_rms_epsilon", spec.norm_epsilon, ValueType.FLOAT32)
    writer.add(f"{prefix}.rope.freq_base", spec.rope_base, ValueType.FLOAT32)


def _write_tokenizer(writer: GgufWriter, path: Path) -> None:
    model = json.loads(path.read_text())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    key = "tokenizer.ggml."
    writer.add(key + "model", "gpt2", ValueType.STRING)
    writer.add(key + "pre", PRE, ValueType.STRING)
    writer.add(key + "tokens", tokens, ValueType.STRING)
    types = [CONTROL if token in SPECIALS else NORMAL for token in tokens]
    writer.add(key + "token_type", types, ValueType.INT32)
    writer.add(key + "merges", [" ".join(merge) for merge in model["merges"]], ValueType.STRING)
    for role in ("bos", "eos"):
        writer.add(f"{key}{role}_token_id", vocabulary[END], ValueType.UINT32)
    # A prompt is seldom how a file begins, and what was learned from began anywhere in one.
    writer.add(key + "add_bos_token", False, ValueType.BOOL)
    writer.add("tokenizer.chat_template", TEMPLATE, ValueType.STRING)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint as GGUF.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="vai-mini")
    parser.add_argument("--type", choices=sorted(TYPES), default="BF16")
    args = parser.parse_args()
    export(load(args.checkpoint)[0], args.tokenizer, args.out, name=args.name, type=args.type)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
