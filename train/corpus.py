"""The text the demonstration models learn from: free sources that are on every machine that can train.

Run: python -m train.corpus OUT. Writes train.text and held.text (documents one after the other, UTF-8), their ends as
train.ends.npy and held.ends.npy (int64, bytes), and manifest.json: each source with version, licence and size, each
file with its SHA-256. The same installed versions give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Packages the training environment has anyway, with the licence of their own sources. A name that is not here is not
# read: what a package's metadata says about its licence is not uniform enough to decide by.
LICENCES: Mapping[str, str] = {
    "click": "BSD-3-Clause",
    "filelock": "MIT",
    "fsspec": "BSD-3-Clause",
    "httptools": "MIT",
    "jinja2": "BSD-3-Clause",
    "markupsafe": "BSD-3-Clause",
    "msgspec": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "rich": "MIT",
    "starlette": "BSD-3-Clause",
    "uvicorn": "BSD-3-Clause",
}
STANDARD_LIBRARY = "python"
SUFFIXES = (".py", ".rst", ".md", ".txt")
# Copies of other projects, whose licences are their own, and texts about licences.
FOREIGN = ("site-packages", "dist-packages", "_vendor", "vendor", "third_party", "licenses", "licences")
# A model this small learns what tests look like instead of what they test.
TESTS = ("test", "tests", "idle_test")
MAX_FILE_BYTES = 1 << 19
HELD_OUT_ONE_IN = 50
SPLITS = ("train", "held")


class Source(NamedTuple):
    """Files of one project: (name in the corpus, path on this machine), by name."""

    name: str
    version: str
    licence: str
    files: list[tuple[str, Path]]


class Document(NamedTuple):
    """One file: "source/path", the split it belongs to, and its bytes."""

    name: str
    split: str
    text: bytes


def standard_library() -> Source:
    """The sources of this Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((f"{STANDARD_LIBRARY}/{path.relative_to(root).as_posix()}", path) for path in root.rglob("*"))
    return Source(STANDARD_LIBRARY, platform.python_version(), "PSF-2.0", _eligible(files))


def package(name: str) -> Source | None:
    """The files of an installed package, or None where it is not installed. `name` is a key of LICENCES."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    listed = distribution.files or []
    files = ((f"{name}/{each.as_posix()}", Path(str(distribution.locate_file(each)))) for each in listed)
    return Source(name, distribution.version, LICENCES[name], _eligible(files))


def _eligible(files: Iterator[tuple[str, Path]]) -> list[tuple[str, Path]]:
    def belongs(name: str) -> bool:
        folders = name.split("/")[:-1]
        unwanted = any(f in FOREIGN or f in TESTS or f.endswith(".dist-info") for f in folders)
        return name.endswith(SUFFIXES) and not unwanted

    return sorted((name, path) for name, path in files if belongs(name) and ".." not in name)


def split_of(name: str) -> str:
    """The split a document belongs to, by its name alone: more sources never move a document."""
    digest = hashlib.sha256(name.encode()).digest()
    return "held" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def documents(sources: Sequence[Source]) -> Iterator[Document]:
    """Every text worth learning from, each content once."""
    seen: set[bytes] = set()
    for source in sources:
        for name, path in source.files:
            if not path.is_file() or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
                continue
            text = path.read_bytes().replace(b"\r\n", b"\n").strip() + b"\n"
            content = hashlib.sha256(b" ".join(text.split())).digest()
            if content in seen or not _is_prose_or_code(text):
                continue
            seen.add(content)
            yield Document(name, split_of(name), text)


def _is_prose_or_code(text: bytes) -> bool:
    """Not binary, not another encoding, and not a table of numbers or one endless line."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    digits = sum(text.count(b"%d" % digit) for digit in range(10))
    return b"\0" not in text and 5 * digits < len(text) and len(text) < 120 * (text.count(b"\n") + 1)


def write(out: Path, sources: Sequence[Source]) -> dict[str, dict[str, int]]:
    """Write the corpus into the folder `out`; return {split: {source: bytes}}. The manifest comes last."""
    out.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    ends: dict[str, list[int]] = {split: [] for split in SPLITS}
    hashes: dict[str, str] = {}
    with (out / "train.text").open("wb") as train, (out / "held.text").open("wb") as held:
        files = {"train": train, "held": held}
        for document in documents(sources):
            files[document.split].write(document.text)
            ends[document.split].append(files[document.split].tell())
            hashes[document.name] = hashlib.sha256(document.text).hexdigest()
            by_source = sizes[document.split]
            source = document.name.split("/")[0]
            by_source[source] = by_source.get(source, 0) + len(document.text)
    for split in SPLITS:
        np.save(out / f"{split}.ends.npy", np.array(ends[split], np.int64))
    listed = [{"name": s.name, "version": s.version, "licence": s.licence} for s in sources]
    manifest = {"sources": listed, "bytes": sizes, "held_out_one_in": HELD_OUT_ONE_IN, "files": hashes}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return sizes


def read(corpus: Path, split: str) -> Iterator[str]:
    """The documents of a split of a corpus on disk."""
    data = memoryview((corpus / f"{split}.text").read_bytes())
    start = 0
    for end in np.load(corpus / f"{split}.ends.npy", allow_pickle=False).tolist():
        yield bytes(data[start:end]).decode()
        start = end


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect the training text.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", nargs="*", choices=sorted(LICENCES), default=sorted(LICENCES))
    args = parser.parse_args()
    found = [package(name) for name in args.package]
    sources = [standard_library(), *(source for source in found if source is not None)]
    sizes = write(args.out, sources)
    for source in sources:
        train, held = (sizes[split].get(source.name, 0) for split in SPLITS)
        print(f"{source.name:14} {source.version:16} {source.licence:14} {train:12,} train {held:10,} held out")
    print(f"{'in all':46} {sum(sizes['train'].values()):12,} train {sum(sizes['held'].values()):10,} held out")


if __name__ == "__main__":
    main()
