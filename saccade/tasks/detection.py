"""Boxes around the things in a picture: the losses, the predictions, the metric and the transforms of their targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.config import RunConfig
from saccade.models.detector import BoxTargets, DetectionOutputs, DetectorRow
from saccade.tasks.set_loss import DEFORMABLE_DETR, DETR

# (outputs, targets) -> named, already weighted scalars
Loss = Callable[[Any, BoxTargets], dict[str, Tensor]]
LOSSES: dict[str, Callable[[DetectorRow, RunConfig], Loss]] = {
    "detr": lambda row, config: DETR,
    "deformable_detr": lambda row, config: DEFORMABLE_DETR,
}


class DetectionTask:
    """What the engine needs to know of detection; it knows nothing of it otherwise."""

    name = "detect"
    best = "ap"  # the metric by which the kept model is chosen, higher is better

    def __init__(self, class_names: tuple[str, ...], config: RunConfig, row: Row):
        assert isinstance(row, DetectorRow)
        self.class_names = class_names
        self.loss = LOSSES[row.loss](row, config)

    @staticmethod
    def forward(network: nn.Module, images: Tensor, targets: BoxTargets) -> DetectionOutputs:
        return network(images, targets)

    def losses(self, outputs: DetectionOutputs, targets: BoxTargets) -> dict[str, Tensor]:
        return self.loss(outputs, targets)
