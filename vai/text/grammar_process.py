"""The fork server of grammar.py: `python -m vai.text.grammar_process`, and in its forks the grammars themselves.

It gets a tokenizer's sections over its standard input, a socket, and from then on a descriptor for each fork it is to
make. A fork has an alarm for everything it does and a ceiling on memory, so nobody has to watch it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
from typing import TYPE_CHECKING

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from vai.text.gbnf import to_lark
from vai.text.grammar import (
    ANSWER,
    ASK,
    COMPILE_SECONDS,
    DROP,
    FAILED,
    FINISHED,
    LENGTH,
    MASK,
    MASK_SECONDS,
    MEMORY,
    NEW,
    PATIENCE,
    GrammarSpec,
    receive,
)
from vai.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SENTENCE = 600  # characters of an error
# White space as people write it, a space or a new line and its indentation, and no more: a model could go on for ever.
JSON_SETTINGS: JsonCompileOptions = {
    "whitespace_pattern": r"\x20|\r?\n[\x20\t]{0,40}",
    "lenient": False,
    "coerce_one_of": False,
}
# Settings of a Lark rule that concern how its tokens are drawn, which is not for a mask to say, or take tokens back.
_SETTINGS = re.compile(r"(?m)^\s*[?!]?[A-Za-z_][\w-]*\s*\[[^\]\n]*\b(temperature|stop|max_tokens)\s*=")


class Vocabulary(TokenizerWrapper):
    """A tokenizer as llguidance wants it: the bytes of every token, which ones are control tokens, and how it encodes.

    Where the tokenizer has no token that ends an answer, one is added behind the others, which no mask shows.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:  # the base's wants another library's tokenizer
        self.is_tokenizer_wrapper = True
        self._tokenizer = tokenizer
        self._made: list[LLTokenizer] = []
        self.size = tokenizer.vocabulary
        self.tokens = [tokenizer.token_bytes(id) for id in range(self.size)]
        self.special_token_ids = [id for id in range(self.size) if tokenizer.is_control(id)]
        self.ends = sorted(tokenizer.eog) or [self.size]
        if not tokenizer.eog:
            self.tokens = [*self.tokens, b""]
        self.eos_token_id = self.ends[0]
        self.bos_token_id = tokenizer.bos

    def make(self) -> LLTokenizer:
        """The library's tokenizer; the lists it was made from are let go."""
        made = LLTokenizer(self, eos_token=self.ends)
        self.tokens, self.special_token_ids = [], []
        self._made.append(made)
        return made

    def __call__(self, text: str) -> list[int]:  # by the library, as it compiles
        """Ids of a text that the grammar prescribes, as the model would write it."""
        ids = self._tokenizer.encode(text, add_bos=False)
        if b"".join(map(self._tokenizer.token_bytes, ids)) == text.encode():
            return ids
        return self._made[0].greedy_tokenize(text)  # the tokenizer normalizes texts, or puts a space before them


