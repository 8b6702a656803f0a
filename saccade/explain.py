"""From a prediction back to the pixels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.backbones.features import AttentionTrace


def attention_rollout(trace: AttentionTrace) -> Float[Tensor, "B h w"]:
    """How much of each patch flows into the summary through all blocks: https://arxiv.org/abs/2005.00928.

    Each block mixes its attention (mean over heads) equally with the residual connection; the maps are multiplied from
    the pooling down to the patches. Registers and the class token are left out; each map is scaled to a maximum of 1.
    """
    flow = trace.pooling.float()[:, None]  # (B, 1, N)
    for weights in reversed(trace.weights):
        mixed = weights.float().mean(dim=1)  # (B, N, N)
        identity = torch.eye(mixed.shape[-1], device=mixed.device)
        flow = flow @ (0.5 * (mixed + identity))
    patches = flow[:, 0, trace.prefix :].unflatten(1, trace.grid)
    return patches / patches.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
