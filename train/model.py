"""The decoder that is trained: the arithmetic of VAI's `llama` family (vai/models/decoder.py), in PyTorch.

Pre-norm blocks of grouped-query attention with RoPE over neighbouring elements, and SwiGLU; the output projection is
the token embedding. Parameters have the names that GGUF gives them, so that export renames nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vai.models.decoder import rope_frequencies
from vai.models.spec import Spec


@dataclass(frozen=True)
class Shape:
    """Sizes in elements. Matrices are multiples of 32 wide, so that every block type of VAI fits them."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int

    def spec(self, vocabulary: int, context: int) -> Spec:
        """What VAI calls this model."""
        return Spec(
            architecture="llama",
            pairing="norm",
            layers=self.layers,
            width=self.width,
            ffn=self.ffn,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocabulary=vocabulary,
            context=context,
            norm_epsilon=1e-5,
            rope_base=10_000.0,
            rope_dims=self.head_dim,
            tied=True,
        )


SHAPES: Mapping[str, Shape] = {
    "mini": Shape(layers=4, width=384, ffn=1024, heads=6, kv_heads=2, head_dim=64),
    "nano": Shape(layers=4, width=128, ffn=384, heads=4, kv_heads=2, head_dim=32),
    # For tests.
    "micro": Shape(layers=2, width=64, ffn=160, heads=4, kv_heads=2, head_dim=16),
}


class Decoder(nn.Module):
    """Token ids (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.token_embd = nn.Embedding(spec.vocabulary, spec.width)
        self.blk = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.output_norm = nn.RMSNorm(spec.width, eps=spec.norm_epsilon)
        frequencies = torch.tensor(
            rope_frequencies(spec.rope_base, spec.rope_dims, spec.rope_factor), dtype=torch.double
        )
        angles = torch.arange(spec.context, dtype=torch.double)[:, None] * frequencies
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Normal with deviation 0.02; what writes into the residual stream is scaled by its depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.spec.layers) ** 0.5 if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embd(ids)
        rotation = (self.cosine[: ids.shape[1]], self.sine[: ids.shape[1]])
        for block in self.blk:
            x = block(x, rotation)
        return functional.linear(self.output_norm(x), self.token_embd.weight)


class Block(nn.Module):
    """x + attention(norm(x)), then that plus feed_forward(norm of that)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.attn_norm = nn.RMSNorm(spec.width, eps=spec.norm_epsilon)
        self.attn_q = nn.Linear(spec.width, q, bias=False)
        self.attn_k = nn.Linear(spec.width, kv, bias=False)
        self.attn_v = nn.Linear(spec.width, kv, bias=False)
        self.attn_output = nn.Linear(q, spec.width, bias=False)
        self.ffn_norm = nn.RMSNorm(spec.width, eps=spec.norm_epsilon)
        self.ffn_gate = nn.Linear(spec.width, spec.ffn, bias=False)
        self.ffn_up = nn.Linear(spec.width, spec.ffn, bias=False)
        self.ffn_down = nn.Linear(spec.ffn, spec.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn_output(self._attention(self.attn_norm(x), rotation))
        h = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))

    def _attention(self, h: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q = _rotate(self._heads(self.attn_q(h)), rotation)
        k = _rotate(self._heads(self.attn_k(h)), rotation)
        v = self._heads(self.attn_v(h))
        shared = self.spec.heads // self.spec.kv_heads
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE over neighbouring elements (Su et al. 2021), in float32. x: (batch, heads, tokens, head_dim)."""
    cosine, sine = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


@torch.no_grad()
def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The `count` most likely tokens after the prompt, one by one, without a cache: slow and plain."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]
