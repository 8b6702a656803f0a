"""A Transformer decoder token by token: keys and values of what is past are kept, so that each token costs one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.feedforward import SwiGLU
from saccade.layers.transformer import TransformerBlock

ROWS = 32  # for about so many rows a packed matrix is laid out; it serves any number


class PackedLinear:
    """A linear layer for inference, its matrix laid out once as oneDNN multiplies fastest: two to four times the speed
    of `F.linear` on few rows (AMD EPYC, float32). Elsewhere it is `F.linear`."""

    def __init__(self, weight: Float[Tensor, "O I"], bias: Tensor | None):
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.packed = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            try:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)
            except (AttributeError, RuntimeError, NotImplementedError):  # the operator is not of PyTorch's public ones
                self.packed = None

    def __call__(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        x = x.to(self.weight.dtype)  # autocast knows nothing of the operator below
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed(layer: nn.Linear) -> PackedLinear:
    return PackedLinear(layer.weight, layer.bias)


class BlockStep:
    """A `TransformerBlock` with a context, for the next token of each beam."""

    def __init__(self, block: TransformerBlock):
        assert block.cross_attention is not None and block.norm2 is not None
        assert not isinstance(block.mlp, SwiGLU)
        inner, cross = block.self_attention, block.cross_attention
        C = inner.out.in_features
        self.heads, self.norm_first = inner.heads, block.norm_first
        self.norms = block.norm1, block.norm2, block.norm3
        self.qkv, self.out = PackedLinear(inner.qkv.weight, inner.bias()), packed(inner.out)
        weight, bias = cross.qkv.weight, cross.bias()
        self.query = PackedLinear(weight[:C].contiguous(), None if bias is None else bias[:C])
        self.key_value = PackedLinear(weight[C:].contiguous(), None if bias is None else bias[C:])
        self.cross_out = packed(cross.out)
        self.up, self.down, self.activation = packed(block.mlp.up), packed(block.mlp.down), block.mlp.activation

    def context(self, memory: Float[Tensor, "B M C"]) -> Float[Tensor, "2 B H M D"]:
        """Keys and values of what is attended to, once for all tokens."""
        return self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def __call__(
        self,
        x: Float[Tensor, "B W C"],
        past: Float[Tensor, "B L 2 H D"],
        used: int,
        visible: Bool[Tensor, "B 1 W L"] | None,
        context: Float[Tensor, "2 B H M D"],
        context_bias: Tensor | None,
    ) -> Float[Tensor, "B W C"]:
        """Writes keys and values of the W beams into `past` behind the first `used` places, and attends to all these.

        `visible` says which places belong to the past of which beam; none: all do.
        """
        W = x.shape[1]
        h = self.norms[0](x) if self.norm_first else x
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, W, H, D)
        past[:, used : used + W, 0] = k
        past[:, used : used + W, 1] = v
        keys, values = past[:, : used + W].permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=visible)
        x = self._add(x, self.out(mixed.transpose(1, 2).flatten(2)), 0)
        h = self.norms[1](x) if self.norm_first else x
        q = self.query(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, context[0], context[1], attn_mask=context_bias)
        x = self._add(x, self.cross_out(mixed.transpose(1, 2).flatten(2)), 1)
        h = self.norms[2](x) if self.norm_first else x
        return self._add(x, self.down(self.activation(self.up(h))), 2)

    def _add(self, x: Tensor, branch: Tensor, k: int) -> Tensor:
        x = x + branch
        return x if self.norm_first else self.norms[k](x)


class Past:
    """The keys and values of all layers for B texts with W beams each, in the order in which they were made.

    Beams are never moved: a place that is not in a beam's past is hidden from it, so that going on with other beams
    changes a small table instead of copying all keys and values.
    """

    def __init__(
        self, steps: Sequence[BlockStep], memory: Float[Tensor, "B M C"], context_bias: Tensor | None, beams: int
    ):
        B, _, C = memory.shape
        self.steps, self.beams = steps, beams
        self.contexts = torch.stack([step.context(memory) for step in steps])  # (layers, 2, B, H, M, D)
        self.context_bias = context_bias
        heads = steps[0].heads
        self.kept = memory.new_empty(len(steps), B, 8 * beams, 2, heads, C // heads)
        self.visible = torch.zeros(B, beams, 8 * beams, dtype=torch.bool, device=memory.device)
        self.used = 0  # places, `beams` for each token
        self.own = torch.eye(beams, dtype=torch.bool, device=memory.device)

    def advance(self, x: Float[Tensor, "B W C"]) -> Float[Tensor, "B W C"]:
        """One token of every beam through all layers."""
        reach = self.used + self.beams
        if reach > self.kept.shape[2]:
            self.kept = torch.cat((self.kept, torch.empty_like(self.kept)), dim=2)
            self.visible = torch.cat((self.visible, torch.zeros_like(self.visible)), dim=2)
        self.visible[:, :, self.used : reach] = self.own
        seen = None if self.beams == 1 else self.visible[:, None, :, :reach]
        for step, kept, context in zip(self.steps, self.kept, self.contexts, strict=True):
            x = step(x, kept, self.used, seen, context, self.context_bias)
        self.used = reach
        return x

    def select(self, parents: Int[Tensor, "B W"]) -> None:
        """Each beam goes on with the past of another one of its text."""
        self.visible = self.visible.gather(1, parents[..., None].expand(-1, -1, self.visible.shape[2]))

    def keep(self, texts: Int[Tensor, " b"]) -> None:
        """The others are finished; what belongs to them is let go."""
        kept = self.kept.new_empty(len(self.kept), len(texts), *self.kept.shape[2:])
        kept[:, :, : self.used] = self.kept[:, texts, : self.used]
        self.kept, self.visible = kept, self.visible[texts]
        self.contexts = self.contexts[:, :, texts]
        self.context_bias = None if self.context_bias is None else self.context_bias[texts]

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return sum(each.numel() * each.element_size() for each in (self.kept, self.contexts))

