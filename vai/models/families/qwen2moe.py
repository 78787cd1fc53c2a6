"""Qwen 1.5 and 2 with experts (A2.7B, 57B-A14B): Qwen 2's attention; a softmax router, experts, and one that all share.

The chosen shares are not renormalized: the GGUF file does not say so (`norm_topk_prob`), but none of these models does.
"""

from vai.models.family import Family

FAMILY = Family(
    architecture="qwen2moe",
    pairing="neox",
    qkv_bias="required",
    rope_divisors=False,
    experts="required",
    shared_expert=True,
)
