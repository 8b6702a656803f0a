"""What a loss must know of the other processes of a run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_processes(count: float | Tensor, device: torch.device) -> Tensor:
    """The mean of a number that each process has: what sums are divided by whose gradients are averaged afterwards."""
    mean = torch.as_tensor(count, dtype=torch.float32, device=device).clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return mean
