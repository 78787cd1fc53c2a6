"""Phi 3, 3.5 and 4: queries, keys and values are one matrix in the file, gate and up another; RoPE rotates halves."""

from vai.models.family import Family

FAMILY = Family(
    architecture="phi3",
    pairing="neox",
    qkv_bias="absent",
    rope_divisors=False,
    windows=True,
    longrope=True,
    fused_tensors=True,
)
