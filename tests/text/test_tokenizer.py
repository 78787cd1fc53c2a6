"""Tokenizers from GGUF fields: the ids of a slow independent implementation, and no surprise from users or files."""

from __future__ import annotations

import hashlib
import json
import threading
import unicodedata
from functools import cache
from typing import Any

import msgspec
import pytest
from checkpoint_fields import byte_level, sentence_piece
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_bpe import CUTS
from reference_bpe import byte_level as reference_byte_level
from reference_bpe import sentence_piece as reference_sentence_piece

from vai.errors import BadRequest, MalformedFile, UnsupportedModel
from vai.rom.image import canonical_json
from vai.text.fields import read
from vai.text.pretokenizers import PRETOKENIZERS
from vai.text.template import template_section
from vai.text.tokenizer import PROBE, Tokenizer, probe_tokens, tokenizer_section

MARKER = "\ufdd0"
TEXTS = [
    "Hello, world! It's 2024-11-21, isn't it?  We'LL see; I'D SAY 'Tis fine.",
    "def f(x):\n    return x + 1  # comment\n\n\n\tif x:\r\n\t\tpass\n",
    "   leading and trailing   \n \n  \t x",
    "12345678 1 22 333 4444 3.14159 ½ ² Ⅷ १२३",
    "naïve café Größe straße ÀÉÎ ǅ ŉ",
    "Привет, мир! Ελληνικά κείμενα שלום עולם مرحبا بالعالم",
    "你好，世界。今天天气很好！ 日本語のテキスト、カタカナ 한국어 텍스트",
    "नमस्ते दुनिया ไทยแลนด์ தமிழ் e\u0301a\u0300",
    "👩\u200d👩\u200d👧 👍🏽 🇩🇪 𝔘𝔫𝔦 ﬁ",
    "CamelCaseWords HTTPServer iPhone XMLHttpRequest aBC",
    "a/b//c\\d {\"k\": [1, 2]} <tag attr='v'/> $x_1 += y->z; @!#%^&*()",
    "don't won't I'm you're they've 'sup 'LL",
    "\u00a0\u3000wide\u2003spaces\u2028line",
    " ",
    "\n",
    "x",
]


@cache
def made(kind: str, pre: str = "qwen2", size: int = 3000) -> Tokenizer:
    fields = sentence_piece() if kind == "llama" else byte_level(pre, size)
    return Tokenizer.from_sections(tokenizer_section(fields), template_section(fields))


