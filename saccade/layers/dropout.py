"""Dropout, https://jmlr.org/papers/v15/srivastava14a.html, for which a processor draws few random numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 2**16  # of probability


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`. On processors a 64-bit number decides on four values; PyTorch draws one for each, on one core.

    So `p` is rounded to a multiple of 1 / 65536, which the values that stay are scaled by, and what is kept for the
    backward pass has a byte for each value.
    """
    dropped = round(p * STEPS)
    if not training or x.device.type != "cpu" or not 0 < dropped < STEPS or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = numbers.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - STEPS // 2
    return (x * keep).mul_(STEPS / (STEPS - dropped))
