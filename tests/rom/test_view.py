"""An attached image: read-only, zero copy, and of no use in a fork."""

from __future__ import annotations

from pathlib import Path

import pytest
from rom_toy import Start, burn

from vai.errors import BadRequest, Unavailable
from vai.rom import image as form
from vai.rom import segment


def test_the_data_is_read_only_and_lies_where_a_huge_page_can(root: Path) -> None:
    with segment.attach(root, burn(root)) as image:
        assert image.data.readonly
        assert image.data.format == "B"
        assert image.mapping.address % form.DATA_ALIGN == 0
        with pytest.raises(TypeError):
            image.data[0] = 1


def test_a_tensor_is_a_view_of_the_data_area(root: Path) -> None:
    with segment.attach(root, burn(root)) as image:
        stored, part, view = image.tensor("blk.0.attn_k.weight")
        assert (stored.name, part.first_block) == ("blk.0.attn_qkv.weight", 64)
        assert view.obj is image.data.obj
        assert view == image.data[stored.offset : stored.offset + stored.bytes]
        with pytest.raises(BadRequest, match="no tensor 'nope'"):
            image.tensor("nope")


def test_a_closed_image_refuses_to_work(root: Path) -> None:
    image = segment.attach(root, burn(root))
    image.close()
    image.close()
    assert image.closed
    for attempt in (lambda: image.data, lambda: image.section("spec"), image.fileno):
        with pytest.raises(Unavailable, match="closed; attach it again"):
            attempt()


def test_an_image_nobody_refers_to_gives_its_lease_back(root: Path) -> None:
    digest = burn(root)
    segment.attach(root, digest)
    assert segment.holders(segment.image_path(root, digest)) == []


def test_a_section_nobody_knows_is_refused(root: Path) -> None:
    with segment.attach(root, burn(root)) as image, pytest.raises(KeyError):
        image.section("secrets")


def test_a_fork_is_refused_by_name_and_holds_no_lease(root: Path, start: Start) -> None:
    digest = burn(root)
    process = start("forker", root, digest)
    for _ in range(3):
        line = process.stdout.readline()
        assert line.startswith(f"Unavailable: This image was attached by process {process.pid}")
    assert process.stdout.readline() == "child still reads 4096\n"
    # The child lives on, mapping and all, until its standard input ends; the parent's lease has to go without it.
    while segment.holders(segment.image_path(root, digest)):
        pass
    segment.remove(root, digest)


def test_mappings_stay_out_of_core_dumps(root: Path) -> None:
    with segment.attach(root, burn(root)) as image:
        area = Path("/proc/self/smaps").read_text().split(f"{image.mapping.address:x}-", 1)[1]
        flags = area.split("VmFlags:", 1)[1].splitlines()[0].split()
        assert "dd" in flags
        assert "wr" not in flags


def test_memory_is_unmapped_when_the_last_view_of_it_goes(root: Path) -> None:
    image = segment.attach(root, burn(root))
    address = f"{image.mapping.address:x}-"
    view = image.data[:1]
    image.close()
    del image
    assert address in Path("/proc/self/maps").read_text()
    del view
    assert address not in Path("/proc/self/maps").read_text()
