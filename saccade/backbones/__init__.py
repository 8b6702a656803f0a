"""Backbones by name. A backbone is one file and rows in its table; this is the only list of them."""

from __future__ import annotations

from saccade.backbones.vit import VIT, ViT, ViTConfig
from saccade.config import NetworkConfig, closest
from saccade.errors import UserError

BACKBONES: dict[str, ViTConfig] = {**VIT}


def backbone_row(name: str) -> ViTConfig:
    """The table's row for a name; an unknown name is an error that lists the closest ones."""
    if name not in BACKBONES:
        raise UserError(f"unknown model {name!r}{closest(name, tuple(BACKBONES))} (`saccade models` lists all)")
    return BACKBONES[name]


def build_backbone(name: str, network: NetworkConfig | None = None, image_size: int | None = None) -> ViT:
    """A backbone with random weights. `image_size` sets the grid of learned positions."""
    return ViT(backbone_row(name).changed(network or NetworkConfig(), image_size))
