"""The life of an image across real processes: burn, publish, lease, remove, sweep, verify, huge pages."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rom_toy import SCRIPT, Start, burn, sections, toy_tensors

from vai.errors import CorruptImage, InUse, ModelNotFound, NotEnoughRoom, Unavailable, WrongVersion
from vai.rom import image as form
from vai.rom import segment
from vai.rom.image import TensorTable


def _images(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "images").iterdir())


# --- burning ----------------------------------------------------------------------------------------------------------


def test_a_burned_image_reads_back_what_was_written(root: Path) -> None:
    digest = burn(root, seed=3)
    assert _images(root) == [f"{digest}.rom"]
    with segment.attach(root, digest) as image:
        tensors, data_bytes = toy_tensors()
        assert image.table.tensors == tuple(tensors)
        assert len(image.data) == data_bytes
        for name, content in sections(image.data, tensors, data_bytes).items():
            assert image.section(name) == content
        segment.verify(image)


def test_the_format_is_the_one_that_was_written_down(root: Path) -> None:
    digest = burn(root, seed=3)
    assert digest == "b55a7aabdca785ae91dc190d06d175293ef80efaa0371d35a0fce014da76965b", (
        "another digest for the same content: raise the ABI"
    )
    file = segment.image_path(root, digest).read_bytes()
    assert file[:24] == b"VAI-ROM\n" + struct.pack("<IIII", 2, 1, 6, 0)
    file_bytes, data_offset, data_bytes = struct.unpack_from("<QQQ", file, 24)
    assert (file_bytes, data_offset) == (len(file), 2 << 20)
    assert hashlib.sha256(file[256:640]).digest() == file[48:80] == bytes.fromhex(digest)
    names, end, hashes = [], data_offset + data_bytes, {}
    for entry in range(256, 640, 64):
        name, offset, length, sha256 = struct.unpack_from("<16sQQ32s", file, entry)
        names.append(name.rstrip(b"\0").decode())
        assert offset == -(-end // 64) * 64
        end = offset + length
        assert hashlib.sha256(file[offset:end]).digest() == sha256
        hashes[names[-1]] = sha256
    assert names == ["tensors", "spec", "tokenizer", "template", "defaults", "provenance"]
    start, length = struct.unpack_from("<QQ", file, 256 + 16)
    table = json.loads(file[start : start + length])
    data = file[data_offset : data_offset + data_bytes]
    assert end == file_bytes
    assert len(data) == data_bytes == table["data_bytes"]
    chunks = [hashlib.sha256(data[at : at + (4 << 20)]).hexdigest() for at in range(0, len(data), 4 << 20)]
    assert chunks == table["chunks"]
    weights = hashlib.sha256(b"VAI weights 1\n" + hashes["tensors"] + hashes["spec"]).hexdigest()
    with segment.attach(root, digest) as image:
        assert image.weights == weights
        assert [list(tensor[:6]) for tensor in image.table.tensors] == [tensor[:6] for tensor in table["tensors"]]


def test_one_checkpoint_has_one_digest_wherever_and_whenever(tmp_path: Path) -> None:
    assert burn(tmp_path / "here") == burn(tmp_path / "there")


def test_equal_shapes_with_different_values_are_different_images(root: Path) -> None:
    first, second = burn(root, seed=1), burn(root, seed=2)
    assert first != second
    with segment.attach(root, first) as one, segment.attach(root, second) as two:
        assert one.weights != two.weights


def test_another_template_is_another_image_of_the_same_weights(root: Path) -> None:
    first, second = burn(root), burn(root, template=b'{"chat_template":"x"}')
    assert first != second
    with segment.attach(root, first) as one, segment.attach(root, second) as two:
        assert one.weights == two.weights


def test_an_existing_digest_wins(root: Path) -> None:
    digest = burn(root)
    before = segment.image_path(root, digest).stat()
    assert burn(root) == digest
    after = segment.image_path(root, digest).stat()
    assert (before.st_ino, before.st_mtime_ns, after.st_nlink) == (after.st_ino, after.st_mtime_ns, 1)
    assert _images(root) == [f"{digest}.rom"]


def test_an_exception_in_a_burn_leaves_nothing(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), segment.Partial(root, data_bytes=6 << 20, section_bytes=0) as partial:
        assert len(_images(root)) == 1
        assert len(partial.data) == 6 << 20
        assert not any(partial.data)
        raise KeyboardInterrupt
    assert _images(root) == []


def test_a_burn_that_never_publishes_leaves_nothing(root: Path) -> None:
    with segment.Partial(root, data_bytes=2 << 20, section_bytes=0):
        pass
    assert _images(root) == []


def test_a_table_of_other_data_than_planned_is_not_published(root: Path) -> None:
    tensors, data_bytes = toy_tensors()
    made = sections(b"", tensors, data_bytes)
    with (
        pytest.raises(ValueError, match="planned"),
        segment.Partial(root, data_bytes=data_bytes + 4096, section_bytes=0) as partial,
    ):
        partial.publish(made, 1.0)
    assert _images(root) == []


@pytest.mark.parametrize("said", [0, 64 << 20])
def test_sections_may_be_longer_or_shorter_than_was_said(said: int, root: Path) -> None:
    tensors, data_bytes = toy_tensors()
    with segment.Partial(root, data_bytes=data_bytes, section_bytes=said) as partial:
        made = sections(partial.data, tensors, data_bytes)
        digest = partial.publish(made, 0.5)
    with segment.attach(root, digest) as image:
        segment.verify(image)
        assert image.path.stat().st_blocks * 512 >= image.header.file_bytes == image.path.stat().st_size
        assert image.section("tokenizer") == made["tokenizer"]


def test_sections_there_is_no_room_for_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    setup = f"mount -t tmpfs -o size=8m,mode=755 tmpfs {mount}"
    _, refused, images = _in_namespace(setup, mount / "root", scale=1, role="oversized")
    assert refused.startswith("NotEnoughRoom: Need 70.4 MiB, free 1.6 MiB: the filesystem of")
    assert images == "[]"


def test_a_table_that_is_wrong_is_not_published(root: Path) -> None:
    tensors, data_bytes = toy_tensors()
    made = sections(b"", tensors, data_bytes, tensors=b"{}")
    with pytest.raises(CorruptImage), segment.Partial(root, data_bytes=6 << 20, section_bytes=0) as partial:
        partial.publish(made, 1.0)
    assert _images(root) == []


def test_a_burn_writes_inside_its_data_area_and_only_until_it_publishes(root: Path) -> None:
    tensors, data_bytes = toy_tensors()
    made = sections(b"", tensors, data_bytes)
    with segment.Partial(root, data_bytes=data_bytes, section_bytes=0) as partial:
        partial.write(memoryview(b"end"), data_bytes - 3)
        assert partial.data[-4:] == b"\0end"
        for start in (-1, data_bytes - 2):
            with pytest.raises(ValueError, match="outside the data area"):
                partial.write(memoryview(b"end"), start)
        partial.publish(made, 1.0)
        with pytest.raises(Unavailable, match="burn has ended"):
            partial.write(memoryview(b"late"), 0)
        assert partial.data.readonly is False, "the view cannot know; the memory under it does"
    with pytest.raises(Unavailable, match="burn has ended"):
        partial.publish(made, 1.0)


def test_a_forked_child_of_a_burner_deletes_nothing(root: Path) -> None:
    with segment.Partial(root, data_bytes=2 << 20, section_bytes=0) as partial:
        child = os.fork()
        if child == 0:
            partial.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert _images(root) == [partial.path.name]
        assert segment.sweep(root) == []


def test_nobody_writes_to_a_published_image_through_a_view_kept_from_its_burn(root: Path) -> None:
    script = f"""
