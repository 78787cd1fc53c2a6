"""Names outlive everything, and damage to one of them hurts nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rom_toy import burn

from vai.errors import BadRequest, MalformedFile, ModelNotFound
from vai.rom import segment
from vai.rom.registry import Name, Registry


@pytest.fixture
def registry(root: Path, tmp_path: Path) -> Registry:
    return Registry(root, tmp_path / "deep/names")


def test_a_name_survives_and_is_replaced_whole(registry: Registry) -> None:
    first = Name("qwen2:1.5b", "/models/q.gguf", {"format": "gguf"}, "a" * 64, {"system": "Be brief. é"})
    registry.put(first)
    assert Registry(registry.root, registry.directory).get("qwen2:1.5b") == first
    second = Name("qwen2:1.5b", "/models/other.gguf")
    registry.put(second)
    assert registry.names() == [second]
    assert [path.name for path in registry.directory.iterdir()] == ["qwen2:1.5b.json"]


def test_a_name_that_is_not_there_lists_those_that_are(registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match="none yet; `vai load FILE`"):
        registry.get("a")
    registry.put(Name("b", "/b.gguf"))
    registry.put(Name("c", "/c.gguf"))
    with pytest.raises(ModelNotFound, match=r"no model 'a'\. Known: b, c\."):
        registry.get("a")


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a" * 129, "a\nb", "a b", "-a", "ä"])
def test_what_cannot_be_a_file_name_cannot_be_a_models_name(registry: Registry, name: str) -> None:
    with pytest.raises(BadRequest, match="cannot be a model's name"):
        registry.put(Name(name, "/a.gguf"))
    with pytest.raises(ModelNotFound):
        registry.get(name)
    assert not registry.directory.exists()


@given(content=st.binary(max_size=64))
def test_a_damaged_name_file_is_refused_by_name_and_hides_no_other(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.mktemp("names")
    registry = Registry(directory / "root", directory)
    registry.put(Name("good", "/good.gguf"))
    (directory / "bad.json").write_bytes(content)
    with pytest.raises(MalformedFile, match=r"bad\.json is damaged"):
        registry.get("bad")
    assert [n.name for n in registry.names()] == ["good"]
    assert len(registry.broken()) == 1


@pytest.mark.parametrize(
    "content",
    [
        '{"name":"other","source":"s","recipe":{},"digest":null,"overrides":{}}',
        '{"name":"bad","source":1,"recipe":{},"digest":null,"overrides":{}}',
        '{"name":"bad","source":"s","recipe":[],"digest":null,"overrides":{}}',
        '{"name":"bad","source":"s","recipe":{},"digest":"../x","overrides":{}}',
        '{"name":"bad","source":"s","recipe":{},"digest":null,"overrides":{},"more":1}',
        "[" * 100_000,
    ],
)
def test_a_name_file_with_wrong_fields_is_refused(registry: Registry, content: str) -> None:
    registry.put(Name("good", "/good.gguf"))
    (registry.directory / "bad.json").write_text(content)
    with pytest.raises(MalformedFile):
        registry.get("bad")


def test_forgetting_a_name_keeps_the_image(registry: Registry) -> None:
    digest = burn(registry.root)
    registry.put(Name("toy", "/toy.gguf", digest=digest))
    registry.forget("toy")
    assert registry.names() == []
    assert registry.is_resident(digest)
    with pytest.raises(ModelNotFound):
        registry.forget("toy")


def test_residency_is_what_the_files_say(registry: Registry) -> None:
    assert registry.resident() == []
    digest = burn(registry.root)
    (found,) = registry.resident()
    assert (found.digest, found.problem) == (digest, None)
    assert found.bytes == found.path.stat().st_size == found.header.file_bytes
    assert found.header.burn_seconds == 0.5
    segment.remove(registry.root, digest)
    assert registry.resident() == []
    assert not registry.is_resident(digest)


def test_a_damaged_image_is_listed_with_its_problem(registry: Registry) -> None:
    burn(registry.root)
    segment.image_path(registry.root, "f" * 64).write_bytes(b"nonsense")
    (registry.root / "images/notes.rom").write_bytes(b"")
    good, bad = sorted(registry.resident(), key=lambda found: found.digest == "f" * 64)
    assert good.problem is None
    assert bad.header is None
    assert "not a ROM image" in bad.problem


def test_a_model_is_found_by_name_digest_or_its_first_digits(registry: Registry) -> None:
    digest = burn(registry.root)
    registry.put(Name("toy", "/toy.gguf", digest=digest))
    assert registry.find("toy") == registry.find(digest) == registry.find(digest[:8]) == digest
    for text in (digest[:7], "0" * 8):
        with pytest.raises(ModelNotFound, match="Known: toy"):
            registry.find(text)


def test_a_name_that_was_never_burned_says_how(registry: Registry) -> None:
    registry.put(Name("toy", "/toy.gguf"))
    with pytest.raises(ModelNotFound, match=r"vai load /toy\.gguf"):
        registry.find("toy")
