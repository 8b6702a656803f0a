"""Deformable DETR: https://arxiv.org/abs/2010.04159. DETR that looks at a few points of several maps.

Boxes may be refined from block to block of the decoder (`refine`), and the queries be the best of what every place of
the encoder proposes (`two_stage`). Pictures of a batch have one shape, so nothing is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones import build_backbone
from saccade.backbones.resnet import RESNET
from saccade.layers.attention import MultiHeadAttention
from saccade.layers.deformable import DeformableAttention
from saccade.layers.dropout import dropout
from saccade.layers.feedforward import feed_forward, perceptron
from saccade.layers.linear import Linear
from saccade.layers.positions import sinusoidal_2d_of_shares, sinusoidal_of_shares
from saccade.layers.splat import splat
from saccade.layers.transformer import xavier
from saccade.models.detector import BoxTargets, DetectionOutputs, Detector, DetectorRow, LayerOutputs

Shapes = list[tuple[int, int]]

FROM_BACKBONE = 3  # of several levels, so many are maps of the backbone; each one after them is half as large
GROUPS = 32  # of channels that are normalised together
LEAST = 1e-5  # a share of the picture, or its distance from one, below which its logit does not fall
PRIOR = 0.01  # probability of each class at first, as in https://arxiv.org/abs/1708.02002
EDGE = 0.01  # places nearer than this to the edge of the picture, or boxes that large, propose nothing
SMALLEST = 0.05  # side of the box that a place of the first level starts from; it doubles from level to level
MAP_STRIDE = 16  # pixels for a cell of the maps that explain


@dataclass(frozen=True, kw_only=True)
class DeformableDETRConfig(DetectorRow):
    """The published models saw pictures as DETR's do: shorter side 800 pixels, the longer at most 1333.

    Of one level, it is the backbone's last map. `points` are those of a head in each level.
    """

    family: ClassVar[str] = "deformable_detr"
    image_size: int = 928
    dim: int = 256
    heads: int = 8
    hidden: int = 1024
    encoder_depth: int = 6
    decoder_depth: int = 6
    levels: int = 4
    encoder_points: int = 4
    decoder_points: int = 4
    queries: int = 300
    refine: bool = False
    two_stage: bool = False
    loss: str = "deformable_detr"
    dropout: float = 0.1

    @property
    def about(self) -> str:
        kind = "two stages, " if self.two_stage else "refined boxes, " if self.refine else ""
        depths = f"{self.encoder_depth} + {self.decoder_depth} blocks of {self.dim} channels"
        levels = f"{self.levels} levels" if self.levels > 1 else "one level"
        return f"{kind}{self.queries} queries, {depths}, {levels}, on {self.backbone.family}: {self.backbone.about}"


_RESNET50 = replace(RESNET["resnet50"], image_size=928, frozen_norm=True)

DEFORMABLE_DETR = {
    "deformable_detr_resnet50": DeformableDETRConfig(backbone=_RESNET50),
    "deformable_detr_resnet50_refine": DeformableDETRConfig(backbone=_RESNET50, refine=True),
    "deformable_detr_resnet50_two_stage": DeformableDETRConfig(backbone=_RESNET50, refine=True, two_stage=True),
    "deformable_detr_resnet50_single": DeformableDETRConfig(backbone=_RESNET50, levels=1),
    "deformable_detr_resnet50_single_dc5": DeformableDETRConfig(backbone=replace(_RESNET50, dilated=True), levels=1),
}


class DeformableEncoderBlock(nn.Module):
    """Places look at places of all levels, and a feed-forward network; post-norm."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int, dropout: float):
        super().__init__()
        self.self_attention = DeformableAttention(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = feed_forward("relu", dim, hidden)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        positions: Float[Tensor, "1 N C"],
        reference: Float[Tensor, "1 N 2"],
        shapes: Shapes,
    ) -> Float[Tensor, "B N C"]:
        drop = partial(dropout, p=self.dropout, training=self.training)
        x = self.norm1(x + drop(self.self_attention(x + positions, reference, x, shapes)))
        return self.norm3(x + drop(self.mlp(x)))


