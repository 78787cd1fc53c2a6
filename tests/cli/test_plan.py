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
from msgspec.structs import replace

from vai.burn.burn import burn, preview
from vai.burn.synth import SHAPES, synthesize
from vai.rom import segment
from vai.rom.registry import Name, Registry

Vai = Callable[..., subprocess.CompletedProcess[str]]


def planned(vai: Vai, *arguments: str | Path, code: int = 0, **environment: str) -> dict[str, Any]:
    done = vai("plan", "--json", *arguments, **environment)
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


def test_layers_with_a_window_are_told_apart(vai: Vai, tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-gemma2", type="Q8_0")
    (model,) = planned(vai, tmp_path / "m.gguf", "--kv", "32M")["models"]
    assert model["groups"] == [
        {"layers": 1, "window": None, "bytes_per_token": 384},
        {"layers": 2, "window": 20, "bytes_per_token": 768},
    ]
    assert model["kv_bytes_per_token"] == 384 + 768
    assert "of the last 20 tokens in 2 layers" in vai("plan", tmp_path / "m.gguf", "--kv", "32M").stdout
    assert model["tokens_that_fit"] == (16 << 20) // (384 * 32) * 32  # one slab for all that sees everything


def test_what_a_scratchpad_is_too_small_for_is_told_with_the_size_that_would_do(vai: Vai, tmp_path: Path) -> None:
    shape = replace(SHAPES["tiny-gemma2"], heads=16, kv_heads=16, head_dim=256, rope_dims=256, context=4096)
    synthesize(tmp_path / "m.gguf", shape=shape, type="Q8_0")
    wide = tmp_path / "m.gguf"  # 0.5 MiB a page of the layer that sees everything, 1 MiB of those with a window
    few, none = vai("plan", wide, "--kv", "48M"), vai("plan", wide, "--kv", "16M")
    assert "m.gguf is refused prompts of 2,048 tokens and more" in few.stdout
    assert "a context of 4,096 takes --kv 80M." in few.stdout
    assert "m.gguf computes prompts of 1,024 tokens and more in chunks of fewer rows" in few.stdout
    assert none.returncode == 8 and "at least 32.0 MiB: --kv 32M" in none.stderr


def test_types_that_run_slowly_are_named_before_and_after_loading(vai: Vai, tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-256", type="Q2_K")
    (model,) = planned(vai, tmp_path / "m.gguf", "--kv", "32M")["models"]
    share = f"{model['slow']['Q2_K'] / model['image_bytes']:.0%} in Q2_K"
    assert share != "0% in Q2_K" and f"m.gguf: {share}" in vai("plan", tmp_path / "m.gguf", "--kv", "32M").stdout
    assert vai("load", tmp_path / "m.gguf").returncode == 0
    assert share in vai("trace", "m").stdout


def test_types_that_run_fast_are_not_called_slow(vai: Vai, checkpoint: Path) -> None:
    (model,) = planned(vai, checkpoint)["models"]
    assert model["slow"] == {}
    assert "slow" not in vai("plan", checkpoint).stdout


def test_a_model_that_keeps_no_more_than_its_window_fits_at_any_length(vai: Vai, tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-mistral", type="Q8_0")
    (model,) = planned(vai, tmp_path / "m.gguf", "--kv", "16M")["models"]
    assert model["tokens_that_fit"] is None
    assert vai("plan", tmp_path / "m.gguf", "--kv", "16M").stdout.splitlines()[1].split()[-1] == "any"


def test_what_is_planned_is_what_status_and_proc_say_after_loading(
    vai: Vai, checkpoint: Path, registry: Registry, port: int
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

    small = planned(vai, "m", "--kv", "32M", "--kv-type", "q8_0")
    assert (before["kv_type"], small["kv_type"]) == ("bf16", "q8_0")
    assert small["models"][0]["kv_bytes_per_token"] * 64 == model["kv_bytes_per_token"] * 34  # heads of 32

    started = vai("serve", "--port", str(port), "--kv", "32M", "--detach")
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


_TOUCHED = """
import ctypes
import gc
import json
import os
import sys
from pathlib import Path
import numpy as np
from vai.daemon import pool as memory
from vai.kernels import table
from vai.kernels.program import StepArgs
from vai.models.decoder import build
from vai.models.spec import Spec
from vai.rom.segment import attach
from vai.scratchpad.pages import map_pool

PR_SET_THP_DISABLE = 41  # a huge page would count neighbours of the workspace too
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
root, kv, *digests = sys.argv[1:]
descriptor = memory.create(int(kv))
pool, workers = map_pool(descriptor), table.make_workers(2)
images = [attach(Path(root), digest) for digest in digests]
programs = [build(Spec.from_bytes(image.spec)) for image in images]

def private():
    gc.collect()
    with open("/proc/self/smaps_rollup") as rollup:  # /proc/self/status rounds to dozens of pages a core
        return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Anonymous:"))

def run(program, image, rows):
    plan = table.lower(program, image, max_rows=512, max_sequences=64, workers=workers)
    pages, page = program.context // 32, program.groups[0].page_bytes("bf16")
    begin = program.context - rows  # the step ends where the context does, with as many results as a step may have
    step = StepArgs(
        np.zeros(rows, np.int32), np.arange(begin, begin + rows, dtype=np.int32), np.array([0, rows], np.int32),
        np.array([begin], np.int32), (np.arange(pages, dtype=np.int64)[None] * page,),
        np.arange(rows - min(rows, 64), rows, dtype=np.int32),
    )
    plan.forward(step, pool)
    return plan

pool[:] = 1
for program, image in zip(programs, images):
    run(program, image, 64)  # what Python and the allocator take the first time
before = private()
plans = [run(program, image, 512) for program, image in zip(programs, images)]
grown = private() - before
assert grown and plans
print(json.dumps([grown, os.fstat(descriptor).st_blocks * 512]))
"""


def test_two_models_with_every_page_touched_take_what_was_planned_before_they_were_loaded(
    vai: Vai, registry: Registry, tmp_path: Path
) -> None:
    """Images and scratchpad as the kernel counts their blocks, workspaces by what private memory grows."""
    sources = {"a": ("tiny", 20_000), "b": ("tiny-qwen2", 16_000)}  # tokens enough for logits of megabytes
    for name, (shape, vocabulary) in sources.items():
        spec = replace(SHAPES[shape], vocabulary=vocabulary, context=1024)
        synthesize(tmp_path / f"{name}.gguf", shape=spec, type="Q8_0", seed=2)
    promised = planned(vai, *(tmp_path / f"{name}.gguf" for name in sources), "--kv", "32M", VAI_THREADS="2")
    parts = ("new_image_bytes", "workspace_bytes", "scratchpad_bytes", "scratchpad_header_bytes")
    assert promised["need"] == sum(promised[part] for part in parts)
    for name in sources:
        assert vai("load", tmp_path / f"{name}.gguf", "--name", name).returncode == 0
    digests = [str(registry.get(name).digest) for name in sources]
    images = sum(segment.image_path(registry.root, digest).stat().st_blocks * 512 for digest in digests)
    script = [sys.executable, "-c", _TOUCHED, str(registry.root), str(32 << 20), *digests]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    workspaces, scratchpad = json.loads(done.stdout)
    assert images == pytest.approx(promised["new_image_bytes"], rel=0.02)
    assert workspaces == pytest.approx(promised["workspace_bytes"], rel=0.02)
    assert scratchpad == promised["scratchpad_bytes"] + promised["scratchpad_header_bytes"]
    assert images + workspaces + scratchpad == pytest.approx(promised["need"], rel=0.02)


def test_what_does_not_fit_is_refused_with_need_room_and_a_way_out(vai: Vai, loaded: str, checkpoint: Path) -> None:
    refused = vai("plan", "m", "--kv", "900T")
    assert refused.returncode == 8
    assert "scratchpad with headers 903.5 TiB" in refused.stderr
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
