"""Recipes for detection: a function per regime, from the data to settings."""

from __future__ import annotations

import math
from typing import Any

from saccade.config import merge
from saccade.recipes.summary import DataSummary

PASSES = 110  # over the data, that a detector from scratch should have at least
NANO_SECONDS = 0.055  # that a training picture of 320 px takes `glance_nano` on two cores


def detect(data: DataSummary) -> dict[str, Any]:
    """Boxes from a few hundred pictures or more, nothing pre-trained.

    Command: `saccade train cells --minutes 30` (205 pictures of 640 x 480 with 2,800 boxes of 3 classes).
    Cost: 30 minutes on two cores of a processor, 101 passes at 384 px.
    Result: AP 63.1 %, AP50 91.5 % on 72 held-out pictures; see benchmarks/README.md.
    The other families learn as their papers say, see `of_family`; they are made for far more pictures and passes.
    """
    model, size = affordable_detector(data)
    return {
        "model": model,
        "batch_size": 8,
        "lr": 1e-3,
        "optimizer": {"weight_decay": 0.05},
        "preprocessing": {"image_size": size, "max_aspect": 3.0},
        "augment": {"mosaic": 0.5, "zoom": [0.6, 1.7], "policy": "none", "color_jitter": 0.2},
        "ema": {"decay": 0.998},
        "epochs": max(20.0, min(300.0, round(60_000 / data.samples))),
    }


# Of DETR, https://arxiv.org/abs/2005.12872. Those after it kept them, but that Deformable DETR has a learning rate of
# 2e-4 for 32 pictures a step.
PUBLISHED = {"lr": 1e-4, "optimizer": {"weight_decay": 1e-4, "clip_norm": 0.1}}
# Gentler with a backbone that is trained already: a tenth, or less from layer to layer where it is a ViT
# (https://arxiv.org/abs/2406.03459)
TRAINED = {
    "detr": {"optimizer": {"backbone_lr": 0.1}},
    "deformable_detr": {"optimizer": {"backbone_lr": 0.1}},
    "lw_detr": {"optimizer": {"layer_decay": 0.8}},
    "rf_detr": {"optimizer": {"layer_decay": 0.8}},
}
# Statistics that are frozen are those of a trained backbone; one from scratch needs its own.
FROM_SCRATCH = {"network": {"frozen_norm": False}}


def of_family(family: str, trained: bool) -> dict[str, Any]:
    """What a recipe says otherwise for detectors of a family whose paper says how it learns; nothing for Glance.

    `trained`: the run begins from weights, of a detector or of a backbone alone.
    """
    if family not in TRAINED:
        return {}
    return merge(PUBLISHED, TRAINED[family] if trained else FROM_SCRATCH)


def affordable_detector(data: DataSummary) -> tuple[str, int]:
    """The model and the size of pictures with which the budget lasts for enough passes."""
    side = round(math.sqrt(data.height * data.width) / 32) * 32  # of a square of as many pixels
    if data.seconds is None:
        return "glance_small", max(256, min(640, side))
    seconds = data.seconds / data.samples / PASSES  # for one picture
    size = round(320 * math.sqrt(seconds / NANO_SECONDS) / 32) * 32
    return "glance_nano", max(256, min(512, side, size))


def detect_fine_tune(data: DataSummary) -> dict[str, Any]:
    """A detector that knows other things, or only a backbone that was trained on whole pictures, gently.

    Command: `saccade train cells --weights facebook/detr-resnet-50`.
    """
    return {
        "model": "glance_small",
        "batch_size": 8,
        "lr": 1e-4,
        "optimizer": {"weight_decay": 1e-4, "clip_norm": 0.1},
        "preprocessing": {"max_aspect": 3.0},
        "augment": {"zoom": [0.7, 1.5], "policy": "none", "color_jitter": 0.2},
        "epochs": max(10.0, min(100.0, round(20_000 / data.samples))),
    }
