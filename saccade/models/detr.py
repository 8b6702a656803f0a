"""DETR: https://arxiv.org/abs/2005.12872. A backbone, and a Transformer that is asked by learned queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saccade.backbones import build_backbone
from saccade.backbones.resnet import RESNET
from saccade.layers.feedforward import perceptron
from saccade.layers.positions import sinusoidal_2d_of_shares
from saccade.layers.transformer import TransformerBlock, xavier
from saccade.models.detector import BoxTargets, DetectionOutputs, Detector, DetectorRow, LayerOutputs


@dataclass(frozen=True, kw_only=True)
class DETRConfig(DetectorRow):
    """The published models saw pictures whose shorter side is 800 pixels and the longer at most 1333.

    An `image_size` of 928 gives a picture of 4:3, as most of COCO's are, as many pixels: 800 x 1066.
    """

    family: ClassVar[str] = "detr"
    image_size: int = 928
    dim: int = 256
    heads: int = 8
    hidden: int = 2048
    encoder_depth: int = 6
    decoder_depth: int = 6
    queries: int = 100
    loss: str = "detr"
    dropout: float = 0.1

    @property
    def about(self) -> str:
        depths = f"{self.encoder_depth} + {self.decoder_depth} x {self.dim}"
        return f"{self.backbone.about}; {depths}, {self.queries} queries"


def _resnet(name: str, *, dilated: bool = False) -> DETRConfig:
    return DETRConfig(backbone=replace(RESNET[name], image_size=928, frozen_norm=True, dilated=dilated))


DETR = {
    "detr_resnet50": _resnet("resnet50"),
    "detr_resnet50_dc5": _resnet("resnet50", dilated=True),
    "detr_resnet101": _resnet("resnet101"),
    "detr_resnet101_dc5": _resnet("resnet101", dilated=True),
}


class Detr(Detector):
    """The last map's places attend to each other, queries to each other and to the places; a query gives a box.

    Dropout is that of the paper, after each attention and feed-forward network.
    """

    config: DETRConfig

    def __init__(self, config: DETRConfig, num_classes: int):
        super().__init__()
        c = self.config = config
        self.num_classes = num_classes
        self.backbone = build_backbone(c.backbone)
        self.projection = nn.Conv2d(self.backbone.channels[-1], c.dim, kernel_size=1)
        block = partial(TransformerBlock, c.dim, c.heads, c.hidden, dropout=c.dropout)
        self.encoder = nn.ModuleList(block(cross=False) for _ in range(c.encoder_depth))
        self.decoder = nn.ModuleList(block() for _ in range(c.decoder_depth))
        self.norm = nn.LayerNorm(c.dim)
        self.query_table = nn.Parameter(torch.randn(c.queries, c.dim))
        self.classes = nn.Linear(c.dim, num_classes + 1)  # the last one is for nothing
        self.boxes = perceptron(c.dim, c.dim, c.dim, 4)
        xavier(self.encoder)
        xavier(self.decoder)

    def forward(self, images: Float[Tensor, "B 3 H W"], targets: BoxTargets | None = None) -> DetectionOutputs:
        memory, places, _ = self._encode(images)
        x, states = self._start(memory), []
        for block in self.decoder:
            x = self.backbone.run(block, x, memory, self.query_table, places)
            states.append(x)
        return self._answer(states)

    def with_maps(self, images: Float[Tensor, "B 3 H W"]) -> tuple[DetectionOutputs, Float[Tensor, "B Q h w"]]:
        memory, places, grid = self._encode(images)
        x, states = self._start(memory), []
        for block in self.decoder[:-1]:
            x = block(x, memory, self.query_table, places)
            states.append(x)
        last = self.decoder[-1]
        assert isinstance(last, TransformerBlock)
        x, weights = last.with_weights(x, memory, self.query_table, places)
        return self._answer([*states, x]), weights.mean(dim=1).unflatten(-1, grid)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Tokens (B, h w, C), their positions (h w, C) and the grid."""
        x = self.projection(self.backbone(images).maps[-1])
        grid = x.shape[-2], x.shape[-1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        places = sinusoidal_2d_of_shares(grid, self.config.dim, device=x.device, dtype=dtype).to(x.dtype)
        x = x.flatten(2).transpose(1, 2)
        for block in self.encoder:
            x = self.backbone.run(block, x, None, places)
        return x, places, grid

    def _start(self, memory: Tensor) -> Tensor:
        """Queries begin as nothing but their positions, which every block adds."""
        return memory.new_zeros(len(memory), *self.query_table.shape)

    def _answer(self, states: list[Tensor]) -> DetectionOutputs:
        """What every block of the decoder says: they share the last norm and the heads."""
        x = self.norm(torch.stack(states))  # (L, B, Q, C)
        logits, change = self.classes(x), self.boxes(x)
        boxes = change.to(torch.promote_types(change.dtype, torch.float32)).sigmoid()  # a step of bfloat16 is 1 / 256
        return DetectionOutputs(tuple(map(LayerOutputs, logits, boxes)))

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self.backbone.layers, *self.encoder, *self.decoder]

    def class_tensors(self) -> tuple[str, ...]:
        return "classes.weight", "classes.bias"
