"""Glance, the house detector: the one that learns fastest from few pictures and needs no suppression of doubles.

A small convolutional backbone, attention within its coarsest map and sums between its maps; every place proposes a
box; the best proposals become queries of a deformable decoder (two stages, https://arxiv.org/abs/2010.04159). What
makes it learn fast is that every part is taught directly:

- each place by the several objects that fit it best (task alignment, https://arxiv.org/abs/2108.07755), which only
  training sees, and the score that chooses the queries by one place an object (https://arxiv.org/abs/2405.14458), so
  that doubles are rare before the decoder begins;
- the decoder by disturbed copies of the true boxes, right ones and wrong ones (https://arxiv.org/abs/2203.03605), and
  a score that says how well the box fits (https://arxiv.org/abs/2412.04234).

Boxes are refined relative to their own size, so that small ones learn as fast as large ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones import build_backbone
from saccade.backbones.base import Row
from saccade.backbones.resnet import RESNET, ResNetConfig
from saccade.layers.attention import MultiHeadAttention
from saccade.layers.boxes import pairwise_iou, to_centres, to_corners
from saccade.layers.convolution import ConvNorm
from saccade.layers.deformable import DeformableAttention
from saccade.layers.encoder import EncoderBlock
from saccade.layers.feedforward import FeedForward
from saccade.layers.positions import sinusoidal_2d
from saccade.layers.splat import splat
from saccade.models.detector import BoxTargets, DetectionOutputs, Detector, DetectorRow, LayerOutputs

LEVELS = 3  # the last maps of the backbone
PRIOR = 0.01  # probability of any class at first
RIVAL_POWERS = (1, 2, 4, 8)
START = 2.0  # a place's box at first reaches so many strides to each side


@dataclass(frozen=True, kw_only=True)
class GlanceConfig(DetectorRow):
    """`denoising` is about how many disturbed boxes a training picture gets beside its queries."""

    family: ClassVar[str] = "glance"
    dim: int
    decoder_layers: int
    heads: int = 8
    points: int = 4
    hidden: int = 512
    encoder_layers: int = 1
    fusion_blocks: int = 1
    denoising: int = 100
    image_size: int = 640
    loss: str = "glance"

    @property
    def about(self) -> str:
        return f"{self.backbone.about}; {self.decoder_layers} x {self.dim}, {self.queries} queries"


def _row(
    backbone: Row, dim: int, layers: int, image_size: int, *, queries: int = 300, blocks: int = 1, hidden: int = 512
) -> GlanceConfig:
    return GlanceConfig(
        backbone=replace(backbone, image_size=image_size),
        dim=dim,
        decoder_layers=layers,
        image_size=image_size,
        queries=queries,
        fusion_blocks=blocks,
        hidden=hidden,
    )


SLIM = ResNetConfig(depths=(1, 2, 2, 1), bottleneck=False, widths=(32, 64, 128, 256), stem=32)

GLANCE = {
    "glance_nano": _row(SLIM, 96, 2, 320, queries=100, hidden=256),
    "glance_small": _row(RESNET["resnet18"], 128, 3, 480),
    "glance_medium": _row(RESNET["resnet34"], 192, 4, 640, blocks=2),
    "glance_large": _row(RESNET["resnet50"], 256, 6, 640, blocks=2, hidden=1024),
}


@dataclass(frozen=True)
class Dense:
    """What every place (N of them, of all maps) says, and where it is; boxes and points are shares of the picture."""

    boxes: Float[Tensor, "B N 4"]  # left, top, right, bottom
    one: Float[Tensor, "B N K"]  # the score that chooses queries: one place an object
    many: Float[Tensor, "B N K"] | None  # several places an object; only in training
    points: Float[Tensor, "N 2"]
    strides: Float[Tensor, "N 2"]


@dataclass(frozen=True)
class Denoising:
    """What became of disturbed boxes: in each layer R of them in B rows, of which only those named are real."""

    layers: tuple[LayerOutputs, ...]  # each (B, R, ...)
    picture: Int[Tensor, " D"]
    place: Int[Tensor, " D"]  # 0 to R - 1
    target: Int[Tensor, " D"]  # which of the batch's objects it was made from
    right: Tensor  # bool (D,): should become that object; the others should become nothing


@dataclass(frozen=True)
class GlanceOutputs(DetectionOutputs):
    dense: Dense | None = None
    denoising: Denoising | None = None


class Fusion(nn.Module):
    """The backbone's maps -> maps of one width, each of which has seen the others."""

    def __init__(self, channels: Sequence[int], c: GlanceConfig):
        super().__init__()
        self.entries = nn.ModuleList(ConvNorm(width, c.dim, 1) for width in channels)
        self.encoder = nn.ModuleList(EncoderBlock(c.dim, c.heads, c.hidden) for _ in range(c.encoder_layers))
        self.coarse_to_fine = nn.ModuleList(_convs(c) for _ in channels[1:])
        self.shrink = nn.ModuleList(ConvNorm(c.dim, c.dim, 3, 2) for _ in channels[1:])
        self.fine_to_coarse = nn.ModuleList(_convs(c) for _ in channels[1:])

    def forward(self, maps: Sequence[Float[Tensor, "B C h w"]]) -> list[Float[Tensor, "B D h w"]]:
        x = [entry(each) for entry, each in zip(self.entries, maps, strict=True)]
        x[-1] = self._attend(x[-1])
        for i, convs in reversed(list(enumerate(self.coarse_to_fine))):
            x[i] = convs(x[i] + F.interpolate(x[i + 1], size=x[i].shape[2:], mode="nearest"))
        for i, (shrink, convs) in enumerate(zip(self.shrink, self.fine_to_coarse, strict=True)):
            x[i + 1] = convs(x[i + 1] + shrink(x[i]))
        return x

    def _attend(self, x: Tensor) -> Tensor:
        grid, C = (x.shape[2], x.shape[3]), x.shape[1]
        tokens = x.flatten(2).transpose(1, 2) + sinusoidal_2d(grid, C, device=x.device).to(x.dtype)
        for block in self.encoder:
            tokens = block(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, grid)


