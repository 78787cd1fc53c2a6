"""`vai serve`: become the daemon, or start it in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vai import config
from vai.config import KV_TYPES, Config
from vai.daemon import client, roles
from vai.daemon.supervise import last_line, open_log
from vai.errors import Unavailable

_START_PATIENCE = 120.0
_POLL = 0.02
_HOPELESS = 4  # restarts of a role while waiting for the first readiness


@click.command()
@click.option("--host", help="Address to listen on; default 127.0.0.1. Any other needs VAI_API_KEY.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on; default 8642.")
@click.option(
    "--kv", help="Scratchpad for all models together, as in 4G; default a quarter of free memory, at most 4G."
)
@click.option("--kv-type", type=click.Choice(KV_TYPES), help="How keys and values are stored; default bf16. See below.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Compute threads; default one for each core.")
@click.option("--deterministic", is_flag=True, help="Requests that do not say are deterministic. See below.")
@click.option("--detach", is_flag=True, help="Return when VAI is ready, and leave it running in the background.")
def serve(
    host: str | None,
    port: int | None,
    kv: str | None,
    kv_type: str | None,
    threads: int | None,
    deterministic: bool,
    detach: bool,
) -> None:
    """Start VAI: a daemon that keeps an engine and an OpenAI-compatible HTTP server running.

    Models in memory answer at once; models that are named but not in memory are burned again in the background.
    q8_0 keeps nearly twice the tokens of bf16 in the same scratchpad, each element to one part in 254 of the largest of
    its 32; f32 keeps half as many. Pages of one type mean nothing to an engine of another.

    A deterministic answer depends on weights and tokens alone: not on what is cached, nor on the machine. Prompts of
    others may be computed in the fast kind, where the machine has it (`vai doctor`): sooner, to slightly other numbers.

    Ctrl-C (or `vai stop`) ends all processes; the weights stay. If an engine and a server still run without their
    daemon, the new one takes them over without disturbing a request.

    \b
    Examples:
      vai serve
      vai serve --port 9000 --kv 2G --detach
    """
    settings = config.load()
    settings = replace(
        settings,
        host=host or settings.host,
        port=port or settings.port,
        threads=threads or settings.threads,
        kv_bytes=config.parse_size(kv) if kv else settings.kv_bytes,
        kv_type=kv_type or settings.kv_type,
    )
    roles.refuse_second(settings.root, "daemon")
    argv, key = _daemon(settings, deterministic)
    if detach:
        _start(settings, argv, key)
    else:
        os.execv(sys.executable, argv)  # noqa: S606 - our own program, and no shell is wanted


def _daemon(settings: Config, deterministic: bool) -> tuple[list[str], int | None]:
    """The daemon's command line, and the descriptor of the API key: as an argument, anybody could read it in `ps`."""
    argv = [sys.executable, "-m", "vai.daemon", "--root", str(settings.root), "--names", str(settings.names)]
    argv += ["--logs", str(settings.logs), "--host", settings.host, "--port", str(settings.port)]
    argv += ["--threads", str(settings.threads), "--kv-type", settings.kv_type]
    if settings.kv_bytes is not None:
        argv += ["--kv-bytes", str(settings.kv_bytes)]
    argv += ["--patience", str(settings.patience)]
    if deterministic:
        argv += ["--deterministic"]
    if settings.isa is not None:
        argv += ["--isa", settings.isa]
    if settings.fast is not None:
        argv += ["--fast", settings.fast]
    if settings.api_key is None:
        return argv, None
    key = os.memfd_create("vai-api-key", 0)  # inherited through exec
    os.write(key, settings.api_key.encode())
    return [*argv, "--api-key-fd", str(key)], key


def _start(settings: Config, argv: list[str], key: int | None) -> None:
    """Start the daemon in a session of its own and wait until engine and server are ready."""
    path = settings.logs / "daemon.log"
    with open_log(path) as log:
        daemon = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=() if key is None else (key,),
        )
    deadline = time.monotonic() + _START_PATIENCE
    while daemon.poll() is None:
        states = _states(settings.root)
        if states and all(state["state"] == "ready" for state in states.values()):
            click.echo(f"VAI is ready at {states['server']['address']}/v1 (daemon: process {daemon.pid}).")
            daemon.returncode = 0  # it lives on: not ours to wait for
            return
        for role, state in states.items():
            if state.get("restarts", 0) >= _HOPELESS:
                reason = last_line(settings.logs / f"{role}.log")
                raise Unavailable(f"The {role} keeps ending ({state['last_exit']}): {reason} See vai logs {role}.")
        if time.monotonic() > deadline:
            raise Unavailable(
                f"VAI was not ready within {_START_PATIENCE:.0f} s; `vai status` and `vai logs` show why."
            )
        time.sleep(_POLL)
    click.echo(last_line(path), err=True)  # the daemon's own last words, which say what is wrong
    sys.exit(daemon.returncode)


def _states(root: Path) -> dict[str, Any]:
    try:
        states: dict[str, Any] = client.call(roles.socket_path(root, "daemon"), "status", timeout=5.0)["roles"]
    except Unavailable:
        return {}
    return states
