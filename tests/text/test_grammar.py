"""Grammars: what masks allow is what the grammar says, and no grammar costs anybody but its own request."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fields import byte_level, sentence_piece

from vai.errors import BadRequest, NotSupported
from vai.text import grammar
from vai.text.grammar import Grammars, GrammarSpec, Matcher
from vai.text.template import template_section
from vai.text.tokenizer import Tokenizer, tokenizer_section

VOCABULARY = 3103  # of the model: more than the tokenizer has, and no multiple of 8
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ä", "b\n", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Words:
    """A tokenizer and its grammars."""

    def __init__(self, fields: dict[str, Any]) -> None:
        sections = tokenizer_section(fields), template_section(fields)
        self.tokenizer = Tokenizer.from_sections(*sections)
        self.grammars = Grammars(lambda: sections)

    def open(self, kind: grammar.Kind, value: str = "") -> Matcher:
        return self.grammars.matcher(GrammarSpec(kind, value), VOCABULARY)

    def answer(self, kind: grammar.Kind, value: str = "", *, seed: int, most: int = 400) -> str | None:
        """What a model that likes every allowed token the same makes of it; None where it does not come to an end."""
        matcher, dice, ids = self.open(kind, value), random.Random(seed), []
        try:
            while not matcher.finished and len(ids) < most:
                ids.append(dice.choice(allowed(matcher)))
                if ids[-1] in self.tokenizer.eog:
                    return self.tokenizer.decode(ids[:-1], continuation=True)
                matcher.accept(ids[-1])
            return self.tokenizer.decode(ids, continuation=True) if matcher.finished else None
        finally:
            matcher.close()

    def accepts(self, kind: grammar.Kind, value: str, text: str) -> bool:
        """Whether a text, a byte a token, may be an answer."""
        matcher = self.open(kind, value)
        try:
            for byte in text.encode():
                token = next(id for id in range(300) if self.tokenizer.token_bytes(id) == bytes([byte]))
                if token not in allowed(matcher):
                    return False
                matcher.accept(token)
            return matcher.finished or any(id in self.tokenizer.eog for id in allowed(matcher))
        finally:
            matcher.close()


def allowed(matcher: Matcher) -> list[int]:
    return [id for id in range(8 * len(matcher.bits)) if matcher.bits[id // 8] >> id % 8 & 1]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def words(request: pytest.FixtureRequest) -> Iterator[Words]:
    made = Words(sentence_piece() if request.param == "llama" else byte_level("qwen2", 3000))
    yield made
    made.grammars.close()


@pytest.fixture(scope="module")
def gpt2() -> Iterator[Words]:
    made = Words(byte_level("qwen2", 3000))
    yield made
    made.grammars.close()


# --- what a mask allows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_answers_under_a_json_schema_satisfy_it(words: Words, seed: int) -> None:
    text = words.answer("json_schema", json.dumps(SCHEMA), seed=seed)
    if text is None:
        return  # white space and escapes can go on for long; test_some_answers_come_to_an_end sees to it that few do
    found = json.loads(text)
    assert {"name", "age"} <= found.keys() <= {"name", "age", "tags"}
    assert len(found["name"]) <= 8 and 0 <= found["age"] <= 150
    assert set(found.get("tags", ())) <= {"ä", "b\n", None} and len(found.get("tags", ())) <= 2


def test_some_answers_come_to_an_end(words: Words) -> None:
    texts = [words.answer("json_schema", json.dumps(SCHEMA), seed=seed) for seed in range(20, 28)]
    assert sum(text is not None for text in texts) >= 4


@pytest.mark.parametrize("seed", range(4))
def test_answers_match_their_regex_choice_and_ebnf(words: Words, seed: int) -> None:
    assert re.fullmatch(r"[a-c]{2,5}-(ja|nein)\n", words.answer("regex", r"[a-c]{2,5}-(ja|nein)\n", seed=seed) or "")
    choices = ["yes", "yes, please", 'ein "ß"\\', "😀"]
    assert words.answer("choice", json.dumps(choices), seed=seed) in choices
    gbnf = 'root ::= num ("+" num){1,3}  # a sum\nnum ::= [1-9] [0-9]? | "(" num ")"\n'
    assert re.fullmatch(r"\(*\d+\)*(\+\(*\d+\)*){1,3}", words.answer("ebnf", gbnf, seed=seed) or "")
    lark = 'start: "<" WORD ">" | "(" start ")"\nWORD: /[a-z]{1,4}/\n'
    assert re.fullmatch(r"\(*<[a-z]{1,4}>\)*", words.answer("ebnf", lark, seed=seed) or "")
    assert re.fullmatch(r"a+;b", words.answer("structural", 'start: /a+/ ";" "b"\n', seed=seed) or "")


def test_a_json_object_is_an_object(gpt2: Words) -> None:
    assert gpt2.accepts("json_object", "", '{"a": [1, {"b": -2.5e3}],\n    "c": "\\nö"}')
    assert gpt2.accepts("json_object", "", "{}")
    assert not any(gpt2.accepts("json_object", "", text) for text in ("[]", "1", '"{}"', " {}", '{"a" 1}', "{} "))
    assert not gpt2.accepts("json_object", "", '{"a":' + " " * 9 + "1}")  # white space that nobody writes


def test_no_mask_shows_an_id_that_the_tokenizer_does_not_have_or_one_that_steers(words: Words) -> None:
    tokenizer, matcher = words.tokenizer, words.open("regex", r"(?s:.*)")
    try:
        assert len(matcher.bits) == -(-VOCABULARY // 8)
        ids = allowed(matcher)
        assert len(ids) > 300 and max(ids) < tokenizer.vocabulary
        assert all(id in tokenizer.eog or not tokenizer.is_control(id) for id in ids)
        assert set(ids) >= tokenizer.eog
    finally:
        matcher.close()


def test_the_end_is_allowed_only_where_the_grammar_allows_it(words: Words) -> None:
    matcher = words.open("regex", "a(bc)?")
    try:
        for byte, end in ((b"a", True), (b"b", False)):
            token = next(id for id in allowed(matcher) if words.tokenizer.token_bytes(id) == byte)
            matcher.accept(token)
            assert words.tokenizer.eog.isdisjoint(allowed(matcher)) is not end
        assert not matcher.finished
        matcher.accept(next(id for id in allowed(matcher) if words.tokenizer.token_bytes(id) == b"c"))
        assert matcher.finished and matcher.bits == b""
    finally:
        matcher.close()


def test_a_tokenizer_without_an_end_still_finishes_its_grammars() -> None:
    fields = byte_level("qwen2", 600)
    endless = {key: value for key, value in fields.items() if "eos" not in key and "eot" not in key}
    tokenizer, template = tokenizer_section(endless), json.loads(template_section(endless))
    template |= {"eos": None, "eog": []}
    grammars = Grammars(lambda: (tokenizer, json.dumps(template).encode()))
    try:
        matcher = grammars.matcher(GrammarSpec("regex", "x*"), 1000)
        assert all(
            b"x" in Tokenizer(tokenizer, json.dumps(template).encode()).token_bytes(id) for id in allowed(matcher)
        )
        matcher.close()
        done = grammars.matcher(GrammarSpec("regex", "y"), 1000)
        done.accept(allowed(done)[0])
        assert done.finished
        done.close()
    finally:
        grammars.close()


def test_answers_under_one_grammar_do_not_know_each_other(gpt2: Words) -> None:
    first, second = gpt2.open("choice", '["ab", "cd"]'), gpt2.open("choice", '["ab", "cd"]')
    before = second.bits
    first.accept(allowed(first)[0])
    assert second.bits == before
    first.close()
    second.accept(allowed(second)[-1])
    second.close()


def test_a_token_that_the_mask_forbids_is_refused(gpt2: Words) -> None:
    matcher = gpt2.open("choice", '["ab", "cd"]')
    with pytest.raises(BadRequest, match="cannot go on under its grammar"):
        matcher.accept(next(id for id in range(300) if id not in allowed(matcher)))
    matcher.close()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"if": {}, "then": {}}', "if"),
        ('{"properties": {"a": {"dependentRequired": {}}}}', "dependentRequired"),
        ('{"type": "string", "format": "phone-number"}', "phone-number"),
        ('{"type": "strnig"}', "strnig"),
        ('{"type": "string", "pattern": "^(?=a)"}', "look-around"),
        ('{"$ref": "https://example.com/schema"}', "https://example.com/schema"),
        ('{"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}', "oneOf"),
        ('{"type": "string", "x-guidance": {"lenient": true}}', "x-guidance"),
        ('{"type": "integer", "minimum": 5, "maximum": 1}', "5"),
        ('{"$ref": "#"}', "no answer can satisfy it"),
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"a": ' * 70 + "1" + "}" * 70, "64 levels"),
        ('{"a": ' * 9000 + "1" + "}" * 9000, "recursion"),
    ],
)
def test_what_a_schema_asks_for_and_cannot_have_is_refused_by_name(gpt2: Words, schema: str, named: str) -> None:
    with pytest.raises(BadRequest) as caught:
        gpt2.open("json_schema", schema)
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        ("regex", "a(b", "regex"),
        ("regex", "", "empty"),
        ("regex", "[^\\s\\S]", "no answer can satisfy it"),
        ("ebnf", "hello", "grammar"),
        ("ebnf", "root ::= other", "other"),
        ("ebnf", 'start: gen\ngen[temperature=0.5]: "a"\n', "temperature"),
        ("ebnf", 'start: "a" <|no_such_token|>\n', "no_such_token"),
        ("choice", "[]", "1 to 4096"),
        ("choice", '["a", ""]', "empty text"),
        ("choice", '["a", 1]', "list of texts"),
        ("regex", "\ud800", "surrogate"),
        ("regex", "a" * 600_000, "524,288"),
    ],
)
def test_what_is_no_grammar_is_refused_by_name(gpt2: Words, kind: grammar.Kind, value: str, named: str) -> None:
    with pytest.raises(BadRequest) as caught:
        gpt2.open(kind, value)
    assert named in caught.value.message


def test_settings_of_the_library_in_a_schema_are_not_supported(gpt2: Words) -> None:
    with pytest.raises(NotSupported, match="x-guidance"):
        gpt2.open("json_schema", '{"x-guidance": {}}')


# --- grammars that mean harm -----------------------------------------------------------------------------------------

HARMFUL: dict[str, tuple[grammar.Kind, str]] = {
    "nested parentheses": ("regex", "(" * 100_000 + "a" + ")" * 100_000),
    "nested repetition": ("regex", "((a{0,1000}){0,1000}){0,1000}"),
    "classic backtracking": ("regex", "(x+x+)+y"),
    "many states": ("regex", ".*a.{500}"),
    "many alternatives": ("regex", "|".join(f"[a-z]{{{i}}}x{i}" for i in range(2000))),
    "large enum": ("json_schema", json.dumps({"enum": [f"value {i} {i * 7919}" for i in range(15_000)]})),
    "product of choices": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(8)]} for i in range(10)]}),
    ),
    "many properties": ("json_schema", json.dumps({"properties": {f"p{i}": {"minimum": i} for i in range(2000)}})),
    "references to each other": (
        "json_schema",
        json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    ),
    "large bounds": ("json_schema", '{"items": {"type": "string", "minLength": 100000}, "minItems": 100000}'),
    "expensive multiple": ("json_schema", '{"type": "integer", "multipleOf": 999999937, "maximum": 99999999999}'),
    "deep rules": ("ebnf", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000)) + 'r20000: "a"\n'),
    "doubled terminals": (
        "ebnf",
        "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(60)) + 'R60: "a"',
    ),
    "ambiguous rules": ("ebnf", 'start: e\ne: e e | e e e | "a" | ""\n'),
    "deep GBNF": ("ebnf", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_grammar_is_refused_or_served_in_time(gpt2: Words, name: str) -> None:
    gpt2.open("regex", "warm").close()
    processes = Ticks()
    try:
        with processes:
            gpt2.answer(*HARMFUL[name], seed=1, most=30)
    except BadRequest as error:
        assert len(error.message) < 1000
    assert processes.worst < 0.5, "another thread of this process was held up"
    assert gpt2.answer("choice", '["still here"]', seed=1) == "still here"


class Ticks:
    """A thread that runs all the time beside something: `worst` is the longest that the rest of this process computed
    without letting it, in seconds of processor time. How busy the machine is does not count.
    """

    def __enter__(self) -> None:
        self.worst, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        last = time.process_time()
        while not self._over.wait(0.002):
            self.worst, last = max(self.worst, time.process_time() - last), time.process_time()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_grammar_past_its_deadline_is_ended_and_the_others_go_on(
    gpt2: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = gpt2.open("choice", '["ab", "cd"]')
    stalled = gpt2.open("regex", "[ab]+")
    [process] = [grammar for grammar in gpt2.grammars._grammars.values() if grammar.spec.value == "[ab]+"]
    monkeypatch.setattr(process, "_socket", Deaf(process._socket))
    with pytest.raises(BadRequest, match="of processor time"):
        stalled.accept(allowed(stalled)[0])
    stalled.close()
    other.accept(allowed(other)[0])
    other.close()
    assert gpt2.answer("regex", "[ab]{3}", seed=1) is not None


class Deaf:
    """A socket whose other end answers nothing any more."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def sendall(self, message: bytes) -> None:
        pass

    def recv(self, count: int) -> bytes:
        raise TimeoutError

    def close(self) -> None:
        self._socket.close()


