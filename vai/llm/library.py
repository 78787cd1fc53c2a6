"""The models that a root and its names offer, opened: what is slow to make is made once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from vai.errors import BadRequest, CorruptImage, MalformedFile, ModelNotFound, Unavailable, VaiError
from vai.llm.words import ModelCard, Overrides, Sizes, Words
from vai.request import Speculate
from vai.rom import segment
from vai.rom.registry import Name, Registry
from vai.text.grammar import Grammars
from vai.text.tokenizer import Tokenizer

TOKENIZERS = 16  # kept, the least recently used go first; 50 MB each at 150,000 tokens
MODELS = 32

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Library:
    """Opens models from the images and names there are: reads metadata sections, takes no lease, touches no weights."""

    def __init__(self, root: Path, names: Path) -> None:
        self._root = root
        self._registry = Registry(root, names)
        self._tokenizers: Shared[bytes, Tokenizer] = Shared(TOKENIZERS)
        self._grammars: Shared[bytes, Grammars] = Shared(TOKENIZERS, Grammars.close)
        self._words: Shared[Hashable, Words] = Shared(MODELS, Words.close)
        self._facts: Shared[tuple[str, int], tuple[int, Sizes]] = Shared(256)

    def cards(self) -> list[ModelCard]:
        """All names, whether resident or not."""
        return [self._card(name) for name in self._registry.names()]

    def opened(self, name: str) -> Words | None:
        """The model if it is open and still resident, without any work. Raises as `open`."""
        found = self._find(name)
        return self._words.peek(self._key(found))

    def open(self, name: str) -> Words:
        """The model of a name, a digest, or its first 8 digits. Raises ModelNotFound, Unavailable if not resident."""
        found = self._find(name)
        return self._words.get(self._key(found), lambda: self._read(found))

    def speculate(self, words: Words, kind: str | None = None, most: int | None = None) -> Speculate:
        """How tokens are guessed for a request: in this `kind` ("off", "ngram", "draft"), else by the draft model that
        the name has, where it is resident, else by lookup; `most` at a time, 0 for none.

        Raises BadRequest where the name has no draft model or one of another tokenizer, Unavailable where it is not
        resident and `kind` asks for it.
        """
        most = Speculate().max_tokens if most is None else most
        if kind == "off" or most == 0:
            return Speculate()
        if kind == "ngram" or (kind is None and words.draft is None):
            return Speculate(kind="ngram", max_tokens=most)
        if words.draft is None:
            raise BadRequest(f"The model '{words.card.name}' has no draft model; leave the kind of guesses open.")
        try:
            return Speculate(kind="draft", draft=self.draft(words, words.draft), max_tokens=most)
        except (ModelNotFound, Unavailable):
            if kind is None:  # it will be there, or not: the answer is the same
                return Speculate(kind="ngram", max_tokens=most)
            raise

    def draft(self, words: Words, name: str) -> str:
        """The digest of a model that can guess for another. Raises ModelNotFound, Unavailable, BadRequest."""
        digest = self._find(name).digest or ""
        own, other = (
            segment.read_header(self._root, each).sections["tokenizer"] for each in (words.card.digest, digest)
        )
        if own.sha256 != other.sha256:
            raise BadRequest(
                f"The model '{name}' cannot guess for '{words.card.name}': their tokenizers differ. Choose a smaller "
                "model of the same family.",
                param="draft",
            )
        return digest

    def close(self) -> None:
        """Let everything go."""
        self._words.clear()
        self._tokenizers.clear()
        self._grammars.clear()

    def _find(self, text: str) -> Name:
        try:
            name = self._registry.get(text)
        except ModelNotFound:
            name = Name(text, "", digest=self._registry.find(text))
        if name.digest is None or not self._registry.is_resident(name.digest):
            load = f"vai load {name.source} --name {name.name}" if name.source else "vai load FILE"
            raise Unavailable(f"The model '{text[:128]}' is not resident. Load it: {load}")
        return name

    def _key(self, name: Name) -> Hashable:
        return name.name, name.digest, msgspec.json.encode(name.overrides)

    def _read(self, name: Name) -> Words:
        digest = name.digest or ""
        sections = segment.read_sections(self._root, digest, "spec", "tokenizer", "template", "defaults")
        tokenizer, template = sections["tokenizer"], sections["template"]
        key = hashlib.sha256(tokenizer).digest() + hashlib.sha256(template).digest()
        made = self._tokenizers.get(key, lambda: Tokenizer.from_sections(tokenizer, template))
        grammars = self._grammars.get(key, lambda: Grammars(partial(_read_tokenizer, self._root, digest)))
        return Words(self._card(name), made, grammars, sections, _overrides(name))

    def _card(self, name: Name) -> ModelCard:
        digest = name.digest or ""
        try:
            inode = segment.image_path(self._root, digest).stat().st_ino
            created, sizes = self._facts.get((digest, inode), lambda: _read_facts(self._root, digest))
            context = _context(sizes, _overrides(name))
        except (OSError, VaiError):  # not there, or damaged: opening it says which
            return ModelCard(name.name, digest, created=0, context=0, resident=False)
        return ModelCard(name.name, digest, created, context, resident=True)


class Shared(Generic[Key, Value]):
    """Things that are slow to make: made once however many ask at the same moment, the least recently used let go."""

    def __init__(self, limit: int, let_go: Callable[[Value], None] | None = None) -> None:
        self._limit = limit
        self._let_go = let_go
        self._lock = threading.Lock()
        self._made: OrderedDict[Key, Future[Value]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of `key`, made by `make` in this thread if nobody has yet. A failure is not kept."""
        with self._lock:
            future = self._made.get(key)
            mine = future is None
            if future is None:
                future = self._made[key] = Future()
            self._made.move_to_end(key)
        if not mine:
            return future.result()
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)
            with self._lock:
                self._made.pop(key, None)
            raise
        self._trim(self._limit)
        return future.result()

    def peek(self, key: Key) -> Value | None:
        """The value of `key` if it is there by now."""
        with self._lock:
            future = self._made.get(key)
            if future is None or not future.done():
                return None
            self._made.move_to_end(key)
        return future.result()

    def clear(self) -> None:
        self._trim(0)

    def _trim(self, limit: int) -> None:
        with self._lock:
            old = [key for key, future in self._made.items() if future.done()]
            gone = [self._made.pop(key) for key in old[: max(0, len(self._made) - limit)]]
        for future in gone:
            if self._let_go is not None and future.exception() is None:
                self._let_go(future.result())


def _read_facts(root: Path, digest: str) -> tuple[int, Sizes]:
    """When an image was burned, and its sizes. Raises ModelNotFound, CorruptImage, WrongVersion."""
    created = int(segment.read_header(root, digest).burned_at)
    try:
        return created, msgspec.json.decode(segment.read_sections(root, digest, "spec")["spec"], type=Sizes)
    except msgspec.MsgspecError as error:
        raise CorruptImage(f"The spec of image {digest[:12]} cannot be read: {error}. Burn the model again.") from None


def _read_tokenizer(root: Path, digest: str) -> tuple[bytes, bytes]:
    sections = segment.read_sections(root, digest, "tokenizer", "template")
    return sections["tokenizer"], sections["template"]


def _overrides(name: Name) -> Overrides:
    try:
        return msgspec.convert(name.overrides, Overrides)
    except msgspec.ValidationError as error:
        raise MalformedFile(f"The overrides of the name '{name.name}' cannot be used: {error}.") from None


def _context(sizes: Sizes, overrides: Overrides) -> int:
    return sizes.context if overrides.context is None else max(1, min(sizes.context, overrides.context))
