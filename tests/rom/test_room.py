"""Room is the least of what filesystem, machine and cgroups have; the trees of cgroups are laid out here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vai.rom import room

MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc of a machine with 100 GiB available, of no cgroup."""
    directory = tmp_path / "proc"
    (directory / "self").mkdir(parents=True)
    (directory / "meminfo").write_text("MemTotal: 209715200 kB\nMemAvailable: 104857600 kB\n")
    (directory / "self/cgroup").write_text("")
    (directory / "self/mountinfo").write_text("")
    monkeypatch.setattr(room, "PROC", directory)
    return directory


def _cgroup(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_machine_keeps_its_reserve(proc: Path, tmp_path: Path) -> None:
    (proc / "meminfo").write_text("MemAvailable: 1048576 kB\n")
    assert room.free_room(tmp_path, reserve=24 * MIB).free == 1000 * MIB
    assert room.free_room(tmp_path, reserve=2048 * MIB) == room.Room(
        0, "the machine has no more, 2048 MiB being kept for other programs"
    )


def test_a_root_that_does_not_exist_yet_has_the_room_of_its_parent(proc: Path, tmp_path: Path) -> None:
    (proc / "meminfo").write_text(f"MemAvailable: {1 << 40} kB\n")
    found = room.free_room(tmp_path / "not/yet", reserve=0)
    assert found.free > 0
    assert found.limit == f"the filesystem of {tmp_path} has no more"


def test_the_tightest_ancestor_of_a_v2_cgroup_counts(proc: Path, tmp_path: Path) -> None:
    mount = tmp_path / "cg roup"
    (proc / "self/cgroup").write_text("0::/outer/inner\n")
    escaped = str(mount).replace(" ", "\\040")
    (proc / "self/mountinfo").write_text(f"41 31 0:38 / {escaped} rw,relatime shared:9 - cgroup2 cgroup2 rw\n")
    _cgroup(mount)
    _cgroup(mount / "outer", memory__max=512 * MIB, memory__high="max", memory__current=400 * MIB, memory__stat="")
    _cgroup(mount / "outer/inner", memory__max="max", memory__high=300 * MIB, memory__current=10 * MIB)
    found = room.free_room(tmp_path, reserve=0)
    assert found == room.Room(112 * MIB, "the memory cgroup /outer has a limit of 512 MiB")
    _cgroup(mount / "outer/inner", memory__current=290 * MIB)
    assert room.free_room(tmp_path, reserve=0) == room.Room(
        10 * MIB, "the memory cgroup /outer/inner has a limit of 300 MiB"
    )


def test_file_cache_of_a_cgroup_counts_as_free(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/one\n")
    (proc / "self/mountinfo").write_text(f"41 31 0:38 / {tmp_path / 'cg'} rw - cgroup2 cgroup2 rw\n")
    stat = f"anon {5 * MIB}\nshmem {7 * MIB}\ninactive_file {80 * MIB}\nactive_file {10 * MIB}"
    _cgroup(tmp_path / "cg/one", memory__max=128 * MIB, memory__current=102 * MIB, memory__stat=stat)
    assert room.free_room(tmp_path, reserve=0).free == 116 * MIB


def test_a_v1_cgroup_counts_with_its_ancestors(proc: Path, tmp_path: Path) -> None:
    mount = tmp_path / "memory"
    (proc / "self/cgroup").write_text("5:cpu,cpuacct:/\n4:memory:/docker/abc/job\n0::/\n")
    (proc / "self/mountinfo").write_text(
        f"34 31 0:31 / {tmp_path / 'cpu'} rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"35 31 0:32 /docker/abc {mount} rw,relatime - cgroup cgroup rw,memory\n"
    )
    _cgroup(
        mount, memory__limit_in_bytes=256 * MIB, memory__usage_in_bytes=250 * MIB, memory__stat="total_inactive_file 0"
    )
    stat = f"inactive_file 0\ntotal_inactive_file {3 * MIB}\ntotal_active_file {MIB}"
    _cgroup(
        mount / "job",
        memory__limit_in_bytes=0x7FFFFFFFFFFFF000,
        memory__usage_in_bytes=200 * MIB,
        memory__stat=stat,
    )
    assert room.free_room(tmp_path, reserve=0) == room.Room(6 * MIB, "the memory cgroup / has a limit of 256 MiB")
    _cgroup(mount / "job", memory__limit_in_bytes=201 * MIB)
    assert room.free_room(tmp_path, reserve=0) == room.Room(5 * MIB, "the memory cgroup /job has a limit of 201 MiB")


def test_a_cgroup_above_what_is_mounted_is_measured_where_it_can_be(proc: Path, tmp_path: Path) -> None:
    mount = tmp_path / "cg"
    (proc / "self/cgroup").write_text("0::/../sibling\n")
    (proc / "self/mountinfo").write_text(f"41 31 0:38 / {mount} rw - cgroup2 cgroup2 rw\n")
    _cgroup(mount, memory__max=64 * MIB, memory__current=MIB, memory__stat="")
    assert room.free_room(tmp_path, reserve=0).free == 63 * MIB


def test_this_machine_can_be_asked(tmp_path: Path) -> None:
    found = room.free_room(tmp_path)
    assert found.free >= 0
    assert re.match(r"the (filesystem|machine|memory cgroup)", found.limit)
