"""Keys of pages: what they are made of, which no later version may change without another kernel ABI."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from vai.scratchpad.prefix import page_key, root_key

TOKENS = list(range(100, 132))


def test_a_key_tells_kinds_and_implementations_apart_and_exact_keys_stay_what_they_were() -> None:
    root, held = root_key("weights", "bf16", "salt"), np.array(TOKENS, "<u4").tobytes()
    assert page_key(root, TOKENS) == sha256(root + b"\0" + held).digest()
    assert page_key(root, TOKENS).hex() == "225300b96cf5f0da8d3b4a057dc38e4a81d7729be25b93a4dc2466e2c33c5e61"
    assert page_key(root, TOKENS, "amx") == sha256(root + b"\1amx" + held).digest()
    assert len({page_key(root, TOKENS, fast) for fast in (None, "amx", "portable", "")}) == 4
    assert page_key(root, np.array(TOKENS, "<u4")) == page_key(root, TOKENS)
