"""The measured ceilings: plausible, of the asked-for instruction set, and of every type there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from vai.errors import BadRequest, NotSupported
from vai.kernels import ceilings, table


@pytest.mark.parametrize("isa", table.isas())
def test_every_speed_of_every_implementation_is_measured_with_its_spread(isa: str, tmp_path: Path) -> None:
    found = ceilings.measure(threads=2, buffer_bytes=4 << 20, directory=tmp_path, isa=isa)
    assert found.ahead > 0
    assert (found.isa, found.one.threads, found.all.threads) == (isa, 1, 2)
    assert [linear.type for linear in found.linear] == table.fast_types()
    speeds = [speed for ceiling in (found.one, found.all) for speed in (ceiling.read, ceiling.int8, ceiling.f32)]
    assert [fast.type for fast in found.fast] == (table.fast_kind_types() if table.fast(None) else [])
    speeds += [speed for linear in found.linear for speed in (linear.read, linear.multiply)]
    for speed in speeds + [fast.multiply for fast in found.fast]:
        assert 0 <= speed.low <= speed.median <= speed.high, speed
        assert speed.median > 0, speed


def test_an_instruction_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="avx1024"):
        ceilings.measure(threads=1, buffer_bytes=4 << 20, directory=tmp_path, isa="avx1024")


def test_a_layer_must_fit_the_memory_it_is_timed_over() -> None:
    with pytest.raises(BadRequest, match="does not fit"):
        table.lower_linear("Q4_0", 4096, 4096, memoryview(bytes(1 << 20)), max_rows=1, workers=table.make_workers(1))
