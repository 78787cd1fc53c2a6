"""The life of an image file: room, partial, publication, lease, removal, verification, huge pages.

Layout of a root: `images/<digest>.rom`, `images/.<random>.partial`, `run/room.lock`. A lease is `flock(LOCK_SH)` on a
description the reader opened itself; no counter and no pid is stored anywhere, so a kill leaves nothing to clean up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from vai.errors import CorruptImage, InUse, ModelNotFound, NotEnoughRoom, Unavailable
from vai.rom import image as form
from vai.rom.holders import Holder, holders
from vai.rom.image import Header, TensorTable
from vai.rom.mapping import MADV_COLLAPSE, reopen
from vai.rom.mapping import Mapping as Memory
from vai.rom.room import RESERVE, Room, free_room
from vai.rom.view import Image, map_data, read_section

__all__ = [
    "Holder", "Partial", "Room", "attach", "collapse", "free_room", "holders", "huge_share", "image_path", "prepare",
    "read_header", "read_sections", "remove", "resident_share", "sweep", "verify",
]  # fmt: skip

ALLOCATION_STEP = 64 << 20
_HUGE_STEP = 8 << 20
SMALL_PAGES_SECONDS = 0.5 / (1 << 30)  # what a byte of small pages costs a processor
LEASE_PATIENCE = 5.0  # seconds a reader waits for the instant in which a remover holds the file


# --- places -----------------------------------------------------------------------------------------------------------


def image_path(root: Path, digest: str) -> Path:
    """Where the image of this digest lies. Raises ModelNotFound for what is no digest: no path can be smuggled in."""
    if not form.is_digest(digest):
        raise ModelNotFound(f"'{digest[:80]}' is not the digest of an image (64 hex digits); `vai ls` shows them.")
    return root / "images" / f"{digest}.rom"


def prepare(root: Path) -> None:
    """Make root, images and run, or check them: directories of this user, closed to others. Raises Unavailable."""
    root.parent.mkdir(parents=True, exist_ok=True)
    for directory in (root, root / "images", root / "run"):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        _require_private(directory)


def _require_private(directory: Path) -> None:
    """Somebody else's directory may hold anything, and may shrink files under a reader. Raises Unavailable, OSError."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise Unavailable(f"{directory} must be a directory and is not; move it away, or set VAI_ROOT.")
    if found.st_uid != os.geteuid():
        raise Unavailable(f"{directory} belongs to user {found.st_uid}, not to you; set VAI_ROOT to one of yours.")
    if found.st_mode & 0o077:
        raise Unavailable(f"{directory} is open to other users; close it with: chmod 700 {directory}")


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """LOCK_EX on the file or directory at `path`, opened with `flags`, for the length of the block. Raises OSError."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _room_locked(root: Path) -> contextlib.AbstractContextManager[None]:
    """One burn at a time, from the room check to the end of the allocation."""
    return _locked(root / "run/room.lock", os.O_RDWR | os.O_CREAT)


def _names_locked(root: Path) -> contextlib.AbstractContextManager[None]:
    """For the instants in which files of `images` are made, renamed or deleted. Raises FileNotFoundError."""
    return _locked(root / "images", os.O_RDONLY | os.O_DIRECTORY)


def _names_inode(path: Path, fd: int) -> bool:
    """Whether `path` still is the file behind `fd`."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(fd))


# --- burning ----------------------------------------------------------------------------------------------------------


