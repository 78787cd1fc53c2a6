"""Muon for the matrices between embedding and output, AdamW for all the rest, as one optimizer with one rate.

Muon (Jordan et al. 2024) moves a matrix by its momentum made orthogonal, so that every direction counts alike; scaled
as by Liu et al. 2025 ("Muon is scalable for LLM training"), its steps are as large as AdamW's, so that rate and decay
are shared. torch.optim.Muon has the same arithmetic in bfloat16, which processors without such products compute forty
times slower than float32; this one stays in the type of the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS_OF_ADAMW = 0.2
EPSILON = 1e-7


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1 (between 0.6 and 1.3), by a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + EPSILON)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if wide.shape == matrix.shape else wide.T


class Muon(Optimizer):
    """Matrices only; state["momentum"] is the sum of gradients, each before weighing MOMENTUM of the one after it."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
                ahead = parameter.grad.add(momentum, alpha=MOMENTUM)  # Nesterov's look
                scale = RMS_OF_ADAMW * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonal(ahead), alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, rate: float, decay: float) -> tuple[Optimizer, Optimizer]:
    """(Muon for the matrices of the blocks, AdamW for embedding and norms); norm weights do not decay."""
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        kind = vectors if parameter.dim() < 2 else matrices if name.startswith("blk.") else embeddings
        kind.append(parameter)
    rest = [{"params": embeddings, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return Muon(matrices, rate, decay), AdamW(rest, lr=rate, betas=(0.9, 0.95))
