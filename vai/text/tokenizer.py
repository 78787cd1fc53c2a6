"""Text to token ids and back: the tokenizer section of an image, and the tokenizer made from it.

The section is a Hugging Face tokenizer.json, serialized here from the checkpoint's own fields, so that the same fields
give the same bytes with every version of every library. Two kinds: byte-level BPE (`gpt2`) and SentencePiece BPE by
score with byte fallback (`llama`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders

from vai.errors import BadRequest, MalformedFile
from vai.rom.image import canonical_json
from vai.text.fields import CONTROL, NORMAL, USER_DEFINED, TokenizerFields, read
from vai.text.pretokenizers import Pretokenizer
from vai.text.template import chat_fields
from vai.text.vocabulary import byte_letters, spell

_Json = dict[str, Any]

SPACE = "▁"  # how SentencePiece spells a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

# Every kind of text a vocabulary must carry: scripts, combining marks, emoji with joiners, controls, odd spaces.
PROBE = (
    "Hello, World!  It's 3.14159 and 12,345\tdon't\r\n\n   indented\n\x00\x7f naïve café Größe Ελληνικά Привет мир "
    "שלום مرحبا नमस्ते ไทย 你好，世界。 こんにちは 한국어 👩\u200d👩\u200d👧🇩🇪 👍🏽 𝔘𝔫𝔦 \u00a0\u200b\u3000\ufeff ½ ² ﬁ "
    "{'a': [1, 2]} // x != y"
)


def tokenizer_section(fields: Mapping[str, object] | TokenizerFields) -> bytes:
    """The tokenizer section of a GGUF file's `tokenizer.*` fields, read already or not.

    Canonical tokenizer.json, its vocabulary in the order of ids, proven on a probe text.

    Raises MalformedFile where the fields contradict themselves, UnsupportedModel for kinds and pre-tokenizers that VAI
    does not have.
    """
    checked = fields if isinstance(fields, TokenizerFields) else read(fields)
    if checked.pre is None:
        frame, model, merges = *_sentence_piece(checked), _merges_by_score(checked)
    else:
        frame, model, merges = *_byte_level(checked, checked.pre), checked.merges
    _prove(checked, frame, model, merges)
    return _document(frame, model, checked.ids, merges)


_Merges = Sequence[tuple[str, str]]


def _prove(fields: TokenizerFields, frame: _Json, model: _Json, merges: _Merges) -> None:
    """The library must take the tokenizer, and encoding and decoding give a text back, unless the vocabulary has an
    unknown token to lose it in.

    Asked of those tokens alone that may occur in this text, and their merges. Of the rest the library asks nothing that
    `read` has not checked; taking all of it would cost half a second for 150,000 tokens, more than packing the weights
    of a small model.
    """
    ids = probe_tokens(fields)
    used = [(left, right) for left, right in merges if left in ids and right in ids and left + right in ids]
    tokenizer = _load(_document(frame, model, ids, used))
    if fields.kind == "llama" and fields.unknown is not None:
        return
    [encoding] = tokenizer.encode_batch_fast([PROBE], add_special_tokens=False)
    decoded = tokenizer.decode(encoding.ids, skip_special_tokens=False)
    if unicodedata.normalize("NFC", decoded) != unicodedata.normalize("NFC", PROBE):
        raise MalformedFile("The file's tokenizer does not give back the text it encodes; the vocabulary is damaged.")


def probe_tokens(fields: TokenizerFields) -> dict[str, int]:
    """The tokens that encoding PROBE may meet: its parts as the vocabulary spells them, single bytes, and those that
    stand apart. No merge makes anything else on the way."""
    text = unicodedata.normalize("NFC", PROBE)
    spelled = f"{SPACE}{text.replace(' ', SPACE)}" if fields.pre is None else spell(text.encode())
    lengths = {len(token) for token in fields.tokens}
    parts = {spelled[at : at + length] for length in lengths for at in range(len(spelled) - length + 1)}
    parts.update(f"<0x{byte:02X}>" for byte in range(256))
    parts.update(fields.tokens[index] for index in _added(fields))
    if fields.unknown is not None:
        parts.add(fields.tokens[fields.unknown])
    return {token: fields.ids[token] for token in sorted(parts) if token in fields.ids}


def _added(fields: TokenizerFields) -> list[int]:
    """Ids of control and user-defined tokens, which are matched in raw text, before anything else."""
    return [index for index, kind in enumerate(fields.types) if kind in (CONTROL, USER_DEFINED)]


def _document(frame: _Json, model: _Json, ids: Mapping[str, int], merges: _Merges) -> bytes:
    """A tokenizer.json. The two large parts are written apart: not sorted, and by msgspec, which takes a tenth of the
    time that `canonical_json` takes for the same bytes."""
    parts = {key: canonical_json(value) for key, value in model.items()}
    whole = _object({**parts, "vocab": msgspec.json.encode(ids), "merges": msgspec.json.encode(merges)})
    return _object({**{key: canonical_json(value) for key, value in frame.items()}, "model": whole})


def _object(parts: Mapping[str, bytes]) -> bytes:
    """A JSON object of values that are written already."""
    return b"{%s}" % b",".join(b'"%s":%s' % (key.encode(), parts[key]) for key in sorted(parts))


def _frame(fields: TokenizerFields, **parts: Any) -> _Json:
    """All but the model, of both kinds."""
    added = [
        {
            "id": index,
            "content": fields.tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": fields.types[index] == CONTROL,
        }
        for index in _added(fields)
    ]
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**head, **parts}


def _model(**settings: Any) -> _Json:
    """The model without its vocabulary and merges."""
    return {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        **settings,
    }


def _byte_level(fields: TokenizerFields, pre: Pretokenizer) -> tuple[_Json, _Json]:
    splits: list[_Json] = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in pre.passes
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    frame = _frame(
        fields,
        normalizer={"type": "NFC"} if pre.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        post_processor=None,
        decoder=byte_level,
    )
    model = _model(unk_token=None, fuse_unk=False, byte_fallback=False, ignore_merges=pre.ignore_merges)
    return frame, model


def _sentence_piece(fields: TokenizerFields) -> tuple[_Json, _Json]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    restore: list[_Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prefix = fields.add_space_prefix
    frame = _frame(
        fields,
        normalizer={"type": "Sequence", "normalizers": [prepend, replace] if prefix else [replace]},
        pre_tokenizer=None,
        post_processor=None,
        decoder={"type": "Sequence", "decoders": [*restore, strip] if prefix else restore},
    )
    unknown = None if fields.unknown is None else fields.tokens[fields.unknown]
    model = _model(unk_token=unknown, fuse_unk=True, byte_fallback=True, ignore_merges=False)
    return frame, model


def _merges_by_score(fields: TokenizerFields) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score; as ranked merges that is every way to split
    a normal token into two tokens, best score first. Control and byte tokens are nobody's union.
    """
    ids = {token: index for index, token in enumerate(fields.tokens) if fields.types[index] in (NORMAL, USER_DEFINED)}
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-fields.scores[index], index, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _load(section: bytes) -> _Tokenizer:
    try:
        tokenizer = _Tokenizer.from_buffer(section)
    except Exception as error:  # the library raises nothing narrower
        raise MalformedFile(f"The tokenizer is not usable ({error}); burn the model again.") from None
    tokenizer.encode_special_tokens = True  # control tokens in a text stay text; `encode` below finds those that count
    return tokenizer