def _convs(c: GlanceConfig) -> nn.Sequential:
    return nn.Sequential(*(ConvNorm(c.dim, c.dim, activation=F.silu) for _ in range(c.fusion_blocks)))


class DenseHead(nn.Module):
    """Scores and a box at every place of every map; the maps share it."""

    def __init__(self, c: GlanceConfig, classes: int):
        super().__init__()
        self.box = nn.Sequential(ConvNorm(c.dim, c.dim, activation=F.silu), nn.Conv2d(c.dim, 4, 1))
        self.many = nn.Sequential(ConvNorm(c.dim, c.dim, activation=F.silu), nn.Conv2d(c.dim, classes, 1))
        self.one = nn.Sequential(
            ConvNorm(c.dim, c.dim, activation=F.silu),
            ConvNorm(c.dim, c.dim, activation=F.silu),
            nn.Conv2d(c.dim, classes, 1),
        )
        for head in (self.many, self.one):
            _start_at_prior(head[-1])
        nn.init.zeros_(self.box[-1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.box[-1].bias)  # pyright: ignore[reportArgumentType]

    def forward(self, maps: Sequence[Float[Tensor, "B C h w"]]) -> Dense:
        boxes, ones, manys, points, strides = [], [], [], [], []
        for x in maps:
            h, w = x.shape[2:]
            stride = x.new_tensor((1 / w, 1 / h), dtype=torch.float32)
            rows, columns = torch.meshgrid(
                torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij"
            )
            place = (torch.stack((columns, rows), dim=-1).flatten(0, 1) + 0.5) * stride  # (N, 2)
            reach = START * stride.repeat(2) * _tokens(self.box(x)).float().clamp(-6, 6).exp()  # (B, N, 4)
            boxes.append(torch.cat((place - reach[..., :2], place + reach[..., 2:]), dim=-1))
            ones.append(_tokens(self.one(x)))
            if self.training:
                manys.append(_tokens(self.many(x)))
            points.append(place)
            strides.append(stride.expand(h * w, 2))
        many = torch.cat(manys, dim=1) if manys else None
        return Dense(
            torch.cat(boxes, dim=1), torch.cat(ones, dim=1), many, torch.cat(points), torch.cat(strides)
        )


class DecoderBlock(nn.Module):
    """Queries look at each other, then where their boxes are: post-norm."""

    def __init__(self, c: GlanceConfig):
        super().__init__()
        self.self_attention = MultiHeadAttention(c.dim, c.heads)
        self.cross_attention = DeformableAttention(c.dim, c.heads, LEVELS, c.points)
        self.mlp = FeedForward(c.dim, c.hidden)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c.dim) for _ in range(3))

    def forward(
        self,
        x: Float[Tensor, "B Q C"],
        place: Float[Tensor, "B Q C"],
        boxes: Float[Tensor, "B Q 4"],
        memory: Float[Tensor, "B N C"],
        shapes: Sequence[tuple[int, int]],
        keep: Tensor | None,
        points: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """`keep` (Q, Q): which query may look at which. Where they looked, and how much, is added to `points`."""
        x = self.norm1(x + self.self_attention(x, bias=keep, positions=place))
        if points is None:
            seen = self.cross_attention(x + place, boxes, memory, shapes)
        else:
            seen, locations, weights = self.cross_attention.with_weights(x + place, boxes, memory, shapes)
            points.append((locations, weights))
        x = self.norm2(x + seen)
        return self.norm3(x + self.mlp(x))


class Glance(Detector):
    """Backbone -> fusion -> a proposal at every place -> the best as queries -> decoder. Scores are sigmoids."""

    config: GlanceConfig

    def __init__(self, config: GlanceConfig, num_classes: int):
        super().__init__()
        c = self.config = config
        self.num_classes = num_classes
        self.backbone = build_backbone(c.backbone)
        self.fusion = Fusion(self.backbone.channels[-LEVELS:], c)
        self.dense = DenseHead(c, num_classes)
        self.content = nn.Sequential(nn.Linear(c.dim, c.dim), nn.LayerNorm(c.dim))
        self.place = nn.Sequential(nn.Linear(4, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        self.rivals = nn.ModuleList(nn.Linear(len(RIVAL_POWERS), c.dim) for _ in range(c.decoder_layers))
        self.blocks = nn.ModuleList(DecoderBlock(c) for _ in range(c.decoder_layers))
        self.scores = nn.ModuleList(nn.Linear(c.dim, num_classes) for _ in range(c.decoder_layers))
        self.refine = nn.ModuleList(_refinement(c.dim) for _ in range(c.decoder_layers))
        self.disturbed = nn.Embedding(num_classes, c.dim)  # what a query is told of a disturbed object's class
        for score in self.scores:
            _start_at_prior(score)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self.backbone.layers, *self.fusion.encoder, *self.blocks]

    def class_tensors(self) -> tuple[str, ...]:
        heads = ["dense.many.1", "dense.one.2", *(f"scores.{i}" for i in range(len(self.scores)))]
        return ("disturbed.weight", *(f"{head}.{name}" for head in heads for name in ("weight", "bias")))

    def forward(self, images: Float[Tensor, "B 3 H W"], targets: BoxTargets | None = None) -> GlanceOutputs:
        dense, memory, shapes = self._look(images)
        x, boxes, logits = self._choose(memory, dense)
        if targets is None or not self.training or not self.config.denoising:
            layers = self._decode(x, boxes, logits, memory, shapes)
            return GlanceOutputs(layers, dense=dense if self.training else None)
        noise = disturb(targets, len(images), self.config.denoising, self.num_classes)
        R = noise.boxes.shape[1]
        x = torch.cat((self.disturbed(noise.labels).to(x.dtype), x), dim=1)
        boxes = torch.cat((noise.boxes, boxes), dim=1)
        logits = F.pad(logits, (0, 0, R, 0))
        both = self._decode(x, boxes, logits, memory, shapes, noise.keep(x.shape[1]), first=R)
        layers = tuple(LayerOutputs(layer.logits[:, R:], layer.boxes[:, R:]) for layer in both)
        noisy = tuple(LayerOutputs(layer.logits[:, :R], layer.boxes[:, :R]) for layer in both)
        denoising = Denoising(noisy, noise.picture, noise.place, noise.target, noise.right)
        return GlanceOutputs(layers, dense=dense, denoising=denoising)

    def with_maps(self, images: Float[Tensor, "B 3 H W"]) -> tuple[GlanceOutputs, Float[Tensor, "B Q h w"]]:
        """The maps are of the points at which the last layer looked, on the grid of the finest map."""
        dense, memory, shapes = self._look(images)
        x, boxes, logits = self._choose(memory, dense)
        points: list[tuple[Tensor, Tensor]] = []
        layers = self._decode(x, boxes, logits, memory, shapes, points=points)
        locations, weights = points[-1]  # (B, Q, H, P, 2), (B, Q, H, P)
        return GlanceOutputs(layers), splat(locations.flatten(2, 3), weights.flatten(2), shapes[0])

    def _look(self, images: Tensor) -> tuple[Dense, Tensor, list[tuple[int, int]]]:
        """What every place says; what it holds (B, N, C); the shapes of the maps."""
        maps = self.fusion(self.backbone(images).maps[-LEVELS:])
        memory = torch.cat([_tokens(each) for each in maps], dim=1)
        return self.dense(maps), memory, [(each.shape[2], each.shape[3]) for each in maps]

    def _choose(self, memory: Tensor, dense: Dense) -> tuple[Tensor, Tensor, Tensor]:
        """The places with the best scores: what they hold, their boxes by centre and size, and their scores."""
        count = min(self.config.queries, memory.shape[1])
        scores = dense.one.detach()
        best = scores.amax(dim=-1).topk(count, dim=1).indices[..., None]  # (B, Q, 1)
        x = self.content(memory.gather(1, best.expand(-1, -1, memory.shape[2])))
        boxes = dense.boxes.detach().gather(1, best.expand(-1, -1, 4))
        return x, to_centres(boxes), scores.gather(1, best.expand(-1, -1, scores.shape[2]))

    def _decode(
        self,
        x: Tensor,
        boxes: Tensor,
        logits: Float[Tensor, "B Q K"],
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        keep: Tensor | None = None,
        first: int = 0,
        points: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[LayerOutputs, ...]:
        """What each layer says of the queries, of which those before the `first` are disturbed truths.

        Where each looked, and how much, is added to `points`.
        """
        found, R = [], first
        for rival, block, score, refine in zip(self.rivals, self.blocks, self.scores, self.refine, strict=True):
            boxes = boxes.detach()
            hint = F.pad(rivalry(boxes[:, R:], logits[:, R:].detach().float()), (0, 0, R, 0))
            x = x + rival(hint.to(x.dtype))
            x = self.backbone.run(block, x, self.place(boxes.to(x.dtype)), boxes, memory, shapes, keep, points)
            boxes, logits = refined(boxes, refine(x).float()), score(x)
            found.append(LayerOutputs(logits, boxes))
        return tuple(found)


def rivalry(boxes: Float[Tensor, "B Q 4"], logits: Float[Tensor, "B Q K"]) -> Float[Tensor, "B Q R"]:
    """How much each query's box overlaps that of a surer one of its class: powers of the largest overlap.

    Of queries that see the same thing only one may say so, and all look alike to themselves. Which of them is to speak
    need not be found out by attention alone, then; what is made of the hint is learnt: https://arxiv.org/abs/1705.02950.
    """
    scores, labels = logits.max(dim=-1)  # (B, Q)
    order = torch.arange(scores.shape[1], device=scores.device)
    ties = (scores[:, None] == scores[:, :, None]) & (order < order[:, None])
    surer = (scores[:, None] > scores[:, :, None]) | ties  # (B, Q, Q): the second than the first
    same = labels[:, None] == labels[:, :, None]
    corners = to_corners(boxes)
    overlap = (pairwise_iou(corners, corners) * (surer & same)).amax(dim=2)
    return torch.stack([overlap**power for power in RIVAL_POWERS], dim=-1)


def refined(boxes: Float[Tensor, "B Q 4"], change: Float[Tensor, "B Q 4"]) -> Float[Tensor, "B Q 4"]:
    """The centre moves by shares of width and height, which grow or shrink by factors."""
    centres, sizes = boxes.split(2, dim=-1)
    return torch.cat((centres + change[..., :2] * sizes, sizes * change[..., 2:].clamp(-4, 4).exp()), dim=-1)


@dataclass(frozen=True)
class Noise:
    """Disturbed boxes for a batch: G groups, each with a right and a wrong copy of every object, in B rows of R."""

    labels: Int[Tensor, "B R"]
    boxes: Float[Tensor, "B R 4"]
    group: Int[Tensor, " R"]
    picture: Int[Tensor, " D"]
    place: Int[Tensor, " D"]
    target: Int[Tensor, " D"]
    right: Tensor  # bool (D,)

    def keep(self, count: int) -> Tensor:
        """bool (Q, Q): which of all `count` queries each may look at. Real ones never see a disturbed truth."""
        group = F.pad(self.group, (0, count - len(self.group)), value=-1)
        return (group[:, None] == group) | (group == -1)


LABEL_NOISE = 0.25  # share of disturbed boxes that are told another class
BOX_NOISE = 0.5  # of half the size, by which each edge of a right copy moves at most; of a wrong one, at least


def disturb(targets: BoxTargets, pictures: int, count: int, classes: int) -> Noise:
    """About `count` disturbed copies a picture, in groups: https://arxiv.org/abs/2203.03605.

    A right copy's edges move by less than half of half the side, a wrong one's by half to all of it. Of pictures with
    fewer objects than the fullest one, places are left over, which nothing is asked about.
    """
    boxes, device = targets.boxes, targets.boxes.device
    M = len(boxes)
    per_picture = torch.bincount(targets.picture, minlength=pictures)
    most = int(per_picture.max())
    groups = max(1, count // max(1, 2 * most))
    rank = torch.arange(M, device=device) - (per_picture.cumsum(0) - per_picture)[targets.picture]
    shape = (groups, 2, M)
    group = torch.arange(groups, device=device)[:, None, None].expand(shape)
    wrong = torch.arange(2, device=device)[None, :, None].expand(shape)
    place = (group * 2 + wrong) * most + rank
    target = torch.arange(M, device=device).expand(shape)
    centres, sizes = boxes.split(2, dim=-1)
    corners = torch.cat((centres - sizes / 2, centres + sizes / 2), dim=-1)
    amount = (torch.rand((*shape, 4), device=device) + wrong[..., None]) * BOX_NOISE
    sign = torch.randint(0, 2, (*shape, 4), device=device) * 2 - 1
    moved = (corners + sign * amount * (sizes / 2).repeat(1, 2)).clamp(0, 1)
    first, second = torch.minimum(moved[..., :2], moved[..., 2:]), torch.maximum(moved[..., :2], moved[..., 2:])
    noisy = torch.cat(((first + second) / 2, (second - first).clamp_min(1e-3)), dim=-1)
    told = torch.where(
        torch.rand(shape, device=device) < LABEL_NOISE,
        torch.randint(0, classes, shape, device=device),
        targets.labels.expand(shape),
    )
    R = groups * 2 * most
    picture = targets.picture.expand(shape).flatten()
    all_boxes = torch.full((pictures, R, 4), 0.5, device=device)
    all_boxes[picture, place.flatten()] = noisy.flatten(0, 2)
    labels = torch.zeros((pictures, R), dtype=torch.int64, device=device)
    labels[picture, place.flatten()] = told.flatten()
    of_place = torch.arange(groups, device=device).repeat_interleave(2 * most)
    return Noise(labels, all_boxes, of_place, picture, place.flatten(), target.flatten(), wrong.flatten() == 0)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def _refinement(dim: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
    nn.init.zeros_(layers[-1].weight)  # pyright: ignore[reportArgumentType]
    nn.init.zeros_(layers[-1].bias)  # pyright: ignore[reportArgumentType]
    return layers


def _start_at_prior(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None
    nn.init.constant_(layer.bias, -math.log((1 - PRIOR) / PRIOR))
