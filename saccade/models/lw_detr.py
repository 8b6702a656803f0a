"""LW-DETR: https://arxiv.org/abs/2406.03459, and RF-DETR: https://arxiv.org/abs/2511.09554, which differ in rows.

A plain ViT in windows, a projector, and a short deformable decoder. Every place proposes a box; the surest give the
learned queries their references (https://arxiv.org/abs/2203.03605). In training there are several groups of queries
that do not see each other, each with proposals of its own (https://arxiv.org/abs/2207.13085); else only the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones import build_backbone
from saccade.backbones.windowed_vit import WindowedViTConfig
from saccade.layers.attention import MultiHeadAttention
from saccade.layers.deformable import DeformableAttention
from saccade.layers.feedforward import feed_forward, perceptron
from saccade.layers.linear import Linear
from saccade.layers.positions import sinusoidal_of_shares
from saccade.layers.projector import Projector
from saccade.layers.splat import splat
from saccade.layers.transformer import xavier
from saccade.models.detector import BoxTargets, DetectionOutputs, Detector, DetectorRow, LayerOutputs

Shapes = list[tuple[int, int]]

PRIOR = 0.01  # probability of each class at first, as in https://arxiv.org/abs/1708.02002
EDGE = 0.01  # places nearer than this to the edge of the picture, or boxes that large, propose nothing
SMALLEST = 0.05  # side of the box that a place of the first level starts from; it doubles from level to level


@dataclass(frozen=True, kw_only=True)
class LWDETRConfig(DetectorRow):
    """The published models saw pictures that were squashed to squares of `image_size`; here they keep their shape.

    A setting of max_aspect = 1 makes all pictures squares, with padding.
    """

    family: ClassVar[str] = "lw_detr"
    image_size: int = 640
    dim: int = 256
    heads: int = 8  # of attention among queries
    cross_heads: int = 16
    points: int = 2  # of each of those in each level
    hidden: int = 2048
    decoder_depth: int = 3
    queries: int = 300
    groups: int = 13  # of so many queries, in training
    scales: tuple[float, ...] = (1.0,)  # of the levels, relative to the backbone's maps
    norm: str = "batch"  # of the projector: batch or layer
    norm_eps: float = 1e-6  # of the latter
    loss: str = "lw_detr"
    dropout: float = 0.0

    @property
    def about(self) -> str:
        levels = "one level" if len(self.scales) == 1 else f"{len(self.scales)} levels"
        decoder = f"{self.decoder_depth} blocks of {self.dim} channels, {levels}"
        return f"{self.queries} queries, {decoder}, on {self.backbone.family}: {self.backbone.about}"

    def _form(self) -> dict[str, Any]:
        return {name: value for name, value in super()._form().items() if name != "norm_eps"}


@dataclass(frozen=True, kw_only=True)
class RFDETRConfig(LWDETRConfig):
    """Of the same parts, around a DINOv2 that looks at windows; sizes were found by a search."""

    family: ClassVar[str] = "rf_detr"
    norm: str = "layer"


def _lw_backbone(dim: int, depth: int = 10) -> WindowedViTConfig:
    return WindowedViTConfig(
        dim=dim,
        depth=depth,
        heads=12,
        hidden=4 * dim,
        grid=14,
        whole=(1, 3, 5) if depth == 6 else (2, 4, 5, 8),
        taken=(2, 4, 6) if depth == 6 else (3, 5, 6, 10),
        layer_scale=0.1,
        key_bias=False,
    )


def _rf(image_size: int, decoder_depth: int) -> RFDETRConfig:
    backbone = WindowedViTConfig(
        image_size=image_size,
        dim=384,
        depth=12,
        heads=6,
        hidden=1536,
        grid=image_size // 16,
        windows=2,
        whole=(3, 6, 9),
        taken=(3, 6, 9, 12),
        class_token=True,
        norm=True,
        resize="antialias",
        layer_scale=1.0,
    )
    return RFDETRConfig(backbone=backbone, image_size=image_size, decoder_depth=decoder_depth)


def _rf_base() -> RFDETRConfig:
    """The first one published; of its twelve blocks the last gave nothing to the result, so there is none here."""
    row = _rf(560, 3)
    assert isinstance(row.backbone, WindowedViTConfig)
    form = {"depth": 11, "patch_size": 14, "grid": 37, "windows": 4, "whole": (2, 5, 8), "taken": (2, 5, 8, 11)}
    return replace(row, backbone=replace(row.backbone, **form))


_TINY = LWDETRConfig(backbone=_lw_backbone(192, depth=6), queries=100)
_LARGE = LWDETRConfig(
    backbone=replace(_lw_backbone(384), drop_path=0.1), dim=384, heads=12, cross_heads=24, points=4, scales=(2.0, 0.5)
)

LW_DETR: dict[str, LWDETRConfig] = {
    "lw_detr_tiny": _TINY,
    "lw_detr_small": replace(_TINY, backbone=_lw_backbone(192), queries=300),
    "lw_detr_medium": replace(_TINY, backbone=_lw_backbone(384), queries=300),
    "lw_detr_large": _LARGE,
    "lw_detr_xlarge": replace(_LARGE, backbone=replace(_lw_backbone(768), drop_path=0.1)),
    "rf_detr_nano": _rf(384, 2),
    "rf_detr_small": _rf(512, 3),
    "rf_detr_medium": _rf(576, 4),
    "rf_detr_base": _rf_base(),
    "rf_detr_large": _rf(704, 4),
}


@dataclass(frozen=True)
class GroupedOutputs(DetectionOutputs):
    """The queries of one group after those of the other, also among the proposals that they are made of."""

    groups: int = 1


class Proposer(nn.Module):
    """What a group of queries asks every place for: is there a thing of some class, and how does its box lie?"""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.entry = nn.Sequential(Linear(dim, dim), nn.LayerNorm(dim))
        self.classes = Linear(dim, num_classes)
        self.boxes = perceptron(dim, dim, dim, 4)
        xavier(self.entry)
        start_heads(self.classes, self.boxes)

    def forward(
        self, x: Float[Tensor, "B N C"], start: Float[Tensor, "N 4"], usable: Tensor, count: int
    ) -> LayerOutputs:
        """The surest so many of the places of `x`, from boxes around them. Only what they say is learnt from."""
        with torch.no_grad():
            sure = self.classes(self.entry(x)).amax(dim=-1).masked_fill(~usable, -math.inf)
        best = sure.topk(count, dim=1).indices  # (B, Q)
        chosen = self.entry(x.gather(1, best[..., None].expand(-1, -1, x.shape[-1])))
        return LayerOutputs(self.classes(chosen), refined(start[best], self.boxes(chosen)))


class GroupedDecoderBlock(nn.Module):
    """Queries of a group look at each other, each at places around its reference, a feed-forward network; post-norm."""

    def __init__(self, c: LWDETRConfig):
        super().__init__()
        self.self_attention = MultiHeadAttention(c.dim, c.heads)
        self.norm1 = nn.LayerNorm(c.dim)
        self.cross_attention = DeformableAttention(c.dim, c.cross_heads, len(c.scales), c.points)
        self.norm2 = nn.LayerNorm(c.dim)
        self.mlp = feed_forward("relu", c.dim, c.hidden)
        self.norm3 = nn.LayerNorm(c.dim)
        self.dropout = c.dropout

    def forward(
        self,
        x: Float[Tensor, "B G Q C"],
        positions: Float[Tensor, "B G Q C"],
        reference: Float[Tensor, "B P 4"],
        memory: Float[Tensor, "B N C"],
        shapes: Shapes,
    ) -> Float[Tensor, "B G Q C"]:
        """P = G Q."""
        x = self._among_queries(x, positions)
        mixed = self.cross_attention((x + positions).flatten(1, 2), reference, memory, shapes)
        return self._finish(x, mixed)

    def with_weights(
        self, x: Tensor, positions: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes
    ) -> tuple[Float[Tensor, "B G Q C"], Float[Tensor, "B P H K 2"], Float[Tensor, "B P H K"]]:
        """`forward`, and where in the picture each head looked, with its weights."""
        x = self._among_queries(x, positions)
        attend = self.cross_attention.with_weights
        mixed, locations, weights = attend((x + positions).flatten(1, 2), reference, memory, shapes)
        return self._finish(x, mixed), locations, weights

    def _among_queries(self, x: Tensor, positions: Tensor) -> Tensor:
        mixed = self.self_attention(x.flatten(0, 1), positions=positions.flatten(0, 1))
        return self.norm1(x + self._drop(mixed.view_as(x)))

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self.norm2(x + self._drop(mixed.view_as(x)))
        return self.norm3(x + self._drop(self.mlp(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class LWDetr(Detector):
    """All blocks of the decoder share the last norm, the heads and the references, which are refined but once."""

    config: LWDETRConfig

    def __init__(self, config: LWDETRConfig, num_classes: int):
        super().__init__()
        c = self.config = config
        self.num_classes = num_classes
        self.backbone = build_backbone(c.backbone)
        self.projectors = nn.ModuleList(
            Projector(self.backbone.channels, c.dim, scale=scale, norm=c.norm, eps=c.norm_eps) for scale in c.scales
        )
        self.proposers = nn.ModuleList(Proposer(c.dim, num_classes) for _ in range(c.groups))
        self.query_table = nn.Parameter(torch.randn(c.groups * c.queries, c.dim))
        self.reference_table = nn.Parameter(torch.zeros(c.groups * c.queries, 4))  # changes of the proposals
        self.query_positions = perceptron(2 * c.dim, c.dim, c.dim)
        self.decoder = nn.ModuleList(GroupedDecoderBlock(c) for _ in range(c.decoder_depth))
        self.norm = nn.LayerNorm(c.dim)
        self.classes = Linear(c.dim, num_classes)
        self.boxes = perceptron(c.dim, c.dim, c.dim, 4)
        self._initialise()

    def _initialise(self) -> None:
        """As the published code."""
        xavier(self.decoder)
        xavier(self.query_positions)
        for module in self.decoder.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        start_heads(self.classes, self.boxes)

    def forward(self, images: Float[Tensor, "B 3 H W"], targets: BoxTargets | None = None) -> GroupedOutputs:
        return self._detect(images, self.decoder[-1])

    def with_maps(self, images: Float[Tensor, "B 3 H W"]) -> tuple[GroupedOutputs, Float[Tensor, "B Q h w"]]:
        last, maps = self.decoder[-1], images.new_zeros(0)
        assert isinstance(last, GroupedDecoderBlock)
        patch = self.backbone.strides[0]
        grid = images.shape[2] // patch, images.shape[3] // patch

        def watched(*inputs: Any) -> Tensor:
            nonlocal maps
            x, locations, weights = last.with_weights(*inputs)
            maps = splat(locations.flatten(2, 3), weights.flatten(2) / self.config.cross_heads, grid)
            return x

        return self._detect(images, watched), maps

    def _detect(self, images: Tensor, last: Callable[..., Tensor]) -> GroupedOutputs:
        """`last` computes the last block of the decoder."""
        groups = self.config.groups if self.training else 1
        memory, shapes = self._encode(images)
        proposals = self._propose(memory, shapes, groups)
        Q = proposals.boxes.shape[1] // groups
        tables = self.query_table, self.reference_table
        content, change = (each.unflatten(0, (self.config.groups, -1))[:groups, :Q] for each in tables)
        reference = refined(proposals.boxes.detach(), change.flatten(0, 1))  # (B, G Q, 4)
        waves = sinusoidal_of_shares(reference[..., (1, 0, 2, 3)], self.config.dim // 2).flatten(2)  # (B, G Q, 2 C)
        positions = self.query_positions(waves.to(memory.dtype)).unflatten(1, (groups, Q))
        x, states = content.expand(len(images), -1, -1, -1), []
        for block in (*self.decoder[:-1], last):
            x = self.backbone.run(block, x, positions, reference, memory, shapes)
            states.append(x.flatten(1, 2))
        x = self.norm(torch.stack(states))  # (L, B, G Q, C)
        layers = map(LayerOutputs, self.classes(x), refined(reference, self.boxes(x)))
        return GroupedOutputs(tuple(layers), proposals, groups)

    def _encode(self, images: Tensor) -> tuple[Float[Tensor, "B N C"], Shapes]:
        """The places of all levels, level after level."""
        maps = self.backbone(images).maps
        levels = [self.backbone.run(projector, maps) for projector in self.projectors]
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1), shapes

    def _propose(self, memory: Float[Tensor, "B N C"], shapes: Shapes, groups: int) -> LayerOutputs:
        """The surest places of each group, and their boxes."""
        dtype = torch.promote_types(memory.dtype, torch.float32)
        start = torch.cat([boxes_of_places(*each, memory.device, dtype) for each in enumerate(shapes)])
        usable = ((start > EDGE) & (start < 1 - EDGE)).all(dim=-1)  # (N,)
        x, count = memory.masked_fill(~usable[:, None], 0.0), min(self.config.queries, len(start))
        found = [proposer(x, start, usable, count) for proposer in self.proposers[:groups]]
        return LayerOutputs(torch.cat([each.logits for each in found], 1), torch.cat([each.boxes for each in found], 1))

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self.backbone.layers, *self.decoder]

    def class_tensors(self) -> tuple[str, ...]:
        parts = ("classes", *(f"proposers.{g}.classes" for g in range(len(self.proposers))))
        return tuple(f"{part}.{name}" for part in parts for name in ("weight", "bias"))


def start_heads(classes: nn.Linear, boxes: nn.Sequential) -> None:
    """No class is likely at first, and boxes are those that they begin with."""
    nn.init.constant_(classes.bias, -math.log((1 - PRIOR) / PRIOR))
    last = boxes[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def refined(boxes: Float[Tensor, "*B Q 4"], change: Float[Tensor, "*B Q 4"]) -> Float[Tensor, "*B Q 4"]:
    """Boxes that are moved by parts of their own sides, which then grow by a factor; no logits, so no bounds."""
    change = change.to(torch.promote_types(change.dtype, torch.float32))
    centres, sides = boxes.split(2, dim=-1)
    return torch.cat((centres + change[..., :2] * sides, sides * change[..., 2:].exp()), dim=-1)


def boxes_of_places(
    level: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "N 4"]:
    """A square around the middle of each cell of a map, row by row; all of one size, in shares of the picture."""
    y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in shape)
    side = x.new_full((len(y), len(x)), SMALLEST * 2**level)
    return torch.stack((x.expand_as(side), y[:, None].expand_as(side), side, side), dim=-1).flatten(0, 1)
