"""One label per picture: the loss, the predictions, the metric and the transforms of its targets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.base import Row
from saccade.config import RunConfig
from saccade.data.decode import Picture
from saccade.data.sample import Sample
from saccade.data.transforms import EvalTransform, TrainTransform, collate_eval, collate_train
from saccade.errors import UserError
from saccade.explain import explain
from saccade.metrics.classification import ClassificationMetric, ClassificationReport
from saccade.models.classifier import Classifier, ClassifierOutputs
from saccade.models.embedder import Embedder
from saccade.predictions import Classification
from saccade.tasks.processes import mean_over_processes


class ClassificationTask:
    """What the engine needs to know of classification; it knows nothing of it otherwise."""

    name = "classify"
    best = "top1"  # the metric by which the kept model is chosen, higher is better
    usual_threshold: float | None = None

    def __init__(self, class_names: tuple[str, ...], config: RunConfig, row: Row):
        unfit = [f"augment.{name}" for name in ("mosaic", "copy_paste") if getattr(config.augment, name)]
        if unfit:
            raise UserError(f"{', '.join(unfit)}: for detection; a picture with one label has mixup and cutmix")
        self.class_names = class_names
        self.label_smoothing = config.loss.label_smoothing
        self.train_transform = TrainTransform(config.augment, config.train_preprocessing)
        self.train_collate = partial(collate_train, num_classes=len(class_names))
        self.eval_transform = EvalTransform(config.preprocessing)
        self.eval_collate = collate_eval

    @staticmethod
    def forward(network: nn.Module, images: Tensor, targets: Tensor) -> ClassifierOutputs:
        return network(images)

    @staticmethod
    def answer(network: nn.Module, images: Tensor, targets: Tensor) -> ClassifierOutputs:
        return network(images)

    def losses(self, outputs: ClassifierOutputs, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy against soft targets (B, K); a target of zeros counts for nothing.

        Each picture counts alike, whichever process has it.
        """
        K = targets.shape[1]
        smooth = targets * (1 - self.label_smoothing) + targets.sum(1, keepdim=True) * (self.label_smoothing / K)
        log_probabilities = F.log_softmax(outputs.logits.float(), dim=1)
        count = mean_over_processes((targets != 0).any(dim=1).sum(), targets.device)
        # there may be fewer pictures than processes, or none, whose sum is zero
        return {"cross_entropy": -(smooth * log_probabilities).sum() / count.clamp(min=1e-6)}

    @staticmethod
    def things(targets: Any) -> None:
        return None

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

    @staticmethod
    def threshold(report: ClassificationReport) -> None:
        """None: the most likely class is the answer, however likely."""

    def predict(
        self,
        network: Classifier | Embedder,
        images: Tensor,
        pictures: Sequence[Picture],
        samples: Sequence[Sample],
        *,
        threshold: float | None,
        explained: bool,
    ) -> list[Classification]:
        if not isinstance(network, Classifier):
            raise UserError("the model has no classes; `saccade embed` gives vectors, or train a head on it")
        shares = network(images).logits.float().softmax(dim=1).cpu().numpy()  # (B, K)
        maps = explain(network, images).cpu().numpy() if explained else [None] * len(shares)
        return [
            self._describe(*each) for each in zip(pictures, samples, shares, maps, strict=True)
        ]

    def _describe(
        self, picture: Picture, sample: Sample, shares: np.ndarray, heat: np.ndarray | None
    ) -> Classification:
        best = np.argsort(-shares, kind="stable")[:5]
        return Classification(
            label=self.class_names[best[0]],
            score=float(shares[best[0]]),
            top=tuple((self.class_names[k], float(shares[k])) for k in best),
            probabilities=shares,
            source=picture.name,
            image=picture.whole() if heat is not None else None,
            attention=heat,
            region=sample.region,
        )
