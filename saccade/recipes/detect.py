"""Recipes for detection: a function per regime, from the data to settings."""

from __future__ import annotations

from typing import Any

from saccade.recipes.summary import DataSummary


def detect(data: DataSummary) -> dict[str, Any]:
    """A few hundred pictures with boxes or more, nothing pre-trained."""
    return {"model": "detr_resnet50", "batch_size": 8, "lr": 1e-4, "epochs": 100}


def detect_fine_tune(data: DataSummary) -> dict[str, Any]:
    """All weights of a detector that knows other things, gently."""
    return {**detect(data), "epochs": 30}
