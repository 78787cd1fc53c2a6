"""Chat templates: the template section of an image, and rendering in a process of its own that can be killed.

A template is a program from outside. It runs in Jinja's immutable sandbox, in a worker process (`python -m
vai.text.template`) with a ceiling on memory, output and time, so that a hostile one costs its own requests a deadline
and nobody else anything. The worker speaks over its pipes: a 4-byte little-endian length, then JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import msgspec
from jinja2 import Template as Source
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vai.errors import BadRequest, MalformedFile, Unavailable
from vai.rom.image import canonical_json
from vai.text.fields import TokenizerFields, read

DEADLINE = 5.0  # seconds for one rendering; real ones take milliseconds
MAX_OUTPUT = 16 << 20  # characters
MAX_MESSAGE = 64 << 20  # bytes on the pipe
WORKER_MEMORY = 1 << 30  # bytes of address space
_LENGTH = struct.Struct("<I")

# For images without a template: each message as "role: content" on a line of its own, and then the turn to write.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ChatFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The template section: the Jinja source, and the ids of the tokens that begin and end what."""

    chat_template: str | None
    bos: int | None
    eos: int | None
    add_bos: bool
    eog: list[int]
    bos_token: str
    eos_token: str


def template_section(fields: Mapping[str, object] | TokenizerFields) -> bytes:
    """The template section (canonical JSON) of a GGUF file's `tokenizer.*` fields, read already or not.

    Raises MalformedFile and UnsupportedModel as the tokenizer section does.
    """
    checked = fields if isinstance(fields, TokenizerFields) else read(fields)
    chat = ChatFields(
        chat_template=checked.chat_template,
        bos=checked.bos,
        eos=checked.eos,
        add_bos=checked.add_bos,
        eog=checked.eog,
        bos_token="" if checked.bos is None else checked.tokens[checked.bos],
        eos_token="" if checked.eos is None else checked.tokens[checked.eos],
    )
    return canonical_json(msgspec.to_builtins(chat))


def chat_fields(section: bytes) -> ChatFields:
    """A template section, checked. Raises MalformedFile."""
    try:
        return msgspec.json.decode(section, type=ChatFields)
    except msgspec.MsgspecError as error:
        raise MalformedFile(f"The image's template section is not usable ({error}); burn the model again.") from None


class Template:
    """A chat template and the worker that renders it: started by the first rendering, kept for the next ones.

    Calls from several threads take turns. `close` ends the worker; a later rendering starts a new one.
    """

    def __init__(self, source: str | None, *, deadline: float = DEADLINE) -> None:
        self.source = PLAIN_CHAT if source is None else source
        self._deadline = deadline
        self._worker: _Worker | None = None
        self._turn = threading.Lock()

    def render(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """The prompt for `messages`. `variables` are the template's others (bos_token, tools ...).

        Raises BadRequest with the template's own words where it refuses the conversation or fails, and where it ran
        past the time, memory or output it may use.
        """
        request = {"source": self.source, "deadline": self._deadline, "variables": {**variables, "messages": messages}}
        try:
            message = json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise BadRequest(f"The messages cannot be written as JSON text: {error}.", param="messages") from None
        if len(message) > MAX_MESSAGE:
            raise BadRequest(
                f"The conversation has {len(message):,} bytes; the most is {MAX_MESSAGE:,}.", param="messages"
            )
        with self._turn:
            answer = self._ask(message)
        if "text" in answer:
            return str(answer["text"])
        raise BadRequest(f"The model's chat template failed: {answer.get('error')}.", param="messages")

    def close(self) -> None:
        """End the worker, if there is one."""
        with self._turn:
            self._end_worker()

    def _ask(self, message: bytes) -> dict[str, Any]:
        """One question to the worker, which is killed at the deadline; the pipe then ends, whatever it was doing."""
        worker = self._worker = self._worker or _Worker()
        try:
            reply = worker.ask(message, self._deadline)
            answer = None if reply is None else json.loads(reply)
        except (OSError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            self._end_worker()
            return {"error": f"it ran longer than {self._deadline:g} seconds, or used too much memory"}
        return answer

    def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()


class _Worker:
    """The process at the other end of a socket pair, its imports done: a slow start is not a slow template."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-m", "vai.text.template"]
            try:
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
            except OSError as error:
                ours.close()
                raise Unavailable(f"The process that renders chat templates does not start: {error}.") from None
        self._socket = ours
        self._answers = ours.makefile("rb")
        if _read_message(self._answers) is None:
            self.end()
            raise Unavailable("The process that renders chat templates ended at its start; see the log above.")

    def ask(self, message: bytes, deadline: float) -> bytes | None:
        """The answer, or None where it did not come in time: the process is killed then, which ends the socket."""
        watchdog = threading.Timer(deadline, self._process.kill)
        watchdog.start()
        try:
            self._socket.sendall(_LENGTH.pack(len(message)) + message)
            return _read_message(self._answers)
        finally:
            watchdog.cancel()

    def end(self) -> None:
        self._process.kill()
        self._answers.close()
        self._socket.close()
        self._process.wait()


def _read_message(pipe: BinaryIO) -> bytes | None:
    """One message, or None where the pipe ended."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE:
        return None
    body = pipe.read(length)
    return body if len(body) == length else None


# From here on: what runs inside the worker.


class _Generation(Extension):
    """`{% generation %}`: marks assistant text for training masks; when serving, its body is all it means."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads a class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Arguments(dict[str, Any]):
    """Arguments of a call: an object for templates that write it as JSON, a text for those that join it to others."""

    def __str__(self) -> str:
        return _to_json(self)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def _with_arguments(messages: list[dict[str, Any]]) -> None:
    """Make the arguments of all calls what either kind of template takes."""
    for message in messages:
        for call in message.get("tool_calls") or () if isinstance(message, dict) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                function["arguments"] = _Arguments(function["arguments"])


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face's chat templates expect it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, _Generation],
        autoescape=False,  # prompts are not HTML
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _render(compiled: Callable[[str], Source], source: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """{"text": ...} or {"error": a sentence}. Whatever a template raises is its own affair, so all of it is caught."""
    pieces: list[str] = []
    size = 0
    try:
        _with_arguments(variables["messages"])
        for piece in compiled(source).generate(variables):
            size += len(piece)
            if size > MAX_OUTPUT:
                return {"error": f"it writes more than {MAX_OUTPUT:,} characters"}
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()
    except MemoryError:
        return {"error": "it uses too much memory"}
    except Exception as error:
        return {"error": f"{error}"[:2000] or type(error).__name__}
    return {"text": text}


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the pipe ends. An alarm ends this process past the deadline, also where nobody waits any more."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled = lru_cache(maxsize=2)(_environment().from_string)
    _write_message(answers, b"{}")
    while (message := _read_message(requests)) is not None:
        request = json.loads(message)
        signal.setitimer(signal.ITIMER_REAL, request["deadline"])
        answer = _render(compiled, request["source"], request["variables"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write_message(answers, json.dumps(answer, ensure_ascii=False).encode())


def _write_message(pipe: BinaryIO, body: bytes) -> None:
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