class DeformableDecoderBlock(nn.Module):
    """Queries look at each other, then at places around their reference, and a feed-forward network; post-norm."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int, dropout: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, levels, points)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = feed_forward("relu", dim, hidden)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(
        self,
        x: Float[Tensor, "B Q C"],
        positions: Float[Tensor, "*B Q C"],
        reference: Float[Tensor, "*B Q R"],
        memory: Float[Tensor, "B N C"],
        shapes: Shapes,
    ) -> Float[Tensor, "B Q C"]:
        x = self._among_queries(x, positions)
        return self._finish(x, self.cross_attention(x + positions, reference, memory, shapes))

    def with_weights(
        self, x: Tensor, positions: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes
    ) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q H K 2"], Float[Tensor, "B Q H K"]]:
        """`forward`, and where in the picture each head looked, with its weights."""
        x = self._among_queries(x, positions)
        mixed, locations, weights = self.cross_attention.with_weights(x + positions, reference, memory, shapes)
        return self._finish(x, mixed), locations, weights

    def _among_queries(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.norm1(x + self._drop(self.self_attention(x, positions=positions)))

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self.norm2(x + self._drop(mixed))
        return self.norm3(x + self._drop(self.mlp(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


@dataclass(frozen=True)
class Memory:
    """The N places of all levels, level after level, as the encoder leaves them."""

    tokens: Float[Tensor, "B N C"]
    middles: Float[Tensor, "B N 2"]  # x and y, as shares of the picture
    shapes: Shapes


@dataclass(frozen=True)
class Queries:
    """What the decoder begins with. The reference is a point, or a box where `proposals` (of all places) gave it."""

    content: Float[Tensor, "B Q C"]
    positions: Float[Tensor, "*B Q C"]
    reference: Float[Tensor, "B Q R"]
    proposals: LayerOutputs | None = None


class DeformableDetr(Detector):
    """Without `refine`, all blocks of the decoder share the heads; with it each has its own. In two stages there is one
    more pair of heads, the last: it asks every place of the encoder whether a thing is there (its first class), and how
    its box lies.
    """

    config: DeformableDETRConfig

    def __init__(self, config: DeformableDETRConfig, num_classes: int):
        super().__init__()
        c = self.config = config
        if c.two_stage and not c.refine:
            raise ValueError("proposals are boxes, which only a model that refines them can go on with")
        if c.levels != 1 and c.levels < FROM_BACKBONE:
            raise ValueError(f"{c.levels} levels, which must be one, or {FROM_BACKBONE} and more")
        self.num_classes = num_classes
        self.backbone = build_backbone(c.backbone)
        self.projections = nn.ModuleList(self._projections())
        self.level_table = nn.Parameter(torch.randn(c.levels, c.dim))
        block = partial(DeformableEncoderBlock, c.dim, c.heads, c.levels, c.encoder_points, c.hidden, c.dropout)
        self.encoder = nn.ModuleList(block() for _ in range(c.encoder_depth))
        block = partial(DeformableDecoderBlock, c.dim, c.heads, c.levels, c.decoder_points, c.hidden, c.dropout)
        self.decoder = nn.ModuleList(block() for _ in range(c.decoder_depth))
        if c.two_stage:
            self.proposal = nn.Sequential(Linear(c.dim, c.dim), nn.LayerNorm(c.dim))
            self.proposal_query = nn.Sequential(Linear(2 * c.dim, 2 * c.dim), nn.LayerNorm(2 * c.dim))
        else:
            self.query_table = nn.Parameter(torch.randn(c.queries, 2 * c.dim))  # positions, then content
            self.reference = nn.Linear(c.dim, 2)
        heads = (c.decoder_depth if c.refine else 1) + c.two_stage
        self.classes = nn.ModuleList(Linear(c.dim, num_classes) for _ in range(heads))
        self.boxes = nn.ModuleList(perceptron(c.dim, c.dim, c.dim, 4) for _ in range(heads))
        self._initialise()

    def _projections(self) -> Iterator[nn.Module]:
        c = self.config
        given = self.backbone.channels[-min(FROM_BACKBONE, c.levels) :]
        more = [given[-1], *[c.dim] * c.levels][: c.levels - len(given)]
        for width, kernel in [*((width, 1) for width in given), *((width, 3) for width in more)]:
            conv = nn.Conv2d(width, c.dim, kernel, stride=1 if kernel == 1 else 2, padding=kernel // 2)
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
            conv.to(memory_format=torch.channels_last)  # as the maps are, or each call would copy the weights
            yield nn.Sequential(conv, nn.GroupNorm(GROUPS, c.dim))

    def _initialise(self) -> None:
        """As the published code. The first boxes are a tenth of the picture wide and high, or those of the places."""
        xavier(self.encoder)
        xavier(self.decoder)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if self.config.two_stage:
            xavier(self.proposal)
            xavier(self.proposal_query)
        else:
            xavier(self.reference)
            nn.init.zeros_(self.reference.bias)
        for classes, boxes in zip(self.classes, self.boxes, strict=True):
            assert isinstance(classes, nn.Linear) and isinstance(boxes, nn.Sequential)
            nn.init.constant_(classes.bias, -math.log((1 - PRIOR) / PRIOR))
            last = boxes[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            if boxes is self.boxes[0] and not self.config.two_stage:
                nn.init.constant_(last.bias.detach()[2:], -2.0)

    def forward(self, images: Float[Tensor, "B 3 H W"], targets: BoxTargets | None = None) -> DetectionOutputs:
        return self._detect(images, self.decoder[-1])

    def with_maps(self, images: Float[Tensor, "B 3 H W"]) -> tuple[DetectionOutputs, Float[Tensor, "B Q h w"]]:
        last, maps = self.decoder[-1], images.new_zeros(0)
        assert isinstance(last, DeformableDecoderBlock)
        grid = math.ceil(images.shape[2] / MAP_STRIDE), math.ceil(images.shape[3] / MAP_STRIDE)

        def watched(*inputs: Any) -> Tensor:
            nonlocal maps
            x, locations, weights = last.with_weights(*inputs)
            maps = splat(locations.flatten(2, 3), weights.flatten(2) / self.config.heads, grid)
            return x

        return self._detect(images, watched), maps

    def _detect(self, images: Tensor, last: Callable[..., Tensor]) -> DetectionOutputs:
        """`last` computes the last block of the decoder."""
        memory = self._encode(images)
        queries = self._propose(memory) if self.config.two_stage else self._ask(len(images))
        x, reference = queries.content, queries.reference
        states: list[Tensor] = []
        layers: list[LayerOutputs] = []
        for i, block in enumerate((*self.decoder[:-1], last)):
            x = self.backbone.run(block, x, queries.positions, reference, memory.tokens, memory.shapes)
            states.append(x)
            if self.config.refine:
                boxes = moved(reference, self.boxes[i](x))
                layers.append(LayerOutputs(self.classes[i](x), boxes))
                reference = boxes.detach()
        if not self.config.refine:
            x = torch.stack(states)  # (L, B, Q, C)
            layers = list(map(LayerOutputs, self.classes[0](x), moved(reference, self.boxes[0](x))))
        return DetectionOutputs(tuple(layers), queries.proposals)

    def _encode(self, images: Tensor) -> Memory:
        maps = self._levels(images)
        shapes = [(each.shape[2], each.shape[3]) for each in maps]
        x = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        waves = (sinusoidal_2d_of_shares(s, self.config.dim, offset=0.5, device=x.device, dtype=dtype) for s in shapes)
        positions = torch.cat([w.to(x.dtype) + level for w, level in zip(waves, self.level_table, strict=True)])
        middles = torch.cat([middles_of(shape, x.device, dtype) for shape in shapes]).expand(len(x), -1, -1)
        for block in self.encoder:
            x = self.backbone.run(block, x, positions, middles, shapes)
        return Memory(x, middles, shapes)

    def _levels(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of one width, the finest first. The first beyond the backbone's is made of its last one."""
        maps = self.backbone(images).maps
        given = maps[-min(FROM_BACKBONE, self.config.levels) :]
        levels = [project(each) for project, each in zip(self.projections[: len(given)], given, strict=True)]
        x = given[-1]
        for project in self.projections[len(given) :]:
            x = project(x)
            levels.append(x)
        return levels

    def _ask(self, pictures: int) -> Queries:
        """The learned queries, the same for every picture."""
        positions, content = self.query_table.chunk(2, dim=-1)
        reference = at_least_float32(self.reference(positions)).sigmoid()
        return Queries(content.expand(pictures, -1, -1), positions, reference.expand(pictures, -1, -1))

    def _propose(self, memory: Memory) -> Queries:
        """Every place proposes a box that begins around it. The surest become queries, made of nothing but the box."""
        sides = [SMALLEST * 2**level for level, (h, w) in enumerate(memory.shapes) for _ in range(h * w)]
        sides = memory.middles.new_tensor(sides).view(-1, 1).expand(len(memory.tokens), -1, 2)
        boxes = torch.cat((memory.middles, sides), dim=-1)  # (B, N, 4)
        usable = ((boxes > EDGE) & (boxes < 1 - EDGE)).all(dim=-1, keepdim=True)
        start = (boxes / (1 - boxes)).log().masked_fill(~usable, math.inf)
        x = self.proposal(memory.tokens.masked_fill(~usable, 0.0))
        logits, boxes = self.classes[-1](x), (start + self.boxes[-1](x)).sigmoid()
        best = logits[..., 0].topk(min(self.config.queries, x.shape[1]), dim=1).indices
        reference = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        waves = sinusoidal_of_shares(reference, self.config.dim // 2).flatten(2)  # (B, Q, 2 C)
        positions, content = self.proposal_query(waves.to(x.dtype)).chunk(2, dim=-1)
        return Queries(content, positions, reference, LayerOutputs(logits, boxes))

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self.backbone.layers, *self.encoder, *self.decoder]

    def class_tensors(self) -> tuple[str, ...]:
        of_classes = len(self.classes) - self.config.two_stage
        return tuple(f"classes.{i}.{name}" for i in range(of_classes) for name in ("weight", "bias"))

    def proposal_tensors(self) -> tuple[str, ...]:
        last = len(self.classes) - 1
        return (f"classes.{last}.weight", f"classes.{last}.bias") if self.config.two_stage else ()


def moved(reference: Float[Tensor, "*B Q R"], change: Float[Tensor, "*B Q 4"]) -> Float[Tensor, "*B Q 4"]:
    """The boxes that begin at a point (x, y), or at a box, and are changed in logits."""
    least = reference.clamp(min=LEAST), (1 - reference).clamp(min=LEAST)
    start = (least[0] / least[1]).log()
    return (F.pad(start, (0, 4 - start.shape[-1])) + change).sigmoid()


def middles_of(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Float[Tensor, "N 2"]:
    """Of the cells of a map, as shares of it: x and y, row by row."""
    y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in shape)
    return torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1).flatten(0, 1)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
