"""`vai run`: answer one prompt, or chat. With the running engine, or with one in this process over the same memory."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from vai import config
from vai.cli import shipped
from vai.cli.load import load_again
from vai.config import Config
from vai.daemon import roles
from vai.errors import ModelNotFound, VaiError
from vai.rom.registry import Registry, is_name

if TYPE_CHECKING:
    from vai.llm import Delta, GrammarSpec, Model

Conversation = list[dict[str, str]]
Answer = Callable[[Conversation], Iterator[str]]


@click.command()
@click.argument("name", required=False)
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), help="End the answer after so many tokens.")
@click.option("--temperature", type=click.FloatRange(0, 100), help="0 always takes the likeliest token.")
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help="Repeats an answer that was drawn with it.")
@click.option("--json-schema", type=click.File(), help="Answer in JSON that satisfies the schema in this file.")
@click.option("--system", help="What the model is told before the conversation.")
def run(
    name: str | None, prompt: str | None, system: str | None, json_schema: TextIO | None, **sampling: float | None
) -> None:
    """Answer PROMPT with the model NAME; without PROMPT, chat (or answer what comes on standard input).

    The running engine answers; if none runs, an engine inside this command does, over the same weights in memory.
    In a chat, Ctrl-C ends an answer and Ctrl-D the chat. Without NAME, the small model that this installation brings
    answers, if it brings one; a lone argument that cannot be a name is a prompt.

    \b
    Examples:
      vai run qwen "Why is the sky blue?"
      vai run qwen --temperature 0 --max-tokens 64 < question.txt
      vai run qwen --json-schema person.schema.json "Invent a person."
      vai run qwen
    """
    settings = config.load()
    name, prompt = meant(name, prompt)
    make_resident(settings, name)
    opening: Conversation = [] if system is None else [{"role": "system", "content": system}]
    schema = None if json_schema is None else json_schema.read()
    with _answerer(settings, name, sampling, schema) as answer:
        if prompt is None and sys.stdin.isatty():
            _chat(answer, opening)
        else:
            text = sys.stdin.read() if prompt is None else prompt
            _print(answer([*opening, {"role": "user", "content": text}]))


def meant(name: str | None, prompt: str | None, folder: Path = shipped.FOLDER) -> tuple[str, str | None]:
    """(model, prompt) that two arguments stand for. Raises click.UsageError where no model is named or shipped."""
    alone = name is not None and prompt is None and not is_name(name)
    if name is not None and not (alone and shipped.pair(folder)):
        return name, prompt
    if not shipped.pair(folder):
        raise click.UsageError("Missing argument 'NAME'.")
    return shipped.NAMES[0], name


def make_resident(settings: Config, name: str, folder: Path = shipped.FOLDER) -> None:
    """Burn the model unless it is in memory. Raises ModelNotFound, BadRequest where its file is gone."""
    registry = Registry(settings.root, settings.names)
    try:
        resident = registry.is_resident(registry.find(name))
    except ModelNotFound:
        resident = False
    if not resident:
        load_again(settings, name, folder)


def _chat(answer: Answer, conversation: Conversation) -> None:
    """Turns until the end of input. An interrupted answer stays in the conversation as far as it came."""
    click.echo("Ctrl-D ends the chat, Ctrl-C an answer.", err=True)
    while True:
        try:
            text = input(">>> ")
        except EOFError:
            click.echo()
            return
        if not text.strip():
            continue
        conversation.append({"role": "user", "content": text})
        try:
            said = _print(answer(conversation), ends=False)
        except VaiError as error:  # too long a conversation, an engine that is away: the chat can go on
            click.echo(f"vai: {error.message}", err=True)
            conversation.pop()
        else:
            conversation.append({"role": "assistant", "content": said})


def _print(pieces: Iterator[str], *, ends: bool = True) -> str:
    """Write an answer as it comes and return it. Ctrl-C ends it, and where it `ends` the command, that too."""
    whole = ""
    try:
        for piece in pieces:
            whole += piece
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        if ends:
            raise
    click.echo()
    return whole


@contextlib.contextmanager
def _answerer(settings: Config, name: str, sampling: dict[str, Any], schema: str | None) -> Iterator[Answer]:
    """A function from a conversation to the pieces of its answer, which satisfies `schema` if there is one."""
    from vai.llm import LLM, GrammarSpec

    grammar = None if schema is None else GrammarSpec("json_schema", schema)
    if roles.holder(settings.root, "engine") is None:
        click.echo("vai: no engine is running; this command runs its own over the same memory.", err=True)
        with LLM(name) as own:
            yield lambda talk: (delta.text for delta in own.stream(talk, own.sampling(**sampling), grammar=grammar))
        return
    with asyncio.Runner() as runner, contextlib.ExitStack() as undo:
        model = _open(settings, name, runner, undo)
        yield lambda talk: (delta.text for delta in _deltas(runner, model, talk, sampling, grammar))


def _open(settings: Config, name: str, runner: asyncio.Runner, undo: contextlib.ExitStack) -> Model:
    """The model over the running engine. `undo` closes what was opened for it."""
    from vai.llm import Frontend, connect

    port = connect(roles.socket_path(settings.root, "engine"), patience=settings.patience)
    undo.callback(lambda: runner.run(port.close()))
    frontend = Frontend(settings.root, settings.names, port)
    undo.callback(lambda: runner.run(frontend.close()))
    return runner.run(frontend.open(name))


def _deltas(
    runner: asyncio.Runner,
    model: Model,
    conversation: Conversation,
    sampling: dict[str, Any],
    grammar: GrammarSpec | None,
) -> Iterator[Delta]:
    """The answer's deltas, one loop turn at a time; whatever ends the iteration aborts the request."""
    ids = runner.run(model.encode_chat(conversation))
    stream = model.stream(ids, model.sampling(**sampling), grammar=grammar)

    async def following() -> Delta | None:
        return await anext(stream, None)

    try:
        while (delta := runner.run(following())) is not None:
            yield delta
    finally:
        runner.run(stream.aclose())
