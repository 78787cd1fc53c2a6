"""The made-up vocabularies: sized exactly, the same everywhere, and good enough to work on."""

from __future__ import annotations

import time

import pytest

from vai.errors import BadRequest
from vai.text.vocabulary import CONTROL, byte_letters, byte_level_bpe

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("size", [259, 260, 1000, 4096, 32_256])
def test_a_vocabulary_has_exactly_the_asked_size_and_no_token_twice(size: int) -> None:
    tokens, merges, types = byte_level_bpe(size, SPECIALS)
    assert len(tokens) == len(set(tokens)) == len(types) == size
    assert len(merges) == size - 256 - len(SPECIALS)
    assert tokens[:256] == list(byte_letters())
    assert tokens[-3:] == SPECIALS
    assert [index for index, kind in enumerate(types) if kind == CONTROL] == [size - 3, size - 2, size - 1]


def test_every_merge_joins_earlier_tokens_into_the_next_one() -> None:
    tokens, merges, _ = byte_level_bpe(20_000, SPECIALS)
    known = set(tokens[:256])
    for merge, made in zip(merges, tokens[256:], strict=False):
        left, right = merge.split(" ")
        assert left in known
        assert right in known
        assert left + right == made
        known.add(made)


def test_the_vocabulary_of_a_large_model_is_made_in_seconds_and_always_the_same() -> None:
    start = time.process_time()
    first = byte_level_bpe(151_936, SPECIALS)
    assert time.process_time() - start < 3
    assert first == byte_level_bpe(151_936, SPECIALS)


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one() -> None:
    small, large = byte_level_bpe(2000, []), byte_level_bpe(5000, [])
    assert large.tokens[:2000] == small.tokens
    assert large.merges[: len(small.merges)] == small.merges


@pytest.mark.parametrize(("size", "specials"), [(258, SPECIALS), (1 << 21, []), (500, ["x<", "x<"]), (500, ["the"])])
def test_an_impossible_vocabulary_is_refused(size: int, specials: list[str]) -> None:
    with pytest.raises(BadRequest):
        byte_level_bpe(size, specials)
