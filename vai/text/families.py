"""How families of models write their tool calls, each in a class of its own, and which one a template is of."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from vai.text.parsers import NAME_CHARACTERS, Malformed, Parser, Step
from vai.text.tools import parameters

CALL_ID = "000000000"  # stands for nine letters and digits in a head


class Hermes(Parser):
    """Hermes 2 Pro, Qwen2.5, Qwen3, Granite 4: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    name = "hermes"
    markers = ("<tool_call>", "</tool_call>")
    head = '<tool_call>\n{"name": "NAME", "arguments": '
    tail = "}\n</tool_call>"
    between = "\n"

    def _answer(self) -> Step:
        yield from self._marked("<tool_call>", self._call)

    def _call(self) -> Step:
        yield from self._spaces()
        try:
            yield from self._object()
        except Malformed:
            if not self._called:
                raise
        yield from self._spaces()
        yield from self._expect("</tool_call>")


class QwenCoder(Parser):
    """Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>text</parameter></function></tool_call>` in lines.

    Values are raw text: one that the schema does not call a string is passed on as the JSON that it spells.
    """

    name = "qwen3-coder"
    markers = ("<tool_call>", "</tool_call>")
    head = "<tool_call>\n<function=NAME>\n"
    tail = "</function>\n</tool_call>"
    between = "\n"

    def _answer(self) -> Step:
        yield from self._marked("<tool_call>", self._call)

    def _call(self) -> Step:
        yield from self._spaces()
        yield from self._expect("<function=")
        name = yield from self._word(NAME_CHARACTERS)
        yield from self._expect(">")
        self._begin(name)
        self._count = 0
        try:
            yield from self._parameters(name)
        except Malformed:
            if not self._cut_short:  # what was told is to be JSON, the rest is content
                raw = self._raw.copy()
                self._argue("}" if self._count else "{}")
                self._raw = raw
            raise
        self._argue("}" if self._count else "{}")
        yield from self._spaces()
        yield from self._expect("</tool_call>")

    def _parameters(self, function: str) -> Step:
        while True:
            yield from self._spaces()
            if (yield from self._expect("<parameter=", "</function>")) == "</function>":
                return
            key = yield from self._word(NAME_CHARACTERS)
            yield from self._expect(">")
            pieces: list[str] = []
            closed = yield from self._until("</parameter>", pieces.append)
            value = self._spelled(function, key, "".join(pieces), closed)
            self._argue(f"{', ' if self._count else '{'}{json.dumps(key)}: {value}")
            self._count += 1
            if not closed:
                raise Malformed

    def _spelled(self, function: str, key: str, raw: str, whole: bool) -> str:
        """The JSON text of a value; of one that was cut short, what there is of it."""
        text = raw.removeprefix("\n").removesuffix("\n")
        if not whole:
            return json.dumps(raw.removeprefix("\n"), ensure_ascii=False)[:-1]
        if not self._is_text(function, key):
            with suppress(ValueError, RecursionError):
                json.loads(text)
                return text
        return json.dumps(text, ensure_ascii=False)

    def _is_text(self, function: str, key: str) -> bool:
        """Whether the schema says that a value is a string, whatever it looks like."""
        if function not in self._functions:
            return False
        properties = parameters(self._functions[function]).get("properties")
        schema = properties.get(key) if isinstance(properties, dict) else None
        return isinstance(schema, dict) and is_text(schema)


def is_text(schema: dict[str, Any]) -> bool:
    """Whether a schema, at its face, admits strings only."""
    if "type" in schema:
        return schema["type"] in ("string", ["string"])
    values = schema.get("enum", [schema.get("const")])
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


class Llama(Parser):
    """Llama 3: an answer that is nothing but `{"name": ..., "parameters": {...}}`, or that and more after
    `<|python_tag|>`. Without the tag only the name of a function on offer makes a call of it.
    """

    name = "llama3"
    markers = ("<|python_tag|>",)
    head = '{"name": "NAME", "parameters": '
    tail = "}"
    parallel = False

    def _answer(self) -> Step:
        yield from self._spaces()
        if (yield from self._starts("{")):
            yield from self._try(lambda: self._objects(known=True))
        else:
            self._give_up()
        yield from self._marked("<|python_tag|>", lambda: self._objects(known=False))

    def _objects(self, known: bool) -> Step:
        """Calls one after the other, apart by `;`."""
        yield from self._spaces()
        yield from self._object(known=known)
        while True:
            self._raw.clear()
            yield from self._spaces()
            apart = yield from self._take(";")
            yield from self._spaces()
            if not (yield from self._starts("{")):
                break
            yield from self._object(known=known)
        if apart:
            self._called = True
            raise Malformed


