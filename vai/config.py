"""The only reader of the environment. Everything else gets its values as arguments.

Variables: VAI_ROOT (where images live), VAI_HOST, VAI_PORT, VAI_API_KEY, VAI_THREADS, VAI_KV (bytes of scratchpad,
or with a suffix K, M, G), VAI_KV_TYPE (how keys and values are stored), VAI_ISA (force an instruction set),
VAI_FAST (what prompts may be computed with: off, portable, amx; otherwise what the machine has and gains by, or with
VAI_ISA nothing),
VAI_PATIENCE (seconds to wait for an engine that is away, 0 gives answers up), XDG_DATA_HOME (names), XDG_STATE_HOME
(logs).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vai.errors import BadRequest

ISAS = ("scalar", "avx2", "avx512", "amx")
FASTS = ("off", "portable", "amx")
KV_TYPES = ("bf16", "f32", "q8_0")


@dataclass(frozen=True, slots=True)
class Config:
    """Where things are and how large they may be. Sizes in bytes.

    root: images and run files (a directory of a shared-memory filesystem) · names: small files that outlive reboots ·
    logs: one file a role · threads: compute threads · kv_bytes: the scratchpad's size, None = a share of free memory ·
    kv_type: how keys and values are stored in it · isa: forced instruction set or None · fast: forced fast kind, "off",
    or None · patience: seconds that requests wait for an engine that died (0: they end).
    """

    root: Path
    names: Path
    logs: Path
    host: str
    port: int
    api_key: str | None
    threads: int
    kv_bytes: int | None
    kv_type: str
    isa: str | None
    fast: str | None
    patience: int


def parse_size(text: str) -> int:
    """'512M' -> bytes. Suffixes K, M, G, T are powers of 1,024. Raises BadRequest."""
    digits, factor = text.strip().upper().removesuffix("B").removesuffix("I"), 1
    for power, suffix in enumerate("KMGT", start=1):
        if digits.endswith(suffix):
            digits, factor = digits[:-1], 1024**power
            break
    try:
        size = int(float(digits) * factor)
    except ValueError:
        raise BadRequest(f"'{text}' is not a size; write bytes, or a number with K, M, G or T, as in 4G.") from None
    if not 0 < size < 1 << 50:
        raise BadRequest(f"'{text}' is not a usable size.")
    return size


def _integer(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name)
    if text is None:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise BadRequest(f"{name}={text} must be a whole number from {low} to {high}.")
    return int(text)


def load(env: Mapping[str, str] | None = None) -> Config:
    """The configuration of this process, from `env` (default: the environment). Raises BadRequest."""
    env = os.environ if env is None else env
    home = Path(env.get("HOME") or Path.home())
    data = Path(env.get("XDG_DATA_HOME") or home / ".local/share")
    state = Path(env.get("XDG_STATE_HOME") or home / ".local/state")
    isa = env.get("VAI_ISA") or None
    if isa is not None and isa not in ISAS:
        raise BadRequest(f"VAI_ISA={isa} is not known; choose one of {', '.join(ISAS)}.")
    fast = env.get("VAI_FAST") or ("off" if isa else None)  # who asks for less does not want tiles
    if fast is not None and fast not in FASTS:
        raise BadRequest(f"VAI_FAST={fast} is not known; choose one of {', '.join(FASTS)}.")
    kv_type = env.get("VAI_KV_TYPE") or "bf16"
    if kv_type not in KV_TYPES:
        raise BadRequest(f"VAI_KV_TYPE={kv_type} is not known; choose one of {', '.join(KV_TYPES)}.")
    return Config(
        root=Path(env.get("VAI_ROOT") or f"/dev/shm/vai-{os.getuid()}"),  # noqa: S108 - a private 0700 directory, checked
        names=data / "vai/names",
        logs=state / "vai/logs",
        host=env.get("VAI_HOST") or "127.0.0.1",
        port=_integer(env, "VAI_PORT", 8642, 0, 65535),
        api_key=env.get("VAI_API_KEY") or None,
        threads=_integer(env, "VAI_THREADS", len(os.sched_getaffinity(0)), 1, 1024),
        kv_bytes=parse_size(env["VAI_KV"]) if env.get("VAI_KV") else None,
        kv_type=kv_type,
        isa=isa,
        fast=fast,
        patience=_integer(env, "VAI_PATIENCE", 10, 0, 3600),
    )
