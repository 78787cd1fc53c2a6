"""GBNF, the grammars of llama.cpp, as Lark (llama.cpp: grammars/README.md).

A rule that refers to none that refers to itself is a terminal, a regular expression: the lexer reads it at once, and as
far as it goes. The others are rules of the parser.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import NamedTuple

MAX_DEPTH = 100  # of parentheses
MAX_TIMES = 1 << 20
_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\r\n]*)
      | (?P<rule>[A-Za-z0-9_-]+)\s*::=
      | (?P<name>[A-Za-z0-9_-]+)
      | "(?P<text>(?:[^"\\]|\\.)*)"
      | \[(?P<not>\^?)(?P<set>(?:[^\]\\]|\\.)*)\]
      | \{\s*(?P<least>\d+)\s*(?P<comma>,?)\s*(?P<most>\d*)\s*\}
      | (?P<sign>[()|*+?.])""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|([^\\])", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


class _Rule(NamedTuple):
    """A rule on its way: pieces of Lark, with the names of other rules between them."""

    name: str
    pieces: list[str]
    references: dict[int, str]  # where in `pieces` the name of which rule stands


def to_lark(text: str) -> str:
    """A grammar as Lark, from `start`. Raises ValueError naming what cannot be read, or is not there."""
    rules = _read(text)
    if "root" not in rules:
        raise ValueError("there is no rule 'root'")
    for rule in rules.values():
        for name in rule.references.values():
            if name not in rules:
                raise ValueError(f"the rule '{rule.name}' refers to '{name}', which is not there")
    terminals = _terminals(rules)
    names = {
        name: f"{'R' if name in terminals else 'r'}{number}" for number, name in enumerate(rules)
    }  # numbers, because names that differ in signs or case alone may be one in Lark
    lines = [f"start: {names['root']}"]
    for rule in rules.values():
        pieces = [
            names[rule.references[place]] if place in rule.references else piece
            for place, piece in enumerate(rule.pieces)
        ]
        lines.append(f"{names[rule.name]}: {' '.join(pieces)}")
    return "\n".join(lines) + "\n"


def _read(text: str) -> dict[str, _Rule]:
    rules: dict[str, _Rule] = {}
    rule, depth, place = None, 0, 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            line = text.count("\n", 0, place) + 1
            raise ValueError(f"line {line} cannot be read from {json.dumps(text[place : place + 20])} on")
        place = match.end()
        if match["space"] is not None:
            continue
        if match["rule"] is not None:
            _finish(rule, depth)
            name = match["rule"]
            if name in rules:
                raise ValueError(f"there are two rules '{name}'")
            rule = rules[name] = _Rule(name, [], {})
            continue
        if rule is None:
            raise ValueError("it does not begin with a rule, as in: root ::= ...")
        depth += {"(": 1, ")": -1}.get(match["sign"] or "", 0)
        if not 0 <= depth <= MAX_DEPTH:
            raise ValueError(f"the parentheses of the rule '{rule.name}' do not match, or are nested too deeply")
        _add(rule, match)
    _finish(rule, depth)
    return rules


def _add(rule: _Rule, match: re.Match[str]) -> None:
    """One token of a rule's body."""
    pieces, sign = rule.pieces, match["sign"]
    repeats = match["least"] is not None or (sign is not None and sign in "*+?")
    if repeats and (not pieces or pieces[-1] in ("(", "|")):
        raise ValueError(f"in the rule '{rule.name}' nothing stands before {match[0]}")
    if match["name"] is not None:
        rule.references[len(pieces)] = match["name"]
        pieces.append("")
    elif match["text"] is not None:
        characters = "".join(map(chr, _characters(match["text"])))
        pieces.append(json.dumps(characters, ensure_ascii=False))
    elif match["set"] is not None:
        pieces.append(_set(match["set"], match["not"]))
    elif match["least"] is not None:
        least, most = match["least"], match["most"] if match["comma"] else match["least"]
        if len(least) > 7 or len(most) > 7 or int(least) > MAX_TIMES or int(most or 0) > MAX_TIMES:
            raise ValueError(f"nothing is repeated more than {MAX_TIMES} times")
        pieces.append(f"{{{int(least)},{most}}}")
    elif sign == ".":
        pieces.append("/(?s:.)/")
    else:
        if sign in ("|", ")") and (not pieces or pieces[-1] in ("(", "|")):
            pieces.append('""')
        pieces.append(str(sign))


def _finish(rule: _Rule | None, depth: int) -> None:
    """The rule is read to its end."""
    if rule is None:
        return
    if depth:
        raise ValueError(f"the parentheses of the rule '{rule.name}' do not match, or are nested too deeply")
    if not rule.pieces or rule.pieces[-1] == "|":
        rule.pieces.append('""')


def _set(text: str, negated: str) -> str:
    """A set of characters, as a regular expression: [a-z] and its like."""
    raw = _CHARACTER.findall(text)
    found = _characters(text)
    pieces = []
    place = 0
    while place < len(found):
        if place + 2 < len(found) and raw[place + 1][-1] == "-":
            if found[place] > found[place + 2]:
                raise ValueError(f"[{text}] has a range that ends before it begins")
            pieces.append(f"\\x{{{found[place]:X}}}-\\x{{{found[place + 2]:X}}}")
            place += 3
        else:
            pieces.append(f"\\x{{{found[place]:X}}}")
            place += 1
    if not pieces and not negated:
        raise ValueError("[] is no character")
    return f"/[{negated}{''.join(pieces)}]/" if pieces else "/(?s:.)/"


def _characters(text: str) -> list[int]:
    """The code points of a text with escapes."""
    found = []
    for two, four, eight, letter, plain in _CHARACTER.findall(text):
        code = int(two or four or eight, 16) if two or four or eight else ord(_LETTERS.get(letter, letter) or plain)
        if letter and letter.isalnum() and letter not in _LETTERS:
            raise ValueError(f"\\{letter} is no escape that can be read here")
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise ValueError(f"{code:X} is no character")
        found.append(code)
    return found


def _terminals(rules: dict[str, _Rule]) -> set[str]:
    """The rules that no way leads from back to themselves, nor to one that has such a way."""
    users: defaultdict[str, list[str]] = defaultdict(list)
    open_references = {}
    for rule in rules.values():
        used = set(rule.references.values())
        open_references[rule.name] = len(used)
        for name in used:
            users[name].append(rule.name)
    closed = [name for name, count in open_references.items() if not count]
    for name in closed:  # grows as it goes
        for user in users[name]:
            open_references[user] -= 1
            if not open_references[user]:
                closed.append(user)
    return set(closed)
