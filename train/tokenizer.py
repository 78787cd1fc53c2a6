"""The byte-level BPE vocabulary that the demonstration models share, and the corpus in its tokens.

Run: python -m train.tokenizer CORPUS [--size N]. Reads what train.corpus wrote; writes tokenizer.json beside it, and
train.tokens.npy and held.tokens.npy (uint16): every document followed by END. The same corpus gives the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from train.corpus import SPLITS, read
from vai.text.pretokenizers import PRETOKENIZERS

# A pre-tokenizer that readers of GGUF know by name: Qwen 2's without its NFC. A line break ends a piece and indentation
# begins the next, so that a prompt that ends with its line is cut as the corpus is.
PRE = "stablelm2"
END = "<|endoftext|>"
SPECIALS = (END,)
BATCH = 256
MAX_SIZE = 1 << 16  # tokens are stored in 16 bits


def learn(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary of at most `size` tokens (Sennrich et al. 2016), the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRETOKENIZERS[PRE].passes]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterator[str]) -> np.ndarray:
    """Documents as one row of tokens (uint16), END behind each; special tokens spelled in a text are only letters."""
    tokenizer.encode_special_tokens = True
    end = np.array([tokenizer.token_to_id(END)], np.uint16)
    pieces: list[np.ndarray] = []
    while batch := list(islice(texts, BATCH)):
        for encoding in tokenizer.encode_batch_fast(batch):
            pieces += [np.array(encoding.ids, np.uint16), end]
    return np.concatenate(pieces) if pieces else end[:0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the vocabulary and encode the corpus.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--size", type=int, default=8192, choices=range(512, MAX_SIZE + 1), metavar="512..65536")
    args = parser.parse_args()
    tokenizer = learn(read(args.corpus, "train"), args.size)
    tokenizer.save(str(args.corpus / "tokenizer.json"))
    for split in SPLITS:
        tokens = encode(tokenizer, read(args.corpus, split))
        np.save(args.corpus / f"{split}.tokens.npy", tokens)
        size = (args.corpus / f"{split}.text").stat().st_size
        print(f"{split}: {len(tokens):,} tokens, {size / max(1, len(tokens)):.2f} bytes each")


if __name__ == "__main__":
    main()
