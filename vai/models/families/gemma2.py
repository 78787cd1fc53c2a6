"""Gemma 2: every second layer sees a window; scores and logits are capped; norms before and after each part; GELU.

GGUF stores norm weights with the 1 that the checkpoint's lack already added.
"""

from vai.models.family import Family

FAMILY = Family(
    architecture="gemma2",
    pairing="neox",
    qkv_bias="absent",
    rope_divisors=False,
    windows=True,
    window=4096,
    full_every=2,
    softcaps=(50.0, 30.0),
    post_norms=True,
    act="gelu_tanh",
    scaled_embedding=True,
    wide_scale_layers=46,
)
