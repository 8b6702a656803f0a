"""Backbone and a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from saccade.backbones.base import Backbone, Row


@dataclass(frozen=True)
class ClassifierOutputs:
    logits: Float[Tensor, "B K"]


class Classifier(nn.Module):
    """Normalised pictures (B, 3, H, W) -> a score per class (B, K)."""

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.summary_channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> ClassifierOutputs:
        return ClassifierOutputs(self.head(self.backbone.summary(images)))

    def depth_of(self, parameter: str) -> int:
        """Layers below the parameter, for layer-wise learning rates; the head is the deepest."""
        return (
            self.backbone.depth_of(parameter.removeprefix("backbone.")) if self.in_backbone(parameter) else self.depth
        )

    @property
    def config(self) -> Row:
        """All that is needed to build it, beside the number of classes."""
        return self.backbone.config

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.backbone.layers

    @staticmethod
    def class_tensors() -> tuple[str, ...]:
        """The tensors with a row per class."""
        return "head.weight", "head.bias"

    @property
    def depth(self) -> int:
        return len(self.backbone.layers) + 1

    @staticmethod
    def in_backbone(parameter: str) -> bool:
        return parameter.startswith("backbone.")
