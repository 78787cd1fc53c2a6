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

from .test_plan import planned

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


def routing_and_experts_are_told_with_what_one_row_reads(found: dict[str, Any]) -> None:
    """Of 2 of 6 experts, 192 x 224 in Q4_0: 14 rows of blocks for gate and for up, 12 for down."""
    gate_up, down = 2 * 2 * 14, 2 * 12
    read = {"gated_experts": gate_up * 3 * 576, "experts": down * 4 * 576}
    products = {"gated_experts": gate_up * 16 * 192, "experts": down * 16 * 224}
    for step in found["steps"]:
        assert {op for line in step["lines"] for op in line["origin"]} == set(range(1, len(found["program"]) + 1))
        kinds = [line["kind"] for line in step["lines"]]
        told = [kind for kind in kinds if kind in ("route", "sort", "expert_rows", "gated_experts", "experts")]
        assert told == 2 * ["route", "sort", "expert_rows", "gated_experts", "expert_rows", "experts"]
        for line in step["lines"]:
            if (kind := line["kind"]) in read:
                most = min(2 * step["rows"], 6) * read[kind] // 2  # four rows may choose all six
                assert (line["image_bytes"], line["products"]) == (most, products[kind] * step["rows"])
                assert "2 of 6" in line["text"] and line["share"] > 0


def test_the_whole_way_of_a_model_with_experts(vai: Vai, registry: Registry, tmp_path: Path, port: int) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-mixtral", type="Q4_0")
    (before,) = planned(vai, tmp_path / "m.gguf", "--kv", "32M", VAI_THREADS="2")["models"]
    assert vai("load", tmp_path / "m.gguf", "--name", "m").returncode == 0
    (after,) = planned(vai, "m", "--kv", "32M", VAI_THREADS="2")["models"]
    assert [after[key] for key in TOLD] == [before[key] for key in TOLD]

    (row,) = json.loads(vai("ls", "--json").stdout)
    assert (row["architecture"], row["experts"], row["experts_used"]) == ("llama", 6, 2)
    assert "llama, 2 of 6 experts" in vai("ls").stdout
    assert json.loads(vai("show", "m", "--json").stdout)["spec"]["experts"] == 6

    done = vai("trace", "m", "--rows", "4", "--context", "0", "--json", VAI_THREADS="1")
    assert done.returncode == 0, done.stderr
    routing_and_experts_are_told_with_what_one_row_reads(json.loads(done.stdout))

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
