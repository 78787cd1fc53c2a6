"""`GET /metrics`: what a Prometheus server reads of what happened, parsed as it would."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vai.errors import Overloaded

from .conftest import ANSWER, Served, until

TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 40}
MADE = len(ANSWER.encode()) + 1  # the token that ends the turn included


@pytest.fixture
def fresh(serve: Callable[..., Served]) -> Iterator[Served]:
    """A server that others do not count on; its counters go on from test to test, so tests look at differences."""
    yield serve(host="localhost")


def scrape(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels."""
    answer = served.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(served: Served, name: str, **labels: str) -> float:
    return scrape(served).get((name, tuple(sorted(labels.items()))), 0.0)


def grown(served: Served, act: Callable[[], object]) -> dict[str, float]:
    """How much each sample of the model tiny grew while something happened; its end reason is part of the name."""

    def of_tiny() -> dict[str, float]:
        found = {}
        for (name, labels), count in scrape(served).items():
            told = dict(labels)
            if told.get("model_name") == "tiny" and "le" not in told:
                found[name + ("/" + told["finished_reason"] if "finished_reason" in told else "")] = count
        return found

    before = of_tiny()
    act()
    return {name: count - before.get(name, 0.0) for name, count in of_tiny().items() if count != before.get(name, 0.0)}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_counted_once_under_vllms_names(fresh: Served, stream: bool) -> None:
    found = grown(fresh, lambda: fresh.post("/v1/completions", TEXT | {"stream": stream}))
    assert found["vllm:request_success_total/stop"] == 1
    assert found["vllm:prompt_tokens_total"] == found["vllm:prefix_cache_queries_total"] == 2
    assert found["vllm:prefix_cache_hits_total"] == 2
    assert found["vllm:generation_tokens_total"] == MADE
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_count"] == MADE - 1
    assert found["vllm:e2e_request_latency_seconds_count"] == 1
    stages = [found[f"vllm:request_{stage}_time_seconds_sum"] for stage in ("queue", "prefill", "decode")]
    assert stages == [0.25, 0.5, 1.0]
    assert found["vllm:request_inference_time_seconds_sum"] == 1.5
    assert found["vllm:request_time_per_output_token_seconds_sum"] == 1.0 / (MADE - 1)
    assert (found["vllm:request_prompt_tokens_sum"], found["vllm:request_generation_tokens_sum"]) == (2, MADE)


@pytest.mark.parametrize("stream", [False, True])
def test_the_stages_of_an_http_request_are_counted_once_whatever_its_choices(fresh: Served, stream: bool) -> None:
    names = ("loader", "preprocessor", "queue", "core", "postprocessor")

    def seen(kind: str) -> list[float]:
        name = f"vai_request_stage_seconds_{kind}"
        return [value(fresh, name, model_name="tiny", stage=stage) for stage in names]

    counts, sums = seen("count"), seen("sum")
    fresh.post("/v1/completions", TEXT | {"stream": stream, "n": 3})
    assert [after - before for before, after in zip(counts, seen("count"), strict=True)] == [1] * 5
    loader, preprocessor, queue, core, postprocessor = (
        after - before for before, after in zip(sums, seen("sum"), strict=True)
    )
    assert 0.5 < loader < 0.6 and 0 < preprocessor < 0.1  # the engine's part of the longest choice, and the server's
    assert (round(queue, 6), round(core, 6)) == (0.25, 1.5)
    assert 3 * 0.125 < postprocessor < 0.6


def test_every_choice_is_a_request(fresh: Served) -> None:
    found = grown(fresh, lambda: fresh.post("/v1/completions", TEXT | {"n": 3}))
    assert found["vllm:request_success_total/stop"] == 3
    assert found["vllm:generation_tokens_total"] == 3 * MADE


def test_errors_and_refusals_are_counted_as_such(fresh: Served) -> None:
    fresh.script.error = Overloaded("Too many wait.")
    found = grown(fresh, lambda: fresh.post("/v1/completions", TEXT))
    assert found == {"vllm:request_success_total/error": 1, "vllm:admission_rejections_total": 1}