class Partial:
    """An image being burned: room is checked and taken at entry, and unless `publish` succeeds nothing remains.

        with Partial(root, data_bytes=..., section_bytes=...) as partial:
            if (window := partial.window(start, length)) is not None: ...  # fill it in place
            else: partial.write(packed, start)
            digest = partial.publish(sections, burn_seconds)

    section_bytes: what the sections will take, if only about: room for them is asked for together with that of the
    data, and once more when they are there. reserve: bytes of memory that stay free for others. huge_pages: take 2 MiB
    pages where the kernel gives them at once; `collapse` can try again later.
    Memory is taken step by step, all but the first step in a thread of its own, which holds the room lock: a third of
    a burn would be spent waiting for it otherwise. What `write` reaches before that thread, it takes itself.
    Raises NotEnoughRoom (before a byte is written; later only if the system breaks its word or the sections are larger
    than was said), Unavailable (the directories).
    """

    def __init__(
        self, root: Path, *, data_bytes: int, section_bytes: int, reserve: int = RESERVE, huge_pages: bool = True
    ) -> None:
        self._root = root
        self._data_bytes = data_bytes
        self._data_end = form.DATA_OFFSET + data_bytes  # in the file
        self._file_bytes = self._data_end + section_bytes
        self._reserve = reserve
        self._fd = -1  # for writing and mapping
        self._lease = -1  # for the lock
        self._allocation: threading.Thread | None = None
        self._given_up = threading.Event()  # tells the allocation to end
        self._refused: BaseException | None = None  # what ended it early
        self._step_taken = threading.Condition()
        self._more_huge = huge_pages  # the next step will try for huge pages
        self._huge_end = form.DATA_OFFSET  # where in the file they end
        self.path = root / "images" / f".{os.urandom(8).hex()}.partial"
        _burning.add(self)

    def __enter__(self) -> Partial:
        prepare(self._root)
        with contextlib.ExitStack() as lock:
            lock.enter_context(_room_locked(self._root))
            sweep(self._root)
            try:
                self._create()
                self._memory = Memory(self._fd, form.DATA_OFFSET, self._data_bytes, writable=True)
            except BaseException:
                self._discard()
                raise
            self._data = self._memory.view
            try:
                self._allocate_step(0)
                if self._data_end > ALLOCATION_STEP:
                    self._allocation = threading.Thread(target=self._allocate_rest, args=(lock.pop_all(),))
                    self._allocation.start()
            except BaseException:
                self._release()
                raise
        return self

    @property
    def data(self) -> memoryview:
        """The data area, writable until `publish`; zeros at first. Waits until all of it is allocated."""
        self._await_allocation()
        return self._data

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    def window(self, start: int, length: int) -> memoryview | None:
        """Bytes [start, start + length) of the data area, to be filled in place by any thread; None where they do not
        all lie in 2 MiB pages: use `write` then. Waits until that is known.

        The fastest way: one page fault for 2 MiB, and no copy. Raises Unavailable after `publish` or in a fork.
        """
        end = self._inside(start, length)
        with self._step_taken:
            self._step_taken.wait_for(lambda: self._huge_end >= end or not self._more_huge)
        return self._data[start : start + length] if self._huge_end >= end else None

    def write(self, part: memoryview, start: int) -> None:
        """Put `part` at byte `start` of the data area, from any thread.

        With small pages three times as fast as storing through `data`: the kernel neither clears them first nor maps
        them. Raises Unavailable after `publish` or in a fork.
        """
        self._inside(start, len(part))
        try:
            _write(self._fd, part, form.DATA_OFFSET + start)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise self._no_room(form.DATA_OFFSET + start, error) from None
            raise

    def publish(self, sections: Mapping[str, bytes], burn_seconds: float) -> str:
        """Freeze the data, write the sections, make the image visible under its digest, and return that.

        sections: one byte string for each of SECTIONS. An image of this digest that is there already stays; this one is
        dropped. Raises CorruptImage for a tensor table that is wrong, ValueError for that of other data.
        """
        table = TensorTable.from_bytes(sections["tensors"])
        plan = form.layout({name: len(sections[name]) for name in form.SECTIONS}, table.data_bytes)
        if table.data_bytes != self._data_bytes:
            raise ValueError(f"planned with {self._data_bytes} bytes of data, but the tensor table has {plan}")
        self._require_open()
        self._await_allocation()
        self._memory.freeze()
        self._file_bytes = plan.file_bytes
        with _room_locked(self._root):
            self._allocate(self._data_end, self._file_bytes)
        for name, offset in zip(form.SECTIONS, plan.section_offsets, strict=True):
            _write(self._fd, sections[name], offset)
        header = form.build_header(
            sections, table.data_bytes, burned_at=time.time(), burn_seconds=burn_seconds, host=os.uname().nodename
        )
        _write(self._fd, header, 0)
        digest = form.parse_header(header, self._file_bytes).digest
        with _names_locked(self._root):  # LOCK_EX to LOCK_SH is no atomic step: a sweep must not come between
            fcntl.flock(self._lease, fcntl.LOCK_SH)
            with contextlib.suppress(FileExistsError):
                os.link(self.path, image_path(self._root, digest), follow_symlinks=False)
            self.path.unlink()
        os.close(self._fd)  # the last descriptor that could write; the lease stays until the end of the block
        self._fd = -1
        return digest

    def _inside(self, start: int, length: int) -> int:
        """Where in the file `length` bytes from `start` on end, if the data area has them and is still open."""
        self._require_open()
        if start < 0 or start + length > self._data_bytes:
            raise ValueError(f"{length} bytes at {start} are outside the data area")
        return form.DATA_OFFSET + start + length

    def _require_open(self) -> None:
        if self._fd < 0:
            raise Unavailable("This burn has ended, or belongs to the process this one was forked from.")

    def _create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with _names_locked(self._root):  # no sweep between open and flock
            self._fd = os.open(self.path, flags, 0o400)
            self._lease = reopen(self._fd)
            fcntl.flock(self._lease, fcntl.LOCK_EX)

    def _allocate_step(self, offset: int) -> None:
        end = min(offset + ALLOCATION_STEP, self._data_end)
        huge_end = self._allocate(offset, end)
        with self._step_taken:
            self._more_huge = huge_end == end < self._data_end
            self._huge_end = huge_end
            self._step_taken.notify_all()

    def _allocate(self, offset: int, end: int) -> int:
        """Take bytes [offset, end) of the file; where its huge pages end now."""
        # fallocate, not truncate: touching a hole in a full tmpfs is SIGBUS. In steps, since tmpfs undoes a whole
        # call when a signal comes; Python repeats the interrupted one.
        need = self._file_bytes - 512 * os.fstat(self._fd).st_blocks
        _require_room(self._root, self._file_bytes, need, self._reserve)
        try:
            huge_end = self._take_huge_pages(end) if self._more_huge else self._huge_end
            os.posix_fallocate(self._fd, offset, end - offset)  # whatever is not there yet
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise self._no_room(offset, error) from None
            raise
        return huge_end

    def _take_huge_pages(self, end: int) -> int:
        """2 MiB pages from where they end up to at most byte `end` of the file; where they end now. Raises OSError.

        Only collapsing makes them on a tmpfs that was not mounted for it, and it needs one small page in each. A page
        usually costs a fifth of its 512 small ones; where it costs more than they (memory is in pieces, or the host of
        this machine has to find it first), small ones do as well.
        """
        stop = end // form.DATA_ALIGN * form.DATA_ALIGN
        for start in range(self._huge_end, stop, _HUGE_STEP):
            length = min(_HUGE_STEP, stop - start)
            for page in range(start, start + length, form.DATA_ALIGN):
                os.posix_fallocate(self._fd, page + form.DATA_ALIGN - mmap.PAGESIZE, mmap.PAGESIZE)
            began = time.thread_time()
            try:
                self._memory.advise(MADV_COLLAPSE, start - form.DATA_OFFSET, length)
            except OSError:  # none to be had, or no tmpfs
                return start
            if time.thread_time() - began > SMALL_PAGES_SECONDS * length:
                return start + length
        return max(stop, self._huge_end)

    def _allocate_rest(self, lock: contextlib.ExitStack) -> None:
        with lock:
            try:
                for offset in range(ALLOCATION_STEP, self._data_end, ALLOCATION_STEP):
                    if self._given_up.is_set():
                        break
                    self._allocate_step(offset)
            except (OSError, NotEnoughRoom) as error:
                self._refused = error
            finally:
                with self._step_taken:  # whoever waits for a window must not wait for ever
                    self._more_huge = False
                    self._step_taken.notify_all()

    def _await_allocation(self) -> None:
        if self._allocation is not None:
            self._allocation.join()
        if self._refused is not None:
            raise self._refused

    def _no_room(self, given: int, error: OSError) -> NotEnoughRoom:
        return NotEnoughRoom(
            f"Need {_size(self._file_bytes)}, and the system gave {_size(given)} ({error.strerror}). {_WAY_OUT}"
        )

    def _release(self) -> None:
        self._discard()
        self._data = memoryview(b"")
        del self._memory

    def _discard(self) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
        self._given_up.set()
        if self._allocation is not None:
            self._allocation.join()
        self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._lease):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lease = -1