import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(SCRIPT.parents[2])!r}]
from pathlib import Path
import rom_toy
from vai.rom import segment
kept = []
enter = segment.Partial.__enter__
def remember(partial):
    kept.append(enter(partial).data)
    return partial
segment.Partial.__enter__ = remember
rom_toy.burn(Path({str(root)!r}))
print("published", flush=True)
kept[0][0] = 1
print("wrote", flush=True)
"""
    wrote = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert wrote.returncode == -11, wrote.stderr  # SIGSEGV: the memory itself is read-only
    assert wrote.stdout == "published\n"


def test_files_and_directories_are_private(root: Path) -> None:
    path = segment.image_path(root, burn(root))
    assert path.stat().st_mode & 0o777 == 0o400
    for directory in (root, root / "images", root / "run"):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_root_that_is_a_symlink_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="must be a directory"):
        burn(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_root_open_to_others_is_refused_with_the_command_that_closes_it(root: Path) -> None:
    root.mkdir()
    root.chmod(0o750)
    with pytest.raises(Unavailable, match="chmod 700"):
        burn(root)


def test_a_root_of_another_user_is_refused(root: Path) -> None:
    digest = burn(root)
    os.chown(root, 65534, 65534)
    with pytest.raises(Unavailable, match="belongs to user 65534"):
        burn(root)
    with pytest.raises(Unavailable, match="belongs to user 65534"):
        segment.attach(root, digest)


def test_another_user_reads_nothing(shared_memory: Path) -> None:
    root = shared_memory / "root"
    path = segment.image_path(root, burn(root))
    script = f"""
