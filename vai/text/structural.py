"""The grammar that makes a model write tool calls in its own format, with arguments that satisfy the tools' schemas.

A grammar here is llguidance's Lark: text and JSON schemas in turns, control tokens by their ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vai.errors import NotSupported
from vai.text.families import CALL_ID, QwenCoder, is_text
from vai.text.parsers import Parser
from vai.text.tools import Function, Tools, parameters

# As families are trained on JSON: on one line, a space after comma and colon. Otherwise a model could fill with spaces.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_UNWRITTEN = ("pattern", "format", "minLength", "maxLength")  # what raw text is not held to


def grammar(
    family: type[Parser],
    tools: Tools,
    control: Mapping[str, int],
    *,
    thinking: bool = False,
    content: Mapping[str, Any] | None = None,
) -> str | None:
    """The grammar of an answer, None where anything goes.

    Required calls are the whole answer. Where the model may choose, it is free up to the first marker of a call; that
    is held to a grammar if a function is strict, or if there may be one call only. Where `content` says what else than
    calls may come, JSON of that schema, it is not free at all.

    control: ids of those markers that are control tokens. thinking: the answer begins within `<think>`, and is held to
    nothing until that ends. Raises NotSupported for a schema that the family's format cannot be held to.
    """
    strict = any(function.strict for function in tools.functions)
    if not tools.required and tools.parallel and not strict and content is None:
        return None
    writer = _Writer(family, control)
    functions = [function for function in tools.functions if tools.name in (None, function.name)]
    several = tools.parallel and family.parallel
    if tools.required:
        start = writer.calls(functions, several)
    elif content is not None:
        start = writer.calls_or(content, functions, several)
    else:
        start = writer.offer(functions, several)
    think = f"{writer.through('</think>')} GAP " if thinking else ""
    return "\n".join((f"start: {think}({start})", *writer.rules, "TEXT: /(.|\\n)*/", "GAP: /\\n{0,2}/", ""))


class _Writer:
    """Rules, as they become needed."""

    def __init__(self, family: type[Parser], control: Mapping[str, int]) -> None:
        self._family = family
        self._control = control
        self.rules: list[str] = []

    def calls(self, functions: Sequence[Function], several: bool) -> str:
        """Calls and nothing else."""
        return self._listed(self._text(self._family.opening), functions, several, strict=True)

    def calls_or(self, content: Mapping[str, Any], functions: Sequence[Function], several: bool) -> str:
        """Calls, or JSON of this schema."""
        if not self._marker:
            raise NotSupported(
                "This model writes calls without a marker, so they cannot be told from JSON; leave 'response_format' "
                "or 'tools' out.",
                param="response_format",
            )
        calls = self._listed(self._text(self._family.opening), functions, several, strict=False)
        return f"{calls} | {self._json(content)}"

    def offer(self, functions: Sequence[Function], several: bool) -> str:
        """Text, and calls once one is begun."""
        family = self._family
        marker = self._marker
        if not marker:  # without one, the first character tells
            self.rules.append("PROSE: /([^{ \\n](.|\\n)*)?/")
            return f"{self._listed('', functions, several, strict=False)} | PROSE"
        through = self.through(marker)
        if family.opening:
            rest = self._text(family.opening.removeprefix(marker))
            return f"{through} {self._listed(rest, functions, several, strict=False)} | TEXT"
        call = f"{through} {self._call(functions, marker, strict=False)}"
        return f"({call})* TEXT" if several else f"{call} | TEXT"

    @property
    def _marker(self) -> str:
        """What a call begins with, "" where that is JSON."""
        opening = self._family.opening or self._family.head
        return next((marker for marker in self._family.markers if opening.startswith(marker)), "")

    def through(self, marker: str) -> str:
        """Any text up to the first such marker, and the marker."""
        if marker in self._control:
            return f"TEXT <[{self._control[marker]}]>"
        name = f"through_{len(self.rules)}"
        self.rules.append(f"{name}[lazy]: TEXT {json.dumps(marker, ensure_ascii=False)}")
        return name

    def _listed(self, opening: str, functions: Sequence[Function], several: bool, *, strict: bool) -> str:
        family = self._family
        call = self._call(functions, "", strict)
        more = f"({self._text(family.between)} {call})*" if several else ""
        return " ".join(part for part in (opening, call, more, self._text(family.closing)) if part)

    def _call(self, functions: Sequence[Function], begun: str, strict: bool) -> str:
        """One call, of which `begun` is written."""
        family = self._family
        choices = []
        for function in functions:
            head = family.head.replace("NAME", function.name, 1).removeprefix(begun)
            arguments = self._arguments(function) if strict or function.strict else self._json({"type": "object"})
            name = f"call_{len(self.rules)}"
            self.rules.append(f"{name}: {self._text(head)} {arguments} {self._text(family.tail)}")
            choices.append(name)
        name = f"call_{len(self.rules)}"
        self.rules.append(f"{name}: {' | '.join(choices)}")
        return name

    def _arguments(self, function: Function) -> str:
        return self._raw(parameters(function)) if self._family is QwenCoder else self._json(parameters(function))

    def _json(self, schema: Mapping[str, Any]) -> str:
        name = f"json_{len(self.rules)}"
        self.rules.append(f"{name}: %json {json.dumps({**schema, 'x-guidance': _WRITTEN})}")
        return name

    def _raw(self, schema: Mapping[str, Any]) -> str:
        """Arguments as Qwen3-Coder writes them: a line with the key, the value's text or JSON, a line that ends it."""
        properties = schema.get("properties")
        pieces = []
        for key, value in properties.items() if isinstance(properties, dict) else ():
            shape = value if isinstance(value, dict) else {}
            line = f"{json.dumps(f'<parameter={key}>' + chr(10))} {self._value(key, shape, schema)}"
            required = schema.get("required")
            pieces.append(f"{line}" if isinstance(required, list) and key in required else f"({line})?")
        return " ".join(pieces)

    def _value(self, key: str, shape: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
        """A value and the line that ends it."""
        end = "\n</parameter>\n"
        if not is_text(dict(shape)):
            shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            return f"{self._json({**shape, **shared})} {json.dumps(end)}"
        held = [name for name in _UNWRITTEN if name in shape]
        if held:
            raise NotSupported(
                f"This model writes the text of '{key}' outside of JSON, where '{held[0]}' cannot be enforced; leave "
                "it out, or let the model choose with tool_choice 'auto' and without 'strict'.",
                param="tools",
            )
        values = shape.get("enum", [shape["const"]] if "const" in shape else None)
        if isinstance(values, list):
            return f"({' | '.join(json.dumps(f'{value}{end}', ensure_ascii=False) for value in values)})"
        return self.through(end)

    def _text(self, text: str) -> str:
        """Text as Lark, its control tokens by id, and nine letters for a call's id."""
        pieces: list[str] = []
        plain = ""
        while text:
            token = next((token for token in self._control if text.startswith(token)), None)
            if token is None and not text.startswith(CALL_ID):
                plain, text = plain + text[0], text[1:]
                continue
            pieces += [json.dumps(plain, ensure_ascii=False)] if plain else []
            pieces.append("/[a-zA-Z0-9]{9}/" if token is None else f"<[{self._control[token]}]>")
            plain, text = "", text[len(token or CALL_ID) :]
        pieces += [json.dumps(plain, ensure_ascii=False)] if plain else []
        return " ".join(pieces)
