"""Gemma 3 (text): as Gemma 2, with norms of heads in place of caps, five layers with a window to one without.

Layers with a window rotate by a base of their own, which no factor scales.
"""

from vai.models.family import Family

FAMILY = Family(
    architecture="gemma3",
    pairing="neox",
    qkv_bias="absent",
    rope_divisors=False,
    qk_norm=True,
    windows=True,
    full_every=6,
    local_rope_base=10_000.0,
    post_norms=True,
    act="gelu_tanh",
    scaled_embedding=True,
    wide_scale_layers=62,
)