import os
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for attempt in (lambda: os.listdir({str(path.parent)!r}), lambda: open({str(path)!r}, "rb").read(1)):
    try:
        print("read", attempt())
    except PermissionError:
        print("refused")
"""
    command = [sys.executable, "-I", "-S", "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\nrefused\n"
    for directory in (root, root / "images"):
        directory.chmod(0o755)  # even with the directories open, the file itself is closed
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("\nrefused\n")


# --- no room ----------------------------------------------------------------------------------------------------------


def _in_namespace(setup: str, root: Path, scale: int, role: str = "room") -> list[str]:
    """Lines of the role, in a mount namespace of its own after `setup`, a shell command that has to succeed."""
    command = f"set -e; {setup}; exec {sys.executable} {SCRIPT} {role} {root} {scale}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_small_tmpfs_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    setup = f"mount -t tmpfs -o size=8m,mode=755 tmpfs {mount}"
    room, refused, images = _in_namespace(setup, mount / "root", scale=2)
    assert "limit='the filesystem of" in room
    assert refused.startswith("NotEnoughRoom: Need 10.7 MiB, free 8.0 MiB: the filesystem of")
    assert "vai rm NAME" in refused
    assert images == "[]"


def test_what_fits_in_a_small_tmpfs_is_burned(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    setup = f"mount -t tmpfs -o size=8m,mode=755 tmpfs {mount}"
    _, digest, images = _in_namespace(setup, mount / "root", scale=1)
    assert images == f"['{digest}.rom']"


def test_a_small_memory_cgroup_is_refused_before_a_byte_is_written(small_cgroup: Path, shared_memory: Path) -> None:
    command = f"echo $$ > {small_cgroup}/cgroup.procs; exec {sys.executable} {SCRIPT} room {shared_memory}/root 12"
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    room, refused, images = done.stdout.splitlines()
    assert "limit='the memory cgroup" in room
    assert refused.startswith("NotEnoughRoom: Need 54.2 MiB, free")
    assert "has a limit of 48 MiB" in refused
    assert "vai rm NAME" in refused
    assert images == "[]"


def test_what_the_system_refuses_in_the_middle_leaves_nothing(root: Path) -> None:
    script = f"""
import resource, sys
sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(SCRIPT.parents[2])!r}]
from pathlib import Path
import rom_toy
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
rom_toy.room(Path({str(root)!r}), "1")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    _, refused, images = done.stdout.splitlines()
    assert refused.startswith("NotEnoughRoom: Need 6.4 MiB, and the system gave 0.0 MiB (File too large).")
    assert images == "[]"


