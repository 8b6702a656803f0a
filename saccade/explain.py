"""From a prediction back to the pixels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.backbones.features import AttentionTrace
from saccade.models.classifier import Classifier


def explain(network: Classifier, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w"]:
    """What each picture's prediction rests on, scaled to a maximum of 1: attention where tokens are kept from end to
    end, and gradients of the best class where they are merged on the way."""
    with torch.no_grad():
        trace = network.backbone.trace(images)
        if trace is not None:
            return attention_rollout(trace)
    return gradient_map(network, images)


def gradient_map(network: Classifier, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w"]:
    """Grad-CAM of the best class on the coarsest map: https://arxiv.org/abs/1610.02391. What speaks against it is 0."""
    with torch.enable_grad():
        features = network.backbone(images.detach().requires_grad_())
        best = network.head(features.summary).amax(dim=1).sum()
        last = features.maps[-1]
        (gradient,) = torch.autograd.grad(best, last)
    heat = (gradient.mean(dim=(2, 3), keepdim=True) * last).sum(dim=1).relu().detach().float()
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)


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
