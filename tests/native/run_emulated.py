"""Runs pytest over emulated kernels in the place of the installed ones: `run_emulated.py MODULE [ARGUMENT...]`."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import vai.kernels

NAME = "vai.kernels._native"


def main(path: str, *arguments: str) -> int:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = vai.kernels._native = module
    spec.loader.exec_module(module)
    assert module.emulated
    assert module.isas()[-2:] == ["avx512", "amx"] and module.refused_isas() == [], module.refused_isas()
    assert module.fasts()[-1] == "amx" and module.refused_fasts() == [], module.refused_fasts()
    return pytest.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
