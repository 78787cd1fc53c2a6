"""A conversation as the ids of a prompt, in the model's own chat format, and how the answer to it is read.

Templates that know tools get them. For the others there is the form that Hermes 2 Pro made common, because many
models have seen it, and because it needs no token of its own: the functions and one example of a call in the system
message, calls in what the assistant said, results in what the user says next.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from vai.errors import BadRequest, NotSupported
from vai.text import structural
from vai.text.families import CALL_ID, DeepSeek, Hermes, Mistral, detect
from vai.text.grammar import GrammarSpec, check_schema
from vai.text.parsers import Parser
from vai.text.template import ChatFields, Template
from vai.text.tokenizer import Tokenizer
from vai.text.tools import Tools, too_deep

Message = Mapping[str, Any]
ROLES = frozenset({"system", "user", "assistant", "tool"})
# One of these characters, which no text has any use for, breaks up control tokens in what users write.
_MARKERS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF0100))]
_THINK = ("<think>", "</think>")
_TAKES_TOOLS = re.compile(r"\btools\b")
_KWARGS = "chat_template_kwargs"
_OURS = frozenset({"messages", "tools", "bos_token", "eos_token", "add_generation_prompt"})


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is read. Without a family and thinking it is all content.

    shown: control tokens that are part of what is read. grammar: what makes the answer the calls that were asked for.
    """

    family: type[Parser] | None = None
    tools: Tools | None = None
    thinks: bool = False
    thinking: bool = False
    shown: frozenset[int] = field(default=frozenset())
    grammar: GrammarSpec | None = None

    def parser(self) -> Parser | None:
        """What reads one answer; None where there is nothing to take apart."""
        if self.family is None and not self.thinks:
            return None
        functions = self.tools.functions if self.tools is not None else ()
        return (self.family or Parser)(functions, thinks=self.thinks, thinking=self.thinking)

    def call_id(self) -> str:
        """An id for a call, as the family's template takes it back."""
        if self.family is not None and issubclass(self.family, Mistral):
            return _mistral_id(secrets.token_hex(16))
        return f"call_{secrets.token_hex(12)}"


class ChatPrompt(NamedTuple):
    """The ids of a conversation up to where the model's turn begins, and how that turn is read."""

    ids: list[int]
    reading: Reading


