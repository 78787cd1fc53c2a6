"""Tokenizers the slow way, written from the algorithms' descriptions: nothing here is shared with what it checks.

Byte-level BPE: Radford et al. 2019 with Sennrich et al. 2016, cutting text by each model's published expression.
SentencePiece BPE: Kudo and Richardson 2018 as in Llama: the pair with the best union first, bytes for the rest.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

# As published in the models' own tokenizer.json, \\p{..} inside a class always.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|[\p{{N}}]"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "gpt-2": (GPT2,),
    "smollm": (r"[\p{N}]", GPT2),
    "starcoder": (r"[\p{N}]", GPT2),
    "tekken": (TEKKEN,),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?[\p{L}]+",
        r"\s?[\p{P}]+",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"[\p{N}]",
    ),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",  # published as a list of ranges: the cased letters of an older Unicode
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"[\p{N}]+",
    ),
    "deepseek-v3": (r"[\p{N}]{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3),
}
IGNORES_MERGES = {"llama-bpe", "tekken"}


@cache
def _characters(category: str) -> str:
    """The characters of a Unicode category, as ranges for the inside of a class."""
    codes = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith(category)]
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\p\{(\w+)\}", lambda match: _characters(match[1]), expression))


def cut(text: str, expressions: Sequence[str]) -> list[str]:
    """Pieces of the text: each expression isolates its matches in the pieces of the one before."""
    pieces = [text]
    for expression in expressions:
        finer: list[str] = []
        for piece in pieces:
            at = 0
            for match in _compiled(expression).finditer(piece):
                finer += [piece[at : match.start()], match.group()]
                at = match.end()
            finer.append(piece[at:])
        pieces = [piece for piece in finer if piece]
    return pieces


def _alphabet() -> list[str]:
    """GPT-2's bytes_to_unicode, from its description: printable bytes are themselves, the others follow from U+0100."""
    letters, shift = [], 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + shift))
            shift += 1
    return letters


def byte_level(text: str, tokens: Sequence[str], merges: Sequence[str], pre: str) -> list[int]:
    """Ids of `text`: in each piece the best-ranked pair is joined until no pair has a rank."""
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    alphabet = _alphabet()
    result: list[int] = []
    for piece in cut(text, CUTS[pre]):
        word = [alphabet[byte] for byte in piece.encode()]
        if pre in IGNORES_MERGES and "".join(word) in ids:
            word = ["".join(word)]
        while len(word) > 1:
            rank, at = min((ranks.get((a, b), len(ranks)), at) for at, (a, b) in enumerate(pairwise(word)))
            if rank == len(ranks):
                break
            word[at : at + 2] = [word[at] + word[at + 1]]
        result += [ids[token] for token in word]
    return result


def sentence_piece(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Ids of `text` with the space Llama puts before it."""
    ids = {token: index for index, token in enumerate(tokens)}
    word = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        unions = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(pairwise(word)) if a + b in ids]
        if not unions:
            break
        _, at = min(unions)
        word[at : at + 2] = [word[at] + word[at + 1]]
    result: list[int] = []
    for piece in word:
        result += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return result
