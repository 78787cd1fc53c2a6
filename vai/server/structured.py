"""What an answer must look like, in the words of three APIs: OpenAI's, vLLM's (new and old), llama.cpp's.

All of them end in one GrammarSpec, and a request says it in one way only.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from vai.errors import BadRequest, NotSupported
from vai.llm import GrammarSpec

Text = Annotated[str, Meta(min_length=1)]  # how long it may be, text/grammar.py says for all of them
Choices = Annotated[list[Text], Meta(min_length=1)]
Schema = msgspec.Raw | UnsetType  # an object, or a text that holds one


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's wrapping of a schema. Whether `strict` or not, the answer satisfies it."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    description: Annotated[str, Meta(max_length=1 << 16)] | None = None
    schema: Schema = UNSET
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    type: Annotated[str, Meta(max_length=64)]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """vLLM's. One of them."""

    json: Schema = UNSET
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class Constrained(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of a request that constrain its answer. One of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = UNSET
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    json_schema: Schema = UNSET  # llama.cpp's, as the next
    grammar: Text | None = None


def grammar_of(asked: Constrained) -> GrammarSpec | None:
    """What the answer must match; None for anything. Raises BadRequest where two fields say it, NotSupported."""
    new = asked.structured_outputs or StructuredOutputs()
    fields: list[tuple[str, GrammarSpec | None]] = [
        ("response_format", _formatted(asked.response_format)),
        ("structured_outputs.json", _schema(new.json, "structured_outputs.json")),
        ("structured_outputs.regex", _spec("regex", new.regex)),
        ("structured_outputs.choice", _choice(new.choice)),
        ("structured_outputs.grammar", _spec("ebnf", new.grammar)),
        ("structured_outputs.json_object", GrammarSpec("json_object") if new.json_object else None),
        ("guided_json", _schema(asked.guided_json, "guided_json")),
        ("guided_regex", _spec("regex", asked.guided_regex)),
        ("guided_choice", _choice(asked.guided_choice)),
        ("guided_grammar", _spec("ebnf", asked.guided_grammar)),
        ("json_schema", _schema(asked.json_schema, "json_schema")),
        ("grammar", _spec("ebnf", asked.grammar)),
    ]
    given = [(name, spec) for name, spec in fields if spec is not None]
    if len(given) > 1:
        names = "' and '".join(name for name, _ in given)
        raise BadRequest(f"'{names}' say each what the answer must look like; send one.", param=given[1][0])
    return given[0][1] if given else None


def _formatted(given: ResponseFormat | None) -> GrammarSpec | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return GrammarSpec("json_object")
    if given.type != "json_schema":
        raise NotSupported(f"A 'response_format' of type '{given.type}' is not supported.", param="response_format")
    name = "response_format.json_schema"
    if given.json_schema is None:
        raise BadRequest(f"The field '{name}' is required with this type.", param=name)
    spec = _schema(given.json_schema.schema, f"{name}.schema")
    if spec is None:
        raise BadRequest(f"The field '{name}.schema' is required.", param=f"{name}.schema")
    return spec


def _spec(kind: Literal["regex", "ebnf"], value: str | None) -> GrammarSpec | None:
    return None if value is None else GrammarSpec(kind, value)


def _choice(choices: list[str] | None) -> GrammarSpec | None:
    return None if choices is None else GrammarSpec("choice", msgspec.json.encode(choices).decode())


def _schema(given: Schema, name: str) -> GrammarSpec | None:
    """A schema as it stands in the body, or as the text that a client put there."""
    if isinstance(given, UnsetType):
        return None
    text = bytes(given).decode()
    if text == "null":
        return None
    if text.startswith('"'):
        text = msgspec.json.decode(text, type=str)
    if not text.lstrip().startswith("{"):
        raise BadRequest(f"'{name}' must be a JSON schema, which is an object.", param=name)
    return GrammarSpec("json_schema", text)