@pytest.mark.parametrize("limit", [2, 5])
def test_what_the_system_refuses_while_the_burn_is_writing_leaves_nothing(limit: int, root: Path) -> None:
    """Steps of 1 MiB, so that all but the first are taken beside the burn; the system breaks its word after some."""
    script = f"""
import resource, sys
sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(SCRIPT.parents[2])!r}]
from pathlib import Path
import rom_toy
from vai.rom import segment
segment.ALLOCATION_STEP = 1 << 20
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit} << 20, {limit} << 20))
rom_toy.room(Path({str(root)!r}), "1")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    _, refused, images = done.stdout.splitlines()
    assert refused.startswith(f"NotEnoughRoom: Need 6.4 MiB, and the system gave {limit}.0 MiB (File too large).")
    assert images == "[]"


def test_what_is_written_before_it_is_allocated_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "ALLOCATION_STEP", 64 << 10)
    with segment.Partial(root, data_bytes=62 << 20, section_bytes=0) as partial:
        partial.write(memoryview(b"early"), (62 << 20) - 5)
        assert partial.data[-6:] == b"\0early", "data waits for the allocation"
        assert partial.path.stat().st_blocks * 512 >= 64 << 20
    assert _images(root) == []


def test_a_reserve_no_machine_has_is_refused_and_says_so(root: Path) -> None:
    with (
        pytest.raises(NotEnoughRoom, match=r"free 0\.0 MiB: the machine has no more, .* kept for other programs"),
        segment.Partial(root, data_bytes=2 << 20, section_bytes=0, reserve=1 << 60),
    ):
        pass
    assert _images(root) == []


# --- killed burners ---------------------------------------------------------------------------------------------------

INVISIBLE = ["first step allocated", "allocated", "half written", "before publish"]


@pytest.mark.parametrize("point", INVISIBLE)
def test_a_killed_burner_leaves_only_a_partial_that_a_sweep_deletes(root: Path, start: Start, point: str) -> None:
    process = start("burner", root, point)
    assert process.stdout.readline() == f"{point}\n"
    (partial,) = _images(root)
    assert partial.endswith(".partial")
    assert segment.sweep(root) == [], "its burner still lives"
    process.kill()
    process.wait()
    assert segment.sweep(root) == [root / "images" / partial]
    assert _images(root) == []


def test_the_next_burn_takes_back_what_a_killed_one_left(root: Path, start: Start) -> None:
    process = start("burner", root, "half written")
    process.stdout.readline()
    process.kill()
    process.wait()
    digest = burn(root)
    assert _images(root) == [f"{digest}.rom"]


def test_a_burner_killed_between_link_and_unlink_has_published(root: Path, start: Start) -> None:
    process = start("burner", root, "linked")
    assert process.stdout.readline() == "linked\n"
    process.kill()
    process.wait()
    partial, published = _images(root)
    digest = published.removesuffix(".rom")
    assert (root / "images" / partial).stat().st_nlink == 2
    with segment.attach(root, digest) as image:  # its lease keeps LOCK_EX from the sweep
        segment.verify(image)
        assert segment.sweep(root) == [root / "images" / partial]
        assert _images(root) == [published]
        assert len(image.data)


def test_removing_an_image_takes_a_dead_burners_second_link_too(root: Path, start: Start) -> None:
    process = start("burner", root, "linked")
    process.stdout.readline()
    process.kill()
    process.wait()
    digest = _images(root)[1].removesuffix(".rom")
    segment.remove(root, digest)
    assert _images(root) == []


def test_one_burn_at_a_time_takes_room(root: Path, start: Start) -> None:
    process = start("burner", root, "first step allocated")
    process.stdout.readline()
    with open(root / "run/room.lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_burner_that_has_its_room_lets_the_next_one_in(root: Path, start: Start) -> None:
    process = start("burner", root, "allocated")
    process.stdout.readline()
    digest = burn(root, seed=9)
    process.communicate("\n")
    assert len([name for name in _images(root) if name.endswith(".rom")]) == 2
    assert f"{digest}.rom" in _images(root)


def test_sweeping_where_nothing_was_burned_makes_nothing(root: Path) -> None:
    assert segment.sweep(root) == []
    assert not root.exists()
    root.mkdir(mode=0o700)
    assert segment.sweep(root) == []
    assert list(root.iterdir()) == []


def test_the_sweep_leaves_alone_what_is_no_partial_of_ours(root: Path, tmp_path: Path) -> None:
    digest = burn(root)
    (tmp_path / "precious").write_text("precious")
    (root / "images/.0123.partial").symlink_to(tmp_path / "precious")
    assert segment.sweep(root) == []
    assert (tmp_path / "precious").read_text() == "precious"
    assert f"{digest}.rom" in _images(root)


# --- leases -----------------------------------------------------------------------------------------------------------


def test_holders_are_named_and_removal_waits_for_none_of_them(root: Path, start: Start) -> None:
    digest = burn(root)
    path = segment.image_path(root, digest)
    readers = [start("reader", root, digest) for _ in range(2)]
    for reader in readers:
        assert reader.stdout.readline() == "attached\n"
    found = segment.holders(path)
    assert [h.pid for h in found] == sorted(r.pid for r in readers)
    assert all("rom_toy.py reader" in h.command and h.start_time > 0 for h in found)
    with pytest.raises(InUse, match=rf"\(pid {readers[0].pid}\).*--force"):
        segment.remove(root, digest)
    assert path.exists()


def test_a_forced_removal_leaves_the_bytes_to_the_last_reader(root: Path, start: Start) -> None:
    digest = burn(root)
    with segment.attach(root, digest) as image:
        expected = hashlib.sha256(image.data).hexdigest()
    reader = start("reader", root, digest)
    reader.stdout.readline()
    size = segment.image_path(root, digest).stat().st_size
    assert segment.remove(root, digest, force=True) == size
    assert _images(root) == []
    with pytest.raises(ModelNotFound):
        segment.attach(root, digest)
    assert burn(root) == digest, "the same model can be burned again beside the removed one"
    reader.stdin.write("\n")
    reader.stdin.flush()
    assert reader.stdout.readline() == f"{expected}\n"


def test_a_killed_reader_holds_nothing(root: Path, start: Start) -> None:
    digest = burn(root)
    reader = start("reader", root, digest)
    reader.stdout.readline()
    reader.kill()
    reader.wait()
    assert segment.holders(segment.image_path(root, digest)) == []
    segment.remove(root, digest)
    assert _images(root) == []


def test_closing_gives_the_lease_back_while_views_stay_readable(root: Path) -> None:
    digest = burn(root)
    image = segment.attach(root, digest)
    view = image.data[:4096]
    expected = bytes(view)
    image.close()
    segment.remove(root, digest)
    assert bytes(view) == expected


def test_a_reader_that_lost_the_race_with_rm_and_a_new_burn_gets_the_new_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = burn(root)
    old = segment.image_path(root, digest).stat().st_ino
    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        segment.remove(root, digest)
        with open(segment.image_path(root, "0" * 64), "w"):  # keeps the inode number from being used again at once
            burn(root)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with segment.attach(root, digest) as image:
        assert os.fstat(image.fileno()).st_ino == segment.image_path(root, digest).stat().st_ino != old


def test_a_reader_does_not_wait_for_ever_for_a_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = burn(root)
    monkeypatch.setattr(segment, "LEASE_PATIENCE", 0.01)
    with open(segment.image_path(root, digest), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InUse, match=f"pid {os.getpid()}"):
            segment.attach(root, digest)


def test_removing_what_is_not_there_says_so(root: Path) -> None:
    burn(root)
    with pytest.raises(ModelNotFound, match="vai ls"):
        segment.remove(root, "0" * 64)


@pytest.mark.parametrize("digest", ["", "../../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_a_digest_can_smuggle_no_path(root: Path, digest: str) -> None:
    with pytest.raises(ModelNotFound, match="not the digest"):
        segment.attach(root, digest)


# --- checking ---------------------------------------------------------------------------------------------------------


def _flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:  # as root, whom modes do not bind
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("index", range(5))
def test_a_flipped_bit_in_a_tensor_is_found_and_the_tensor_named(root: Path, index: int, where: str) -> None:
    digest = burn(root)
    with segment.attach(root, digest) as image:
        tensor = image.table.tensors[index]
        offset = tensor.offset if where == "first" else tensor.offset + tensor.bytes - 1
        _flip(image.path, image.header.data_offset + offset)
        with pytest.raises(CorruptImage, match="burn the model again") as refused:
            segment.verify(image)
        assert tensor.name in str(refused.value)


@pytest.mark.parametrize("name", form.SECTIONS)
def test_a_flipped_bit_in_a_section_is_found_and_the_section_named(root: Path, name: str) -> None:
    digest = burn(root)
    with segment.attach(root, digest) as image:
        _flip(image.path, image.header.sections[name].offset + image.header.sections[name].length - 1)
        with pytest.raises(CorruptImage, match=f"section '{name}'"):
            segment.verify(image)
    if name in ("tensors", "spec"):
        with pytest.raises(CorruptImage, match=f"section '{name}'"):
            segment.attach(root, digest)
    else:
        with segment.attach(root, digest) as image, pytest.raises(CorruptImage, match=f"section '{name}'"):
            image.section(name)


def test_a_hundred_flipped_bits_anywhere_are_found_a_hundred_times(root: Path) -> None:
    path = segment.image_path(root, digest := burn(root))
    places = random.Random(20261121)
    for _ in range(100):
        position = places.randrange(path.stat().st_size)
        if 80 <= position < 160:  # burn time and host, which no hash covers
            continue
        _flip(path, position)
        with pytest.raises((CorruptImage, WrongVersion)), segment.attach(root, digest) as image:
            segment.verify(image)
        _flip(path, position)
    with segment.attach(root, digest) as image:
        segment.verify(image)


def test_a_flipped_bit_between_header_data_and_sections_is_found(root: Path) -> None:
    with segment.attach(root, burn(root)) as image:
        gap = image.header.sections["spec"].offset - 1
        assert gap >= sum(image.header.sections["tensors"][:2])
        for position in (form.HEADER_BYTES, image.header.data_offset - 1, gap):
            _flip(image.path, position)
            with pytest.raises(CorruptImage, match="must have none"):
                segment.verify(image)
            _flip(image.path, position)
        segment.verify(image)


def test_a_truncated_file_is_refused_with_both_sizes(root: Path) -> None:
    path = segment.image_path(root, digest := burn(root))
    size = path.stat().st_size
    os.truncate(path, size - 4096)
    with pytest.raises(CorruptImage, match=f"should have {size} bytes and has {size - 4096}"):
        segment.attach(root, digest)


def test_an_image_under_another_images_name_is_refused(root: Path) -> None:
    first, second = burn(root, seed=1), burn(root, seed=2)
    segment.image_path(root, first).rename(segment.image_path(root, second))
    with pytest.raises(CorruptImage, match=f"holds image {first[:12]}"):
        segment.attach(root, second)


def test_a_link_or_directory_under_an_images_name_is_refused(root: Path) -> None:
    digest = burn(root)
    segment.image_path(root, "1" * 64).symlink_to(segment.image_path(root, digest))
    segment.image_path(root, "2" * 64).mkdir()
    os.mkfifo(segment.image_path(root, "3" * 64))
    with pytest.raises(Unavailable):
        segment.attach(root, "1" * 64)
    for other in "23":
        with pytest.raises(CorruptImage, match="not a file"):
            segment.attach(root, other * 64)


def test_metadata_is_read_without_a_lease(root: Path) -> None:
    digest = burn(root)
    with open(segment.image_path(root, digest), "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert segment.read_sections(root, digest, "defaults", "template")["defaults"] == b"{}"
        assert segment.read_header(root, digest).digest == digest


# --- pages ------------------------------------------------------------------------------------------------------------


def test_a_collapsed_image_is_read_through_huge_pages_by_a_fresh_mapping(shared_memory: Path) -> None:
    with segment.attach(shared_memory / "root", burn(shared_memory / "root", scale=4, huge_pages=False)) as image:
        whole = image.header.data_bytes // form.DATA_ALIGN * form.DATA_ALIGN
        assert segment.huge_share(image) == 0
        expected = whole / image.header.data_bytes
        assert segment.collapse(image) == pytest.approx(expected)
        assert segment.huge_share(image) == pytest.approx(expected)
        assert segment.resident_share(image) == 1
        segment.verify(image)


@pytest.fixture
def whatever_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Huge pages even where small ones would be faster at this moment."""
    monkeypatch.setattr(segment, "SMALL_PAGES_SECONDS", 1.0)


