"""The `tokenizer.*` fields of a GGUF file, checked: nothing behind this believes a file about a length, type or id."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from vai.errors import MalformedFile, UnsupportedModel
from vai.text.pretokenizers import PRETOKENIZERS, UNNAMED, Pretokenizer
from vai.text.vocabulary import byte_letters

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 22
MAX_TOKEN_CHARACTERS = 1 << 10  # of one token; real ones end near 256
MAX_TEMPLATE_CHARACTERS = 1 << 20
_TOGETHER = 1 << 12  # texts whose encoding is tried in one go

# Texts that end a turn whatever id the file declares (GGUF files often name only one of several).
END_OF_GENERATION = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
        "<|eom_id|>", "<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
        "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|flush|>", "<|calls|>"
    )
)  # fmt: skip
UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # the others occur in no text


class TokenizerFields(NamedTuple):
    """A GGUF tokenizer: `kind` "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE); tokens are unique and not empty.

    `ids` has the id of every token, in their order; `merges` (gpt2) are pairs in rank order, of tokens and making a
    token; `scores` (llama) one a token; `pre` is None for llama.
    """

    kind: str
    pre: Pretokenizer | None
    tokens: list[str]
    ids: dict[str, int]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    add_space_prefix: bool
    add_bos: bool
    bos: int | None
    eos: int | None
    unknown: int | None
    eog: list[int]
    chat_template: str | None


def read(fields: Mapping[str, object]) -> TokenizerFields:
    """Check and collect what the tokenizer and template sections are made from.

    Raises MalformedFile, UnsupportedModel.
    """
    kind = _text(fields, "tokenizer.ggml.model", 64)
    if kind is None:
        raise UnsupportedModel("The file has no tokenizer (tokenizer.ggml.model); VAI serves text models only.")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"The tokenizer kind '{kind}' is not supported yet; gpt2 and llama are.")
    ids = _tokens(fields)
    tokens = list(ids)
    types = _types(fields, len(tokens))
    pre = _pretokenizer(fields, len(tokens)) if kind == "gpt2" else None
    bos = _id(fields, "bos", len(tokens)) or _spelled("<s>", kind, ids, types)
    eos = _id(fields, "eos", len(tokens)) or _spelled("</s>", kind, ids, types)
    add_bos = _flag(fields, "tokenizer.ggml.add_bos_token", pre.add_bos if pre else True)
    checked = TokenizerFields(
        kind=kind,
        pre=pre,
        tokens=tokens,
        ids=ids,
        types=types,
        scores=_scores(fields, len(tokens)) if kind == "llama" else [],
        merges=_merges(fields, ids) if kind == "gpt2" else [],
        add_space_prefix=_flag(fields, "tokenizer.ggml.add_space_prefix", kind == "llama"),
        add_bos=add_bos and bos is not None,
        bos=bos.id if bos else None,
        eos=eos.id if eos else None,
        unknown=unknown.id if (unknown := _id(fields, "unknown", len(tokens))) else None,
        eog=_eog(fields, ids, types, eos),
        chat_template=_text(fields, "tokenizer.chat_template", MAX_TEMPLATE_CHARACTERS),
    )
    _check_bytes(checked)
    return checked


class _Id(NamedTuple):
    """A checked token id; a tuple, so that id 0 is not taken for none."""

    id: int


def _text(fields: Mapping[str, object], key: str, limit: int) -> str | None:
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > limit:
        raise MalformedFile(f"{key} must be a text of at most {limit:,} characters.")
    return _encodable(value, key)


def _encodable(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedFile(f"{what} is not valid UTF-8.") from None
    return text


def _flag(fields: Mapping[str, object], key: str, default: bool) -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise MalformedFile(f"{key} must be true or false.")
    return value


def _array(fields: Mapping[str, object], key: str, limit: int) -> list[object] | None:
    listed = fields.get(key)
    if listed is None:
        return None
    if not isinstance(listed, list | tuple) or len(listed) > limit:
        raise MalformedFile(f"{key} must be an array of at most {limit:,} entries.")
    return list(listed)


def _texts(listed: list[object], key: str, limit: int, what: str) -> list[str]:
    """All of `listed`, which must be texts of at most `limit` characters. What is said of one text is asked of all at
    once where that can be: there are some hundred thousand."""
    texts = [text for text in listed if isinstance(text, str)]
    if len(texts) != len(listed) or max(map(len, texts), default=0) > limit:
        wrong = next(i for i, text in enumerate(listed) if not isinstance(text, str) or len(text) > limit)
        raise MalformedFile(f"{key}[{wrong}] must be a text{what}.")
    for start in range(0, len(texts), _TOGETHER):
        _encodable("".join(texts[start : start + _TOGETHER]), key)
    return texts


def _tokens(fields: Mapping[str, object]) -> dict[str, int]:
    """The id of every token, in their order."""
    key = "tokenizer.ggml.tokens"
    listed = _array(fields, key, MAX_TOKENS)
    if not listed:
        raise MalformedFile(f"{key} is missing or empty.")
    tokens = _texts(listed, key, MAX_TOKEN_CHARACTERS, f" of at most {MAX_TOKEN_CHARACTERS:,} characters")
    if "" in tokens:
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise MalformedFile(f"{key} has {twice!r} twice; every token needs its own text.")
    return ids


def _types(fields: Mapping[str, object], count: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    listed = _array(fields, key, MAX_TOKENS)
    if listed is None:
        return [NORMAL] * count
    types = [kind for kind in listed if type(kind) is int]
    if len(listed) != count or len(types) != count or not set(types) <= set(range(BYTE + 1)):
        raise MalformedFile(f"{key} must have {count:,} entries from 0 to {BYTE}, one for each token.")
    return types


def _scores(fields: Mapping[str, object], count: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    listed = _array(fields, key, MAX_TOKENS)
    scores = [score for score in listed or [] if isinstance(score, float) and math.isfinite(score)]
    if listed is None or len(scores) != len(listed) or len(scores) != count:
        raise MalformedFile(f"{key} must have {count:,} finite numbers, one for each token.")
    return scores


def _merges(fields: Mapping[str, object], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    listed = _array(fields, key, MAX_MERGES)
    if listed is None:
        raise MalformedFile(f"{key} is missing; a byte-level BPE tokenizer cannot work without it.")
    tokens = [*ids, ""]  # no merge makes the last
    after = 0  # the token after the one made last: mostly the next, since ids are given in the order of merges
    merges: list[tuple[str, str]] = []
    for index, merge in enumerate(
        _texts(listed, key, 2 * MAX_TOKEN_CHARACTERS + 1, ": two tokens with a space between them")
    ):
        left, _, right = merge.partition(" ")
        if not left:  # the first character may itself be a space
            left, _, right = merge[1:].partition(" ")
            left = merge[:1] + left
        if tokens[after] != left + right:
            after = ids.get(left + right, -1)
        if after < 0 or left not in ids or right not in ids:
            raise MalformedFile(f"{key}[{index}], {merge!r}, joins or makes a token that the vocabulary does not have.")
        after += 1
        merges.append((left, right))
    return merges


def _id(fields: Mapping[str, object], name: str, count: int) -> _Id | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = fields.get(key)
    if value is None or value in (-1, 0xFFFFFFFF):  # both are written for "none"
        return None
    if type(value) is not int or not 0 <= value < count:
        raise MalformedFile(f"{key} must be the id of one of {count:,} tokens, not {value!r}.")
    return _Id(value)


def _spelled(text: str, kind: str, ids: Mapping[str, int], types: list[int]) -> _Id | None:
    """SentencePiece files may leave bos and eos unnamed. They are taken only from a control token spelled so:
    a default id once made Qwen2 start every prompt with a comma.
    """
    if kind != "llama" or text not in ids:
        return None
    return _Id(ids[text]) if types[ids[text]] == CONTROL else None


def _eog(fields: Mapping[str, object], ids: Mapping[str, int], types: list[int], eos: _Id | None) -> list[int]:
    named = [eos, _id(fields, "eot", len(ids)), _id(fields, "eom", len(ids))]
    spelled = {ids[text] for text in END_OF_GENERATION if text in ids and types[ids[text]] in (CONTROL, USER_DEFINED)}
    return sorted(spelled | {checked.id for checked in named if checked})


def _pretokenizer(fields: Mapping[str, object], count: int) -> Pretokenizer:
    name = _text(fields, "tokenizer.ggml.pre", 64)
    architecture = fields.get("general.architecture")
    if name in (None, "", "default"):
        known = UNNAMED.get((architecture, count)) if isinstance(architecture, str) else None
        if known is None:
            raise UnsupportedModel(
                "The file does not say how its tokenizer splits text (tokenizer.ggml.pre is missing or 'default'), and "
                "guessing would corrupt every prompt; convert the checkpoint again with a current converter."
            )
        name = known
    if name not in PRETOKENIZERS:
        raise UnsupportedModel(
            f"The pre-tokenizer '{name}' (tokenizer.ggml.pre) is not supported yet; these are: "
            f"{', '.join(sorted(PRETOKENIZERS))}."
        )
    return PRETOKENIZERS[name]


def _check_bytes(fields: TokenizerFields) -> None:
    """Every text must have an encoding: all bytes of UTF-8 as tokens, or (SentencePiece) an unknown token."""
    if fields.kind == "llama" and fields.unknown is not None:
        return
    spelled = byte_letters() if fields.kind == "gpt2" else tuple(f"<0x{byte:02X}>" for byte in range(256))
    missing = [byte for byte in sorted(UTF8_BYTES) if spelled[byte] not in fields.ids]
    if missing:
        raise MalformedFile(f"The vocabulary has no token for byte {missing[0]:#04x}, so some texts have no encoding.")
