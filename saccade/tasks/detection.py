"""Boxes around the things in a picture: the losses, the predictions, the metric and the transforms of their targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.config import RunConfig
from saccade.data.box_transforms import BoxTrainTransform, FitTransform, Truth
from saccade.data.decode import Picture
from saccade.data.framing import Things
from saccade.data.sample import Batch, Sample
from saccade.data.source import Boxes
from saccade.layers.boxes import to_centres, to_corners
from saccade.metrics.detection import DetectionMetric
from saccade.metrics.detection_report import DetectionReport
from saccade.models.detector import BoxTargets, DetectionOutputs, Detector, DetectorRow
from saccade.predictions import Detections
from saccade.tasks.glance_loss import GlanceLoss
from saccade.tasks.lw_detr_loss import LW_DETR
from saccade.tasks.set_loss import DEFORMABLE_DETR, DETR

# (outputs, targets) -> named, already weighted scalars
Loss = Callable[[Any, BoxTargets], dict[str, Tensor]]
LOSSES: dict[str, Callable[[DetectorRow, RunConfig], Loss]] = {
    "glance": lambda row, config: GlanceLoss(),
    "detr": lambda row, config: DETR,
    "deformable_detr": lambda row, config: DEFORMABLE_DETR,
    "lw_detr": lambda row, config: LW_DETR,
}


# Losses for which the last class of a query is nothing; for all others each class is a question of its own.
AGAINST_NOTHING = ("detr",)

MOST = 300  # detections in one picture: a query may be sure of several classes
NO_NAMES = ("", "N/A")  # of numbers that published models skip


@dataclass(frozen=True)
class EvalTargets:
    """What is compared with the outputs for B pictures: all in pixels of the pictures as they are on disk."""

    indices: tuple[int, ...]
    truths: tuple[Boxes, ...]
    regions: Tensor  # float32 (B, 4): left, top, right, bottom of what each tensor shows
    sizes: Tensor  # float32 (B, 2): width and height


@dataclass(frozen=True)
class Found:
    """The n detections in one picture, the surest first."""

    boxes: np.ndarray  # float32 (n, 4): left, top, right, bottom in pixels of the picture
    scores: np.ndarray  # float32 (n,)
    labels: np.ndarray  # int64 (n,)
    queries: np.ndarray  # int64 (n,)


class DetectionTask:
    """What the engine needs to know of detection; it knows nothing of it otherwise."""

    name = "detect"
    best = "ap"  # the metric by which the kept model is chosen, higher is better
    usual_threshold: float | None = 0.5

    def __init__(self, class_names: tuple[str, ...], config: RunConfig, row: Row):
        assert isinstance(row, DetectorRow)
        self.class_names = class_names
        self.named = torch.tensor([name.strip() not in NO_NAMES for name in class_names])
        self.loss = LOSSES[row.loss](row, config)
        self.against_nothing = row.loss in AGAINST_NOTHING
        self.train_transform = BoxTrainTransform(config.augment, config.train_preprocessing)
        self.train_collate = collate_train
        self.eval_transform = FitTransform(config.preprocessing)
        self.eval_collate = collate_eval

    @staticmethod
    def forward(network: nn.Module, images: Tensor, targets: BoxTargets) -> DetectionOutputs:
        return network(images, targets)

    @staticmethod
    def answer(network: nn.Module, images: Tensor, targets: EvalTargets) -> DetectionOutputs:
        return network(images)

    def losses(self, outputs: DetectionOutputs, targets: BoxTargets) -> dict[str, Tensor]:
        return self.loss(outputs, targets)

    @staticmethod
    def things(targets: BoxTargets) -> int:
        return len(targets.labels)

    def metric(self) -> DetectionMetric:
        return DetectionMetric(self.class_names)

    def update(self, metric: DetectionMetric, outputs: DetectionOutputs, targets: EvalTargets) -> None:
        found = self.find(outputs, targets.regions, targets.sizes)
        for index, truth, one in zip(targets.indices, targets.truths, found, strict=True):
            metric.update(
                index, one.boxes, one.scores, one.labels, truth.boxes, truth.labels, truth.crowd, truth.area
            )

    @staticmethod
    def scalars(report: DetectionReport) -> dict[str, float]:
        """The figures of a report that a run's table shows."""
        return report.scalars()

    @staticmethod
    def threshold(report: DetectionReport) -> float | None:
        """Where F1 is best on the validation split; none where nothing was found there."""
        return report.threshold

    def predict(
        self,
        network: Detector,
        images: Tensor,
        pictures: Sequence[Picture],
        samples: Sequence[Sample],
        *,
        threshold: float | None,
        explained: bool,
    ) -> list[Detections]:
        outputs, maps = network.with_maps(images) if explained else (network(images), None)
        regions, sizes = lay_out(samples)
        found = self.find(outputs, regions.to(images.device), sizes.to(images.device))
        results = []
        for b, (picture, sample, one) in enumerate(zip(pictures, samples, found, strict=True)):
            keep = slice(None) if threshold is None else one.scores >= threshold
            queries = torch.from_numpy(one.queries[keep])
            heat = None if maps is None else maps[b].float().cpu()[queries].numpy()
            results.append(
                Detections(
                    boxes=one.boxes[keep],
                    scores=one.scores[keep],
                    labels=tuple(self.class_names[k] for k in one.labels[keep]),
                    classes=one.labels[keep],
                    size=picture.size,
                    source=picture.name,
                    picture=picture.whole,
                    maps=None if heat is None else heat_over(heat, sample, picture),
                )
            )
        return results

    def find(self, outputs: DetectionOutputs, regions: Tensor, sizes: Tensor) -> list[Found]:
        """The surest detections in each of the pictures that `regions` (B, 4) and `sizes` (B, 2) are of."""
        B = len(regions)  # a batch of nothing but unreadable pictures has one black one
        scores, labels, queries = self.choose(outputs.logits[:B])
        boxes = to_corners(outputs.boxes[:B].float())  # (B, Q, 4)
        origin, extent = regions[:, None, :2], regions[:, None, 2:] - regions[:, None, :2]
        boxes = origin.repeat(1, 1, 2) + boxes * extent.repeat(1, 1, 2)
        boxes = torch.minimum(boxes.clamp(min=0), sizes[:, None].repeat(1, 1, 2))  # (w, h, w, h)
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        parts = [part.cpu().numpy() for part in (boxes, scores, labels, queries)]
        results = []
        for b in range(B):
            one = Found(*(part[b] for part in parts))
            sides = one.boxes[:, 2:] - one.boxes[:, :2]
            keep = ~(one.scores <= 0) & ~(sides <= 0).any(axis=1)  # nothing lies in the padding; NaN is for the metric
            results.append(Found(one.boxes[keep], one.scores[keep], one.labels[keep], one.queries[keep]))
        return results

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, classes and queries (B, n), the surest first."""
        logits = logits.float()
        shares = logits.softmax(-1)[..., :-1] if self.against_nothing else logits.sigmoid()
        shares = shares * self.named.to(shares.device)  # (B, Q, K)
        B, Q, K = shares.shape
        if self.against_nothing:  # a class for each query, as in https://arxiv.org/abs/2005.12872
            best, labels = shares.max(dim=2)
            scores, queries = best.sort(dim=1, descending=True, stable=True)
            return scores, labels.gather(1, queries), queries
        # any classes of any query, as in https://arxiv.org/abs/2010.04159
        scores, pairs = shares.flatten(1).topk(min(MOST, Q * K), dim=1)
        return scores, pairs % K, pairs // K


def collate_train(samples: list[Sample], unreadable: list[tuple[int, str]], shape: tuple[int, int]) -> Batch:
    """Pictures (B, 3, H, W) with BoxTargets. Without things, or without a picture, these are empty."""
    H, W = shape
    images = [sample.image for sample in samples] or [torch.zeros(3, H, W, dtype=torch.uint8)]
    parts: list[Things] = [sample.target for sample in samples]
    things = Things.joined([Things.none(), *parts])
    boxes = to_centres(torch.from_numpy(things.boxes / [W, H, W, H])).float()
    counts = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    picture = torch.arange(len(parts)).repeat_interleave(counts)
    targets = BoxTargets(boxes, torch.from_numpy(things.labels), picture)
    indices = torch.tensor([sample.index for sample in samples], dtype=torch.int64)
    return Batch(torch.stack(images), targets, indices, unreadable)


def collate_eval(samples: list[Sample], unreadable: list[tuple[int, str]], shape: tuple[int, int]) -> Batch:
    """Pictures (B, 3, H, W) with EvalTargets; without a picture, a black one for which there are none."""
    images = [sample.image for sample in samples] or [torch.zeros(3, *shape, dtype=torch.uint8)]
    truths: list[Truth] = [sample.target for sample in samples]
    indices = tuple(sample.index for sample in samples)
    targets = EvalTargets(indices, tuple(truth.boxes for truth in truths), *lay_out(samples))
    return Batch(torch.stack(images), targets, torch.tensor(indices, dtype=torch.int64), unreadable)


def lay_out(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Regions (B, 4) and sizes (B, 2), width first, of pictures that FitTransform made samples of."""
    regions = torch.tensor([sample.region for sample in samples], dtype=torch.float32).reshape(-1, 4)
    sizes = torch.tensor([sample.target.size[::-1] for sample in samples], dtype=torch.float32).reshape(-1, 2)
    return regions, sizes


def heat_over(heat: np.ndarray, sample: Sample, picture: Picture) -> np.ndarray:
    """Maps (n, h, w) of what the tensor shows as maps of the picture alone, each with 1 as its largest value."""
    assert sample.region is not None
    _, _, right, bottom = sample.region
    n, h, w = heat.shape
    inside = (0.0, 0.0, w * picture.width / right, h * picture.height / bottom)
    size = max(1, round(inside[2])), max(1, round(inside[3]))
    cut = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR, inside)) for one in heat]
    maps = np.stack(cut) if n else np.zeros((0, size[1], size[0]), np.float32)
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)
