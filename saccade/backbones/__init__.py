"""Backbones by name. A backbone is one file and rows in its table; this is the only list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from saccade.backbones.base import Backbone, Row
from saccade.backbones.efficientformer import EFFICIENTFORMER, EfficientFormer, EfficientFormerConfig
from saccade.backbones.efficientvit import EFFICIENTVIT, EfficientViT, EfficientViTConfig
from saccade.backbones.levit import LEVIT, LeViT, LeViTConfig
from saccade.backbones.resnet import RESNET, ResNet, ResNetConfig
from saccade.backbones.swin import SWIN, Swin, SwinConfig
from saccade.backbones.vit import VIT, ViT, ViTConfig
from saccade.backbones.windowed_vit import WindowedViT, WindowedViTConfig
from saccade.config import NetworkConfig, closest
from saccade.errors import UserError

R = TypeVar("R", bound=Row)

BACKBONES: dict[str, Row] = {**VIT, **SWIN, **EFFICIENTVIT, **EFFICIENTFORMER, **LEVIT, **RESNET}
FAMILIES: dict[str, tuple[type[Row], Callable[[Any], Backbone]]] = {
    "vit": (ViTConfig, ViT),
    "swin": (SwinConfig, Swin),
    "efficientvit": (EfficientViTConfig, EfficientViT),
    "efficientformer": (EfficientFormerConfig, EfficientFormer),
    "levit": (LeViTConfig, LeViT),
    "resnet": (ResNetConfig, ResNet),
    "windowed_vit": (WindowedViTConfig, WindowedViT),  # within detectors alone, so it has no rows above
}


def backbone_row(name: str) -> Row:
    """The table's row for a name; an unknown name is an error that lists the closest ones."""
    if name not in BACKBONES:
        raise UserError(f"unknown model {name!r}{closest(name, tuple(BACKBONES))} (`saccade models` lists all)")
    return BACKBONES[name]


def name_of(row: Row) -> str:
    """The name in the table of a row that weights of this one fit, or the family's with `-custom`."""
    return next((name for name, known in BACKBONES.items() if known.is_like(row)), f"{row.family}-custom")


def build_backbone(row: Row | str, network: NetworkConfig | None = None, image_size: int | None = None) -> Backbone:
    """A backbone with random weights. `image_size` sets the grid of learned positions."""
    row = backbone_row(row) if isinstance(row, str) else row
    return FAMILIES[row.family][1](row.changed(network or NetworkConfig(), image_size))


def row_from_dict(values: Any, where: str) -> Row:
    """The row that a file describes; a wrong or unknown field is a UserError that names `where`."""
    family = values.get("family") if isinstance(values, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: describes a model of the family {family!r}; this saccade knows {known}")
    return fields_from_dict(FAMILIES[family][0], {k: v for k, v in values.items() if k != "family"}, where)


def fields_from_dict(kind: type[R], values: dict[str, Any], where: str) -> R:
    """A row of this kind from its fields, checked one by one."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{where}: its architecture is incomplete or wrong ({faults})") from None
