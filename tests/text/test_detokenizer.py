"""Incremental text: the same in the end as all at once, whatever the cuts, and nothing that must not be seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from checkpoint_fields import byte_level, sentence_piece
from hypothesis import given, settings
from hypothesis import strategies as st

from vai.text.detokenizer import Detokenizer, StopStrings
from vai.text.template import template_section
from vai.text.tokenizer import Tokenizer, tokenizer_section


@cache
def made(kind: str) -> Tokenizer:
    fields = sentence_piece() if kind == "llama" else byte_level(size=1000)
    return Tokenizer.from_sections(tokenizer_section(fields), template_section(fields))


def cut_at(items: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    places = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[a:b] for a, b in pairwise(places)]


IDS = st.lists(st.integers(0, 1100), max_size=40)
CUTS = st.lists(st.integers(0, 1 << 16), max_size=10)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@settings(max_examples=200)
@given(ids=IDS, cuts=CUTS)
def test_the_pieces_add_up_to_the_decoding_of_all_ids(kind: str, ids: list[int], cuts: list[int]) -> None:
    detokenizer = Detokenizer(made(kind))
    text = "".join(detokenizer.feed(part) for part in cut_at(ids, cuts)) + detokenizer.finish()
    assert text == made(kind).decode(ids, continuation=True)


def test_a_character_made_of_several_tokens_comes_whole() -> None:
    tokenizer = made("gpt2")
    ids = [next(id for id in range(256) if tokenizer.token_bytes(id) == bytes([byte])) for byte in "a👍é".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.feed([id]) for id in ids] == ["a", "", "", "", "👍", "", "é"]
    assert detokenizer.finish() == ""


def test_bytes_that_never_become_a_character_are_replaced_at_the_end() -> None:
    tokenizer = made("gpt2")
    half = next(id for id in range(256) if tokenizer.token_bytes(id) == b"\xf0")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed([half]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_control_tokens_are_not_shown() -> None:
    tokenizer = made("gpt2")
    ids = tokenizer.encode("hi<|im_end|>ho", parse_special=True)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(ids) + detokenizer.finish() == "hiho"


# --- stop strings ---------------------------------------------------------------------------------------------------


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: read characters until what was read ends with a stop string; the longest of those is cut off."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500)
@given(
    text=st.text(alphabet="ab\n#", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n#", min_size=1, max_size=5), max_size=4),
    cuts=CUTS,
)
def test_stop_strings_work_the_same_however_the_stream_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    stream, seen = StopStrings(stops), ""
    before, stop = expected(text, stops)
    for part in cut_at([ord(character) for character in text], cuts):
        seen += stream.feed("".join(map(chr, part)))
        assert before.startswith(seen)  # nothing of a stop string has leaked
    if stream.found is None:
        seen += stream.finish()
    assert (seen, stream.found) == (before, stop)


def test_a_stop_string_across_tokens_does_not_leak() -> None:
    tokenizer = made("gpt2")
    detokenizer = Detokenizer(tokenizer, ["###"])
    ids = tokenizer.encode("one # two ## three ") + [
        next(id for id in range(256) if tokenizer.token_bytes(id) == b"#") for _ in range(3)
    ]
    text = ""
    for id in [*ids, *tokenizer.encode(" never shown")]:
        text += detokenizer.feed([id])
    assert text == "one # two ## three "
    assert detokenizer.stopped == "###"
    assert detokenizer.finish() == ""


def test_text_that_only_looked_like_a_stop_string_is_given_back() -> None:
    tokenizer = made("gpt2")
    detokenizer = Detokenizer(tokenizer, ["User:"])
    assert detokenizer.feed(tokenizer.encode("Us")) == ""
    assert detokenizer.feed(tokenizer.encode("ed")) == "Used"
    assert detokenizer.feed(tokenizer.encode("\nUser")) == "\n"
    assert detokenizer.finish() == "User"


def test_an_empty_stop_string_stops_nothing() -> None:
    stream = StopStrings([""])
    assert stream.feed("text") == "text"
    assert stream.found is None
