"""What tests of several rooms share: two tiny models, synthesized and burned once a session, and a port."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from vai.burn.burn import burn
from vai.burn.synth import synthesize
from vai.rom.registry import Name, Registry

# Machines are shared: how long an example takes says nothing about the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

# A job that a script leaves in the background ignores interrupts, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a time limit of their own are the longest: last of all, they would keep one worker waiting."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


TINY_MODELS = {"tiny": "Q4_0", "tiny-qwen2": "Q8_0"}


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """(root, names, {name: digest}) with "tiny" (llama, Q4_0) and "tiny-qwen2" (Q8_0) burned and named.

    Shared by the whole session: read, attach and serve it, but leave its images and names as they are.
    """
    base = tmp_path_factory.mktemp("tiny")
    root, names = base / "root", base / "names"
    registry, digests = Registry(root, names), {}
    for shape, block_type in TINY_MODELS.items():
        source = base / f"{shape}.gguf"
        synthesize(source, shape=shape, type=block_type, seed=1)
        digests[shape] = burn(source, root).digest
        registry.put(Name(shape, str(source), digest=digests[shape]))
    return root, names, digests


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody gets by chance while a test runs: bound all the time, but not listened on."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]
