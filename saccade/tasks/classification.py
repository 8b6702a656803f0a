"""One label per picture: the loss, the predictions, the metric and the transforms of its targets."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.config import RunConfig
from saccade.data.transforms import EvalTransform, TrainTransform, collate_eval, collate_train
from saccade.metrics.classification import ClassificationMetric, ClassificationReport
from saccade.models.classifier import ClassifierOutputs


class ClassificationTask:
    """What the engine needs to know of classification; it knows nothing of it otherwise."""

    name = "classify"
    best = "top1"  # the metric by which the kept model is chosen, higher is better

    def __init__(self, class_names: tuple[str, ...], config: RunConfig):
        self.class_names = class_names
        self.label_smoothing = config.loss.label_smoothing
        self.train_transform = TrainTransform(config.augment, config.train_preprocessing)
        self.train_collate = partial(collate_train, num_classes=len(class_names))
        self.eval_transform = EvalTransform(config.preprocessing)
        self.eval_collate = collate_eval

    def losses(self, outputs: ClassifierOutputs, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy against soft targets (B, K); a target of zeros counts for nothing."""
        K = targets.shape[1]
        smooth = targets * (1 - self.label_smoothing) + targets.sum(1, keepdim=True) * (self.label_smoothing / K)
        log_probabilities = F.log_softmax(outputs.logits.float(), dim=1)
        return {"cross_entropy": -(smooth * log_probabilities).sum(1).mean()}

    def metric(self) -> ClassificationMetric:
        return ClassificationMetric(self.class_names)

    @staticmethod
    def update(metric: ClassificationMetric, outputs: ClassifierOutputs, targets: Tensor) -> None:
        metric.update(outputs.logits.float().softmax(dim=1).cpu(), targets.cpu())

    @staticmethod
    def scalars(report: ClassificationReport) -> dict[str, float]:
        """The figures of a report that a run's table shows."""
        shown = {"loss": report.loss, "top1": report.top1, "top5": report.top5}
        return {name: value for name, value in shown.items() if value is not None}


def probabilities(outputs: ClassifierOutputs) -> Tensor:
    """(B, K), rows sum to one."""
    return torch.softmax(outputs.logits.float(), dim=1)
