"""What the load benchmark computes from what its clients saw, and how it draws it."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import pytest

from vai.burn.synth import synthesize
from vai.cli.bench.chart import Panel, chart
from vai.cli.bench.figures import Goal, Quantile, figures, quantile
from vai.cli.bench.serving import Point, Row, ratios
from vai.cli.bench.traffic import Record
from vai.cli.bench.workload import WORKLOADS, asks, pauses, text_ids
from vai.errors import BadRequest

SVG = "{http://www.w3.org/2000/svg}"


def answered(sent: float, *events: float, tokens: int = 0) -> Record:
    return Record("m", 10, sent, list(events), tokens=tokens, ended=events[-1] if tokens else None)


def test_rates_and_latencies_are_those_of_the_field() -> None:
    records = [answered(0.0, 1.0, 1.5, 2.5, tokens=3), answered(1.0, 2.0, 2.25)]
    got = figures(records, began=0.0, seconds=10.0, goal=Goal(first=2.0, between=0.8))
    assert (got.sent, got.complete, got.errors, got.waiting) == (2, 1, 0, 0)
    assert got.prompt_rate == 2.0
    assert got.output_rate == pytest.approx(0.5)  # three tokens as counted, two as seen
    assert got.first_p50 == Quantile(1.0)
    assert (got.between_p50, got.between_max) == (0.5, 1.0)
    assert got.per_token_p50 == pytest.approx(0.75)
    assert got.goodput == pytest.approx(0.1)


def test_a_request_that_misses_a_goal_or_fails_is_not_good() -> None:
    slow_start, slow_tokens = answered(0.0, 3.0, 3.1, tokens=2), answered(0.0, 1.0, 3.0, tokens=2)
    failed = Record("m", 10, 0.0, [1.0], error="refused")
    got = figures([slow_start, slow_tokens, failed], began=0.0, seconds=10.0, goal=Goal(first=2.0, between=0.8))
    assert got.goodput == 0
    assert got.errors == 1


def test_who_still_waits_at_the_end_makes_percentiles_lower_bounds() -> None:
    waiting = Record("m", 10, sent=4.0)
    got = figures([answered(0.0, 1.0, 2.0, tokens=2), waiting], began=0.0, seconds=10.0, goal=Goal(2, 1))
    assert got.waiting == 1
    assert got.first_p50 == Quantile(1.0)
    assert got.first_p99 == Quantile(6.0, at_least=True)
    assert str(got.first_p99) == ">6.000"


def test_a_quantile_is_the_smallest_value_that_its_share_does_not_exceed() -> None:
    values = [Quantile(float(value)) for value in range(1, 101)]
    assert [quantile(values, share).seconds for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert math.isnan(quantile([], 0.5).seconds)


def row(system: str, records: list[Record]) -> Row:
    found = figures(records, began=0.0, seconds=10.0, goal=Goal(2, 1))
    return Row(Point("decode", 1), system, "", "m", found, cpu=0, overhead=0, native=0, client=0, tokens={})


def test_ratios_are_taken_over_the_best_of_the_peers_in_each_figure() -> None:
    ours = row("vai", [answered(0.0, 1.0, 1.5, 2.0, tokens=4)])
    quick = row("a", [answered(0.0, 2.0, 7.0, tokens=2)])
    steady = row("b", [answered(0.0, 4.0, 5.0, 6.0, tokens=3)])
    found = ratios([ours, quick, steady])
    assert found is not None
    assert found.output == pytest.approx(4 / 3)
    assert found.first_p99 == pytest.approx(1 / 2)
    assert found.between_p99 == pytest.approx(0.5 / 1)
    assert ratios([ours]) is None


def test_a_ratio_of_what_is_not_known_is_not_known() -> None:
    waits = row("vai", [Record("m", 10, 0.0)])
    answers = row("a", [answered(0.0, 2.0, tokens=1)])
    found = ratios([waits, answers])
    assert found is not None
    assert math.isnan(found.first_p99) and math.isnan(found.between_p99)
    bound = ratios([answers, waits])
    assert bound is not None
    assert bound.first_p99 == pytest.approx(0.2)  # at most: the other had waited 10 s


def test_one_seed_gives_every_server_the_same_prompts_of_log_uniform_length(tmp_path: Path) -> None:
    synthesize(tmp_path / "m.gguf", shape="tiny-qwen2", type="Q8_0", seed=1)
    ids, mixed = text_ids(tmp_path / "m.gguf"), WORKLOADS["mixed"]
    prompts = [ask.prompt for ask in islice(asks(mixed, ids, seed=3), 2000)]
    assert prompts[:50] == [ask.prompt for ask in islice(asks(mixed, ids, seed=3), 50)]
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) >= mixed.shortest and max(lengths) <= mixed.longest
    assert median(lengths) == pytest.approx(200, rel=0.15)  # the geometric mean of 10 and 4,000
    assert {token for prompt in prompts for token in prompt} == set(ids)


def test_arrivals_of_an_open_loop_have_the_rate_asked_for() -> None:
    assert sum(islice(pauses(4.0, seed=1), 2000)) == pytest.approx(500, rel=0.1)


def test_points_are_written_as_people_say_them() -> None:
    assert Point.parse("mixed@16") == Point("mixed", 16)
    assert Point.parse("decode@8~0.5") == Point("decode", 8, 0.5)
    assert [str(Point.parse(text)) for text in ("two@4", "decode@8~0.5")] == ["two@4", "decode@8~0.5"]


@pytest.mark.parametrize("text", ["mixed", "mixed@", "mixed@0", "other@4", "decode@4~0", "decode@4~x"])
def test_what_is_no_point_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadRequest, match="is no point"):
        Point.parse(text)


def test_a_chart_has_a_mark_for_every_value_that_can_be_drawn() -> None:
    plain = Panel("Throughput", "streams", "tokens/s", {"vai": [(1, 10.0), (4, 30.0)], "a<b": [(1, 5.0), (4, 2e6)]})
    log = Panel("First token", "streams", "s", {"vai": [(1, 0.01), (4, float("nan"))], "a<b": [(1, 0.0)]}, log=True)
    drawn = ElementTree.fromstring(chart("On a machine", [plain, log]))
    assert len(drawn.findall(f".//{SVG}circle")) == 5
    assert "a<b" in {text.text for text in drawn.iter(f"{SVG}text")}
    assert all(0 <= float(mark.get("cy", "-1")) <= 300 for mark in drawn.iter(f"{SVG}circle"))


def test_a_panel_without_values_says_so() -> None:
    drawn = chart("t", [Panel("Goodput", "streams", "s", {"vai": [(1, float("nan"))]})])
    assert "Goodput: nothing measured" in drawn
