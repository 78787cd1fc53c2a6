"""An answer taken apart as it comes: reasoning, words for the user, and tool calls.

A parser never raises and never loses text: markup that turns out to be no call is content again. What may yet be a
marker is held back. However the text is cut, the events are the same. Arguments are passed on as the model wrote them.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

from vai.text.tools import Function

MAX_KEY_CHARACTERS = 1024  # of a key, a name or an id in a call; what is longer is no call
SPACES = " \t\r\n"
NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_.-")
_JSON_CHARACTERS = frozenset(string.ascii_letters + string.digits + "+-.,:" + SPACES)  # beside brackets and quotes
Step = Generator[None, None, None]
Waiting = Generator[None, None, bool]
Reading = Generator[None, None, str]
Sink = Callable[[str], None]


class Content(NamedTuple):
    """Words for the user."""

    text: str


class Reasoning(NamedTuple):
    """What the model says to itself."""

    text: str


class Call(NamedTuple):
    """A call begins, the `number`th of this answer, from 0."""

    number: int
    name: str


class Arguments(NamedTuple):
    """More of the JSON text of a call's arguments."""

    number: int
    text: str


Event = Content | Reasoning | Call | Arguments


class Malformed(Exception):
    """The text at hand is no call."""


class _Trimmed:
    """Text without the spaces around it: those at its end are held back until more comes."""

    def __init__(self, emit: Sink) -> None:
        self._emit = emit
        self._held = ""
        self.begun = True  # False: spaces that come next are dropped

    def add(self, text: str) -> None:
        text = self._held + text
        if not self.begun:
            text = text.lstrip(SPACES)
        kept = text.rstrip(SPACES)
        self._held = text[len(kept) :]
        if kept:
            self.begun = True
            self._emit(kept)

    def cut(self) -> None:
        """Something else comes here: drop the spaces before and after it."""
        self._held = ""
        self.begun = False

    def finish(self) -> None:
        text, self._held = self._held, ""
        if text:
            self._emit(text)


