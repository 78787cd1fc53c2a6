"""What may differ between model families of the plain decoder (RMS norm, grouped-query attention, RoPE, SwiGLU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pairing = Literal["norm", "neox"]
Presence = Literal["required", "optional", "absent"]


@dataclass(frozen=True, slots=True)
class Family:
    """A GGUF architecture.

    pairing: which elements of a head RoPE rotates together, as the GGUF file stores them (see ops.Rope).
    qkv_bias: whether the query, key and value projections have biases.
    rope_divisors: whether the file may bring `rope_freqs.weight`, a divisor for each frequency (Llama 3).
    qk_norm: whether each query and key head has an RMS norm of its own before RoPE.
    """

    architecture: str
    pairing: Pairing
    qkv_bias: Presence
    rope_divisors: bool
    qk_norm: bool = False
