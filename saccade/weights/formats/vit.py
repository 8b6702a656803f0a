"""Weights of the ViT family in every dialect. Where a dialect has several spellings, the first is the one written."""

from __future__ import annotations

from saccade.weights.formats.table import Format
from saccade.weights.formats.vit_huggingface import HUGGINGFACE, HUGGINGFACE_OTHERWISE
from saccade.weights.formats.vit_others import (
    DEIT3,
    DINOV2,
    DINOV2_QUARTERS,
    DINOV3,
    NPZ,
    TORCHVISION,
    TORCHVISION_1,
)
from saccade.weights.formats.vit_timm import TIMM

FORMATS: tuple[Format, ...] = (
    TIMM,
    HUGGINGFACE,
    HUGGINGFACE_OTHERWISE,
    TORCHVISION,
    TORCHVISION_1,
    NPZ,
    DINOV2,
    DINOV2_QUARTERS,
    DEIT3,
    DINOV3,
)
