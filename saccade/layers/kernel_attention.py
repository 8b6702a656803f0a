"""Attention by feature maps: softmax(q k^T) becomes f(q) f(k)^T, whose products can be taken in the cheaper order."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saccade.layers.mixing import EfficientAttention, Layout


def kernel_attention(
    q: Float[Tensor, "B H N F"], k: Float[Tensor, "B H M F"], v: Float[Tensor, "B H M E"]
) -> Float[Tensor, "B H N E"]:
    """(q k^T) v with rows scaled to sum to one, for features that are not negative: O(N + M) time and memory."""
    M = k.shape[2]
    # means, not sums: the ratio is the same, and half precision does not overflow over many tokens
    summary = k.transpose(-2, -1) @ (v / M)  # (B, H, F, E)
    total = q @ k.mean(dim=-2).unsqueeze(-1)  # (B, H, N, 1)
    # where all weights vanish, the result is zero; the floor is high enough for the gradient to be finite, too
    return (q @ summary) / total.clamp_min(torch.finfo(total.dtype).tiny ** 0.8)


class LinearAttention(EfficientAttention):
    """Features elu(x) + 1: https://arxiv.org/abs/2006.16236."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        return kernel_attention(elu_plus_one(q), elu_plus_one(k), v)


def elu_plus_one(x: Tensor) -> Tensor:
    """As e^min(x, 0) + max(x, 0): unlike elu(x) + 1, which rounds to 0, it stays positive for very negative x."""
    return x.clamp(max=0).exp() + F.relu(x)


class PerformerAttention(EfficientAttention):
    """FAVOR+, random features whose products are e^(q k / sqrt(D)) on average: https://arxiv.org/abs/2009.14794.

    Tends to exact attention as `features` grows (D ln D unless given). The paper adds a small constant to the features,
    which pulls the weights towards equality however many there are; here only the divisor is kept from zero.
    """

    directions: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: Layout | None = None,
        qkv_bias: bool = True,
        key_bias: bool = True,
        features: int | None = None,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, key_bias=key_bias)
        D = dim // heads
        count = features or max(1, round(D * math.log(D)))
        self.register_buffer("directions", orthogonal_directions(count, D))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Other random features: now and then in training, so that no model comes to depend on one draw."""
        self.directions.copy_(orthogonal_directions(*self.directions.shape, generator=generator))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        # exponents must be exact to a few hundredths, which half precision is not
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            directions = self.directions.to(wide)
            # per query, and per head over all keys: both cancel in the ratio, and neither looks at batch mates
            q_features = softmax_features(q.to(wide), directions, peak_over=(-1,))
            k_features = softmax_features(k.to(wide), directions, peak_over=(-2, -1))
            return kernel_attention(q_features, k_features, v.to(wide)).to(v.dtype)


def softmax_features(
    x: Float[Tensor, "B H N D"], directions: Float[Tensor, "F D"], *, peak_over: tuple[int, ...]
) -> Float[Tensor, "B H N F"]:
    """e^(w x - |x|^2 / 2) for each direction w, divided by the largest, for x that is scaled by D^(-1/4)."""
    x = x * x.shape[-1] ** -0.25
    exponents = x @ directions.T - x.square().sum(dim=-1, keepdim=True) / 2  # (B, H, N, F)
    return (exponents - exponents.detach().amax(dim=peak_over, keepdim=True)).exp()


def orthogonal_directions(
    count: int, dim: int, generator: torch.Generator | None = None
) -> Float[Tensor, "{count} {dim}"]:
    """Each row is distributed as a standard normal vector; every `dim` of them are orthogonal to each other."""
    blocks = []
    for _ in range(math.ceil(count / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
        blocks.append((q * r.diagonal().sign()).T)  # without the signs, QR favours one half of the space
    lengths = torch.randn(count, dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths
