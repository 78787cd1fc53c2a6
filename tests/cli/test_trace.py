"""`vai trace`: every operation of a model is timed, in one decode step and one prefill chunk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

Vai = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("isa", ["scalar", ""])
def test_every_operation_of_the_program_is_in_a_timed_line(vai: Vai, loaded: str, isa: str) -> None:
    done = vai(
        "trace", loaded, "--rows", "20", "--context", "5", "--json", VAI_THREADS="2", VAI_ISA=isa, VAI_FAST="off"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(step["kind"], step["rows"]) for step in found["steps"]] == [("decode", 1), ("prefill", 20)]
    for step in found["steps"]:
        lines = step["lines"]
        assert {op for line in lines for op in line["origin"]} == set(range(1, len(found["program"]) + 1))
        assert all(line["seconds"] >= 0 for line in lines)
        assert step["seconds"] > 0
        linear = [line for line in lines if line["kind"] in ("linear", "gated")]
        assert linear and all(line["share"] > 0 and line["image_bytes"] > 0 and line["products"] > 0 for line in linear)
        assert all(rate > 0 for rate in step["ceiling"].values())
    stages = found["stages"]
    assert list(stages) == ["loader", "preprocessor", "queue", "core", "prefill", "decode", "postprocessor"]
    assert all(seconds > 0 for seconds in stages.values())
    decode, prefill = ({line["text"]: line["products"] for line in step["lines"]} for step in found["steps"])
    head = found["steps"][1]["lines"][-1]["text"]  # of the one row that is asked for
    assert all(prefill[text] == count * (1 if text == head else 20) for text, count in decode.items())


def test_a_chunk_of_the_fast_kind_is_traced_where_prompts_are_computed_so(vai: Vai, loaded: str) -> None:
    done = vai("trace", loaded, "--rows", "2", "--context", "0", "--json", VAI_THREADS="1", VAI_FAST="portable")
    assert done.returncode == 0, done.stderr
    exact, fast = json.loads(done.stdout)["steps"][1:]
    assert (exact["kind"], fast["kind"]) == ("prefill", "prefill, fast (portable)")
    assert "quantize" not in {line["kind"] for line in fast["lines"]} >= {"narrow"}
    assert sum(line["products"] for line in fast["lines"] if line["kind"] == "gated") == sum(
        line["products"] for line in exact["lines"] if line["kind"] == "gated"
    )


def test_people_see_the_program_the_lines_and_their_sums(vai: Vai, loaded: str) -> None:
    done = vai("trace", loaded, "--rows", "2", "--context", "0", VAI_THREADS="1")
    assert done.returncode == 0, done.stderr
    for word in (
        "PROGRAM",
        "DECODE, 1 row:",
        "PREFILL, 2 rows:",
        "attn_qkv.weight",
        "GB/S",
        "SHARE",
        "STAGE",
        "preprocessor",
    ):
        assert word in done.stdout


def test_a_chunk_past_the_model_s_context_is_refused(vai: Vai, loaded: str) -> None:
    done = vai("trace", loaded, "--context", "4090")
    assert done.returncode != 0
    assert "context of 4096" in done.stderr
