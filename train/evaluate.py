"""Held-out bits per byte of a checkpoint, beside what anyone can run without one.

Run: python -m train.evaluate CORPUS [CHECKPOINT ...] [--bytes N]. Baselines: a 5-gram model of bytes, made from the
training text; zlib and xz, which see the held-out text alone. All are measured on the same documents, the first ones of
the held-out split up to N bytes. A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from train.model import Decoder
from train.train import load

ORDER = 5


def bits_per_byte(model: Decoder, tokens: np.ndarray, size: int) -> float:
    """Bits a byte of text `tokens` (each document with its end) of `size` bytes in all."""
    nats = 0.0
    with torch.inference_mode():
        for window, skip in windows(tokens, model.spec.context):
            row = torch.from_numpy(window.astype(np.int64))
            logits = model(row[None, :-1])[0, skip:].float()
            nats += float(functional.cross_entropy(logits, row[1 + skip :], reduction="sum"))
    return nats / math.log(2) / size


def windows(tokens: np.ndarray, context: int) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, skip): each token but the first is to be predicted from those before it, after the first `skip` of them.

    Windows of the whole context advance by half of it, and a token is scored in the first window that holds it: all but
    the first have at least half a context before them. The first document's first token follows its last one's end.
    """
    half = context // 2
    row = np.concatenate([tokens[-1:], tokens])
    for start in range(0, len(row) - 1, half):
        window = row[start : start + context + 1]
        skip = context - half if start else 0
        if len(window) - 1 <= skip:
            break
        yield window, skip


def ngram_bits_per_byte(train: bytes, held: bytes, order: int = ORDER) -> float:
    """Bits a byte under a byte model of `order` - 1 bytes of context, smoothed by Witten and Bell (1991): a context
    seen n times with t different bytes behind it gives t / (n + t) of its weight to the context one byte shorter."""
    probability = np.full(len(held), 1 / 256)
    for length in range(1, order + 1):
        grams, counts = np.unique(_grams(train, length), return_counts=True)
        first = np.flatnonzero(np.diff(grams >> np.uint64(8), prepend=np.uint64(1 << 63)))
        contexts = grams[first] >> np.uint64(8)
        seen = np.add.reduceat(counts, first)
        kinds = np.diff(first, append=len(grams))
        asked = _grams(held, length)
        n, t = (_look_up(contexts, values, asked >> np.uint64(8)) for values in (seen, kinds))
        mixed = (_look_up(grams, counts, asked) + t * probability[length - 1 :]) / np.maximum(n + t, 1)
        probability[length - 1 :] = np.where(n > 0, mixed, probability[length - 1 :])
    return float(-np.log2(probability).mean())


def _grams(text: bytes, length: int) -> np.ndarray:
    """Each run of `length` bytes as a number, the last byte lowest."""
    values = np.frombuffer(text, np.uint8)
    grams = np.zeros(len(values) - length + 1, np.uint64)
    for place in range(length):
        grams = (grams << np.uint64(8)) | values[place : len(values) - length + 1 + place]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """values of the sorted `keys` that are asked for, 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def compressed_bits_per_byte(held: bytes) -> dict[str, float]:
    """zlib and xz at their strongest."""
    packed = {"zlib": zlib.compress(held, 9), "xz": lzma.compress(held, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(data) / len(held) for name, data in packed.items()}


def held_out(corpus: Path, limit: int) -> tuple[bytes, np.ndarray]:
    """(text, tokens) of the first whole documents of the held-out split up to `limit` bytes, at least one."""
    ends = np.load(corpus / "held.ends.npy", allow_pickle=False)
    count = max(1, int(np.searchsorted(ends, limit, side="right")))
    tokens = np.load(corpus / "held.tokens.npy", allow_pickle=False)
    with (corpus / "held.text").open("rb") as file:
        text = file.read(int(ends[count - 1]))
    # The end of a document is a token that no text in between contains, and the last of them all is one.
    return text, tokens[: int(np.flatnonzero(tokens == tokens[-1])[count - 1]) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte of held-out text.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--bytes", type=int, default=1 << 62, help="of held-out text; all of it if not given")
    parser.add_argument("--train-bytes", type=int, default=64 << 20, help="of training text for the 5-gram model")
    args = parser.parse_args()
    text, tokens = held_out(args.corpus, args.bytes)
    with (args.corpus / "train.text").open("rb") as file:
        train = file.read(args.train_bytes)
    results = {f"{ORDER}-gram": ngram_bits_per_byte(train, text), **compressed_bits_per_byte(text)}
    for path in args.checkpoints:
        results[str(path)] = bits_per_byte(load(path)[0].eval(), tokens, len(text))
    print(f"{len(text):,} bytes held out, {len(tokens):,} tokens")
    for name, bits in sorted(results.items(), key=lambda each: each[1]):
        print(f"{name:40} {bits:6.3f} bits a byte")
    print(json.dumps({"evaluate": results, "bytes": len(text), "tokens": len(tokens)}))


if __name__ == "__main__":
    main()
