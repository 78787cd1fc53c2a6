"""What may differ between model families of the plain decoder (RMS norm, grouped-query attention, RoPE, SwiGLU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pairing = Literal["norm", "neox"]
Presence = Literal["required", "optional", "absent"]
Act = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Family:
    """A GGUF architecture.

    pairing: which elements of a head RoPE rotates together, as the GGUF file stores them (see ops.Rope).
    qkv_bias: whether the query, key and value projections have biases.
    rope_divisors: whether the file may bring `rope_freqs.weight`, a divisor for each frequency (Llama 3).
    qk_norm: whether each query and key head has an RMS norm of its own before RoPE.
    windows: whether layers may see a window of the last tokens only: `window` of them where the file does not say;
        every `full_every`-th layer sees everything, 0 for none. local_rope_base: RoPE's base in layers with a window
        where the file does not say; 0 for that of the others.
    softcaps: what attention's scores and the logits are capped at where the file does not say; None: nothing is capped.
    post_norms: whether what attention and feed-forward give is normalized before it is added.
    act: of the gate. scaled_embedding: whether embeddings are multiplied by sqrt(width).
    wide_scale_layers: with so many layers, scores are divided by sqrt(width / heads), not sqrt(head_dim).
    experts: whether the feed-forward layers are experts, of which a softmax router chooses some for each token;
        where that is optional, the file says how wide they are as it does of a plain feed-forward layer, and may say
        what shares are multiplied by. renormalize: whether the shares of the chosen ones are made to sum to 1.
        shared_expert: whether each layer has one more, which every token goes to, and a gate of its own.
    longrope: whether the file may bring two sets of such divisors, for a short and for a long context (LongRoPE).
    fused_tensors: whether the file has one matrix of queries, keys and values, and one of gate and up.
    """

    architecture: str
    pairing: Pairing
    qkv_bias: Presence
    rope_divisors: bool
    qk_norm: bool = False
    windows: bool = False
    window: int = 0
    full_every: int = 0
    local_rope_base: float = 0.0
    softcaps: tuple[float, float] | None = None
    post_norms: bool = False
    act: Act = "silu"
    scaled_embedding: bool = False
    wide_scale_layers: int = 0
    experts: Presence = "absent"
    renormalize: bool = False
    shared_expert: bool = False
    longrope: bool = False
    fused_tensors: bool = False
