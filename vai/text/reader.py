"""An answer from token ids to what its reader sees: words, reasoning and tool calls, in pieces as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vai.text.chat import Reading
from vai.text.detokenizer import Detokenizer, TokenBytes
from vai.text.parsers import Arguments, Call, Content, Event
from vai.text.tools import ToolCall


class Piece(NamedTuple):
    """What is new in an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Piece:
        """Several, one after the other, as one."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(
            "".join(piece.text for piece in pieces),
            "".join(piece.reasoning for piece in pieces),
            tuple(call for piece in pieces for call in piece.calls),
        )


class Reader:
    """One answer: feed its ids in order. After a stop string nothing more comes, and `stopped` is that string."""

    def __init__(self, tokenizer: TokenBytes, stops: Sequence[str] = (), reading: Reading | None = None) -> None:
        self._reading = reading or Reading()
        self._detokenizer = Detokenizer(tokenizer, stops, shown=self._reading.shown)
        self._parser = self._reading.parser()

    @property
    def stopped(self) -> str | None:
        return self._detokenizer.stopped

    @property
    def called(self) -> bool:
        """Whether there is a call in the answer so far."""
        return self._parser is not None and self._parser.calls > 0

    def feed(self, tokens: Sequence[int], *, last: bool = False) -> Piece:
        """What these tokens bring; with `last`, or where a stop string is found, also what was held back."""
        text = self._detokenizer.feed(tokens)
        if last:
            text += self._detokenizer.finish()
        if self._parser is None:
            return Piece(text)
        events = self._parser.feed(text)
        if last or self.stopped is not None:
            events += self._parser.finish()
        return self._piece(events)

    def _piece(self, events: Iterable[Event]) -> Piece:
        text, reasoning = "", ""
        calls: list[ToolCall] = []
        for event in events:
            if isinstance(event, Content):
                text += event.text
            elif isinstance(event, Call):
                calls.append(ToolCall(event.number, self._reading.call_id(), event.name, ""))
            elif isinstance(event, Arguments) and calls and calls[-1].number == event.number:
                calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + event.text)
            elif isinstance(event, Arguments):
                calls.append(ToolCall(event.number, "", "", event.text))
            else:
                reasoning += event.text
        return Piece(text, reasoning, tuple(calls))
