"""`vai doctor`: this machine, what it can do at most, how near the kernels come, and what people stumble over."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import click

from vai import config
from vai.cli.checks import checks
from vai.cli.output import json_option, print_json, size, table
from vai.config import Config
from vai.errors import NotEnoughRoom
from vai.rom.room import free_room

LEAST_BUFFER = 256 << 20
MOST_BUFFER = 2 << 30
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

Report = dict[str, Any]
_RATES = ("read", "int8", "f32", "bf16")


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Look at this machine: what it is, what it can do at most, how near VAI comes, and what could go wrong.

    Takes a few seconds and all compute threads. Other programs disturb it, so every speed is a median with its spread.
    Shares are of the ceiling measured in turns with the kernel: reading at one row, multiplying at 128 rows. Which
    kernels and prefetches are the fastest is remembered in run/tuned.json below VAI_ROOT, if there is a VAI_ROOT yet.
    """
    settings = config.load()
    found = examine(settings)
    if as_json:
        print_json(found)
        return
    _machine(found)
    click.echo()
    _ceilings(found)
    click.echo()
    _kernels(found)
    click.echo()
    _checks(found)


def examine(settings: Config) -> Report:
    """Everything `vai doctor --json` prints. Raises NotEnoughRoom where not even a buffer can be had."""
    from vai.kernels import ceilings
    from vai.kernels import table as kernels

    load = os.getloadavg()
    measured = ceilings.measure(
        threads=settings.threads,
        buffer_bytes=_buffer_bytes(settings),
        directory=settings.root / "run",
        isa=settings.isa,
    )
    return {
        "machine": {**machine(), "threads": settings.threads, "load": load},
        "isas": kernels.isas(),
        "refused": dict(kernels.refused()),
        "isa": measured.isa,
        "implementations": kernels.implementations(measured.isa),
        "ahead": measured.ahead,
        "buffer_bytes": measured.buffer_bytes,
        "ceilings": [
            {"threads": ceiling.threads}
            | {name: speed._asdict() for name in _RATES if (speed := getattr(ceiling, name)) is not None}
            for ceiling in (measured.one, measured.all)
        ],
        "linear": [
            linear._asdict() | {"read": linear.read._asdict(), "multiply": linear.multiply._asdict()}
            for linear in measured.linear
        ],
        "fasts": kernels.fasts(),
        "refused_fasts": dict(kernels.refused_fasts()),
        "fast": kernels.fast(settings.fast),
        "fast_linear": [fast._asdict() | {"multiply": fast.multiply._asdict()} for fast in measured.fast],
        "slow": [name for name in kernels.block_types() if name not in kernels.fast_types()],
        "checks": [check._asdict() for check in checks(settings)],
    }


def _buffer_bytes(settings: Config) -> int:
    """Four times the last cache, within bounds; a quarter of the free memory at most."""
    room = free_room(settings.root)
    wanted = min(max(LEAST_BUFFER, 4 * max(caches().values(), default=0)), MOST_BUFFER)
    count = min(wanted, room.free // 4) // 4096 * 4096
    if count < 16 << 20:
        raise NotEnoughRoom(f"Only {size(room.free)} are free, too few to measure anything: {room.limit}.")
    return count


def machine() -> Report:
    """The processor and the memory, from the kernel's own files."""
    return {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "logical_cores": len(os.sched_getaffinity(0)),
        "physical_cores": _physical(),
        "caches": caches(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _physical() -> int:
    """Cores this process may use, hyper-threads of one counted once; a hypervisor may hide which are."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)


def caches() -> dict[str, int]:
    """Bytes of each cache of the first core, as "L1d", "L2", "L3"; empty where the kernel says nothing."""
    found = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
            count = config.parse_size((index / "size").read_text())
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = count
    return found


def _machine(found: Report) -> None:
    told = found["machine"]
    cores = f"{told['logical_cores']} logical cores"
    if told["physical_cores"] != told["logical_cores"]:
        cores += f" on {told['physical_cores']} physical ones"
    rows = [
        ("CPU", f"{told['cpu']} ({told['architecture']}), {cores}"),
        ("Caches", ", ".join(f"{name} {size(count)}" for name, count in told["caches"].items()) or "not told"),
        ("Memory", size(told["memory"])),
        ("Kernel", told["kernel"]),
        ("Load", f"{told['load'][0]:.2f} before this measurement"),
        ("Instruction sets", f"{', '.join(found['isas'])}; used: {found['isa']}"),
    ]
    rows += [
        (f"  {isa}", ", ".join(op for op, chosen in found["implementations"].items() if chosen == isa))
        for isa in reversed(found["isas"])
        if isa in found["implementations"].values()
    ]
    rows += [(f"  {isa}", f"promised, but not used: {reason}") for isa, reason in found["refused"].items()]
    rows += [("Prefetches", f"{found['ahead']:,} bytes ahead")]
    rows += [("Fast kind", f"{found['fast']}, for prompts" if found["fast"] else "none: prompts are exact as all else")]
    rows += [(f"  {name}", f"promised, but not used: {reason}") for name, reason in found["refused_fasts"].items()]
    table(("MACHINE", ""), rows)


def _ceilings(found: Report) -> None:
    header = ["CEILINGS", f"READ {size(found['buffer_bytes'])}", "INT8 MULTIPLY+ADD", "F32 MULTIPLY+ADD"]
    rates = [name for name in _RATES[1:] if name in found["ceilings"][0]]
    header += ["BF16 TILES"] if "bf16" in rates else []
    rows = []
    for ceiling in found["ceilings"]:
        label = f"{ceiling['threads']} thread{'' if ceiling['threads'] == 1 else 's'}"
        rows.append((label, _speed(ceiling["read"], "GB/s"), *(_tops(ceiling[name]) for name in rates)))
    table(header, rows)


def _kernels(found: Report) -> None:
    rows = [
        (
            linear["type"],
            _speed(linear["read"], "GB/s"),
            f"{linear['read_share']:.0%}",
            _tops(linear["multiply"]),
            f"{linear['multiply_share']:.0%} of {'f32' if linear['floats'] else 'int8'}",
        )
        for linear in found["linear"]
    ]
    threads = found["machine"]["threads"]
    table((f"LINEAR ({threads} threads)", "1 ROW", "SHARE", "128 ROWS", "SHARE"), rows)
    if found["fast_linear"]:
        click.echo()
        fast = found["fast_linear"]
        shares = [(each["type"], _tops(each["multiply"]), f"{each['multiply_share']:.0%}") for each in fast]
        table((f"FAST LINEAR ({threads} threads)", "512 ROWS", "SHARE OF TILES"), shares)
    click.echo(f"Slow, unpacked weight by weight and not measured: {', '.join(found['slow'])}")


def _checks(found: Report) -> None:
    table(("CHECK", "", ""), [(c["name"], "ok" if c["good"] else "LOOK", c["found"]) for c in found["checks"]])
    for check in found["checks"]:
        if check["remedy"]:
            click.echo(f"{check['name']}: {check['remedy']}")


def _speed(speed: dict[str, float], unit: str) -> str:
    median, low, high = (speed[name] / 1e9 for name in ("median", "low", "high"))
    return f"{median:.1f} {unit} ({low:.1f} to {high:.1f})"


def _tops(speed: dict[str, float]) -> str:
    """Multiply-adds as the field counts them: two operations each."""
    median, low, high = (2 * speed[name] / 1e12 for name in ("median", "low", "high"))
    return f"{median:.3f} TOPS ({low:.3f} to {high:.3f})"
