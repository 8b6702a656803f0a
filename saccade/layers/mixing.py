"""What exchangeable forms of attention share: the layout of the tokens, and one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.layers.attention import MultiHeadAttention

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """How tokens are laid out: first `prefix` tokens without a place (class token, registers), then a grid by rows."""

    grid: tuple[int, int]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


class Mixer(MultiHeadAttention):
    """Exact attention under the interface that all forms share: `forward` is also told the layout of the keys.

    The constructor takes the layout that the model is made for, which matters only to forms with weights per token.
    """

    independent_queries: ClassVar[bool] = True  # a query's result depends on no other: some may be computed alone
    takes_rotary: ClassVar[bool] = True

    def __init__(
        self, dim: int, heads: int, *, layout: Layout | None = None, qkv_bias: bool = True, key_bias: bool = True
    ):
        super().__init__(dim, heads, qkv_bias=qkv_bias, key_bias=key_bias)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        context: Float[Tensor, "B M C"] | None = None,
        *,
        bias: Tensor | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
        layout: Layout | None = None,
    ) -> Float[Tensor, "B N C"]:
        return super().forward(x, context, bias=bias, causal=causal, rotary=rotary)

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
        return super().with_weights(x, context, bias=bias, causal=causal, rotary=rotary)


class EfficientAttention(Mixer, ABC):
    """A form that never has all scores at hand, so it takes no bias and has no causal order. Subclasses write `mix`."""

    @abstractmethod
    def mix(
        self, q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H M D"], v: Float[Tensor, "B H M E"], layout: Layout
    ) -> Float[Tensor, "B H N E"]:
        """Must be linear in the values: `with_weights` reads the weights from what it does to the identity."""

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        context: Float[Tensor, "B M C"] | None = None,
        *,
        bias: Tensor | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
        layout: Layout | None = None,
    ) -> Float[Tensor, "B N C"]:
        layout = self._checked(x, context, bias, causal, rotary, layout)
        q, k, v = self.project_on(x, context, rotary, layout)
        return self.out(self.mix(q, k, v, layout).transpose(1, 2).flatten(2))

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
        """`forward`, and the weight of each key's value in each result, with O(N M) memory: for explanations.

        Forms that replace the softmax may give weights that are negative or do not sum to one.
        """
        layout = self._checked(x, context, bias, causal, rotary, layout)
        q, k, v = self.project_on(x, context, rotary, layout)
        identity = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
        weights = self.mix(q, k, identity, layout)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    def project_on(
        self, x: Tensor, context: Tensor | None, rotary: Rotary | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`project`, for forms that need the layout already here."""
        return self.project(x, context, rotary)

    def _checked(
        self,
        x: Tensor,
        context: Tensor | None,
        bias: Tensor | None,
        causal: bool,
        rotary: Rotary | None,
        layout: Layout | None,
    ) -> Layout:
        name = type(self).__name__
        keys = x.shape[1] if context is None else context.shape[1]
        if bias is not None or causal:
            raise ValueError(f"{name} never has all scores at hand: it takes no bias and has no causal order")
        if context is not None and not self.independent_queries:
            raise ValueError(f"{name} is self-attention alone: it takes no context")
        if rotary is not None and not self.takes_rotary:
            raise ValueError(f"{name} makes keys of several tokens at once: it takes no rotary positions")
        if layout is None:
            raise ValueError(f"{name} must be told where its tokens lie: layout=Layout(grid, prefix)")
        if layout.tokens != keys:
            raise ValueError(f"{name}: {keys} tokens, but a layout of {layout.tokens}: {layout}")
        return layout
