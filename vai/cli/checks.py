"""What people stumble over, looked at before they do: each check says what it found, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vai.cli.output import size
from vai.config import Config
from vai.daemon import pool, roles
from vai.rom.image import DATA_ALIGN
from vai.rom.mapping import MADV_COLLAPSE, Mapping
from vai.rom.room import rooms

SYSTEM_USERS = 1000  # logind leaves the shared memory of user ids below alone
_LOGIND = ("usr/lib/systemd/logind.conf.d", "run/systemd/logind.conf.d", "etc/systemd/logind.conf.d")


class Check(NamedTuple):
    """good: nothing to do · found: a sentence · remedy: what to do, "" where there is nothing."""

    name: str
    good: bool
    found: str
    remedy: str = ""


def checks(settings: Config) -> list[Check]:
    """Every check, over the machine as it is now."""
    return [
        *shared_memory(settings.root),
        limits(settings.root),
        huge_pages(),
        rights(settings.root),
        remove_ipc(Path("/"), os.getuid()),
        threads(settings.threads),
        *processes(settings.root),
    ]


def shared_memory(root: Path, *, machine: int | None = None) -> list[Check]:
    """Whether images live in memory, and whether that filesystem is large enough. machine: its bytes of memory."""
    there = _existing(root)
    kind, mount = _filesystem(there)
    found = os.statvfs(there)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    memory = machine or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    in_memory = kind in ("tmpfs", "ramfs", "hugetlbfs")
    kept_where = Check(
        "filesystem",
        in_memory,
        f"{root} is on {kind}, mounted at {mount}.",
        "" if in_memory else "Images are meant to be in memory: set VAI_ROOT to a directory under /dev/shm.",
    )
    small = total < memory // 2
    how_large = Check(
        "its size",
        not small,
        f"{size(total)} with {size(free)} free, on a machine with {size(memory)}.",
        f"Under half of the memory. In a container: --shm-size, or ipc: host; else mount -o remount,size=80% {mount}."
        if small
        else "It promises more than the machine has; VAI asks the machine too before it burns."
        if total > memory
        else "",
    )
    return [kept_where, how_large]


def limits(root: Path) -> Check:
    """Memory cgroups, as containers have them."""
    _, _, *cgroups = rooms(root)
    if not cgroups:
        return Check("container limits", True, "No memory cgroup limits this process.")
    least = min(cgroups, key=lambda room: room.free)
    enough = least.free >= 1 << 30
    return Check(
        "container limits",
        enough,
        f"{least.limit[0].upper()}{least.limit[1:]}, of which {size(max(least.free, 0))} are left.",
        "" if enough else "Images count against it: raise the limit of the container or service.",
    )


def huge_pages() -> Check:
    """Whether the kernel gives an image 2 MiB pages when asked, which it may whatever shmem_enabled says."""
    settings = [f"{name} is {_setting(name)}" for name in ("enabled", "shmem_enabled")]
    works = _collapses()
    return Check(
        "huge pages",
        works,
        f"Images {'get' if works else 'do not get'} 2 MiB pages (transparent_hugepage: {', '.join(settings)}).",
        ""
        if works
        else "Needs Linux 6.1 and transparent_hugepage/enabled other than never; decoding is slower without.",
    )


def _collapses() -> bool:
    """Try it, on one page's worth of shared memory."""
    descriptor = os.memfd_create("vai-doctor", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, bytes(DATA_ALIGN))
        Mapping(descriptor, 0, DATA_ALIGN).advise(MADV_COLLAPSE, 0, DATA_ALIGN)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _setting(name: str) -> str:
    """The chosen word of a file such as "always [madvise] never"."""
    try:
        words = Path(f"/sys/kernel/mm/transparent_hugepage/{name}").read_text()
    except OSError:
        return "absent"
    return words.partition("[")[2].partition("]")[0]


def rights(root: Path) -> Check:
    """Who else could read or change the images."""
    if not root.exists():
        return Check("rights", True, f"{root} does not exist yet; VAI makes it for you alone.")
    wrong = [f"{path} {fault}" for path in (root, *_below(root)) if (fault := _fault(path)) is not None]
    if wrong:
        return Check("rights", False, f"{'; '.join(wrong[:3])}.", f"chown and chmod them back to you: {root} is 0700.")
    return Check("rights", True, f"{root} belongs to you, and no other user may look into it. Root may.")


