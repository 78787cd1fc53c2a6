"""How byte-level BPE files cut text into pieces before merging: one list of expressions for each `tokenizer.ggml.pre`.

Each expression isolates its matches within the pieces left by the one before it; what it does not match stays a piece.
The names and what they stand for are those of the GGUF format as llama.cpp writes it; the syntax is Oniguruma's.
"""

from __future__ import annotations

from typing import NamedTuple

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _SIGNS
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _SIGNS
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _by_case(contraction: str, digits: str) -> str:
    """Words split where the case changes, as in GPT-4o and Tekken."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contraction}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES
    )


_CJK_RUN = r"[一-龥ࠀ-一가-퟿]+"
# The cased letters as DeepSeek LLM's tokenizer enumerates them: fewer than today's Unicode has, so spelled out
# (escaped where Unicode normalization would change the character).
_DEEPSEEK_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥ"
    "ῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_CASED}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _CJK_RUN,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_RUN, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _SPACES,
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")


class Pretokenizer(NamedTuple):
    """`passes`: expressions in order. `ignore_merges`: a piece that is a token is taken whole. `add_bos`: where the
    file does not say. `nfc`: text is normalized to NFC first (as the checkpoint's own tokenizer does; GGUF does not
    record it).
    """

    passes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _table() -> dict[str, Pretokenizer]:
    llama3 = Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
    qwen2 = Pretokenizer((_QWEN2,))
    gpt2 = Pretokenizer((_GPT2,))
    digits = Pretokenizer((r"\p{N}", _GPT2))
    gpt4o = Pretokenizer((_by_case(_CONTRACTIONS + "?", r"\p{N}{1,3}"),))
    v3 = Pretokenizer(_DEEPSEEK_V3)
    return {
        **dict.fromkeys(
            ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "midm-2.0"), llama3
        ),
        **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), Pretokenizer((_LLAMA3,))),
        **dict.fromkeys(("deepseek-r1-qwen", "megrez", "hunyuan", "stablelm2", "solar-open"), qwen2),
        "qwen2": qwen2._replace(nfc=True),
        "qwen35": Pretokenizer((_QWEN35,), nfc=True),
        **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "granite-docling", "exaone4", "gigachat"), gpt2),
        **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), digits),
        "mellum2": digits,
        **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2", "kanana2"), gpt4o),
        "tekken": Pretokenizer((_by_case("", r"\p{N}"),), ignore_merges=True, add_bos=True),
        **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), v3),
        "deepseek-llm": Pretokenizer(_DEEPSEEK_LLM),
        "deepseek-coder": Pretokenizer(_DEEPSEEK_CODER),
        "falcon": Pretokenizer(_FALCON),
    }


PRETOKENIZERS = _table()

# Files of before `tokenizer.ggml.pre` existed, or converted without it, that architecture and vocabulary size identify.
UNNAMED = {
    ("llama", 32_256): "deepseek-coder",
    ("llama", 102_400): "deepseek-llm",
    ("llama", 128_256): "llama-bpe",
    ("qwen2", 151_936): "qwen2",
    ("qwen2", 152_064): "qwen2",
}
