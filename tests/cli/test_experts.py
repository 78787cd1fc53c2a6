"""A model with experts on the whole way of a user: planned, loaded, listed, traced, and served over HTTP."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vai import LLM
from vai.burn.synth import synthesize
from vai.daemon.roles import holder
from vai.request import SamplingParams
from vai.rom.registry import Registry

from .test_plan import _free_port, planned

Vai = Callable[..., subprocess.CompletedProcess[str]]
TOLD = ("image_bytes", "workspace_bytes", "kv_bytes_per_token", "tokens_that_fit")
PROMPT = list(range(40))


def completed(port: int, **asked: Any) -> dict[str, Any]:
    """The choice that /v1/completions gives."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({"model": "m", "temperature": 0, **asked}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
        return choice


def test_the_whole_way_of_a_model_with_experts(vai: Vai, registry: Registry, tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-qwen3moe", type="Q4_K_M")
    (before,) = planned(vai, tmp_path / "m.gguf", "--kv", "32M")["models"]
    assert vai("load", tmp_path / "m.gguf", "--name", "m").returncode == 0
    (after,) = planned(vai, "m", "--kv", "32M")["models"]
    assert [after[key] for key in TOLD] == [before[key] for key in TOLD]

    (row,) = json.loads(vai("ls", "--json").stdout)
    assert (row["architecture"], row["experts"], row["experts_used"]) == ("qwen3moe", 10, 3)
    assert "qwen3moe, 3 of 10 experts" in vai("ls").stdout
    assert json.loads(vai("show", "m", "--json").stdout)["spec"]["experts"] == 10

    port = _free_port()
    started = vai("serve", "--port", str(port), "--kv", "32M", "--detach", VAI_THREADS="2")
    assert started.returncode == 0, started.stderr
    answer = completed(port, prompt=PROMPT, max_tokens=12, logprobs=0)
    status = json.loads(vai("status", "--json").stdout)
    assert status["images"][0]["bytes"] == before["image_bytes"]
    assert status["engine"]["models"][0]["workspace_bytes"] == before["workspace_bytes"]
    assert vai("stop").returncode == 0
    assert holder(registry.root, "engine") is None
    with LLM("m", root=registry.root, names=registry.directory, threads=1, kv_bytes=32 << 20) as llm:
        own = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=0))
    assert answer["text"] == own.text != ""
    assert answer["logprobs"]["token_logprobs"] == [each.logprob for each in own.logprobs]


def test_routing_and_experts_are_traced_with_what_one_row_reads(vai: Vai, registry: Registry, tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-qwen3moe", type="Q4_0")
    assert vai("load", tmp_path / "m.gguf", "--name", "m").returncode == 0
    done = vai("trace", "m", "--rows", "4", "--context", "0", "--json", VAI_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for step in found["steps"]:
        assert {op for line in step["lines"] for op in line["origin"]} == set(range(1, len(found["program"]) + 1))
        kinds = [line["kind"] for line in step["lines"]]
        told = [kind for kind in kinds if kind in ("route", "sort", "expert_rows", "gated_experts", "experts")]
        assert told == 2 * ["route", "sort", "expert_rows", "gated_experts", "expert_rows", "experts"]
        blocks = 256 // 16  # of an expert's matrix; of gate and up twice as many
        read = {"gated_experts": 3 * 2 * blocks, "experts": 3 * blocks}
        for line in step["lines"]:
            if line["kind"] in read:
                assert line["image_bytes"] == read[line["kind"]] * 256 // 64 * 576
                assert line["products"] == read[line["kind"]] * 16 * 256 * step["rows"]
                assert "3 of 10" in line["text"] and line["share"] > 0
