"""Attention through few keys or landmarks in place of all tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.attention import attention
from saccade.layers.mixing import EfficientAttention, Layout, Rotary
from saccade.layers.positions import resize_positions


class LinformerAttention(EfficientAttention):
    """Keys and values of all tokens are projected to `rank` of each: https://arxiv.org/abs/2006.04768.

    The projections are learned for one grid; for another they are interpolated as learned positions are. One pair is
    shared by all heads. Prefix tokens stay keys of their own, since they belong to no place in the grid.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: Layout | None = None,
        qkv_bias: bool = True,
        key_bias: bool = True,
        rank: int = 64,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, key_bias=key_bias)
        if layout is None:
            raise ValueError("LinformerAttention has a weight per token: it must know the layout that it is made for")
        self.grid = layout.grid
        tokens = math.prod(self.grid)
        self.project_keys = nn.Parameter(torch.empty(rank, tokens).normal_(std=tokens**-0.5))
        self.project_values = nn.Parameter(torch.empty(rank, tokens).normal_(std=tokens**-0.5))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        return attention(q, self._reduce(k, self.project_keys, layout), self._reduce(v, self.project_values, layout))

    def _reduce(self, x: Float[Tensor, "B H M D"], projection: Tensor, layout: Layout) -> Float[Tensor, "B H R D"]:
        prefix, patches = x.split((layout.prefix, x.shape[2] - layout.prefix), dim=2)
        projection = resize_projection(projection, self.grid, layout.grid).to(x.dtype)
        reduced = torch.einsum("rn,bhnd->bhrd", projection, patches)  # one product, so that nothing is (B, H, R, N)
        return torch.cat((prefix, reduced), dim=2) if layout.prefix else reduced


def resize_projection(
    projection: Float[Tensor, "R N"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "R M"]:
    """Of a grid's tokens to those of another, each projected token being a sum of as much as before."""
    if old == new:
        return projection
    return resize_positions(projection.T, old, new).T * (math.prod(old) / math.prod(new))


class NystromAttention(EfficientAttention):
    """softmax(q l_k) softmax(l_q l_k)^+ softmax(l_q k) with landmarks l, means of runs of tokens.

    https://arxiv.org/abs/2102.03902. Prefix tokens are landmarks of their own. No more tokens than landmarks: exact
    attention, which is the limit. The depth-wise convolution of values in the authors' code, which is not in the
    paper's formulas, is left out: it would add parameters. Their start of the inverse looks at all batch mates, ours
    does not.
    """

    independent_queries = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: Layout | None = None,
        qkv_bias: bool = True,
        key_bias: bool = True,
        landmarks: int = 64,
        iterations: int = 6,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, key_bias=key_bias)
        self.landmarks = landmarks
        self.iterations = iterations

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if q.shape[2] <= layout.prefix + self.landmarks:
            return attention(q, k, v)
        return nystrom(q, k, v, self.landmarks, prefix=layout.prefix, iterations=self.iterations)


def nystrom(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N E"],
    landmarks: int,
    *,
    prefix: int = 0,
    iterations: int = 6,
) -> Float[Tensor, "B H N E"]:
    """Exact attention where there are as many landmarks as tokens and `iterations` suffice for the inverse."""
    q_landmarks, k_landmarks = (segment_means(x, landmarks, prefix) for x in (q, k))  # (B, H, L, D)
    scale = q.shape[-1] ** -0.5
    with torch.autocast(q.device.type, enabled=False):  # the inverse does not converge in half precision
        wide = torch.promote_types(q.dtype, torch.float32)
        kernel = ((q_landmarks.to(wide) * scale) @ k_landmarks.to(wide).transpose(-2, -1)).softmax(dim=-1)
        gathered = attention(q_landmarks, k, v).to(wide)  # (B, H, L, E)
        summary = (pseudo_inverse(kernel, iterations) @ gathered).to(v.dtype)
    return attention(q, k_landmarks, summary)