def _below(root: Path) -> Iterator[Path]:
    for name in ("images", "run"):
        if (root / name).is_dir():
            yield root / name
    yield from (root / "images").glob("*.rom")


def _fault(path: Path) -> str | None:
    try:
        found = path.lstat()
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def remove_ipc(system: Path, uid: int) -> Check:
    """Whether systemd deletes this user's shared memory at the end of the last login. system: the root directory."""
    name = "logind"
    if not (system / "run/systemd/users").is_dir():
        return Check(name, True, "systemd-logind does not run here, so nobody deletes images behind your back.")
    if uid < SYSTEM_USERS:
        return Check(name, True, "systemd-logind leaves the shared memory of system users alone.")
    if not _removes(system):
        return Check(name, True, "systemd-logind is told to leave shared memory alone (RemoveIPC=no).")
    lingering = (system / "var/lib/systemd/linger").is_dir() and any(
        (system / "var/lib/systemd/linger" / who).exists() for who in _names(uid)
    )
    if lingering:
        return Check(name, True, "systemd-logind keeps your shared memory, because you linger.")
    return Check(
        name,
        False,
        "systemd-logind deletes your shared memory, images included, when you log out (RemoveIPC=yes).",
        "Run: loginctl enable-linger. Or set RemoveIPC=no in /etc/systemd/logind.conf.",
    )


def _removes(system: Path) -> bool:
    """The last word on RemoveIPC in logind's files, in the order it reads them; yes where nobody says."""
    files = [system / "etc/systemd/logind.conf"]
    drop_ins = {file.name: file for place in _LOGIND for file in sorted((system / place).glob("*.conf"))}
    removes = True
    for file in files + [drop_ins[key] for key in sorted(drop_ins)]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in file.read_text().splitlines():
                key, _, value = line.partition("=")
                if key.strip() == "RemoveIPC":
                    removes = value.strip().lower() in ("yes", "true", "on", "1")
    return removes


def _names(uid: int) -> list[str]:
    import pwd

    with contextlib.suppress(KeyError):
        return [pwd.getpwuid(uid).pw_name]
    return []


def threads(count: int) -> Check:
    """Spinning workers without a core of their own wait for each other."""
    cores = len(os.sched_getaffinity(0))
    many = count > cores
    return Check(
        "threads",
        not many,
        f"{count} compute threads on {cores} logical cores.",
        "More threads than cores make every step slower: set VAI_THREADS." if many else "",
    )


def processes(root: Path) -> list[Check]:
    """Which roles live. None has to; but an engine without a daemon is not restarted when it dies."""
    alive = {role: roles.holder(root, role) for role in roles.ROLES}
    running = [f"{role} (process {pid})" for role, pid in alive.items() if pid is not None]
    if not running:
        return [Check("processes", True, "Nothing runs: vai serve starts the server, vai run needs none.")]
    missing = [role for role, pid in alive.items() if pid is None]
    found = [
        Check(
            "processes",
            not missing,
            f"Alive: {', '.join(running)}." + (f" Not: {', '.join(missing)}." if missing else ""),
            "vai serve takes over what lives and starts the rest." if missing else "",
        )
    ]
    engine = alive["engine"]
    if engine is not None:
        descriptor = pool.reopen(engine)
        kept = descriptor is not None
        if descriptor is not None:
            os.close(descriptor)
        found.append(
            Check(
                "scratchpad",
                kept,
                "The engine's scratchpad can be handed to its successor." if kept else "It cannot be reached.",
                "" if kept else "A container or another user stands between: start VAI again as one user.",
            )
        )
    return found


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _filesystem(path: Path) -> tuple[str, str]:
    """(type, mount point) of the filesystem of a path, from /proc/self/mountinfo."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted, _, filesystem = line.partition(" - ")
        fields = mounted.split()
        if fields[2] == wanted:
            return filesystem.split(" ", 1)[0], fields[4]
    return "an unknown filesystem", str(path)
