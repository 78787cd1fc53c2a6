"""The burner as a process: what it says, and what killing it at any point leaves: nothing."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vai.burn.synth import SHAPES, synthesize
from vai.rom import segment

CHUNKS = 15  # of the checkpoint below
AHEAD = 6  # lines a burner can say that nobody has read, below


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 MB, so that a burn has points to be killed at."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.gguf"
    shape = msgspec.structs.replace(SHAPES["qwen2-1.5b"], layers=1, ffn=512, vocabulary=14_336, context=512)
    synthesize(path, shape=shape, type="F16")
    return path


@pytest.fixture
def root() -> Iterator[Path]:
    """A root in shared memory, where images live."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="vai-test-"))
    yield directory / "root"
    shutil.rmtree(directory)


def command(root: Path, source: Path) -> list[str]:
    return [sys.executable, "-m", "vai.burn", "--root", str(root), "--source", str(source)]


def run(root: Path, source: Path) -> tuple[int, list[dict[str, Any]]]:
    # It ends at idle priority. In a session of its own the kernel gives it a share of the cores even so, if others want
    # all of them (autogroups).
    done = subprocess.run(
        command(root, source), stdout=subprocess.PIPE, timeout=60, check=False, start_new_session=True
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def stopped_after(root: Path, source: Path, lines: int, number: signal.Signals) -> tuple[int, list[dict[str, Any]]]:
    """Send a signal to a burner that has said this many lines; its exit code and what it said in all.

    It talks through a socket of the smallest size, so it is at most AHEAD lines further when the signal comes.
    """
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with ours, subprocess.Popen(command(root, source), stdout=theirs) as process:
        theirs.close()
        with ours.makefile("rb", buffering=0) as said:
            heard = [said.readline() for _ in range(lines)]
            process.send_signal(number)
            heard += said.readlines()
    return process.returncode, [json.loads(line) for line in heard]


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "images").iterdir()) if (root / "images").exists() else []


def bytes_held(root: Path) -> int:
    """Bytes of memory that the files under root take."""
    return sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())


def test_it_reports_every_step_and_the_image(checkpoint: Path, root: Path) -> None:
    code, said = run(root, checkpoint)
    assert code == 0
    assert [line["step"] for line in said] == ["reading", *["packing"] * (CHUNKS + 1), "publishing", "published"]
    assert said[-2]["done"] == said[-2]["total"] > 0
    assert said[-2]["rate"] > 0
    published = said[-1]
    assert left(root) == [f"{published['digest']}.rom"]
    with segment.attach(root, published["digest"]) as image:
        segment.verify(image)
        assert image.weights == published["weights"]


def test_the_image_has_huge_pages_when_the_burner_ends(checkpoint: Path, root: Path) -> None:
    _, said = run(root, checkpoint)
    with segment.attach(root, said[-1]["digest"]) as image:
        assert segment.huge_share(image) > 0.5


@pytest.mark.parametrize("lines", [1, 2, 3, 5, CHUNKS + 2 - AHEAD - 1])
def test_killed_at_any_point_it_leaves_nothing_visible_and_the_space_comes_back(
    lines: int, checkpoint: Path, root: Path
) -> None:
    code, said = stopped_after(root, checkpoint, lines, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not [name for name in left(root) if name.endswith(".rom")], said
    if (root / "images").exists():
        segment.sweep(root)
        assert left(root) == []
        assert bytes_held(root) == 0
    code, said = run(root, checkpoint)
    assert code == 0, said
    assert left(root) == [f"{said[-1]['digest']}.rom"]


@pytest.mark.parametrize("lines", [CHUNKS + 2, CHUNKS + 3])
def test_killed_around_publication_there_is_a_whole_image_or_none(lines: int, checkpoint: Path, root: Path) -> None:
    code, _ = stopped_after(root, checkpoint, lines, signal.SIGKILL)
    assert code == -signal.SIGKILL
    segment.sweep(root)
    for name in left(root):
        with segment.attach(root, name.removesuffix(".rom")) as image:
            segment.verify(image)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lines", [1, 2, 4, CHUNKS + 2 - AHEAD - 1])
def test_interrupted_it_leaves_nothing_and_says_so(
    number: signal.Signals, lines: int, checkpoint: Path, root: Path
) -> None:
    code, said = stopped_after(root, checkpoint, lines, number)
    assert code == 130
    assert said[-1]["error"]["code"] == "interrupted"
    assert left(root) == []


def test_a_listener_that_goes_away_does_not_stop_it(checkpoint: Path, root: Path) -> None:
    with subprocess.Popen(command(root, checkpoint), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    [name] = left(root)
    assert name.endswith(".rom")


def test_missing_strange_and_malformed_sources_are_told_apart(checkpoint: Path, root: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    with checkpoint.open("rb") as file:
        short.write_bytes(file.read(1 << 20))
    found = {}
    for source in (tmp_path / "absent.gguf", tmp_path, short):
        code, said = run(root, source)
        found[source.name] = (code, said[-1]["error"]["code"])
    assert list(found.values()) == [(4, "model_not_found"), (2, "invalid_value"), (9, "malformed_file")]
    assert left(root) == []


def test_in_a_small_tmpfs_it_is_refused_before_writing(checkpoint: Path, tmp_path: Path) -> None:
    """A filesystem of 16 MiB, mounted in a namespace of the burner's own."""
    mount = tmp_path / "small"
    mount.mkdir()
    script = 'mount -t tmpfs -o size=16m,mode=700 none "$0" && "$@"; code=$?; find "$0" -type f; exit $code'
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(mount)]
    done = subprocess.run([*argv, *command(mount / "root", checkpoint)], capture_output=True, timeout=60, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]
    files = [line for line in done.stdout.splitlines() if not line.startswith(b"{")]
    assert done.returncode == 8, done.stderr
    assert said[-1]["error"]["code"] == "not_enough_room"
    assert "Need 59" in said[-1]["error"]["message"]
    assert "free 16.0 MiB" in said[-1]["error"]["message"]
    assert "vai rm" in said[-1]["error"]["message"]
    assert all(file.endswith(b"/room.lock") for file in files), files
