"""Tokenizer fields as a GGUF file has them, for the tests of this room."""

from __future__ import annotations

from functools import cache
from typing import Any

from vai.text.vocabulary import byte_level_bpe

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def byte_level(pre: str = "qwen2", size: int = 3000, **more: Any) -> dict[str, Any]:
    """A `gpt2` tokenizer with ChatML control tokens at the end; `more` are fields without their `tokenizer.ggml.`."""
    tokens, merges, types = byte_level_bpe(size, CHATML)
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": merges,
        "token_type": types,
        "eos_token_id": size - 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**fields, **more}.items()}


@cache
def _pieces() -> tuple[str, ...]:
    """Pieces of a SentencePiece vocabulary: every piece of some words, each word also with its space."""
    words = "the there then hello help world word low lower lowest new newer wide wider größe привет мир 世界 return"
    pieces = {f"▁{word}"[begin:end] for word in words.split() for begin in range(9) for end in range(begin + 1, 10)}
    return tuple(sorted((piece for piece in pieces if piece), key=lambda piece: (len(piece), piece)))


def sentence_piece(**more: Any) -> dict[str, Any]:
    """A `llama` tokenizer: unknown, bos, eos, 256 bytes, pieces with distinct scores."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*head, *_pieces()]
    # Neither by length nor by alphabet: a fixed shuffle, so that the order of merging shows.
    scores = [0.0] * len(head) + [-float((index * 7919) % 10007) for index in range(len(_pieces()))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(_pieces())
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**fields, **more}.items()}