def segment_means(x: Float[Tensor, "B H N D"], segments: int, prefix: int = 0) -> Float[Tensor, "B H L D"]:
    """The prefix as it is, and means of `segments` runs of the other tokens whose lengths differ by one at most."""
    parts, tokens = [x[:, :, :prefix]], x[:, :, prefix:]
    length, longer = divmod(tokens.shape[2], segments)
    cut = longer * (length + 1)
    if longer:
        parts.append(tokens[:, :, :cut].unflatten(2, (longer, length + 1)).mean(dim=3))
    parts.append(tokens[:, :, cut:].unflatten(2, (segments - longer, length)).mean(dim=3))
    return torch.cat(parts, dim=2)


def pseudo_inverse(a: Float[Tensor, "*batch L L"], iterations: int) -> Float[Tensor, "*batch L L"]:
    """Moore-Penrose inverse by products alone, of third order: https://arxiv.org/abs/2102.03902, equation 11."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    rows, columns = a.abs().sum(dim=-1).amax(dim=-1), a.abs().sum(dim=-2).amax(dim=-1)
    z = a.transpose(-2, -1) / (rows * columns)[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


class SpatialReductionAttention(EfficientAttention):
    """Keys and values of the picture at 1/`ratio` of its resolution: https://arxiv.org/abs/2102.12122.

    A grid that is no multiple of the ratio is filled with zeros on the right and below, where PVT would drop tokens.
    Prefix tokens are keys as they are.
    """

    takes_rotary = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layout: Layout | None = None,
        qkv_bias: bool = True,
        key_bias: bool = True,
        ratio: int = 4,
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, key_bias=key_bias)
        self.ratio = ratio
        self.reduce = nn.Conv2d(dim, dim, kernel_size=ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim)

    def project_on(
        self, x: Tensor, context: Tensor | None, rotary: Rotary | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.project(x, self.reduced(x if context is None else context, layout), None)

    def reduced(self, x: Float[Tensor, "B M C"], layout: Layout) -> Float[Tensor, "B L C"]:
        """The prefix, and a token for each square of ratio x ratio of the others."""
        prefix, patches = x.split((layout.prefix, x.shape[1] - layout.prefix), dim=1)
        maps = patches.transpose(1, 2).unflatten(2, layout.grid)  # (B, C, h, w)
        h, w = layout.grid
        if h % self.ratio or w % self.ratio:
            maps = F.pad(maps, (0, -w % self.ratio, 0, -h % self.ratio))
        tokens = self.norm(self.reduce(maps).flatten(2).transpose(1, 2))
        return torch.cat((prefix, tokens), dim=1) if layout.prefix else tokens

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        return attention(q, k, v)

    def with_weights(
        self,
        x: Float[Tensor, "B N C"],
        context: Float[Tensor, "B M C"] | None = None,
        *,
        bias: Tensor | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
        layout: Layout | None = None,
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B H N M"]]:
        """As of every form; the weight of a reduced token is shared out equally to the tokens that it is made of."""
        mixed, weights = super().with_weights(x, context, bias=bias, causal=causal, rotary=rotary, layout=layout)
        assert layout is not None
        return mixed, self._spread(weights, layout)

    def _spread(self, weights: Float[Tensor, "B H N L"], layout: Layout) -> Float[Tensor, "B H N M"]:
        h, w = layout.grid
        rows, columns = (torch.arange(n, device=weights.device) // self.ratio for n in (h, w))
        cell = (rows[:, None] * -(-w // self.ratio) + columns).flatten()  # (h w): the reduced token of each token
        tokens_per_cell = cell.bincount().to(weights.dtype)
        prefix, reduced = weights.split((layout.prefix, weights.shape[-1] - layout.prefix), dim=-1)
        return torch.cat((prefix, (reduced / tokens_per_cell)[..., cell]), dim=-1)
