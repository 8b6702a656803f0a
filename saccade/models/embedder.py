"""A backbone alone: pictures to vectors."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saccade.backbones.base import Backbone, Row


@dataclass(frozen=True)
class EmbedderOutputs:
    embedding: Float[Tensor, "B C"]


class Embedder(nn.Module):
    """Normalised pictures (B, 3, H, W) -> a vector each (B, C)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> EmbedderOutputs:
        return EmbedderOutputs(self.backbone.summary(images))

    @property
    def config(self) -> Row:
        """All that is needed to build it."""
        return self.backbone.config
