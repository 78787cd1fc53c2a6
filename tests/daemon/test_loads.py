"""Loads in the background, by real burners."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vai.burn.synth import synthesize
from vai.daemon.loads import Load, Loader, parse
from vai.errors import CorruptImage, MalformedFile, ModelNotFound, Unavailable
from vai.rom import segment
from vai.rom.registry import Name


@contextlib.asynccontextmanager
async def loading(tmp_path: Path) -> AsyncIterator[Loader]:
    segment.prepare(tmp_path / "root")
    loader = Loader(tmp_path / "root", tmp_path / "names", tmp_path / "burn.log")
    running = asyncio.create_task(loader.run())
    try:
        yield loader
    finally:
        await loader.stop(5.0)
        running.cancel()


async def over(load: Load) -> Load:
    await asyncio.wait_for(load.over.wait(), 60)
    return load


async def test_a_load_makes_an_image_resident_and_writes_its_name(tmp_path: Path, checkpoint: Path) -> None:
    async with loading(tmp_path) as loader:
        load = await over(loader.add(Load(str(checkpoint), name="m")))
        assert (load.state, load.done) == ("done", load.total)
        assert load.total > 0
        assert loader.registry.get("m") == Name("m", str(checkpoint), digest=load.digest)
        assert loader.registry.is_resident(load.digest or "")


async def test_what_is_named_and_absent_is_burned_again_once_for_all_its_names(
    tmp_path: Path, checkpoint: Path
) -> None:
    async with loading(tmp_path) as loader:
        digest = (await over(loader.add(Load(str(checkpoint), name="a")))).digest or ""
        loader.registry.put(Name("b", str(checkpoint), digest=digest, overrides={"system": "Be brief."}))
        await loader.stop(5.0)
        segment.remove(tmp_path / "root", digest)
        (wanted,) = loader.wanted()
        assert (await over(wanted)).digest == digest
        assert loader.registry.is_resident(digest)
        assert loader.registry.get("b").overrides == {"system": "Be brief."}
        assert loader.wanted() == []


async def test_a_name_that_was_never_burned_gets_its_digest(tmp_path: Path, checkpoint: Path) -> None:
    async with loading(tmp_path) as loader:
        loader.registry.put(Name("m", str(checkpoint), overrides={"context": 64}))
        (wanted,) = loader.wanted()
        digest = (await over(wanted)).digest
        assert loader.registry.get("m") == Name("m", str(checkpoint), digest=digest, overrides={"context": 64})


async def test_a_source_that_changed_never_serves_under_the_old_name(tmp_path: Path, checkpoint: Path) -> None:
    source = tmp_path / "m.gguf"
    shutil.copy(checkpoint, source)
    async with loading(tmp_path) as loader:
        digest = (await over(loader.add(Load(str(source), name="m")))).digest or ""
        await loader.stop(5.0)
        segment.remove(tmp_path / "root", digest)
        synthesize(source, shape="tiny", type="Q4_0", seed=2)  # same shapes, other values
        (wanted,) = loader.wanted()
        await over(wanted)
        assert isinstance(wanted.error, CorruptImage)
        assert loader.registry.get("m").digest == digest
        assert loader.registry.resident() == []


async def test_a_load_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    async with loading(tmp_path) as loader:
        gone = loader.add(Load(str(tmp_path / "gone.gguf"), name="gone"))
        bad = loader.add(Load(str(broken), name="broken"))
        await over(gone)
        await over(bad)
        assert isinstance(gone.error, ModelNotFound)
        assert isinstance(bad.error, MalformedFile)
        assert loader.registry.names() == []
        assert loader.registry.resident() == []
        assert list((tmp_path / "root" / "images").iterdir()) == []


async def test_a_resident_name_is_loaded_at_once_and_equal_wishes_are_one(tmp_path: Path, checkpoint: Path) -> None:
    async with loading(tmp_path) as loader:
        load = loader.add(Load(str(checkpoint), name="m"))
        assert loader.add(Load(str(checkpoint), name="m")) is load
        await over(load)
        assert loader.by_name("m").over.is_set()
        with pytest.raises(ModelNotFound, match="Known: m"):
            loader.by_name("x")


def test_a_line_that_is_no_object_is_nothing() -> None:
    assert [parse(line) for line in (b"", b"[1]", b"{", b'{"done": 1}')] == [{}, {}, {}, {"done": 1}]


async def test_a_name_that_cannot_be_written_fails_its_load_and_not_the_loader(
    tmp_path: Path, checkpoint: Path
) -> None:
    async with loading(tmp_path) as loader:
        (tmp_path / "names").write_text("a file where the directory should be")
        failed = await over(loader.add(Load(str(checkpoint), name="m")))
        assert isinstance(failed.error, Unavailable)
        (tmp_path / "names").unlink()
        assert (await over(loader.add(Load(str(checkpoint), name="m")))).state == "done"