class Parser:
    """One answer of a model without tool calls. `feed` its text in any pieces, then `finish` once.

    thinks: an answer may begin with `<think>`; thinking: it began before the answer did, in the prompt.

    A family's class says how it writes calls: `opening`, then each call from `head` (which names the function NAME)
    to `tail`, with the arguments as JSON between, calls apart by `between`, then `closing`. `markers` are the texts
    that may be control tokens of its vocabulary. `parallel`: whether it writes several calls at once.
    """

    name: ClassVar[str] = "none"
    markers: ClassVar[tuple[str, ...]] = ()
    opening: ClassVar[str] = ""
    head: ClassVar[str] = ""
    tail: ClassVar[str] = ""
    between: ClassVar[str] = ""
    closing: ClassVar[str] = ""
    parallel: ClassVar[bool] = True

    def __init__(self, functions: Sequence[Function] = (), *, thinks: bool = False, thinking: bool = False) -> None:
        self._functions = {function.name: function for function in functions}
        self._thinks, self._thinking = thinks, thinking
        self._text, self._at, self._ended = "", 0, False
        self._raw: list[str] = []  # what was read since the last event, for the case that it is no call
        self._events: list[Event] = []
        self._content = _Trimmed(lambda text: self._events.append(Content(text)))
        self._reasoning = _Trimmed(lambda text: self._events.append(Reasoning(text)))
        self._called = False  # the call being read was told
        self.calls = 0
        self._run = self._read()
        next(self._run)

    def feed(self, text: str) -> list[Event]:
        """What is certain after this piece of text."""
        self._text = self._text[self._at :] + text
        self._at = 0
        return self._advance()

    def finish(self) -> list[Event]:
        """What was held back, at the end of the answer."""
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        with suppress(StopIteration):
            next(self._run)
        events, self._events = self._events, []
        return _joined(events)

    def _read(self) -> Step:
        yield
        if self._thinks or self._thinking:
            yield from self._think()
        yield from self._answer()
        yield from self._pass()
        self._content.finish()

    def _answer(self) -> Step:
        """Read up to where nothing but content can come. Families override it."""
        yield from ()

    def _think(self) -> Step:
        if not self._thinking:
            yield from self._spaces()
            if not (yield from self._take("<think>")):
                self._give_up()
                return
        self._raw.clear()
        self._reasoning.begun = False
        yield from self._until("</think>", self._reasoning.add)
        self._content.begun = False

    # -- reading: everything waits for text by yielding, and ends where the answer does ------------------------------

    def _more(self) -> Waiting:
        """Whether a character can be read."""
        while self._at == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def _peek(self) -> Reading:
        """The next character, "" at the end."""
        return self._text[self._at] if (yield from self._more()) else ""

    def _skip(self, count: int) -> str:
        text = self._text[self._at : self._at + count]
        self._at += count
        self._raw.append(text)
        return text

    def _starts(self, text: str) -> Waiting:
        """Whether `text` comes next."""
        while not self._text.startswith(text, self._at):
            if self._ended or not text.startswith(self._text[self._at :]):
                return False
            yield
        return True

    def _take(self, text: str) -> Waiting:
        """Read `text` if it comes next."""
        found = yield from self._starts(text)
        if found:
            self._skip(len(text))
        return found

    def _expect(self, *texts: str) -> Reading:
        """Read the one of these texts that comes next."""
        for text in texts:
            if (yield from self._take(text)):
                return text
        rest = self._text[self._at :]
        if self._ended and any(text.startswith(rest) for text in texts):
            self._skip(len(rest))
        raise Malformed

    def _spaces(self) -> Step:
        while (yield from self._more()) and self._text[self._at] in SPACES:
            self._skip(1)

    def _until(self, marker: str, sink: Sink) -> Waiting:
        """Hand the text before `marker` to `sink` and read the marker; False where the answer ends without one."""
        while True:
            place = self._text.find(marker, self._at)
            if place >= 0:
                before, self._at = self._text[self._at : place], place + len(marker)
                if before:
                    sink(before)
                return True
            held = 0 if self._ended else _overlap(self._text, self._at, marker)
            before, self._at = self._text[self._at : len(self._text) - held], len(self._text) - held
            if before:
                sink(before)
            if self._ended:
                return False
            yield

    def _word(self, characters: frozenset[str]) -> Reading:
        """A word of these characters, not empty."""
        word = ""
        while (yield from self._more()) and self._text[self._at] in characters:
            word += self._skip(1)
            if len(word) > MAX_KEY_CHARACTERS:
                raise Malformed
        if not word:
            raise Malformed
        return word

    def _string(self) -> Reading:
        """The value of a short JSON string."""
        pieces: list[str] = []
        if (yield from self._peek()) != '"':
            raise Malformed
        yield from self._value(pieces.append, MAX_KEY_CHARACTERS)
        return str(_decoded("".join(pieces)))

    def _value(self, sink: Sink, limit: int | None = None) -> Step:
        """One JSON value, as its brackets and quotes tell, in pieces to `sink`."""
        depth, quoted, escaped, length = 0, False, False, 0  # length: read before the text at hand
        if (yield from self._peek()) not in ("{", "[", '"'):
            sink((yield from self._word(NAME_CHARACTERS | {"+"})))
            return
        while (yield from self._more()):
            for place in range(self._at, len(self._text)):
                character = self._text[place]
                if limit is not None and length + place - self._at > limit:
                    sink(self._skip(place - self._at))
                    raise Malformed
                if escaped:
                    escaped = False
                elif quoted:
                    escaped = character == "\\"
                    quoted = character != '"'
                elif character == '"':
                    quoted = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                elif character not in _JSON_CHARACTERS:
                    if place > self._at:
                        sink(self._skip(place - self._at))
                    raise Malformed
                if not depth and not quoted:
                    sink(self._skip(place + 1 - self._at))
                    return
            piece = self._skip(len(self._text) - self._at)
            length += len(piece)
            sink(piece)
        raise Malformed

    # -- telling -----------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        """What was read since the last event is content."""
        self._content.add("".join(self._raw))
        self._raw.clear()

    def _begin(self, name: str) -> None:
        self._called = True
        self._content.cut()
        self._events.append(Call(self.calls, name))
        self.calls += 1
        self._raw.clear()

    def _argue(self, text: str) -> None:
        self._events.append(Arguments(self.calls - 1, text))
        self._raw.clear()

    def _pass(self) -> Step:
        """The rest is content."""
        while (yield from self._more()):
            self._content.add(self._skip(len(self._text) - self._at))
            self._raw.clear()

    def _marked(self, marker: str, read: Callable[[], Step]) -> Step:
        """Content up to each marker, and calls by `read` behind it."""
        while (yield from self._until(marker, self._content.add)):
            self._raw = [marker]
            yield from self._try(read)

    def _try(self, read: Callable[[], Step]) -> Waiting:
        """Whether `read` found what it was to read. If not, what it read beyond a told call is content again, unless
        the answer was cut short within that call.
        """
        self._called = False
        try:
            yield from read()
        except Malformed:
            if not (self._called and self._cut_short):
                self._give_up()
            self._raw.clear()
            return False
        self._raw.clear()
        return True

    @property
    def _cut_short(self) -> bool:
        """Whether the answer ended where it was to go on."""
        return self._ended and self._at == len(self._text)

    # -- calls as JSON -----------------------------------------------------------------------------------------------

    def _object(self, *, known: bool = False) -> Step:
        """{"name": ..., "arguments": {...}}, the keys in any order. known: functions on offer only, no other keys."""
        self._called = False
        name, held = "", ""
        yield from self._expect("{")
        while True:
            yield from self._spaces()
            key = yield from self._string()
            yield from self._spaces()
            yield from self._expect(":")
            yield from self._spaces()
            if key == "name" and not name:
                name = yield from self._string()
                if not name or (known and name not in self._functions):
                    raise Malformed
                if held:
                    self._begin(name)
                    self._argue(held)
            elif key in ("arguments", "parameters") and not held and not self._called:
                if name and (yield from self._peek()) == "{":
                    self._begin(name)
                    yield from self._value(self._argue)
                else:
                    held = yield from self._arguments()
                    if name:
                        self._begin(name)
                        self._argue(held)
            elif known and key not in ("type", "id"):
                raise Malformed
            else:
                yield from self._value(_forget)
            yield from self._spaces()
            if not (yield from self._take(",")):
                break
        yield from self._expect("}")
        if not name:
            raise Malformed
        if not self._called:
            self._begin(name)
            self._argue("{}")

    def _arguments(self) -> Reading:
        """An object; also one written as a JSON string, and null for none."""
        first = yield from self._peek()
        pieces: list[str] = []
        yield from self._value(pieces.append)
        text = "".join(pieces)
        if first == "{":
            return text
        value = _decoded(text)
        if value is None or value == "":
            return "{}"
        if not isinstance(value, str):
            raise Malformed
        return value


def _decoded(text: str) -> Any:
    """The value of a JSON text; a string in it may be no text, but half of a surrogate pair."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            value.encode()
    except (ValueError, RecursionError):
        raise Malformed from None
    return value


def _forget(text: str) -> None:
    """A sink for values that nobody asked for."""


def _overlap(text: str, start: int, marker: str) -> int:
    """Length of the longest end of text[start:] that begins `marker`."""
    for length in range(min(len(text) - start, len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _joined(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind as one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Arguments) and isinstance(last, Arguments) and last.number == event.number:
            joined[-1] = Arguments(event.number, last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        else:
            joined.append(event)
    return joined
