"""Muon, with products that every processor is fast at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# x -> a x + b x^3 + c x^5 takes singular values from (0, 1] to about one in five rounds
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
SMALLEST = 1e-7


class Muon(torch.optim.Optimizer):
    """Steps in the direction of the momentum with all its singular values made about one.

    The rule is https://kellerjordan.github.io/posts/muon/, with Nesterov's momentum, decoupled weight decay, and steps
    as large as AdamW's (https://arxiv.org/abs/2502.16982): 0.2 times the root of the longer side. It is that of
    `torch.optim.Muon`, which multiplies in bfloat16 wherever it runs; processors without instructions for it take ten
    times as long over that as over float32. Here they are given `precision`, which is to be the run's.

    All parameters must be matrices.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        self.precision = torch.float32  # of products on a processor
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon moves matrices alone, not a tensor of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"]
                mean.lerp_(parameter.grad, 1 - momentum)
                direction = orthogonal(parameter.grad.lerp(mean, momentum), self.precision)
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(direction, alpha=-0.2 * lr * max(parameter.shape) ** 0.5)
        return loss


def orthogonal(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """(R, C) -> (R, C) with the same singular vectors, and singular values of about one, by Newton-Schulz iteration."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix.to(precision if matrix.device.type == "cpu" else torch.bfloat16)
    if not wide:
        x = x.T  # the products below are of the shorter side
    x = x / x.norm().clamp(min=SMALLEST)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x if wide else x.T
