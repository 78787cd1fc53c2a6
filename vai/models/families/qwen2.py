"""Qwen 2 and 2.5 (dense): biases on queries, keys and values; RoPE rotates halves; small models tie the embedding."""

from vai.models.family import Family

FAMILY = Family(architecture="qwen2", pairing="neox", qkv_bias="required", rope_divisors=False)