def test_an_image_is_burned_into_huge_pages_where_the_kernel_has_them(
    shared_memory: Path, whatever_they_cost: None
) -> None:
    with segment.attach(shared_memory / "root", burn(shared_memory / "root", scale=4)) as image:
        whole = image.header.data_bytes // form.DATA_ALIGN * form.DATA_ALIGN
        assert segment.huge_share(image) == pytest.approx(whole / image.header.data_bytes)
        segment.verify(image)


@pytest.mark.parametrize("step", [4 << 20, 64 << 20])
def test_a_window_is_the_data_itself_where_it_has_huge_pages(
    step: int, shared_memory: Path, whatever_they_cost: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last 4 MiB of data, whose end no huge page fits."""
    monkeypatch.setattr(segment, "ALLOCATION_STEP", step)
    with segment.Partial(shared_memory / "root", data_bytes=(10 << 20) + 4096, section_bytes=0) as partial:
        for start in (0, 6 << 20):
            window = partial.window(start, 4 << 20)
            assert window is not None
            window[-3:] = b"end"
            assert partial.data[start : start + (4 << 20)] == bytes((4 << 20) - 3) + b"end"
        assert partial.window(6 << 20, (4 << 20) + 1) is None
        partial.write(memoryview(b"tail"), 10 << 20)
        assert bytes(partial.data[(10 << 20) - 1 :]) == b"dtail".ljust(4097, b"\0")
        with pytest.raises(ValueError, match="outside the data area"):
            partial.window(10 << 20, 4097)
        assert partial.path.stat().st_blocks * 512 == (12 << 20) + 4096


def test_there_is_no_window_where_the_filesystem_has_no_huge_pages_or_none_are_wanted(
    root: Path, shared_memory: Path
) -> None:
    with segment.Partial(root, data_bytes=6 << 20, section_bytes=0) as partial:
        assert partial.window(0, 2 << 20) is None
    wanted = segment.Partial(shared_memory / "root", data_bytes=6 << 20, section_bytes=0, huge_pages=False)
    with wanted as partial:
        assert partial.window(0, 2 << 20) is None


def test_huge_pages_that_cost_more_than_small_ones_are_not_waited_for(
    shared_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "SMALL_PAGES_SECONDS", 0.0)
    with segment.Partial(shared_memory / "root", data_bytes=30 << 20, section_bytes=0) as partial:
        assert partial.window(0, 8 << 20) is not None
        assert partial.window(8 << 20, 2 << 20) is None
        assert not any(partial.data), "what is no huge page is there as well"


def test_a_window_ends_with_its_burn(shared_memory: Path) -> None:
    partial = segment.Partial(shared_memory / "root", data_bytes=6 << 20, section_bytes=0)
    with partial:
        pass
    with pytest.raises(Unavailable, match="burn has ended"):
        partial.window(0, 1)


def test_collapsing_where_the_filesystem_cannot_changes_nothing(root: Path) -> None:
    with segment.attach(root, burn(root)) as image:
        assert segment.collapse(image) == 0
        segment.verify(image)


def test_attaching_costs_no_private_memory(shared_memory: Path, start: Start) -> None:
    root = shared_memory / "root"
    digest = burn(root, scale=8)
    grown = int(start("memory", root, digest).stdout.readline())
    assert grown < 4 << 20


def test_attaching_a_model_of_seven_gigabytes_takes_under_20_ms(root: Path) -> None:
    layers, (rows, columns) = 32, (4096 * 3, 4096)
    names = [f"blk.{i}.{kind}" for i in range(layers) for kind in ("qkv", "out", "gate_up", "down", "norm", "norm2")]
    size = form.tensor_bytes("Q8_0", rows, columns)
    offsets, data_bytes = form.place([size] * len(names))
    tensors = [
        form.StoredTensor(n, "Q8_0", rows, columns, o, size, (form.Part(n, rows, 0, 1),))
        for n, o in zip(names, offsets, strict=True)
    ]
    chunks = [hashlib.sha256(str(i).encode()).digest() for i in range(-(-data_bytes // form.CHUNK))]
    made = sections(b"", *toy_tensors(), tensors=TensorTable(data_bytes, chunks, tensors).to_bytes())
    header = form.build_header(made, data_bytes, burned_at=0.0, burn_seconds=0.0, host="")
    parsed = form.parse_header(header, form.layout({n: len(s) for n, s in made.items()}, data_bytes).file_bytes)
    segment.prepare(root)
    with open(segment.image_path(root, parsed.digest), "wb") as file:
        file.truncate(parsed.file_bytes)  # a hole: attaching must not touch the data
        file.write(header)
        for name, section in parsed.sections.items():
            file.seek(section.offset)
            file.write(made[name])
    assert data_bytes > 7 << 30

    def once() -> float:
        begin = time.process_time()  # not the clock on the wall: other processes of the machine are not measured here
        with segment.attach(root, parsed.digest):
            return time.process_time() - begin

    assert min(once() for _ in range(10)) < 0.020