_burning: weakref.WeakSet[Partial] = weakref.WeakSet()


def _close_in_child() -> None:
    for partial in list(_burning):
        partial._close()


os.register_at_fork(after_in_child=_close_in_child)

_NO_ROOM = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)
_WAY_OUT = "Remove a model with `vai rm NAME` (`vai ls` shows their sizes), or stop what uses the memory."


def _require_room(root: Path, total: int, need: int, reserve: int) -> None:
    room = free_room(root, reserve=reserve)
    if need > room.free:
        raise NotEnoughRoom(f"Need {_size(total)}, free {_size(room.free)}: {room.limit}. {_WAY_OUT}")


def _size(value: int) -> str:
    if value < 1 << 30:
        return f"{value / (1 << 20):.1f} MiB"
    return f"{value / (1 << 30):.2f} GiB"


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


# --- attaching --------------------------------------------------------------------------------------------------------


def attach(root: Path, digest: str) -> Image:
    """Take a lease and check header, tensor table and spec. Raises ModelNotFound, CorruptImage, WrongVersion, InUse."""
    path = image_path(root, digest)
    fd = _lease(path, digest)
    try:
        header = _header(fd, digest)
        table = TensorTable.from_bytes(read_section(fd, header, "tensors"))
        if table.data_bytes != header.data_bytes:
            raise CorruptImage(
                f"The header and the tensor table of image {digest[:12]} disagree; burn the model again."
            )
        return Image(fd, path, header, table, read_section(fd, header, "spec"))
    except BaseException:
        os.close(fd)
        raise


