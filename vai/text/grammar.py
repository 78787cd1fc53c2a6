"""Grammars: what an answer may look like, and so which tokens may come next.

llguidance does the work, in processes of its own (grammar_process.py): a fork server for each tokenizer, and for each
grammar a fork of it that compiles the grammar and then computes the masks of every answer under it. So a grammar, which
is a program from outside, has ceilings on time and memory, may even crash, and costs nobody else anything; and what the
library does under the interpreter lock is done under another process's. Grammars that are asked for again are found
compiled.

The wire, over a socket pair for each grammar: its kind and text as a 4-byte little-endian length and JSON, answered
once; then ASK for ANSWER, in order. DROP has no answer.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import msgspec

from vai.errors import BadRequest, NotSupported, Overloaded, Unavailable

MAX_TEXT = 1 << 19  # bytes of one grammar
MAX_DEPTH = 64  # of a JSON schema
MAX_CHOICES = 4096  # of kind "choice"
MAX_RUNNING = 64  # grammars of one tokenizer that answers are under, at once
MAX_WAITING = 64  # answers that wait for their grammars
KEPT = 8  # grammars of one tokenizer that no answer is under, for the next that is

COMPILE_SECONDS = 2.0  # of processor time
MASK_SECONDS = 0.5
PATIENCE = 5.0  # times either of them, in seconds that pass: the processors may be busy
MEMORY = 512 << 20  # bytes of address space beyond what the fork server has
START_SECONDS = 60.0

LENGTH = struct.Struct("<I")
ASK = struct.Struct("<BII")  # NEW, ACCEPT or DROP; which matcher; a token
NEW, ACCEPT, DROP = 0, 1, 2
ANSWER = struct.Struct("<BI")  # MASK, FINISHED or FAILED; bytes that follow: a mask, none, a sentence
MASK, FINISHED, FAILED = 0, 1, 2

Kind = Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural"]


class GrammarSpec(msgspec.Struct, frozen=True):
    """What an answer must match, from its first token to its last.

    `value` by kind: json_schema: a schema as JSON text · json_object: nothing · regex: in the syntax of Rust's `regex`,
    matching the whole answer · ebnf: Lark as llguidance reads it (from `start`), or GBNF (`root ::= ...`) · choice: a
    JSON list of the texts to choose from · structural: Lark written by VAI itself.
    """

    kind: Kind
    value: str = ""


def check(spec: GrammarSpec) -> None:
    """Raise BadRequest for what is no grammar of its kind, or larger than any that is compiled."""
    try:
        size = len(spec.value.encode())
    except UnicodeEncodeError:
        raise BadRequest("The grammar has half of a surrogate pair in it, which is no character; send UTF-8.") from None
    if size > MAX_TEXT:
        raise BadRequest(f"The grammar has {size:,} bytes; the most is {MAX_TEXT:,}.")
    if spec.kind == "json_schema":
        check_schema(spec.value)
    elif spec.kind == "choice":
        _check_choices(spec.value)
    elif spec.kind in ("regex", "ebnf") and not spec.value:
        raise BadRequest("The grammar is empty, so there is nothing to answer.")


def check_schema(text: str) -> None:
    """Raise BadRequest for a text that is no JSON schema, or one nested deeper than MAX_DEPTH; NotSupported for one
    with llguidance's own settings in it. What the library cannot do, it says itself when it compiles.
    """
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The JSON schema is not valid JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise BadRequest("A JSON schema must be a JSON object.")
    if "x-guidance" in schema:
        raise NotSupported("'x-guidance' in a JSON schema is not supported; leave it out.")
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
        if not level:
            return
    raise BadRequest(f"The JSON schema is nested deeper than {MAX_DEPTH} levels.")


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _check_choices(text: str) -> None:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The choices must be a list of texts: {error}.") from None
    if not 0 < len(choices) <= MAX_CHOICES:
        raise BadRequest(f"An answer is chosen from 1 to {MAX_CHOICES} texts, not from {len(choices)}.")
    if not all(choices):
        raise BadRequest("An empty text cannot be chosen: an answer has at least one token.")


class Matcher:
    """One answer under a grammar. `bits` is the mask of its next token: bit i % 8 of byte i // 8 is set where token i
    may come, over the model's whole vocabulary. `finished`: nothing can come any more, and `bits` is empty.

    One thread at a time.
    """

    def __init__(self, grammar: _Grammar, number: int, size: int, let_go: Callable[[_Grammar], None]) -> None:
        self.bits = b""
        self.finished = False
        self._grammar = grammar
        self._number = number
        self._size = size
        self._let_go: Callable[[_Grammar], None] | None = let_go
        self._take(NEW, 0)

    def accept(self, token: int) -> None:
        """Go on behind `token`. Raises BadRequest where the grammar does not allow it, or got too expensive."""
        self._take(ACCEPT, token)

    def close(self) -> None:
        """The answer is over."""
        let_go, self._let_go = self._let_go, None
        if let_go is not None:
            self._grammar.drop(self._number)
            let_go(self._grammar)

    def _take(self, what: int, token: int) -> None:
        kind, body = self._grammar.ask(what, self._number, token)
        if kind == FAILED:
            raise BadRequest(f"The answer cannot go on under its grammar: {_sentence(body)}.")
        self.finished = kind == FINISHED
        self.bits = b"" if self.finished else body[: self._size].ljust(self._size, b"\0")


class Grammars:
    """All grammars over one tokenizer. Any thread may call; compiling and masks take as long as they take.

    Nothing is started before the first grammar. `close` ends the processes; a later grammar starts them again.
    """

    def __init__(self, sections: Callable[[], tuple[bytes, bytes]]) -> None:
        """`sections`: reads the tokenizer and template sections of an image with this tokenizer."""
        self._sections = sections
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._waiting = 0
        self._server: _ForkServer | None = None
        self._grammars: OrderedDict[GrammarSpec, _Grammar] = OrderedDict()  # least recently used first

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a `matcher` that another thread makes. Raises Overloaded where too many wait."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} answers wait for their grammars already; try again soon.")
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def matcher(self, spec: GrammarSpec, vocabulary: int) -> Matcher:
        """A new answer under `spec`, for a model of `vocabulary` tokens (which may be more than the tokenizer has).

        Raises BadRequest naming what is wrong with the grammar, or that it takes more time or memory than it may;
        Overloaded where too many grammars are in use, Unavailable where no process can be started.
        """
        check(spec)
        grammar = self._use(spec)
        try:
            grammar.compile()
            return Matcher(grammar, grammar.next_number(), -(-vocabulary // 8), self._let_go)
        except BaseException:
            self._let_go(grammar)
            raise

    def close(self) -> None:
        """End every process."""
        with self._lock:
            grammars, self._grammars = self._grammars, OrderedDict()
            server, self._server = self._server, None
        for grammar in grammars.values():
            grammar.end()
        if server is not None:
            server.end()

    def _use(self, spec: GrammarSpec) -> _Grammar:
        with self._lock:
            grammar = self._grammars.get(spec)
            if grammar is None or grammar.ended:
                if sum(other.users > 0 for other in self._grammars.values()) >= MAX_RUNNING:
                    raise Overloaded(f"Answers under {MAX_RUNNING} grammars are being made already; try again soon.")
                grammar = self._grammars[spec] = _Grammar(spec, self._started)
            self._grammars.move_to_end(spec)
            grammar.users += 1
            return grammar

    def _let_go(self, grammar: _Grammar) -> None:
        with self._lock:
            grammar.users -= 1
            if grammar.ended and self._grammars.get(grammar.spec) is grammar:
                del self._grammars[grammar.spec]
            unused = [other for other in self._grammars.values() if not other.users]
            gone = unused[: max(0, len(unused) - KEPT)]
            for other in gone:
                del self._grammars[other.spec]
            if not grammar.users and self._grammars.get(grammar.spec) is not grammar:
                gone.append(grammar)
        for other in gone:
            other.end()

    def _started(self) -> _ForkServer:
        """The fork server, started by whoever needs it first, or again where it died."""
        with self._starting:
            if self._server is not None and not self._server.alive:
                self._server.end()
                self._server = None
            if self._server is None:
                self._server = _ForkServer(*self._sections())
            return self._server


class _Grammar:
    """A grammar and its process. `users`: answers under it. `ended`: its process is no more, and no answer goes on."""

    def __init__(self, spec: GrammarSpec, server: Callable[[], _ForkServer]) -> None:
        self.spec = spec
        self.users = 0
        self.ended = False
        self._server = server
        self._socket: socket.socket | None = None
        self._refusal = ""
        self._numbers = 0
        self._turn = threading.Lock()

    def compile(self) -> None:
        """Have it compiled, unless it is. Raises BadRequest."""
        with self._turn:
            if self._socket is None and not self.ended:
                self._compile()
            if self._refusal:
                raise BadRequest(self._refusal)

    def next_number(self) -> int:
        with self._turn:
            self._numbers += 1
            return self._numbers

    def ask(self, what: int, number: int, token: int) -> tuple[int, bytes]:
        """The answer to NEW or ACCEPT. Raises BadRequest where the process ended over it."""
        with self._turn:
            answer = self._exchange(ASK.pack(what, number, token))
        if answer is None:
            raise BadRequest(
                f"The answer cannot go on under its grammar: to find its next token takes more than {MASK_SECONDS:g} s "
                f"of processor time, or {MEMORY >> 20} MB."
            )
        return answer

    def drop(self, number: int) -> None:
        """The answer with this number is over."""
        with self._turn, suppress(OSError):
            if self._socket is not None:
                self._socket.sendall(ASK.pack(DROP, number, 0))

    def end(self) -> None:
        """Close the socket, which is the end of the process."""
        connection = self._socket
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # whoever waits for an answer has the turn
        with self._turn:
            self._close()

    def _compile(self) -> None:
        self._socket = self._server().fork()
        self._socket.settimeout(COMPILE_SECONDS * PATIENCE + 1)
        body = msgspec.json.encode(self.spec)
        answer = self._exchange(LENGTH.pack(len(body)) + body)
        if answer is None:
            self._refusal = (
                f"The grammar takes more than it may to compile: {COMPILE_SECONDS:g} s of processor time, "
                f"{MEMORY >> 20} MB, or too deep a nesting. Make it smaller."
            )
        elif answer[0] == FAILED:
            self._refusal = f"The grammar cannot be used: {_sentence(answer[1])}."
            self._close()
        else:
            self._socket.settimeout(MASK_SECONDS * PATIENCE + 1)

    def _exchange(self, message: bytes) -> tuple[int, bytes] | None:
        """The answer, or None where the process ended: it sets an alarm for everything it does."""
        if self._socket is None:
            return None
        try:
            self._socket.sendall(message)
            kind, length = ANSWER.unpack(receive(self._socket, ANSWER.size))
            return kind, receive(self._socket, length)
        except OSError:
            self._close()
            return None

    def _close(self) -> None:
        self.ended = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _ForkServer:
    """The process that has a tokenizer loaded, and whose forks are the processes of grammars."""

    def __init__(self, tokenizer: bytes, template: bytes) -> None:
        """From the sections of an image. Takes a second for 150,000 tokens. Raises Unavailable."""
        self._turn = threading.Lock()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-m", "vai.text.grammar_process"]
            try:
                self._process = subprocess.Popen(command, stdin=theirs.fileno())
            except OSError as error:
                ours.close()
                raise Unavailable(f"The process that compiles grammars does not start: {error}.") from None
        self._socket = ours
        ours.settimeout(START_SECONDS)
        try:
            for section in (tokenizer, template):
                ours.sendall(LENGTH.pack(len(section)) + section)
            receive(ours, 1)
        except OSError:
            self.end()
            raise Unavailable("The process that compiles grammars ended at its start; see the log above.") from None

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> socket.socket:
        """The socket of a new fork. Raises Unavailable."""
        ours, theirs = socket.socketpair()
        with theirs, self._turn:
            try:
                socket.send_fds(self._socket, [b"+"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise Unavailable(f"The process that compiles grammars ended ({error}); try again.") from None
        return ours

    def end(self) -> None:
        self._process.kill()
        self._socket.close()
        self._process.wait()


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes. Raises OSError where the other end is gone."""
    body = bytearray()
    while len(body) < count:
        piece = connection.recv(count - len(body))
        if not piece:
            raise ConnectionResetError("the process ended")
        body += piece
    return bytes(body)


def _sentence(text: bytes) -> str:
    return text.decode(errors="replace").strip().rstrip(".") or "it matches nothing"