class Grammar:
    """What runs in a fork: one compiled grammar and the answers under it."""

    def __init__(self, connection: socket.socket, tokenizer: LLTokenizer, size: int) -> None:
        """`size`: ids that a mask may show."""
        self._connection = connection
        self._tokenizer = tokenizer
        self._size = size
        self._matchers: dict[int, LLMatcher] = {}

    def serve(self) -> None:
        """Compile, then answer until the socket ends."""
        stream = self._connection.makefile("rb")
        (length,) = LENGTH.unpack(stream.read(LENGTH.size))
        spec = msgspec.json.decode(stream.read(length), type=GrammarSpec)
        _set_alarm(COMPILE_SECONDS)
        compiled, error = self._compile(spec)
        _set_alarm(0)
        if compiled is None:
            return self._answer(FAILED, error.encode())
        self._answer(FINISHED)
        while len(head := stream.read(ASK.size)) == ASK.size:
            what, number, token = ASK.unpack(head)
            if what == DROP:
                self._matchers.pop(number, None)
                continue
            _set_alarm(MASK_SECONDS)
            answer = self._new(compiled, number) if what == NEW else self._accept(number, token)
            _set_alarm(0)
            self._answer(*answer)
        return None

    def _compile(self, spec: GrammarSpec) -> tuple[LLMatcher | None, str]:
        """The grammar, its first mask found, or why there is none."""
        try:
            text = _library_text(spec)
        except (ValueError, RecursionError) as error:
            return None, _short(str(error))
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        warnings = [] if matcher.is_error() else matcher.get_grammar_warnings()
        if warnings:
            return None, _short("; ".join(warnings))
        kind, body = self._mask(matcher.deep_copy())
        if kind == FAILED:
            return None, body.decode()
        return matcher, ""

    def _new(self, compiled: LLMatcher, number: int) -> tuple[int, bytes]:
        self._matchers[number] = compiled.deep_copy()
        return self._mask(self._matchers[number])

    def _accept(self, number: int, token: int) -> tuple[int, bytes]:
        matcher = self._matchers[number]
        matcher.consume_token(token)
        return self._mask(matcher)

    def _mask(self, matcher: LLMatcher) -> tuple[int, bytes]:
        bits = b"" if matcher.is_stopped() else matcher.compute_bitmask()
        if matcher.is_error():
            return FAILED, _reason(matcher).encode()
        if matcher.is_stopped():
            return FINISHED, b""
        shown = int.from_bytes(bits, "little") & ((1 << self._size) - 1)
        return (MASK, shown.to_bytes(-(-self._size // 8), "little")) if shown else (FINISHED, b"")

    def _answer(self, kind: int, body: bytes = b"") -> None:
        self._connection.sendall(ANSWER.pack(kind, len(body)) + body)


def _library_text(spec: GrammarSpec) -> str:
    """A grammar as llguidance reads it. Raises ValueError."""
    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_SETTINGS)
    if spec.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(spec.value, overrides=JSON_SETTINGS)
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.value)
    if spec.kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(spec.value))
        return f"start: CHOICE\nCHOICE: {texts}\n"
    if spec.kind == "ebnf" and "::=" in spec.value:
        return to_lark(spec.value)
    if spec.kind == "ebnf" and (found := _SETTINGS.search(spec.value)):
        raise ValueError(f"the setting '{found[1]}' of a rule is not supported")
    return spec.value


def _reason(matcher: LLMatcher) -> str:
    error = matcher.get_error().removesuffix("<non-verbose/>")
    return "no answer can satisfy it" if error.startswith("NoExtension") else _short(error)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_SENTENCE else text[:MAX_SENTENCE] + "..."


def _set_alarm(seconds: float) -> None:
    """End this process after so much processor time, or PATIENCE times as long in any case; 0: do not."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * PATIENCE)


def _limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _become_grammar(descriptor: int, control: socket.socket, tokenizer: LLTokenizer, size: int) -> None:
    """What a fork does, to its end."""
    control.close()
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # what the library says as it fails is for nobody
    _limit_memory()
    with socket.socket(fileno=descriptor) as connection:
        Grammar(connection, tokenizer, size).serve()


def _section(control: socket.socket) -> bytes:
    (length,) = LENGTH.unpack(receive(control, LENGTH.size))
    return receive(control, length)


def main() -> None:
    """Read the sections, build, say so, and fork for every descriptor that comes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a fork ended
    control = socket.socket(fileno=0)
    vocabulary = Vocabulary(Tokenizer.from_sections(_section(control), _section(control)))
    size, made = vocabulary.size, vocabulary.make()
    control.sendall(b"+")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        for descriptor in descriptors:
            if os.fork() == 0:
                try:
                    _become_grammar(descriptor, control, made, size)
                finally:
                    os._exit(0)
            os.close(descriptor)


if __name__ == "__main__":
    main()