def tokenizer_of(fields: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_sections(tokenizer_section(fields), template_section(fields))


# --- the same ids as an independent implementation ------------------------------------------------------------------


@pytest.mark.parametrize("pre", sorted(CUTS))
def test_byte_level_ids_are_those_of_an_independent_implementation(pre: str) -> None:
    fields = byte_level(pre)
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    tokenizer = made("gpt2", pre)
    for text in TEXTS:
        normalized = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.encode(text) == reference_byte_level(normalized, tokens, merges, pre), text


def test_a_piece_that_is_a_token_is_taken_whole_where_the_model_ignores_merges() -> None:
    tokens = [*byte_level(size=259)["tokenizer.ggml.tokens"][:256], "ab", "abc", "<|end|>"]
    fields = {"tokens": tokens, "merges": ["a b"], "token_type": [1] * 258 + [3], "eos_token_id": 258}
    assert tokenizer_of(byte_level("llama-bpe", 259, **fields, add_bos_token=False)).encode("abc") == [257]
    assert tokenizer_of(byte_level("qwen2", 259, **fields)).encode("abc") == [256, tokens.index("c")]


PIECES = st.lists(
    st.sampled_from(["the", "hello", " ", "world", "lower", "größe", "мир", "世界", "x", "\n", "é", "<", "s>", "▁"]),
    max_size=20,
).map("".join)


@settings(max_examples=200)
@given(PIECES)
def test_sentence_piece_ids_are_those_of_an_independent_implementation(text: str) -> None:
    fields = sentence_piece()
    expected = reference_sentence_piece(text, fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"])
    assert made("llama").encode(text, add_bos=False) == expected


def test_sentence_piece_joins_by_score_and_not_by_length_or_order() -> None:
    head = sentence_piece()["tokenizer.ggml.tokens"][:259]
    tokens = [*head, "▁", "a", "b", "c", "ab", "bc", "abc"]
    types = [2, 3, 3] + [6] * 256 + [1] * 7
    scores = [0.0] * 259 + [0.0, 0.0, 0.0, 0.0, -5.0, -1.0, -9.0]
    fields = sentence_piece(tokens=tokens, token_type=types, scores=scores, add_space_prefix=False)
    tokenizer = tokenizer_of(fields)
    assert tokenizer.encode("abcb", add_bos=False) == [265, 261]  # b+c first, then a+bc
    assert tokenizer.encode("abab", add_bos=False) == [263, 263]


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_pretokenizer_gives_the_probe_back(pre: str) -> None:
    tokenizer = made("gpt2", pre, 600)
    decoded = tokenizer.decode(tokenizer.encode(PROBE))
    assert decoded == (unicodedata.normalize("NFC", PROBE) if PRETOKENIZERS[pre].nfc else PROBE)


@settings(max_examples=200)
@given(st.text())
def test_any_text_comes_back_from_a_byte_level_tokenizer(text: str) -> None:
    assert made("gpt2", "llama-bpe").decode(made("gpt2", "llama-bpe").encode(text)) == text


@settings(max_examples=200)
@given(st.text().filter(lambda text: "▁" not in text))
def test_any_text_comes_back_from_a_sentence_piece_tokenizer(text: str) -> None:
    tokenizer = made("llama")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(id) for id in ids[1:]).decode() == (f" {text}" if text else "")


def test_english_takes_less_than_half_a_token_for_each_byte() -> None:
    text = (
        "The committee reviewed seventeen proposals on Wednesday, and none of them satisfied the requirements that had "
        "been published earlier. A program is a list of operations; each of them reads its inputs and writes an output."
    )
    assert len(made("gpt2", "qwen2", 3000).encode(text)) < 0.5 * len(text)


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer, text = made("gpt2"), "hello world " * 100_000
    encoding = threading.Thread(target=tokenizer.encode, args=(text,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        encoding.join(0.001)
        turns += 1
    assert turns > 10


def test_half_a_surrogate_pair_is_refused_with_a_sentence() -> None:
    for kind in ("gpt2", "llama"):
        with pytest.raises(BadRequest, match="surrogate"):
            made(kind).encode("a\ud800b", parse_special=True)


def test_ids_outside_the_vocabulary_stand_for_nothing() -> None:
    tokenizer = made("gpt2")
    assert tokenizer.vocabulary == 3000
    assert [tokenizer.token_bytes(id) for id in (3000, 1 << 40, -1)] == [b"", b"", b""]
    assert tokenizer.decode([*tokenizer.encode("hi"), 5000]) == "hi"


# --- control tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("spelled", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<0x0A>"])
def test_text_that_spells_a_control_token_stays_text(kind: str, spelled: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(f"a{spelled}b", add_bos=False)
    assert not any(tokenizer.is_control(id) for id in ids)
    assert tokenizer.decode(ids) == f"a{spelled}b"
    assert len(ids) > 3


def test_a_template_can_write_control_tokens() -> None:
    tokenizer = made("gpt2")
    start, end = 2998, 2999
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_end|>", parse_special=True)
    assert ids == [start, *tokenizer.encode("user\nhi"), end, *tokenizer.encode("\n"), end]
    assert tokenizer.decode(ids) == "user\nhi\n"
    assert tokenizer.decode(ids, control=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_end|>"


def test_the_longest_control_token_wins() -> None:
    tokens = [*byte_level(size=259)["tokenizer.ggml.tokens"][:256], "<|a", "<|a|>", "<|end|>"]
    fields = byte_level("qwen2", 259, tokens=tokens, merges=[], token_type=[1] * 256 + [3, 3, 3], eos_token_id=258)
    assert tokenizer_of(fields).encode("<|a|><|a<|", parse_special=True) == [257, 256, *map(tokens.index, "<|")]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<", "<|", "<|im_", "end|>", "|>", "user", " ", "\n"])))
def test_disarmed_text_never_yields_a_control_token_whatever_the_template_adds(parts: list[str]) -> None:
    tokenizer = made("gpt2")
    user = "".join(parts)
    disarmed = tokenizer.disarm(user, MARKER)
    assert disarmed.replace(MARKER, "") == user
    ids = tokenizer.encode(f"<|im_start|>user\n{disarmed}", parse_special=True, marker=MARKER)
    assert ids == [2998, *tokenizer.encode(f"user\n{user}")]


def test_a_control_token_cannot_be_assembled_from_two_texts() -> None:
    tokenizer = made("gpt2")
    halves = tokenizer.disarm("<|im_", MARKER) + tokenizer.disarm("end|>", MARKER)
    assert 2999 not in tokenizer.encode(halves, parse_special=True, marker=MARKER)


def test_text_without_control_tokens_is_not_touched() -> None:
    text = "if a < b: print('<tag>') </think> <tool_response>"
    assert made("gpt2").disarm(text, MARKER) == text


def test_user_defined_tokens_are_matched_in_any_text_but_shown() -> None:
    tokens = [*byte_level(size=259)["tokenizer.ggml.tokens"][:256], "<think>", "<|x|>", "<|end|>"]
    fields = byte_level("qwen2", 259, tokens=tokens, merges=[], token_type=[1] * 256 + [4, 3, 3], eos_token_id=258)
    tokenizer = tokenizer_of(fields)
    assert tokenizer.encode("<think>") == [256]
    assert tokenizer.decode([256]) == "<think>"


# --- BOS and the end of a turn --------------------------------------------------------------------------------------


def test_a_bos_token_is_never_assumed() -> None:
    tokenizer = made("gpt2", "llama-bpe")  # this pre-tokenizer adds BOS, but the file names none
    assert tokenizer.bos is None
    assert not tokenizer.add_bos
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_bos=False)


def test_a_bos_token_comes_once_even_if_the_template_writes_it() -> None:
    tokenizer = tokenizer_of(byte_level("llama-bpe", bos_token_id=2997))
    assert tokenizer.encode("hi")[0] == 2997
    assert tokenizer.encode("<|endoftext|>hi", parse_special=True) == tokenizer.encode("hi")
    assert tokenizer.encode("hi", add_bos=False)[0] != 2997


def test_a_file_can_turn_bos_off() -> None:
    tokenizer = tokenizer_of(byte_level("llama-bpe", bos_token_id=2997, add_bos_token=False))
    assert tokenizer.bos == 2997
    assert 2997 not in tokenizer.encode("hi")


def test_token_zero_can_be_bos() -> None:
    tokenizer = tokenizer_of(byte_level("llama-bpe", bos_token_id=0))
    assert tokenizer.encode("hi")[0] == 0


def test_sentence_piece_bos_is_taken_from_a_control_token_of_that_name_only() -> None:
    fields = sentence_piece()
    del fields["tokenizer.ggml.bos_token_id"]
    assert tokenizer_of(fields).encode("hi")[0] == 1
    types = [*fields["tokenizer.ggml.token_type"]]
    types[1] = 1
    assert tokenizer_of({**fields, "tokenizer.ggml.token_type": types}).bos is None


def test_every_token_that_ends_a_turn_is_known_not_only_the_declared_one() -> None:
    assert made("gpt2").eog == {2997, 2999}
    assert tokenizer_of(byte_level(eos_token_id=7, eot_token_id=8, eom_token_id=9)).eog == {7, 8, 9, 2997, 2999}


# --- files that lie -------------------------------------------------------------------------------------------------

GGML = "tokenizer.ggml."
LIES: dict[str, dict[str, Any]] = {
    "tokens missing": {GGML + "tokens": None},
    "tokens empty": {GGML + "tokens": []},
    "tokens not an array": {GGML + "tokens": 7},
    "a token that is a number": {GGML + "tokens": [*map(chr, range(100)), 5]},
    "a token twice": {GGML + "tokens": ["a", "b", "a"], GGML + "token_type": [1, 1, 1], GGML + "merges": []},
    "an endless token": {GGML + "tokens": ["a" * 5000], GGML + "token_type": [1]},
    "a token that is half a character": {GGML + "tokens": ["\ud800"], GGML + "token_type": [1]},
    "types too short": {GGML + "token_type": [1]},
    "a type from nowhere": {GGML + "token_type": [9] * 3000},
    "a type that is a truth": {GGML + "token_type": [True] * 3000},
    "merges missing": {GGML + "merges": None},
    "a merge of strangers": {GGML + "merges": ["Ġqqqq zzzz"]},
    "a merge of one": {GGML + "merges": ["a"]},
    "an empty merge": {GGML + "merges": [""]},
    "a merge that is a number": {GGML + "merges": [3]},
    "an id past the end": {GGML + "eos_token_id": 3000},
    "a negative id": {GGML + "bos_token_id": -5},
    "an id that is a word": {GGML + "eos_token_id": "2"},
    "an id that is a truth": {GGML + "eos_token_id": True},
    "a flag that is a word": {GGML + "add_bos_token": "yes"},
    "a template that is a number": {"tokenizer.chat_template": 5},
    "an endless template": {"tokenizer.chat_template": "x" * (2 << 20)},
    "a byte missing": {
        GGML + "tokens": ["a", "b"],
        GGML + "token_type": [1, 1],
        GGML + "merges": [],
        GGML + "eos_token_id": 0,
    },
}


@pytest.mark.parametrize("lie", sorted(LIES))
@pytest.mark.parametrize("make", [tokenizer_section, template_section])
def test_a_file_that_lies_is_refused_with_a_sentence(lie: str, make: Any) -> None:
    with pytest.raises(MalformedFile, match=r"[a-z].*\.$"):
        make({**byte_level(), **LIES[lie]})


@pytest.mark.parametrize("scores", [None, [1.0], [float("nan")] * 400, [1] * 400])
def test_scores_must_be_finite_numbers_one_for_each_token(scores: Any) -> None:
    with pytest.raises(MalformedFile, match="scores"):
        tokenizer_section(sentence_piece(scores=scores))


@pytest.mark.parametrize("model", [None, "bert", "t5", "rwkv", "gemma4"])
def test_a_tokenizer_of_another_kind_is_refused_by_name(model: str | None) -> None:
    with pytest.raises(UnsupportedModel, match=model or "no tokenizer"):
        tokenizer_section(byte_level(model=model))


def test_an_unknown_pretokenizer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'brand-new'"):
        tokenizer_section(byte_level("brand-new"))


def test_a_token_that_garbles_texts_is_refused() -> None:
    """It is matched in raw text, and comes back as what the alphabet of byte-level BPE has its characters for."""
    fields = byte_level(size=600)
    fields[GGML + "token_type"][-2] = 4  # user-defined
    tokenizer_section(fields)
    fields[GGML + "tokens"][-2] = "fé"
    with pytest.raises(MalformedFile, match="does not give back the text it encodes"):
        tokenizer_section(fields)


@pytest.mark.parametrize(
    "fields", [*map(byte_level, sorted(CUTS)), sentence_piece(), sentence_piece(unknown_token_id=None)]
)
def test_a_tokenizer_is_proven_on_every_token_that_the_whole_of_it_uses(fields: dict[str, Any]) -> None:
    used = set(tokenizer_of(fields).encode(PROBE, add_bos=False))
    tokens = probe_tokens(read(fields))
    assert len(used) > 100
    assert used <= set(tokens.values())
    assert all(fields[GGML + "tokens"][id] == token for token, id in tokens.items())


def test_every_character_is_written_as_canonical_json_writes_it() -> None:
    texts = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assert msgspec.json.encode([("".join(texts), "a")]) == canonical_json([("".join(texts), "a")])
    for text in texts[:256]:
        assert (
            msgspec.json.encode({text: 1, "b": 2})
            == json.dumps({text: 1, "b": 2}, separators=(",", ":"), ensure_ascii=False).encode()
        )


def test_the_vocabulary_stands_in_the_order_of_ids_with_any_characters_in_it() -> None:
    odd = ['""', '\\"', "a b", "\n", "\x00", "é\u2028", "𝔘", " "]
    fields = byte_level(size=600)
    fields[GGML + "tokens"][300 : 300 + len(odd)] = odd
    fields[GGML + "merges"] = []
    document = json.loads(tokenizer_section(fields))
    assert list(document["model"]["vocab"].items()) == [(t, i) for i, t in enumerate(fields[GGML + "tokens"])]
    assert [tokenizer_of(fields).token_bytes(i) for i in (300, 301, 306)] == [b'""', b'\\"', "𝔘".encode()]


@pytest.mark.parametrize("pre", [None, "default", ""])
def test_a_file_that_does_not_say_how_to_split_is_refused_rather_than_guessed_at(pre: str | None) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre"):
        tokenizer_section({**byte_level(), "general.architecture": "llama", "tokenizer.ggml.pre": pre})


def test_an_old_file_is_recognized_by_architecture_and_size() -> None:
    old = {**byte_level("default", 32_256), "general.architecture": "llama"}
    assert tokenizer_section(old) == tokenizer_section(byte_level("deepseek-coder", 32_256))


# --- the section ----------------------------------------------------------------------------------------------------


def test_the_section_has_the_same_bytes_on_every_machine() -> None:
    tokens = [*byte_level(size=259)["tokenizer.ggml.tokens"][:256], "th", "the", "<|end|>"]
    fields = {"tokens": tokens, "merges": ["t h", "th e"], "token_type": [1] * 258 + [3], "eos_token_id": 258}
    section = tokenizer_section(byte_level("qwen2", 259, **fields))
    assert hashlib.sha256(section).hexdigest() == "6096aab489f73d5fbffa8174fb7564083e8421c4d1d6e13dd8da0481d00c9358"
    template = template_section({**byte_level("qwen2", 259, **fields), "tokenizer.chat_template": "{{ 'é' }}"})
    assert template == (
        b'{"add_bos":false,"bos":null,"bos_token":"","chat_template":"{{ \'\xc3\xa9\' }}","eog":[258],"eos":258,'
        b'"eos_token":"<|end|>"}'
    )


def test_the_section_is_a_hugging_face_tokenizer() -> None:
    document = json.loads(tokenizer_section(byte_level("llama-bpe", 500)))
    assert document["model"]["type"] == "BPE"
    assert document["model"]["ignore_merges"] is True
    assert len(document["model"]["vocab"]) == 500
    assert [token["content"] for token in document["added_tokens"]] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("section", [b"", b"{}", b"[1]", b"\xff", b'{"version":"1.0","model":{"type":"BPE"}}'])
def test_a_damaged_section_is_refused(section: bytes) -> None:
    with pytest.raises(MalformedFile):
        Tokenizer.from_sections(section, template_section(byte_level()))
    with pytest.raises(MalformedFile):
        Tokenizer.from_sections(tokenizer_section(byte_level()), section)


def test_a_template_section_cannot_name_tokens_that_are_not_there() -> None:
    with pytest.raises(MalformedFile):
        Tokenizer.from_sections(tokenizer_section(byte_level(size=500)), template_section(byte_level(size=600)))


def test_a_text_that_the_library_gives_up_on_is_refused_with_a_sentence() -> None:
    """Its regular expressions go back ten million times at most; what it raises then is no Exception."""
    with pytest.raises(BadRequest, match="cannot be cut into tokens"):
        made("gpt2").encode(" " * 10_000_100)