def test_a_client_that_leaves_is_counted_as_aborted(fresh: Served) -> None:
    fresh.script.stall_after = 3

    def leave() -> None:
        with fresh.connect() as connection:
            connection.sendall(fresh.raw_request("/v1/completions", TEXT | {"stream": True}))
            until(lambda: fresh.script.open_streams == 1)
            connection.recv(1)
        until(lambda: fresh.script.open_streams == 0)

    found = grown(fresh, leave)
    assert found["vllm:request_success_total/abort"] == 1
    assert "vllm:e2e_request_latency_seconds_count" not in found


def test_the_engine_is_asked_at_each_scrape(fresh: Served) -> None:
    assert value(fresh, "vllm:num_requests_running", model_name="tiny") == 2
    assert value(fresh, "vllm:num_requests_waiting", model_name="org/other:Q4_0") == 1
    assert value(fresh, "vai_engine_native_seconds_total") == 9
    assert value(fresh, "vai_engine_host_cpu_seconds_total") == 0.25
    assert value(fresh, "vllm:kv_cache_usage_perc", model_name="tiny") == 0.25
    assert value(fresh, "vllm:num_preemptions_total", model_name="tiny") == 5
    for what, exact, fast in (("computed", 60, 300), ("cached", 32, 96)):
        found = [
            value(fresh, f"vai_prompt_tokens_{what}_total", model_name="tiny", kind=kind) for kind in ("exact", "fast")
        ]
        assert found == [exact, fast]
    assert value(fresh, "vai_kv_pinned_bytes") == 30
    assert (value(fresh, "vai_kv_cached_bytes"), value(fresh, "vai_kv_adopted_pages")) == (40, 7)
    assert value(fresh, "vai_engine_up") == 1
    before, after = value(fresh, "vai_model_switch_seconds_count"), value(fresh, "vai_model_switch_seconds_count")
    assert after == before + 1


def test_an_engine_that_is_away_takes_only_its_own_numbers_along(fresh: Served) -> None:
    fresh.post("/v1/completions", TEXT)
    fresh.script.engine_alive = False
    found = scrape(fresh)
    assert found[("vai_engine_up", ())] == 0
    assert found[("vllm:generation_tokens_total", (("model_name", "tiny"),))] >= MADE
    assert not any(name == "vllm:num_requests_running" for name, _ in found)


def test_images_are_told_with_their_bytes_and_leases(fresh: Served) -> None:
    images = fresh.root / "images"
    images.mkdir(exist_ok=True)
    named, nameless = images / f"{'a' * 64}.rom", images / f"{'d' * 64}.rom"
    named.write_bytes(bytes(5000))
    nameless.write_bytes(bytes(100))
    lease = os.open(named, os.O_RDONLY)
    fcntl.flock(lease, fcntl.LOCK_SH)
    found = scrape(fresh)
    os.close(lease)
    assert found[("vai_rom_bytes", (("model", "tiny"),))] == 5000
    assert found[("vai_rom_bytes", (("model", "d" * 12),))] == 100
    assert found[("vai_rom_leases", (("model", "tiny"),))] == 1
    assert found[("vai_rom_leases", (("model", "d" * 12),))] == 0
    assert found[("vai_shm_free_bytes", ())] > 0


def test_metrics_need_the_key_as_every_route(serve: Callable[..., Served]) -> None:
    served = serve(api_key="secret")
    assert served.get("/metrics").status_code == 401
    assert served.get("/metrics", authorization="Bearer secret").status_code == 200


def test_a_model_name_from_outside_makes_no_series(fresh: Served) -> None:
    fresh.post("/v1/completions", TEXT | {"model": "no-such-model"})
    assert "no-such-model" not in fresh.get("/metrics").text


def test_a_root_without_images_is_fine(stoppable: tuple[Served, Callable[[], None]], tmp_path: Path) -> None:
    served, _ = stoppable
    assert value(served, "vai_shm_free_bytes") > 0
    assert "vai_rom_bytes{" not in served.get("/metrics").text
