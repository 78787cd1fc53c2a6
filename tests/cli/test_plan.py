"""`vai plan`: what it promises before anything is loaded is what is there afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vai.burn.burn import burn, preview
from vai.burn.synth import synthesize
from vai.rom import segment
from vai.rom.registry import Name, Registry

Vai = Callable[..., subprocess.CompletedProcess[str]]


def planned(vai: Vai, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    done = vai("plan", "--json", *arguments)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("shape", "type"), [("tiny", "Q8_0"), ("tiny", "F16"), ("tiny-qwen2", "Q4_0")])
def test_the_size_of_an_image_is_known_to_the_byte_before_it_is_burned(tmp_path: Path, shape: str, type: str) -> None:
    synthesize(tmp_path / "m.gguf", shape=shape, type=type)
    promised = preview(tmp_path / "m.gguf")
    burned = burn(tmp_path / "m.gguf", tmp_path / "root")
    file = segment.image_path(tmp_path / "root", burned.digest)
    assert promised.file_bytes == burned.bytes == file.stat().st_size
    with segment.attach(tmp_path / "root", burned.digest) as image:
        assert (promised.table.tensors, promised.spec.to_bytes()) == (image.table.tensors, image.spec)


def test_what_is_planned_is_what_status_and_proc_say_after_loading(
    vai: Vai, checkpoint: Path, registry: Registry
) -> None:
    before = planned(vai, checkpoint, "--kv", "32M")
    (model,) = before["models"]
    assert (model["digest"], before["new_image_bytes"]) == (None, model["image_bytes"])
    assert vai("load", checkpoint, "--name", "m").returncode == 0
    after = planned(vai, "m", "--kv", "32M")
    assert after["models"][0]["digest"] == registry.get("m").digest
    same = ("image_bytes", "workspace_bytes", "kv_bytes_per_token", "tokens_that_fit")
    assert [after["models"][0][key] for key in same] == [model[key] for key in same]
    assert (after["new_image_bytes"], after["resident_image_bytes"]) == (0, model["image_bytes"])

    started = vai("serve", "--port", str(_free_port()), "--kv", "32M", "--detach")
    assert started.returncode == 0, started.stderr
    status = json.loads(vai("status", "--json").stdout)
    (image,), (attached,) = status["images"], status["engine"]["models"]
    assert image["bytes"] == model["image_bytes"]
    assert attached["workspace_bytes"] == model["workspace_bytes"]
    assert status["engine"]["pool_bytes"] == before["scratchpad_bytes"] == 32 << 20
    allocated = segment.image_path(registry.root, image["digest"]).stat().st_blocks * 512
    assert abs(allocated - model["image_bytes"]) <= 0.02 * model["image_bytes"]
    running = planned(vai, "m")  # with the engine there: its own scratchpad and threads
    assert running["scratchpad_bytes"] == 32 << 20
    assert running["models"][0]["tokens_that_fit"] == model["tokens_that_fit"]


_GROWTH = """
import ctypes
import sys
from pathlib import Path
import numpy as np
from vai.kernels import table
from vai.kernels.program import StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.segment import attach

PR_SET_THP_DISABLE = 41  # a huge page would count neighbours of the workspace too
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0

def private():
    with open("/proc/self/smaps_rollup") as rollup:  # /proc/self/status rounds to dozens of pages a core
        return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Anonymous:"))

image = attach(Path(sys.argv[1]), sys.argv[2])
program = build(Spec.from_bytes(image.spec))
rows, page = 512, program.groups[0].page_bytes("bf16")
plan = table.lower(program, image, max_rows=rows, max_sequences=64, workers=table.make_workers(2))
pool = np.zeros(16 * page, np.uint8)
pool[:] = 1

def step(rows):
    return StepArgs(
        np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32), np.array([0, rows], np.int32), np.zeros(1, np.int32),
        (np.arange(16, dtype=np.int64)[None] * page,), np.arange(rows - min(rows, 64), rows, dtype=np.int32)
    )

small, whole = step(1), step(rows)
plan.forward(small, pool)
before = private()
plan.forward(whole, pool)
print(plan.workspace_bytes, private() - before)
"""


def test_a_plan_takes_no_more_memory_than_its_workspace(registry: Registry, loaded: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(registry.root), loaded], capture_output=True, text=True, check=True
    )
    workspace, grown = map(int, done.stdout.split())
    assert 0.5 * workspace < grown <= 1.02 * workspace + (128 << 10)  # and what Python itself took meanwhile


def test_what_does_not_fit_is_refused_with_need_room_and_a_way_out(vai: Vai, loaded: str, checkpoint: Path) -> None:
    refused = vai("plan", "m", "--kv", "900T")
    assert refused.returncode == 8
    assert "900.0 TiB" in refused.stderr
    assert "--kv" in refused.stderr
    assert "WORKSPACE" in refused.stdout
    assert planned(vai, "m", "--kv", "900T", code=8)["accepted"] is False
    assert "m (2.65 MiB)" in vai("plan", checkpoint, "--kv", "900T").stderr  # what could go


def test_two_names_of_one_image_and_one_file_twice_are_counted_once(
    vai: Vai, registry: Registry, loaded: str, checkpoint: Path
) -> None:
    registry.put(Name("n", str(checkpoint), digest=loaded))
    one, two = planned(vai, "m", "--kv", "16M"), planned(vai, "m", "n", "--kv", "16M")
    assert (one["need"], len(two["models"])) == (two["need"], 2)
    once, twice = planned(vai, checkpoint), planned(vai, checkpoint, os.path.relpath(checkpoint))
    assert once["new_image_bytes"] == twice["new_image_bytes"] > 0


def test_a_name_that_is_not_in_memory_is_planned_from_its_file(vai: Vai, registry: Registry, loaded: str) -> None:
    resident = planned(vai, "m")["models"][0]
    segment.remove(registry.root, loaded)
    absent = planned(vai, "m")["models"][0]
    assert absent["digest"] is None
    assert absent["image_bytes"] == resident["image_bytes"]
    registry.put(Name("m", "/gone.gguf", digest=loaded))
    gone = vai("plan", "m")
    assert (gone.returncode, "/gone.gguf" in gone.stderr) == (2, True)


def test_what_is_no_model_is_refused_by_name(vai: Vai, tmp_path: Path) -> None:
    assert vai("plan", "nobody").returncode == 4
    (tmp_path / "lies.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    assert vai("plan", tmp_path / "lies.gguf").returncode == 9


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
