"""The feed-forward network of a Transformer block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.linear import Linear


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that CLIP was trained with: https://arxiv.org/abs/1606.08415."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
SWIGLU = "swiglu"

# Bytes. A larger tensor the C library asks the system for each time anew, which takes as long as to fill it; several
# small ones it has at hand, and they stay in the processor's cache.
LARGE, PIECE = 2**25, 2**23


class FeedForward(nn.Module):
    """Linear, activation, linear: https://arxiv.org/abs/1706.03762, with GELU as in ViT, or an approximation of it."""

    def __init__(self, dim: int, hidden: int, *, activation: str = "gelu", dropout: float = 0.0):
        super().__init__()
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)
        self.activation = ACTIVATIONS[activation]
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        pieces = [self.down(self.activation(self.up(piece))) for piece in self._pieces(x)]
        x = pieces[0] if len(pieces) == 1 else torch.cat([piece.flatten(0, 1) for piece in pieces]).view(x.shape)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _pieces(self, x: Float[Tensor, "B N C"]) -> Sequence[Float[Tensor, "b n C"]]:
        """Some samples, or parts of one: how a sample is cut depends on nothing but itself."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return (x,)
        size = x.shape[1:-1].numel() * self.up.out_features * x.element_size()
        if len(x) * size <= LARGE or x.dim() != 3:
            return (x,)
        if size <= PIECE:
            return x.split(PIECE // size)
        return [piece for sample in x.split(1) for piece in sample.chunk(math.ceil(size / PIECE), dim=1)]


class SwiGLU(nn.Module):
    """Gated: down(silu(gate(x)) * up(x)), https://arxiv.org/abs/2002.05202. Gate and up share one packed matrix."""

    def __init__(self, dim: int, hidden: int, *, dropout: float = 0.0):
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        x = self.down(F.silu(gate) * up)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def feed_forward(kind: str, dim: int, hidden: int, *, dropout: float = 0.0) -> FeedForward | SwiGLU:
    """By name: `swiglu`, or one of `ACTIVATIONS`."""
    if kind == SWIGLU:
        return SwiGLU(dim, hidden, dropout=dropout)
    return FeedForward(dim, hidden, activation=kind, dropout=dropout)


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them, from the first width to the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
