"""What `vai status` and `vai ps` show: from files, locks and whoever answers; every process may be dead."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from vai.cli.engine import ask
from vai.config import Config
from vai.daemon import client, roles
from vai.errors import Unavailable, VaiError
from vai.rom import segment
from vai.rom.holders import holders
from vai.rom.registry import Name, Registry, Resident
from vai.rom.room import free_room

Report = dict[str, Any]
_PATIENCE = 5.0


def daemon(root: Path) -> Report:
    """What a living daemon tells; empty where none answers."""
    try:
        return client.call(roles.socket_path(root, "daemon"), "status", timeout=_PATIENCE)
    except Unavailable:
        return {}


def processes(root: Path, told: Report) -> dict[str, Report]:
    """Role -> pid, state, uptime (seconds), private memory (bytes) and, from a living daemon, address and restarts."""
    found = {}
    for role in roles.ROLES:
        pid = roles.holder(root, role)
        report: Report = {
            "state": "stopped" if pid is None else "running",
            "pid": pid,
            **told.get("roles", {}).get(role, {}),
        }
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                report |= {"pid": pid, "uptime": roles.age(pid), "private_bytes": _private(pid)}
        found[role] = report
    return found


def _private(pid: int) -> int | None:
    """Bytes of anonymous memory of a process: what it holds that no other shares."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return None


def engine(root: Path) -> Report | None:
    """The engine's own status, as EngineStatus of engine/port.py; None where none answers."""
    try:
        status = ask(root, lambda port: port.status())
    except Unavailable:
        return None
    import msgspec

    built: Report = msgspec.to_builtins(status)
    return built


def images(settings: Config) -> list[Report]:
    """The images in memory with their names, sizes, shape, residency and leases."""
    registry = Registry(settings.root, settings.names)
    names = registry.names()
    return [_image(settings.root, resident, names) for resident in registry.resident()]


def _image(root: Path, resident: Resident, names: list[Name]) -> Report:
    report: Report = {
        "names": [name.name for name in names if name.digest == resident.digest],
        "digest": resident.digest,
        "bytes": resident.bytes,
        "problem": resident.problem,
    }
    if resident.header is not None:
        report |= {"burned_at": resident.header.burned_at, "burn_seconds": resident.header.burn_seconds}
    report["leases"] = [
        {"pid": holder.pid, "command": holder.command} for holder in holders(resident.path) if holder.pid != os.getpid()
    ]
    try:
        with segment.attach(root, resident.digest) as image:
            report["spec"] = json.loads(image.spec)
            report |= {"resident": segment.resident_share(image), "huge": segment.huge_share(image)}
    except VaiError as error:
        report["problem"] = error.message
    return report


def absent(settings: Config) -> list[Report]:
    """The names whose image is not in memory."""
    registry = Registry(settings.root, settings.names)
    return [
        {"name": name.name, "source": name.source}
        for name in registry.names()
        if name.digest is None or not registry.is_resident(name.digest)
    ]


def status(settings: Config) -> Report:
    """Everything `vai status --json` prints."""
    segment.prepare(settings.root)
    room = free_room(settings.root)
    running, told = engine(settings.root), daemon(settings.root)
    return {
        "root": str(settings.root),
        "processes": processes(settings.root, told),
        "engine": running,
        "images": images(settings),
        "absent": absent(settings),
        "loads": [load for load in told.get("loads", []) if load["state"] != "done"],
        "scratchpad": None if running is None else {"bytes": running["pool_bytes"], "used": running["pool_used"]},
        "room": {"free": room.free, "limit": room.limit},
    }
