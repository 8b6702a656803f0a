"""Every model by name and by description: classifiers and embedders are a backbone's row, the others have their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saccade.backbones import BACKBONES, FAMILIES, build_backbone, fields_from_dict, row_from_dict
from saccade.backbones import name_of as name_of_backbone
from saccade.backbones.base import Row
from saccade.config import closest
from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.models.deformable_detr import DEFORMABLE_DETR, DeformableDetr, DeformableDETRConfig
from saccade.models.detector import Detector, DetectorRow
from saccade.models.detr import DETR, Detr, DETRConfig
from saccade.models.embedder import Embedder
from saccade.models.glance import GLANCE, Glance, GlanceConfig
from saccade.models.lw_detr import LW_DETR, LWDetr, LWDETRConfig, RFDETRConfig
from saccade.models.recurrent import RECURRENTS, Recurrent, RecurrentRow
from saccade.models.transformer import TRANSFORMERS, Transformer, TransformerRow
from saccade.models.translator import Translator, TranslatorRow

Network = Classifier | Embedder | Detector | Translator

DETECTORS: dict[str, DetectorRow] = {**GLANCE, **DETR, **DEFORMABLE_DETR, **LW_DETR}
DETECTOR_FAMILIES: dict[str, tuple[type[DetectorRow], Callable[[Any, int], Detector]]] = {
    "glance": (GlanceConfig, Glance),
    "detr": (DETRConfig, Detr),
    "deformable_detr": (DeformableDETRConfig, DeformableDetr),
    "lw_detr": (LWDETRConfig, LWDetr),
    "rf_detr": (RFDETRConfig, LWDetr),
}

TRANSLATORS: dict[str, TranslatorRow] = {**TRANSFORMERS, **RECURRENTS}
TRANSLATOR_FAMILIES: dict[str, tuple[type[TranslatorRow], Callable[[Any], Translator]]] = {
    "transformer": (TransformerRow, Transformer),
    "recurrent": (RecurrentRow, Recurrent),
}


def model_row(name: str) -> Row:
    """The table's row for the name of any model; an unknown name is an error that lists the closest ones."""
    known: dict[str, Row] = {**BACKBONES, **DETECTORS, **TRANSLATORS}
    if name not in known:
        raise UserError(f"unknown model {name!r}{closest(name, tuple(known))} (`saccade models` lists all)")
    return known[name]


def task_of(row: Row) -> str:
    """What a model of this row is for."""
    if isinstance(row, TranslatorRow):
        return "translate"
    return "detect" if isinstance(row, DetectorRow) else "classify"


def name_of(row: Row) -> str:
    """The name in the table of a row that weights of this one fit, or the family's with `-custom`."""
    if isinstance(row, DetectorRow):
        return next((name for name, known in DETECTORS.items() if known.is_like(row)), f"{row.family}-custom")
    if isinstance(row, TranslatorRow):
        return next((name for name, known in TRANSLATORS.items() if known.is_like(row)), f"{row.family}-custom")
    return name_of_backbone(row)


def read_row(values: Any, where: str) -> Row:
    """The row of any model that a file describes; a wrong or unknown field is a UserError that names `where`."""
    family = values.get("family") if isinstance(values, dict) else None
    if isinstance(family, str) and family in DETECTOR_FAMILIES:
        backbone = row_from_dict(values.get("backbone"), where)
        plain = {name: value for name, value in values.items() if name != "family"}
        return fields_from_dict(DETECTOR_FAMILIES[family][0], {**plain, "backbone": backbone}, where)
    if isinstance(family, str) and family in TRANSLATOR_FAMILIES:
        plain = {name: value for name, value in values.items() if name != "family"}
        return fields_from_dict(TRANSLATOR_FAMILIES[family][0], plain, where)
    return row_from_dict(values, where)


def build_network(row: Row, classes: int) -> Network:
    """The network of a row with random weights; of a backbone's row without classes an embedder.

    A translator has no classes: its row knows its vocabulary.
    """
    if isinstance(row, TranslatorRow):
        return TRANSLATOR_FAMILIES[row.family][1](row)
    if isinstance(row, DetectorRow):
        return DETECTOR_FAMILIES[row.family][1](row, classes)
    return Classifier(build_backbone(row), classes) if classes else Embedder(build_backbone(row))


__all__ = [
    "BACKBONES",
    "DETECTORS",
    "DETECTOR_FAMILIES",
    "FAMILIES",
    "TRANSLATORS",
    "TRANSLATOR_FAMILIES",
    "Network",
    "build_network",
    "model_row",
    "name_of",
    "read_row",
    "task_of",
]
