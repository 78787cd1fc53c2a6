"""What the environment says, and what follows from it."""

from __future__ import annotations

import pytest

from vai import config
from vai.errors import BadRequest


def test_who_forces_an_instruction_set_gets_no_fast_kind_unless_it_is_asked_for() -> None:
    home = {"HOME": "/nowhere"}
    assert config.load(home).fast is None
    assert config.load({**home, "VAI_ISA": "scalar"}).fast == "off"
    assert config.load({**home, "VAI_ISA": "scalar", "VAI_FAST": "portable"}).fast == "portable"
    with pytest.raises(BadRequest, match="VAI_FAST=steam"):
        config.load({**home, "VAI_FAST": "steam"})