def read_sections(root: Path, digest: str, *names: str) -> dict[str, bytes]:
    """Copies of metadata sections, checked, without a lease. Raises ModelNotFound, CorruptImage, WrongVersion."""
    fd = _open(image_path(root, digest), digest)
    try:
        header = _header(fd, digest)
        return {name: read_section(fd, header, name) for name in names}
    finally:
        os.close(fd)


def read_header(root: Path, digest: str) -> Header:
    """The header of an image, without a lease. Raises ModelNotFound, CorruptImage, WrongVersion."""
    fd = _open(image_path(root, digest), digest)
    try:
        return _header(fd, digest)
    finally:
        os.close(fd)


def _open(path: Path, digest: str) -> int:
    try:
        _require_private(path.parents[1])
        _require_private(path.parent)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelNotFound(f"No image {digest[:12]} is resident; `vai ls` shows those that are.") from None
    except OSError as error:
        raise Unavailable(f"The image {digest[:12]} cannot be opened: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptImage(f"{path} is not a file; move it away.")
    return fd


def _header(fd: int, digest: str) -> Header:
    header = form.parse_header(os.pread(fd, form.HEADER_BYTES, 0), os.fstat(fd).st_size)
    if header.digest != digest:
        raise CorruptImage(
            f"The file of image {digest[:12]} holds image {header.digest[:12]}; remove it and burn again."
        )
    return header


def _lease(path: Path, digest: str) -> int:
    """A descriptor of the file now at `path`, with LOCK_SH."""
    deadline = time.monotonic() + LEASE_PATIENCE
    while True:
        fd = _open(path, digest)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            if time.monotonic() > deadline:
                raise InUse(f"The image {digest[:12]} is locked by {_named(holders(path))}; try again.") from None
            time.sleep(0.001)
            continue
        if _names_inode(path, fd):
            return fd
        os.close(fd)  # removed, or removed and burned again, between open and lock


# --- removing ---------------------------------------------------------------------------------------------------------


def remove(root: Path, digest: str, *, force: bool = False) -> int:
    """Delete an image and return its bytes. Raises ModelNotFound, and InUse naming the holders unless `force`.

    With `force` it is gone from its name at once, and the last reader frees the bytes.
    """
    path = image_path(root, digest)
    fd = _open(path, digest)
    try:
        with _names_locked(root):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not force:
                    raise InUse(
                        f"The image {digest[:12]} is in use by {_named(holders(path))}. Stop what uses it, or "
                        "remove it with --force: its memory then comes back when the last of them ends."
                    ) from None
            found = os.fstat(fd)
            if _names_inode(path, fd):
                path.unlink()
            for partial in _partials(root):  # of a burner killed between link and unlink
                if os.path.samestat(partial.lstat(), found):
                    partial.unlink()
            return found.st_size
    finally:
        os.close(fd)


def sweep(root: Path) -> list[Path]:
    """Delete what killed burners left, and return it. A living burner's partial is locked, and stays."""
    swept: list[Path] = []
    if not (root / "images").is_dir():
        return swept
    with _names_locked(root):
        for partial in _partials(root):
            try:
                fd = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue  # a symlink or somebody else's file: not a partial of ours
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if os.fstat(fd).st_nlink == 1:  # 2: published, the locks are its readers'
                    continue
            finally:
                os.close(fd)
            partial.unlink(missing_ok=True)
            swept.append(partial)
    return swept


def _partials(root: Path) -> list[Path]:
    return sorted((root / "images").glob(".*.partial"))


def _named(found: list[Holder]) -> str:
    return ", ".join(f"{h.command} (pid {h.pid})" for h in found) or "a process that has just ended"


# --- checking ---------------------------------------------------------------------------------------------------------


def verify(image: Image, threads: int = 2) -> None:
    """Hash every section and chunk. Raises CorruptImage naming the section or the tensors that are not as burned."""
    header = _header(image.fileno(), image.digest)
    for name in form.SECTIONS:
        read_section(image.fileno(), header, name)
    _check_padding(image.fileno(), header)
    table, data = image.table, image.data

    def intact(index: int) -> bool:
        chunk = data[index * table.chunk_bytes : (index + 1) * table.chunk_bytes]
        return hashlib.sha256(chunk).digest() == table.chunks[index]

    from concurrent.futures import ThreadPoolExecutor  # 6 ms that only a verification should pay

    with ThreadPoolExecutor(threads) as pool:
        wrong = [index for index, good in enumerate(pool.map(intact, range(len(table.chunks)))) if not good]
    if wrong:
        names = list(dict.fromkeys(tensor.name for index in wrong for tensor in table.at(index)))
        raise CorruptImage(
            f"The image {image.digest[:12]} is corrupt in {', '.join(names) or 'its padding'} "
            f"({len(wrong)} of {len(table.chunks)} chunks of 4 MiB). Remove it with --force and burn the model again."
        )


def _check_padding(fd: int, header: Header) -> None:
    """What no hash covers, between header, data and sections, is zero."""
    starts, ends = [form.HEADER_BYTES], [header.data_offset]
    end = header.data_offset + header.data_bytes
    for section in header.sections.values():
        starts.append(end)
        ends.append(section.offset)
        end = section.offset + section.length
    for start, end in zip(starts, ends, strict=True):
        if os.pread(fd, end - start, start).strip(b"\0"):
            raise CorruptImage(f"The image {header.digest[:12]} has bytes where it must have none; burn it again.")


# --- pages ------------------------------------------------------------------------------------------------------------


def resident_share(image: Image) -> float:
    """Share of the data area that is in memory and not swapped out, 0 to 1."""
    pages = -(-image.header.data_bytes // os.sysconf("SC_PAGESIZE"))
    return image.mapping.resident_pages() / pages


def huge_share(image: Image) -> float:
    """Share of the data area that a fresh mapping reads through 2 MiB pages, 0 to 1. Touches one byte every 2 MiB."""
    memory = map_data(image.fileno(), image.header)
    bytes(memory.view[:: form.DATA_ALIGN])
    return _huge_bytes(memory.address) / image.header.data_bytes


def _huge_bytes(address: int) -> int:
    """Bytes of the mapping at `address` that this process maps through huge page-table entries."""
    inside, huge = False, 0
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):
                inside = int(key.partition("-")[0], 16) == address
            elif inside and key in ("ShmemPmdMapped:", "FilePmdMapped:"):
                huge += int(rest.split()[0]) << 10
    return huge


def collapse(image: Image, step: int = form.DATA_ALIGN) -> float:
    """Rebuild the data area from 2 MiB pages, `step` bytes a call; the share that is huge afterwards, 0 to 1.

    Best effort: a range the kernel cannot collapse (no free huge page, not a tmpfs) stays as it was.
    The caller sets the priority.
    """
    whole = image.header.data_bytes // form.DATA_ALIGN * form.DATA_ALIGN
    for start in range(0, whole, step):
        try:
            image.mapping.advise(MADV_COLLAPSE, start, min(step, whole - start))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS):
                break  # a kernel or filesystem that does not do this at all
    return huge_share(image)