class Chat:
    """One model's chat format: its template, or `template.PLAIN_CHAT` where it has none.

    A template that writes no calls in a format of families.py is refused with tools if it takes any, by name.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, fields: ChatFields, *, system: str | None = None) -> None:
        """`system`: the system message of conversations that have none."""
        self._name = name
        self._tokenizer = tokenizer
        self._system = system
        self._template = Template(fields.chat_template)
        source = self._template.source
        self._family = detect(source)
        self._takes_tools = _TAKES_TOOLS.search(source) is not None
        self._writes_calls = "tool_calls" in source
        self._thinks = "</think>" in source
        self._variables = {"bos_token": fields.bos_token, "eos_token": fields.eos_token, "add_generation_prompt": True}

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        content: GrammarSpec | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """The prompt for a conversation in which the model may call `tools`, and answer with words that match
        `content`, a JSON schema or any object where there are tools.

        `variables`: what else the template is told, values as in JSON (`enable_thinking` of many that reason). Control
        tokens are those of the template; spelled out in a message, a tool or a variable they stay text. Raises
        BadRequest for messages of no known shape, and where the template refuses them; NotSupported for tools that the
        model's format has no way for, and for variables that its template does not read.
        """
        told = dict(variables or {})
        self._check_variables(told)
        if tools is not None and self._takes_tools and self._family is None:
            raise NotSupported(
                f"The chat template of '{self._name}' takes tools, but the format in which the model then writes its "
                "calls is not known here; leave 'tools' out, or give the name another template.",
                param="tools",
            )
        family = self._family or Hermes
        plain = [_plain_message(message, number) for number, message in enumerate(messages)]
        if self._system is not None and not any(message["role"] == "system" for message in plain):
            plain.insert(0, {"role": "system", "content": self._system})
        offered = [] if tools is None else tools.rendered()
        marker = _unused_marker([*plain, *offered, told])
        safe = [{**self._disarmed(message, marker), "role": message["role"]} for message in plain]
        offered = self._disarmed(offered, marker)
        told = self._disarmed(told, marker)
        takes = bool(offered) and self._takes_tools
        if takes:
            told["tools"] = offered
        if self._writes_calls:
            safe = [self._called(message) for message in safe]
        else:
            safe = _spelled_out(safe, family)
        text = self._rendered(safe, told, "" if takes or not offered else _description(offered, family))
        ids = self._tokenizer.encode(text, parse_special=True, marker=marker)
        return ChatPrompt(ids, self._reading(tools, content, family, text))

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name, value in variables.items():
            if name in _OURS:
                raise BadRequest(f"'{name}' is not the request's to set; leave it out.", param=_KWARGS)
            if not name.isidentifier() or not re.search(rf"\b{name}\b", self._template.source):
                raise NotSupported(
                    f"The chat template of '{self._name}' reads no variable '{name[:64]}'; leave it out.", param=_KWARGS
                )
            if too_deep(value):
                raise BadRequest(f"The value of '{name}' is nested too deeply.", param=_KWARGS)

    def _rendered(self, messages: list[dict[str, Any]], variables: dict[str, Any], description: str) -> str:
        """The template's text. `description` of tools goes into the system message; where the template refuses such a
        message, into the first one.
        """
        if not description:
            return self._template.render(messages, **self._variables, **variables)
        variables = {**self._variables, **variables}
        has_system = bool(messages) and messages[0]["role"] == "system"
        opened = messages if has_system else [{"role": "system", "content": ""}, *messages]
        try:
            return self._template.render(_prefixed(opened, description), **variables)
        except BadRequest:
            if has_system or not messages:
                raise
            return self._template.render(_prefixed(messages, description), **variables)

    def close(self) -> None:
        """End the template's process."""
        self._template.close()

    def _reading(self, tools: Tools | None, content: GrammarSpec | None, family: type[Parser], prompt: str) -> Reading:
        if content is not None and tools is None:
            return Reading(grammar=content)  # it is the whole answer, so there is nothing to take apart
        thinking = self._thinks and prompt.rstrip().endswith(_THINK[0])
        marks = (*(family.markers if tools is not None else ()), *(_THINK if self._thinks else ()))
        control = {mark: id for mark in marks if (id := self._control(mark)) is not None}
        shown = frozenset(control.values())
        if tools is None:
            return Reading(thinks=self._thinks, thinking=thinking, shown=shown)
        lark = structural.grammar(family, tools, control, thinking=thinking, content=_content_schema(content))
        grammar = None if lark is None else GrammarSpec("structural", lark)
        return Reading(family, tools, self._thinks, thinking, shown, grammar)

    def _control(self, mark: str) -> int | None:
        """The control token that is spelled so, if there is one."""
        ids = self._tokenizer.encode(mark, parse_special=True, add_bos=False)
        return ids[0] if len(ids) == 1 and self._tokenizer.is_control(ids[0]) else None

    def _called(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with calls as templates expect it."""
        known = dict(message)
        if self._family is not None and issubclass(self._family, DeepSeek) and "tool_calls" in message:
            known["content"] = message["content"] or None  # "" is an answer for its templates, and hides the calls
        if self._family is not None and issubclass(self._family, Mistral):
            if "tool_calls" in message:
                calls = message["tool_calls"]
                known["tool_calls"] = [{**call, "id": _mistral_id(str(call.get("id", "")))} for call in calls]
            if "tool_call_id" in message:
                known["tool_call_id"] = _mistral_id(str(message["tool_call_id"]))
        return known

    def _disarmed(self, value: Any, marker: str) -> Any:
        """The same value with no control token in any text of it."""
        if isinstance(value, str):
            return self._tokenizer.disarm(value, marker)
        if isinstance(value, Mapping):
            return {
                self._tokenizer.disarm(str(key), marker): self._disarmed(item, marker) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._disarmed(item, marker) for item in value]
        return value


def _content_schema(content: GrammarSpec | None) -> dict[str, Any] | None:
    """The JSON schema that content beside calls must satisfy. Raises BadRequest, NotSupported."""
    if content is None:
        return None
    if content.kind == "json_object":
        return {"type": "object"}
    if content.kind != "json_schema":
        raise NotSupported(
            "Beside 'tools', an answer can be held to JSON only; leave one of the two out.", param="tools"
        )
    check_schema(content.value)
    schema: dict[str, Any] = msgspec.json.decode(content.value)
    return schema


def _plain_message(message: Message, number: int) -> dict[str, Any]:
    """A message as chat templates expect it: a known role, its content as one text, the arguments of its calls as
    objects where they are. Raises BadRequest.
    """
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} must have a role and content.", param=where)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ROLES:
        raise BadRequest(f"{where} must have a role of {', '.join(sorted(ROLES))}.", param=where)
    content = message.get("content")
    if isinstance(content, list | tuple):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise BadRequest(f"{where}.content must be a text or a list of text parts.", param=where)
        content = "".join(map(str, texts))
    if not isinstance(content, str | None):
        raise BadRequest(f"{where}.content must be a text or a list of text parts.", param=where)
    plain = {**message, "role": role, "content": content or ""}
    calls = plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = _plain_calls(calls, f"{where}.tool_calls")
    if too_deep(plain):
        raise BadRequest(f"{where} is nested too deeply.", param=where)
    return plain


def _plain_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise BadRequest(f"{where} must be a list of calls.", param=where)
    plain = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{where} must have functions with a name and arguments.", param=where)
        arguments = _object(function.get("arguments"))
        plain.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
    return plain


def _object(arguments: Any) -> Any:
    """The arguments that JSON text spells. What is no object stays what it is: a model wrote it, and sees it again."""
    if arguments in (None, ""):
        return {}
    if isinstance(arguments, str):
        try:
            value = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            return arguments
        return value if isinstance(value, dict) and not too_deep(value) else arguments
    return arguments


def _unused_marker(texts: list[dict[str, Any]]) -> str:
    try:
        text = msgspec.json.encode(texts).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadRequest(f"The messages cannot be written as JSON text: {error}.", param="messages") from None
    for marker in _MARKERS:
        if marker not in text:
            return marker
    raise BadRequest("The messages are full of characters that stand for nothing; send text.", param="messages")


def _mistral_id(id: str) -> str:
    """An id as Mistral's templates insist on: nine letters and digits. Others are replaced, each always by the same."""
    return id if re.fullmatch("[a-zA-Z0-9]{9}", id) else hashlib.sha256(id.encode()).hexdigest()[:9]


# --- templates that know no tools -------------------------------------------------------------------------------------


def _description(tools: list[dict[str, Any]], family: type[Parser]) -> str:
    """What the model is told of tools."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = _written(family, "FUNCTION", '{"ARGUMENT": "VALUE"}')
    return (
        "# Tools\n\nYou may call functions to help with the request. These are described as JSON, one a line:\n"
        f"<tools>\n{lines}\n</tools>\n\nTo call a function, answer in exactly this form, once for each call:\n{example}"
    )


def _prefixed(messages: list[dict[str, Any]], description: str) -> list[dict[str, Any]]:
    """The messages with the tools in the first: behind a system message's own words, before a user's."""
    first = messages[0]
    pieces = (first["content"], description) if first["role"] == "system" else (description, first["content"])
    return [{**first, "content": "\n\n".join(piece for piece in pieces if piece)}, *messages[1:]]


def _written(family: type[Parser], name: str, arguments: str) -> str:
    """One call as the family writes it."""
    head = family.head.replace("NAME", name, 1).replace(CALL_ID, _mistral_id(name))
    return f"{family.opening}{head}{arguments}{family.tail}{family.closing}"


def _spelled_out(messages: list[dict[str, Any]], family: type[Parser]) -> list[dict[str, Any]]:
    """The messages with calls as text of the assistant's and their results as one message of the user's."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "user", "content": result, "results": True})
            continue
        written = [
            _written(family, call["function"]["name"], _json(call["function"]["arguments"]))
            for call in message.get("tool_calls", ())
        ]
        content = "\n".join(piece for piece in (message["content"], *written) if piece)
        plain.append({key: value for key, value in message.items() if key != "tool_calls"} | {"content": content})
    return [{key: value for key, value in message.items() if key != "results"} for message in plain]


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
