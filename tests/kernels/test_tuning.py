"""What is fastest on this machine: measured once, remembered, believed where it can be true, and no bit's business."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vai.errors import NotSupported
from vai.kernels import table, tuning
from vai.kernels.program import StepArgs

FEW = memoryview(bytes(8 << 20))  # of weights: too few to learn from, enough for layers
NONE = memoryview(b"")


def pool() -> table.Workers:
    return table.make_workers(2)


def test_what_was_measured_is_found_again_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "WEIGHTS", len(FEW))
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)
    first, second = pool(), pool()
    isa = tuning.tune(first, FEW, tmp_path)
    assert first.ahead in tuning.DISTANCES
    assert isa in (table.isa(), table.TILES)
    told = {f"{isa}, 2 threads": first.ahead} | ({"2 threads": isa} if table.TILES in table.isas() else {})
    assert json.loads((tmp_path / "tuned.json").read_text()) == told
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]
    assert tuning.tune(second, NONE, tmp_path) == isa  # though of those nothing can be measured
    assert second.ahead == first.ahead


def test_every_instruction_set_and_number_of_threads_has_a_distance_of_its_own(tmp_path: Path) -> None:
    told = {"scalar, 1 threads": 1152, "scalar, 2 threads": 6912, f"{table.isa()}, 2 threads": 4608}
    (tmp_path / "tuned.json").write_text(json.dumps(told))
    found = {}
    for isa, threads in (("scalar", 1), ("scalar", 2), (table.isa(), 2)):
        workers = table.make_workers(threads)
        assert tuning.tune(workers, NONE, tmp_path, isa=isa) == isa
        found[f"{isa}, {threads} threads"] = workers.ahead
    assert found == told


def test_an_instruction_set_that_was_the_fastest_is_used_where_none_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text(json.dumps({"2 threads": "scalar", "scalar, 2 threads": 1152}))
    workers = pool()
    assert tuning.tune(workers, NONE, tmp_path) == "scalar"
    assert workers.ahead == 1152
    assert tuning.tune(table.make_workers(1), NONE, tmp_path) == table.isa()
    assert tuning.tune(pool(), NONE, tmp_path, isa=table.isa()) == table.isa()


def test_few_weights_teach_nothing(tmp_path: Path) -> None:
    workers = pool()
    usual = workers.ahead
    assert tuning.tune(workers, FEW, tmp_path) == table.isa()
    assert workers.ahead == usual
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[" * 100_000, b'"4608"', b"\xff", b'{"KEY": "4608"}', b'{"KEY": 4609}', b'{"KEY": true}',
     b'{"KEY": -1152}', b'{"KEY": 1e999}', b'{"2 threads": "sse9"}', b'{"2 threads": ["scalar"]}',
     b'{"KEY": "scalar"}', b'{"2 threads": 4608}'],
)  # fmt: skip
def test_a_file_that_cannot_be_true_is_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tuned.json").write_bytes(content.replace(b"KEY", f"{table.isa()}, 2 threads".encode()))
    workers = pool()
    usual = workers.ahead
    assert tuning.tune(workers, NONE, tmp_path) == table.isa()
    assert workers.ahead == usual


def test_a_directory_that_is_not_there_keeps_nobody_from_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "WEIGHTS", len(FEW))
    monkeypatch.setattr(tuning, "fastest_distance", lambda *_, **__: 6912)
    workers = pool()
    tuning.tune(workers, FEW, tmp_path / "nowhere", isa="scalar")
    assert workers.ahead == 6912


def test_measuring_leaves_the_distance_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)
    workers = pool()
    workers.ahead = 1728  # not the last one tried
    assert tuning.fastest_distance(workers, FEW, isa=table.isa()) in tuning.DISTANCES
    assert workers.ahead == 1728


def test_an_instruction_set_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "WEIGHTS", len(FEW))
    with pytest.raises(NotSupported, match="avx1024"):
        tuning.tune(pool(), FEW, tmp_path, isa="avx1024")


@pytest.mark.parametrize("isa", table.isas())
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_no_bit_depends_on_the_distance(isa: str, rows: int) -> None:
    """Nor does it matter whether there is memory where it leads: to fetch is not to read."""
    data = memoryview(np.random.default_rng(1).integers(0, 0x3C, 2 << 20, dtype=np.uint8))
    for type_ in ("Q4_0", "Q6_K", "F16"):
        workers = pool()
        plan = table.lower_linear(type_, 256, 512, data, max_rows=rows, workers=workers, isa=isa)
        logits = []
        for distance in (0, 64, *tuning.DISTANCES, 1 << 40):
            workers.ahead = distance
            step = StepArgs.alone(rows)
            step.output_rows = np.arange(rows, dtype=np.int32)[-1:]
            logits.append(plan.forward(step, np.zeros(0, np.uint8)).tobytes())
        assert len(set(logits)) == 1
        assert np.isfinite(np.frombuffer(logits[0], np.float32)).all()
