"""Qwen 3 (dense) and its embedders' text model: an RMS norm of each query and key head before RoPE, and no biases."""

from vai.models.family import Family

FAMILY = Family(architecture="qwen3", pairing="neox", qkv_bias="absent", rope_divisors=False, qk_norm=True)
