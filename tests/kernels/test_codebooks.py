"""Raw blocks mean what the format's own package says, whatever their bytes are."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from vai.kernels.codebooks import dequantize
from vai.rom.image import BLOCK_TYPES

RAW = [kind.name for kind in BLOCK_TYPES.values() if kind.slow]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("type", RAW)
def test_any_bytes_have_the_bits_that_the_package_gives(type: str) -> None:
    kind = gguf.GGMLQuantizationType[type]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    assert BLOCK_TYPES[type].bytes == 16 * size
    blocks = np.random.default_rng(len(type)).integers(0, 256, (1600, size), dtype=np.uint8)
    blocks[0], blocks[1] = 0, 255
    expected = gguf.quants.dequantize(blocks, kind)
    found = dequantize(type, blocks.reshape(-1, 4, 16 * size)).reshape(1600, 256)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(found), ~numbers)
    assert np.array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    assert not found[0].any(), "a row that is not there is zero"
