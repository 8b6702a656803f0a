"""Every dialect of weights that is read and written. A family is one file here, with a table per dialect."""

from __future__ import annotations

from saccade.weights.formats import (
    deformable_detr,
    detr,
    efficientformer,
    efficientvit,
    levit,
    lw_detr,
    marian,
    resnet,
    swin,
    vit,
)
from saccade.weights.formats.table import Format

FORMATS: tuple[Format, ...] = (
    *vit.FORMATS,
    *swin.FORMATS,
    *efficientvit.FORMATS,
    *efficientformer.FORMATS,
    *levit.FORMATS,
    *resnet.FORMATS,
    *detr.FORMATS,
    *deformable_detr.FORMATS,
    *lw_detr.FORMATS,
    *marian.FORMATS,
)
