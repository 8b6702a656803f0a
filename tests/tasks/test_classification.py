"""The loss of a picture with one label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from saccade.backbones import BACKBONES
from saccade.config import RunConfig
from saccade.models.classifier import ClassifierOutputs
from saccade.tasks.classification import ClassificationTask


def test_each_picture_counts_alike_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight pictures four are for either process, and two of the second one's cannot be read."""
    task = ClassificationTask(("a", "b", "c"), RunConfig(data="x"), BACKBONES["vit_micro"])
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    black = torch.zeros(1, 3)

    def loss(part: slice) -> float:
        return task.losses(ClassifierOutputs(logits[part]), targets[part])["cross_entropy"].item()

    together = loss(slice(0, 6))
    assert together == pytest.approx(torch.nn.functional.cross_entropy(
        logits, targets, label_smoothing=task.label_smoothing).item(), rel=1e-6)  # fmt: skip
    assert task.losses(ClassifierOutputs(black), black)["cross_entropy"].item() == 0.0
    shared = []
    for part, others in ((slice(0, 4), 2), (slice(4, 6), 4)):

        def add(tensor: Any, others: int = others) -> None:
            tensor.add_(others)

        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "all_reduce", add)
        shared.append(loss(part))
    assert sum(shared) / 2 == pytest.approx(together, rel=1e-6)
