"""The feed-forward network of a Transformer block."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Linear, GELU, linear: https://arxiv.org/abs/1706.03762, with GELU as in ViT."""

    def __init__(self, dim: int, hidden: int, *, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        x = self.down(F.gelu(self.up(x)))
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class SwiGLU(nn.Module):
    """Gated: down(silu(gate(x)) * up(x)), https://arxiv.org/abs/2002.05202. Gate and up share one packed matrix."""

    def __init__(self, dim: int, hidden: int, *, dropout: float = 0.0):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        x = self.down(F.silu(gate) * up)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
