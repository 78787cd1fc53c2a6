"""Tools: the functions that a client offers to a model, which it has to call, and its calls. Bounds in the types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from vai.errors import BadRequest

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 1 << 16  # of one function's parameters, as JSON
MAX_DEPTH = 64  # of objects and arrays within each other
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}\Z")]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A function: `parameters` is the JSON schema of its arguments, an object; None for no arguments.

    `strict`: its arguments must satisfy the schema also where the model is free to call it or not.
    """

    name: FunctionName
    description: Annotated[str, Meta(max_length=1 << 16)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"]
    function: Function


class FunctionChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: FunctionName


class NamedChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"]
    function: FunctionChoice


ToolList = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedChoice


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions on offer, at least one, and the call asked for.

    required: the answer is a call, or several; with `name` it is one of this function. parallel: it may be several.
    """

    functions: tuple[Function, ...]
    required: bool = False
    name: str | None = None
    parallel: bool = True

    def rendered(self) -> list[dict[str, Any]]:
        """As chat templates expect them: the same keys in the same order, however the client wrote them."""
        return [{"type": "function", "function": _rendered(function)} for function in self.functions]


def _rendered(function: Function) -> dict[str, Any]:
    written: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        written["description"] = function.description
    return written | {"parameters": parameters(function)}


def parameters(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments; that of no arguments where it has none."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}


def offered(
    tools: Sequence[Tool] | None, choice: ToolChoice | None = None, parallel: bool | None = None
) -> Tools | None:
    """What the model is told of, checked: None where it is to call nothing. Raises BadRequest."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("'tool_choice' asks for a call, but there are no 'tools'.", param="tool_choice")
        return None
    functions = tuple(tool.function for tool in tools)
    for number, function in enumerate(functions):
        _check(function, f"tools[{number}].function", [other.name for other in functions[:number]])
    name = choice.function.name if isinstance(choice, NamedChoice) else None
    if name is not None and name not in {function.name for function in functions}:
        raise BadRequest(f"'tool_choice' names '{name}', which no tool is called.", param="tool_choice")
    if choice == "none":
        return None
    return Tools(functions, choice == "required" or name is not None, name, parallel is not False and name is None)


def read_tools(given: Sequence[Any]) -> list[Tool]:
    """Tools from a program's own dictionaries. Raises BadRequest."""
    try:
        return msgspec.convert(given, ToolList)
    except msgspec.ValidationError as error:
        raise BadRequest(f"These tools cannot be used: {error}.", param="tools") from None


def read_choice(given: Any) -> ToolChoice | None:
    """A choice from a program's own text or dictionary. Raises BadRequest."""
    try:
        choice: ToolChoice | None = msgspec.convert(given, ToolChoice | None)
    except msgspec.ValidationError as error:
        raise BadRequest(f"This tool_choice cannot be used: {error}.", param="tool_choice") from None
    return choice


def _check(function: Function, where: str, before: Sequence[str]) -> None:
    if function.name in before:
        raise BadRequest(f"Two tools have the name '{function.name}'.", param=f"{where}.name")
    schema = function.parameters
    if schema is None:
        return
    where += ".parameters"
    if schema.get("type", "object") != "object":
        raise BadRequest("The parameters of a function are a schema of type 'object'.", param=f"{where}.type")
    if too_deep(schema):
        raise BadRequest(f"The parameters are nested more than {MAX_DEPTH} deep.", param=where)
    try:
        size = len(msgspec.json.encode(schema))
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"The parameters cannot be written as JSON: {error}.", param=where) from None
    if size > MAX_SCHEMA_BYTES:
        raise BadRequest(f"The parameters have {size:,} bytes; the most is {MAX_SCHEMA_BYTES:,}.", param=where)


def too_deep(value: Any) -> bool:
    """Whether objects and arrays lie in each other more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


# --- calls ------------------------------------------------------------------------------------------------------------


class ToolCall(NamedTuple):
    """A call, the `number`th of its answer, or a piece of one: `id` and `name` come with the first piece, and are empty
    in the others; the pieces of `arguments`, JSON text as the model wrote it, add up.
    """

    number: int
    id: str
    name: str
    arguments: str


def whole_calls(pieces: Iterable[ToolCall]) -> list[ToolCall]:
    """Calls from their pieces, in order."""
    calls: list[ToolCall] = []
    for piece in pieces:
        if piece.number == len(calls):
            calls.append(piece)
        else:
            call = calls[piece.number]
            calls[piece.number] = call._replace(arguments=call.arguments + piece.arguments)
    return calls