class Mistral(Parser):
    """Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and the newer `[TOOL_CALLS]NAME[ARGS]{...}`, there
    with `[CALL_ID]` and an id before the arguments or without.
    """

    name = "mistral"
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    opening = "[TOOL_CALLS]["
    head = '{"name": "NAME", "arguments": '
    tail = "}"
    between = ", "
    closing = "]"

    def _answer(self) -> Step:
        yield from self._marked("[TOOL_CALLS]", self._calls)

    def _calls(self) -> Step:
        yield from self._spaces()
        if not (yield from self._take("[")):
            yield from self._named()
            return
        while True:
            yield from self._spaces()
            yield from self._object()
            self._raw.clear()
            yield from self._spaces()
            if not (yield from self._take(",")):
                break
        yield from self._expect("]")

    def _named(self) -> Step:
        name = yield from self._word(NAME_CHARACTERS)
        if (yield from self._take("[CALL_ID]")):
            yield from self._word(NAME_CHARACTERS)
        yield from self._take("[ARGS]")
        yield from self._spaces()
        if (yield from self._peek()) != "{":
            raise Malformed
        self._begin(name)
        yield from self._value(self._argue)


class MistralArgs(Mistral):
    """Mistral models that write `[TOOL_CALLS]NAME[ARGS]{...}`."""

    name = "mistral-args"
    opening, closing, between, tail = "", "", "", ""
    head = "[TOOL_CALLS]NAME[ARGS]"


class MistralCallId(MistralArgs):
    """Mistral models that write an id of nine letters between name and arguments."""

    name = "mistral-call-id"
    head = f"[TOOL_CALLS]NAME[CALL_ID]{CALL_ID}[ARGS]"


class DeepSeek(Parser):
    """DeepSeek V3.1: calls as `NAME`, a separator and the arguments, between markers of their own."""

    name = "deepseek"
    markers = (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    )
    opening, _begins, _sep, _ends, closing = markers
    head = f"{_begins}NAME{_sep}"
    tail = _ends

    def _answer(self) -> Step:
        yield from self._marked(self.opening, self._calls)

    def _calls(self) -> Step:
        yield from self._spaces()
        yield from self._expect(self._begins)
        while True:
            self._called = False
            name = yield from self._word(NAME_CHARACTERS)
            yield from self._expect(self._sep)
            yield from self._spaces()
            if (yield from self._peek()) == "{":
                self._begin(name)
                yield from self._value(self._argue)
            else:
                yield from self._fenced()
            yield from self._spaces()
            yield from self._expect(self._ends)
            self._raw.clear()
            yield from self._spaces()
            if (yield from self._expect(self._begins, self.closing)) == self.closing:
                return

    def _fenced(self) -> Step:
        """The name after the separator, the arguments as a block of JSON."""
        name = yield from self._word(NAME_CHARACTERS)
        yield from self._spaces()
        yield from self._take("```json")
        yield from self._spaces()
        if (yield from self._peek()) != "{":
            raise Malformed
        self._begin(name)
        yield from self._value(self._argue)
        yield from self._spaces()
        yield from self._take("```")


class DeepSeekFenced(DeepSeek):
    """DeepSeek V3 and R1, which write the kind of tool before its name, and the arguments as a block of JSON."""

    name = "deepseek-r1"
    head = f"{DeepSeek._begins}function{DeepSeek._sep}NAME\n```json\n"
    tail = f"\n```{DeepSeek._ends}"
    between = "\n"


def detect(template: str) -> type[Parser] | None:
    """How a model writes calls, by the markers in its chat template; None where there are none that are known here.

    The template is read, not run: templates refuse conversations that are made up to probe them.
    """
    written = template.replace("\\n", "").replace("\\", "").replace("\n", "")  # as it stands in strings of Jinja's
    if DeepSeek.opening in template:
        return DeepSeekFenced if "```json" in template else DeepSeek
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" not in template:
            return Mistral
        return MistralCallId if "[CALL_ID]" in template else MistralArgs
    if "<tool_call>" in template:
        if "<function=" in template:
            return QwenCoder
        listed = "<tool_call>[" in written or "<tool_calls>[" in written
        return Hermes if '"arguments": ' in written and not listed else None
    if "<|start_header_id|>" in template and '"parameters": ' in written and "<function=" not in template:
        return Llama
    return None