class Tokenizer:
    """One image's tokenizer. Encoding lets other threads run; nothing here changes after construction."""

    def __init__(self, tokenizer: bytes, template: bytes) -> None:
        chat = chat_fields(template)
        self._tokenizer = _load(tokenizer)
        self.vocabulary: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos, self.eos, self.add_bos = chat.bos, chat.eos, chat.add_bos
        self.eog = frozenset(chat.eog)
        named = [id for id in (chat.bos, chat.eos, *chat.eog) if id is not None]
        if not all(0 <= id < self.vocabulary for id in named):
            raise MalformedFile("The image's template section names a token that its vocabulary does not have.")
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._control = {token.content: id for id, token in added.items() if token.special}
        self._control_ids = frozenset(self._control.values()) | self.eog
        self._starts = re.compile("|".join(sorted(re.escape(first) for first in {text[0] for text in self._control})))
        self._lengths = sorted({len(text) for text in self._control}, reverse=True)
        self._byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        normalizer = self._tokenizer.normalizer
        self._prefixed = (
            not self._byte_level and normalizer is not None and normalizer.normalize_str("a") == f"{SPACE}a"
        )

    @classmethod
    def from_sections(cls, tokenizer: bytes, template: bytes) -> Tokenizer:
        """From an image's sections. Raises MalformedFile.

        Takes 0.4 s for 150,000 tokens, and the library holds the interpreter lock all that time.
        """
        return cls(tokenizer, template)

    def encode(self, text: str, *, parse_special: bool = False, add_bos: bool = True, marker: str = "") -> list[int]:
        """Ids of `text`.

        parse_special: control tokens spelled out in the text become control tokens; otherwise they stay text, as they
        must in what a user wrote. A control token broken by `marker` (see `disarm`) always stays text, and the marker
        is taken out. add_bos: begin with the BOS token if the model wants one and the text does not already. Raises
        BadRequest for what is no text.
        """
        ids: list[int] = []
        start = 0
        if parse_special and self._control:
            for begin, end, id in self._find_control(text):
                ids += self._encode_plain(text[start:begin], marker)
                ids.append(id)
                start = end
        ids += self._encode_plain(text[start:], marker)
        if add_bos and self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def disarm(self, text: str, marker: str) -> str:
        """`text` with `marker` after the first character of every control token in it, and of every beginning of one
        at its end (the next text might complete it). Everything else is left alone, so that templates can still
        trim, compare and split it.
        """
        pieces: list[str] = []
        start = 0
        for match in self._starts.finditer(text) if self._control else ():
            begin = match.start()
            whole = any(text[begin : begin + length] in self._control for length in self._lengths)
            rest = text[begin : begin + self._lengths[0]]
            open_end = begin + len(rest) == len(text) and any(control.startswith(rest) for control in self._control)
            if whole or open_end:
                pieces += (text[start : begin + 1], marker)
                start = begin + 1
        return "".join((*pieces, text[start:]))

    def decode(self, ids: Sequence[int], *, continuation: bool = False, control: bool = False) -> str:
        """Text of `ids`; unknown ids and bytes that are not UTF-8 give U+FFFD or nothing, never an error.

        continuation: the ids go on after others, so a leading space is part of the text and not the encoder's own.
        control: show control tokens.
        """
        shown = [id for id in ids if control or not self.is_control(id)]
        text = b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")
        return text[1:] if self._prefixed and not continuation and text.startswith(" ") else text

    def token_bytes(self, token: int) -> bytes:
        """The bytes `token` stands for; none for an id outside the vocabulary (embedding rows may exceed it)."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token) if 0 <= token < self.vocabulary else None
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(_letter_bytes(letter) for letter in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(SPACE, " ").encode()

    def is_control(self, token: int) -> bool:
        """True for tokens that steer and are not shown: control tokens, and those that end a generation."""
        return token in self._control_ids

    def _encode_plain(self, text: str, marker: str) -> list[int]:
        text = text.replace(marker, "") if marker else text
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest(
                "The text has half of a surrogate pair in it, which is no character; send UTF-8."
            ) from None
        try:
            # The batch call releases the interpreter lock, the single one does not.
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the library's, which cannot be imported and is no Exception
                raise
            raise BadRequest(f"The text cannot be cut into tokens: {error}.") from None
        return list(encoding.ids)

    def _find_control(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(begin, end, id) of control tokens in `text`, leftmost first, the longest where several begin."""
        place = 0
        while match := self._starts.search(text, place):
            place = match.start()
            for length in self._lengths:
                id = self._control.get(text[place : place + length])
                if id is not None:
                    yield place, place + length, id
                    place += length
                    break
            else:
                place += 1


_LETTER_BYTES = {letter: bytes([byte]) for byte, letter in enumerate(byte_letters())}


def _letter_bytes(letter: str) -> bytes:
    """A character of the byte alphabet is its byte; any other stands for itself."""
    return _LETTER_BYTES.get(letter) or letter.encode()