# --- processes -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_are_kept_for_the_next_answer_bounded_in_number_and_ended_by_close() -> None:
    words = Words(byte_level("qwen2", 600))
    before = set(children(os.getpid()))
    for number in range(grammar.KEPT + 4):
        words.open("regex", f"x{number}").close()
    [server] = set(children(os.getpid())) - before
    until(lambda: len(children(server)) == grammar.KEPT)
    kept = set(children(server))
    words.open("regex", f"x{grammar.KEPT + 3}").close()
    assert set(children(server)) == kept
    forks = children(server)
    words.grammars.close()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in [server, *forks]))
    assert words.answer("choice", '["again"]', seed=1) == "again"
    words.grammars.close()


def test_a_fork_server_that_died_is_started_again(gpt2: Words) -> None:
    gpt2.open("regex", "before").close()
    os.kill(gpt2.grammars._server._process.pid, 9)
    gpt2.grammars._server._process.wait()
    assert gpt2.answer("choice", '["after"]', seed=1) == "after"


def test_many_threads_that_ask_for_one_grammar_at_once_have_it_compiled_once() -> None:
    words = Words(byte_level("qwen2", 600))
    matchers: list[Matcher] = []
    threads = [threading.Thread(target=lambda: matchers.append(words.open("json_object"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(matchers) == 8 and len({matcher.bits for matcher in matchers}) == 1
    assert len(children(words.grammars._server._process.pid)) == 1
    for matcher in matchers:
        matcher.close()
    words.grammars.close()
