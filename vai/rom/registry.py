"""Names and resident images. A name is a small file on disk that outlives reboots; residency is what `images/` holds.

Nothing is cached: every answer is read from the files, so any process may ask, and none has to run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vai.errors import BadRequest, MalformedFile, ModelNotFound, VaiError
from vai.rom.image import Header, is_digest
from vai.rom.segment import read_header

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")
_MAX_NAME_FILE = 8 << 20  # a system prompt and a template may be long, not endless
_SHORT = 8  # digits of a digest that are enough to mean one


@dataclass(frozen=True, slots=True)
class Name:
    """What a name stands for.

    source: the checkpoint's path · recipe: how it is burned · digest: the image it was burned into, None before that ·
    overrides: what this variant changes (template, system, defaults, context, and the draft model that guesses for it).
    """

    name: str
    source: str
    recipe: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Resident:
    """An image file that is there. bytes: its size · header: None where `problem` says why it cannot be read."""

    digest: str
    path: Path
    bytes: int
    header: Header | None
    problem: str | None = None


class Registry:
    """The names in `names` and the images under `root`. Neither directory has to exist to be asked."""

    def __init__(self, root: Path, names: Path) -> None:
        self.root = root
        self.directory = names

    def names(self) -> list[Name]:
        """All names that can be read, in alphabetical order."""
        return [found for found in self._read() if isinstance(found, Name)]

    def broken(self) -> list[MalformedFile]:
        """What is wrong with the name files that cannot be read."""
        return [found for found in self._read() if isinstance(found, MalformedFile)]

    def get(self, name: str) -> Name:
        """Raises ModelNotFound listing the names there are, MalformedFile where its file is damaged."""
        try:
            return _load(self._path(name))
        except (FileNotFoundError, BadRequest):
            known = ", ".join(n.name for n in self.names()) or "none yet; `vai load FILE` makes one"
            raise ModelNotFound(f"There is no model '{name[:128]}'. Known: {known}.", param="model") from None

    def find(self, text: str) -> str:
        """The digest meant by a name, a digest, or at least 8 first digits of a resident one. Raises ModelNotFound."""
        if is_digest(text):
            return text
        try:
            name = self.get(text)
        except ModelNotFound:
            if len(text) >= _SHORT:
                matches = [digest for digest in self._digests() if digest.startswith(text)]
                if len(matches) == 1:
                    return matches[0]
            raise
        if name.digest is None:
            raise ModelNotFound(f"The model '{name.name}' has not been burned yet; run: vai load {name.source}")
        return name.digest

    def put(self, name: Name) -> None:
        """Write a name, replacing an older one of the same name whole. Raises BadRequest for what cannot be a name."""
        path = self._path(name.name)
        content = json.dumps(asdict(name), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.urandom(8).hex()}.partial")
        try:
            with open(partial, "x", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)  # the rename itself has to survive a power cut too
        finally:
            os.close(directory)

    def forget(self, name: str) -> None:
        """Delete a name; the image stays. Raises ModelNotFound."""
        try:
            self._path(name).unlink()
        except (FileNotFoundError, BadRequest):
            self.get(name)

    def resident(self) -> list[Resident]:
        """Every image file, in order of digest, damaged ones with their problem."""
        found = []
        for digest in self._digests():
            path = self.root / "images" / f"{digest}.rom"
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                size = path.lstat().st_size
                try:
                    found.append(Resident(digest, path, size, read_header(self.root, digest)))
                except ModelNotFound:
                    continue
                except VaiError as error:
                    found.append(Resident(digest, path, size, None, error.message))
        return found

    def is_resident(self, digest: str) -> bool:
        """Whether an image of this digest is there."""
        return is_digest(digest) and (self.root / "images" / f"{digest}.rom").is_file()

    def _digests(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "images").glob("*.rom") if is_digest(path.stem))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise BadRequest(
                f"'{name[:128]}' cannot be a model's name: use 1 to 128 letters, digits and . _ : + -, "
                "beginning with a letter or digit."
            )
        return self.directory / f"{name}.json"

    def _read(self) -> list[Name | MalformedFile]:
        found: list[Name | MalformedFile] = []
        for path in sorted(self.directory.glob("*.json")):
            if not _NAME.fullmatch(path.stem):
                continue
            try:
                found.append(_load(path))
            except FileNotFoundError:
                continue  # forgotten meanwhile
            except MalformedFile as error:
                found.append(error)
        return found


def is_name(text: str) -> bool:
    """Whether a model can be called that."""
    return _NAME.fullmatch(text) is not None


def _load(path: Path) -> Name:
    with open(path, "rb") as file:
        content = file.read(_MAX_NAME_FILE + 1)
    try:
        fields = json.loads(content) if len(content) <= _MAX_NAME_FILE else None
    except (ValueError, RecursionError):
        fields = None
    if (
        not isinstance(fields, dict)
        or set(fields) != {"name", "source", "recipe", "digest", "overrides"}
        or fields["name"] != path.stem
        or not isinstance(fields["source"], str)
        or not isinstance(fields["recipe"], dict)
        or not isinstance(fields["overrides"], dict)
        or not (fields["digest"] is None or (isinstance(fields["digest"], str) and is_digest(fields["digest"])))
    ):
        raise MalformedFile(f"The name file {path} is damaged; delete it and load the model again.")
    return Name(**fields)
