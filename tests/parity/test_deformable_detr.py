"""Deformable DETR against transformers, with random weights: outputs of all layers and of proposals, matches, every part
of the loss, gradients; and its files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compare_detectors import DOUBLE, SINGLE, agree, convert, pair

from saccade.backbones.resnet import ResNetConfig
from saccade.models.deformable_detr import DeformableDETRConfig
from saccade.verification.detection import made_up_targets
from saccade.weights.formats.deformable_detr import FORMATS

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

TIMM_NAMED, HF_NAMED, ORIGINAL = FORMATS
CLASSES = 7

SMALL: dict[str, Any] = {
    "dim": 64,
    "heads": 4,
    "hidden": 96,
    "encoder_depth": 2,
    "decoder_depth": 3,
    "queries": 12,
    "image_size": 96,
}
NARROW = ResNetConfig(
    depths=(1, 2, 1, 1), bottleneck=True, widths=(8, 8, 16, 16), stem=12, frozen_norm=True, image_size=96
)
RESNET18 = ResNetConfig(depths=(2, 2, 2, 2), bottleneck=False, frozen_norm=True, image_size=96)
OWN = DeformableDETRConfig(backbone=NARROW, **SMALL)
ROWS = {
    "plain": (HF_NAMED, OWN),
    "refine": (HF_NAMED, replace(OWN, refine=True)),
    "two_stage": (HF_NAMED, replace(OWN, refine=True, two_stage=True)),
    "single": (HF_NAMED, replace(OWN, levels=1)),
    "five_levels": (HF_NAMED, replace(OWN, levels=5, refine=True, two_stage=True, encoder_points=3, decoder_points=2)),
    "timm": (TIMM_NAMED, DeformableDETRConfig(backbone=RESNET18, **SMALL)),
    "timm_dilated": (TIMM_NAMED, DeformableDETRConfig(backbone=replace(RESNET18, dilated=True), levels=1, **SMALL)),
}
rows = pytest.mark.parametrize("kind", ROWS)
dtypes = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)


@rows
@dtypes
@pytest.mark.parametrize("size", [(96, 96), (64, 160)], ids=str)
def test_tiny(kind, size, dtype):
    """Measured: outputs and losses 0 in float32, 0 in float64; gradients 0 and 0."""
    form, row = ROWS[kind]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, dtype)
    agree(ours, theirs, form, size, made_up_targets(2, CLASSES, dtype), CLASSES, dtype)
