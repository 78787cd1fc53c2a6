"""Qwen 3 with experts (30B-A3B, 235B-A22B, Coder): Qwen 3's attention; in every layer a softmax router and experts.

The GGUF file does not say that the chosen shares are renormalized (`norm_topk_prob`): all these models do it.
"""

from vai.models.family import Family

FAMILY = Family(
    architecture="qwen3moe",
    pairing="neox",
    qkv_bias="absent",
    rope_divisors=False,
    qk_norm=True,
    experts="required",
    renormalize=True,
)
