"""Muon for the matrices, AdamW for embeddings and norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(gradient: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly, by Newton-Schulz iterations; (matrices, rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    x = gradient.to(torch.bfloat16) if gradient.is_cuda else gradient
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class MuonAdamW:
    """One optimizer over a model: matrices of the blocks by Muon (stacked by shape), the rest by AdamW."""

    def __init__(
        self, model: nn.Module, muon_rate: float, adam_rate: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }
        self.adam = torch.optim.AdamW(rest, adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.rest, self.parameters = rest, [*matrices, *rest]
        self.muon_rate, self.adam_rate, self.weight_decay, self.momentum = muon_rate, adam_rate, weight_decay, momentum

    def step(self, factor: float) -> None:
        """One update, with both learning rates multiplied by ``factor``; gradients are dropped."""
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * factor
        self.adam.step()
        rate = self.muon_rate * factor
        for shape, group in self.groups.items():
            gradient = torch.stack([matrix.grad for matrix in group])
            momentum = self.momenta[shape].mul_(self.momentum).add_(gradient)
            update = orthogonalize(gradient + self.momentum * momentum) * max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, delta in zip(group, update, strict=True):
                matrix.data.mul_(1 - rate * self.weight_decay).add_(delta, alpha=-rate)
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, object]:
        """Momenta and AdamW state, for a checkpoint."""
        return {"momenta": self.momenta, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of ``state_dict``."""
        for shape, momentum in state["momenta"].items():
            self.momenta[shape].copy_(momentum)
        self.adam.load_state_dict(state["adam"])
