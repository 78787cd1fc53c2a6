"""A working byte-level BPE vocabulary of any size, made from nothing but this file, for synthetic checkpoints.

The first merges are trained (Sennrich et al. 2016) on the word list below, weighted by Zipf's law; the rest join the
tokens made so far, short ones first, until the asked size is reached. The same arguments give the same vocabulary
everywhere: only integers decide, and ties go to the lexically smaller pair.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from vai.errors import BadRequest

NORMAL, CONTROL = 1, 3  # tokenizer.ggml.token_type
BYTES = 256
MAX_SIZE = 1 << 20


class Vocabulary(NamedTuple):
    """The arrays of a GGUF file's `gpt2` tokenizer: token i, merges "left right" by rank, and token types."""

    tokens: list[str]
    merges: list[str]
    types: list[int]


@cache
def byte_letters() -> tuple[str, ...]:
    """Byte -> the printable character that stands for it in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(BYTES):
        if byte not in letters:
            letters[byte] = chr(BYTES + len(letters) - len(printable))
    return tuple(letters[byte] for byte in range(BYTES))


def spell(data: bytes) -> str:
    """Bytes in the alphabet of byte-level BPE."""
    letters = byte_letters()
    return "".join(letters[byte] for byte in data)


def byte_level_bpe(size: int, specials: Sequence[str]) -> Vocabulary:
    """A vocabulary of exactly `size` tokens: 256 bytes, merges, then `specials` as control tokens at the end.

    Raises BadRequest if `size` has no room for bytes and specials, is too large, or a special is empty or repeated.
    """
    if not BYTES + len(specials) <= size <= MAX_SIZE:
        raise BadRequest(
            f"A vocabulary of {size:,} entries cannot be made; it takes {BYTES + len(specials):,} to {MAX_SIZE:,}."
        )
    count = size - BYTES - len(specials)
    merges = list(_trained()[:count])
    tokens = [*byte_letters(), *(left + right for left, right in merges)]
    for left, right in _joined(merges, count - len(merges), set(tokens)):
        merges.append((left, right))
        tokens.append(left + right)
    if len(tokens) != size - len(specials) or len({*tokens, *specials, ""}) != size + 1:
        raise BadRequest("Special tokens must be neither empty, nor repeated, nor ordinary tokens.")
    types = [NORMAL] * len(tokens) + [CONTROL] * len(specials)
    return Vocabulary([*tokens, *specials], [f"{left} {right}" for left, right in merges], types)


def _weighted() -> dict[str, int]:
    """The words to train on, spelled, each with an integer weight: as in running text, alone, and capitalized."""
    weights: dict[str, int] = defaultdict(int)
    for rank, word in enumerate((_ENGLISH + _OTHERS).split(), start=1):
        weight = 400_000 // rank + 8
        weights[spell(f" {word}".encode())] += weight
        weights[spell(word.encode())] += weight // 4
        weights[spell(f" {word.capitalize()}".encode())] += weight // 8
    for rank, sign in enumerate(_SIGNS, start=1):
        weights[spell(sign.encode())] += 40_000 // rank
    return weights


@cache
def _trained() -> tuple[tuple[str, str], ...]:
    """Merges by falling frequency of the pair in the weighted words, until every word is one token."""
    weighted = _weighted()
    words, weights = [list(word) for word in weighted], list(weighted.values())
    counts: dict[tuple[str, str], int] = defaultdict(int)
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += weights[index]
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    made: set[str] = set()
    while heap:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative or not negative:
            continue  # an old entry; the present count stands elsewhere in the heap
        changed: set[tuple[str, str]] = set()
        for index in places.pop(pair):
            before = words[index]
            after = _merge(before, pair)
            for old in pairwise(before):
                counts[old] -= weights[index]
                changed.add(old)
            for new in pairwise(after):
                counts[new] += weights[index]
                places[new].add(index)
                changed.add(new)
            words[index] = after
        for other in changed:
            heapq.heappush(heap, (-counts[other], other))
        if "".join(pair) not in made:  # another split may have made this token already
            made.add("".join(pair))
            merges.append(pair)
    return tuple(merges)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def _joined(merges: Sequence[tuple[str, str]], count: int, taken: set[str]) -> Iterator[tuple[str, str]]:
    """`count` further merges: pairs of the tokens there are, by rising sum of their ranks, none made twice."""
    space = byte_letters()[ord(" ")]
    heads = [*byte_letters(), *(left + right for left, right in merges)]
    tails = [token for token in heads if not token.startswith(space)]
    for total in range(len(heads) + len(tails) if count else 0):
        for index in range(max(0, total - len(tails) + 1), min(total + 1, len(heads))):
            left, right = heads[index], tails[total - index]
            if left + right in taken:
                continue
            taken.add(left + right)
            yield left, right
            count -= 1
            if not count:
                return


_ENGLISH = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years much where your way down should because long
each just state those people too mr how little good world make very year still see own work men day get here old
between both life being under three never know same last another while us might great go come since against right came
take used himself few house use place during without again home around however small found mrs thought went say part
once general high upon school every number does united left number course war until always away something fact water
less public though put thing almost hand enough far took head yet government system set told nothing night end why
find going look asked later point knew next program city business give group toward days young let room president side
social given present several order national second possible rather per face among form important often things looked
early white case john become large big need four within felt along children saw best church ever least power
development light thing seemed family interest want members mind area country others turned although done open god
service problem certain kind different thus began door help sense means whole matter name line book read write word
words letter sentence question answer page paper text language example model memory shared weights token tokens prompt
answer request response stream server client daemon engine process thread file files path name value values type types
data list string number integer float bytes byte length size count index key function return class import from def
self none true false print else while try except raise with async await yield lambda static void int char const struct
unsigned double bool auto template public private virtual namespace include using define error message code test run
build start stop open close read write send receive load store burn table page pages cache block row rows column
columns layer layers head heads attention hidden output input bias norm scale base head layer please explain write
short story about describe what summarize following hello hi thanks thank today tomorrow morning capital france paris
germany berlin london england america europe asia africa river mountain sea ocean sun moon star earth red green blue
black yellow color apple bread milk coffee tea food eat drink sleep walk run play game music song film science physics
chemistry biology mathematics computer machine learning deep neural network artificial intelligence human quick brown
fox jumps lazy dog cat bird fish horse animal tree flower garden winter summer spring autumn rain snow wind think
believe know understand remember forget learn teach show tell ask speak talk listen hear feel touch taste smell happy
sad angry strong weak fast slow hot cold warm cool easy hard simple difficult clear dark deep wide narrow high low
information knowledge experience history culture society economy market money price cost company industry product
because therefore however moreover although whether either neither nor yet still already soon later never sometimes
usually one two three four five six seven eight nine ten hundred thousand million first second third half quarter
double single ing ed er est ly ness ment tion sion able ible ful less ous ive al ic ity ance ence ship hood ward wise
ize ify en re un in im dis mis pre pro con com sub super inter trans over under out up down fore anti auto bi co de ex
mid non post semi
"""
_OTHERS = """
der die das und ist nicht ein eine mit für auf den von zu sich auch es an werden aus dem daß über schön größe
le la les des et est une dans que pour qui pas sur plus avec tout être même été français où ça
el los las una por con para como más pero sus este año también español niño
и в не на я что он с как это по но они мы из у за так все же был бы от для привет мир
的 是 不 了 在 有 人 我 他 这 中 国 你 好 世界 我们 模型
の に は を た が で て と し 日本 です ます こんにちは 世界
한국 안녕 하세요 그리고 세계
και το είναι γεια κόσμε
مرحبا العالم في من
नमस्ते दुनिया है
"""
_SIGNS = [
    *("\n", ".\n", ",\n", "\n\n", "  ", "    ", "        ", "            ", "                ", ".\n\n", ":\n", ";\n"),
    *("()", "();", "):", "):\n", "();\n", " =", " ==", " !=", " <=", " >=", " +", " -", " *", " /", " {", " }", "{\n"),
    *("}\n", " (", " [", "],", "),", '",', '":', " '", "',", "->", " ->", "=>", " =>", "::", "//", " //", "/*", "*/"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "...", "…", "“", "”", "—", "’", "##", "###", "**", "```", "--"),
    *("10", "20", "100", "1000", "19", "00", "200", "😀", "👍", "🎉", "é", "ü", "ö", "ä", "ß", "€", "°", "，", "。"),
]
