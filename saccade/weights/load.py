"""From a name, a run folder, a folder of the hub or a file to a network with weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saccade.backbones import BACKBONES, build_backbone, row_from_dict
from saccade.backbones.base import Row
from saccade.config import RunConfig
from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.models.embedder import Embedder
from saccade.weights.convert import import_weights
from saccade.weights.model_file import ModelCard, check_weights, find_model, load_model_file, read_metadata
from saccade.weights.source import open_weights

PREFIX = "backbone."


@dataclass(frozen=True)
class Loaded:
    """Weights under our names, and all that is known of them."""

    weights: dict[str, Tensor]
    row: Row
    card: ModelCard
    where: str
    notes: list[str]


def load_weights(source: str | Path) -> Loaded:
    """From a run folder or model file of saccade, or weights in another dialect: a hub name, a folder, a file."""
    path = Path(source)
    if is_ours(path):
        path = find_model(path)
        weights, card = load_model_file(path)
        return Loaded(weights, row_from_dict(card.architecture, str(path)), card, str(path), [])
    raw = open_weights(str(source))
    found = import_weights(raw)
    return Loaded(found.weights, found.row, found.card(), str(source), [*raw.notes, *found.notes])


def is_ours(path: Path) -> bool:
    """Is it a run folder or a model file of saccade, or a damaged file that may be one?"""
    if path.is_dir() and (path / "checkpoints").exists():
        return True
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    metadata = read_metadata(file)
    return metadata is None or "saccade" in metadata


def build_network(card: ModelCard, where: str = "model file") -> Classifier | Embedder:
    """The network that a model file describes, with random weights."""
    backbone = build_backbone(row_from_dict(card.architecture, where))
    return Classifier(backbone, len(card.class_names)) if card.class_names else Embedder(backbone)


def load_network(source: str | Path) -> tuple[Classifier | Embedder, ModelCard]:
    """The network of any source of weights, strictly loaded, ready to predict."""
    loaded = load_weights(source)
    return fill(loaded.weights, loaded.card, loaded.where).eval(), loaded.card


def fill(weights: dict[str, Tensor], card: ModelCard, where: str) -> Classifier | Embedder:
    """The described network with these weights. They are checked before memory is taken for it."""
    try:
        with torch.device("meta"):
            check_weights(weights, build_network(card, where).state_dict(), where)
        network = build_network(card, where)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    network.load_state_dict(weights)
    return network


def initial_network(config: RunConfig, class_names: tuple[str, ...]) -> tuple[Classifier, list[str]]:
    """The network a run begins with, and what was changed on the way: from scratch, or from `config.weights`.

    A head for other classes is made anew, and what belongs to another resolution is interpolated; both are said.
    """
    size = config.preprocessing.image_size
    if config.weights is None:
        return Classifier(build_backbone(config.model, config.network, size), len(class_names)), []
    loaded = load_weights(config.weights)
    card, where = loaded.card, loaded.where
    if config.model != card.model and not (config.model in BACKBONES and BACKBONES[config.model].is_like(loaded.row)):
        raise UserError(f"{where}: holds a {card.model}, not a {config.model}; leave --model out, or give that name")
    fill(loaded.weights, card, where)
    network = Classifier(build_backbone(loaded.row, config.network, size), len(class_names))
    notes = [f"weights from {where} ({card.training_data or 'unknown data'}; licence: {card.licence})", *loaded.notes]
    weights = dict(loaded.weights)
    if card.class_names != class_names:
        if card.class_names and set(card.class_names) == set(class_names):
            order = torch.tensor([card.class_names.index(name) for name in class_names])
            weights.update({name: weights[name][order] for name in ("head.weight", "head.bias")})
        else:
            fresh = network.state_dict()
            weights.update({name: fresh[name] for name in ("head.weight", "head.bias")})
            old = f"its head for {len(card.class_names)} other classes is left out; " if card.class_names else ""
            notes.append(f"{old}a new head for {len(class_names)}")
    inner = {name.removeprefix(PREFIX): weights.pop(name) for name in list(weights) if name.startswith(PREFIX)}
    notes += network.backbone.adapt(inner, loaded.row)
    weights.update({PREFIX + name: tensor for name, tensor in inner.items()})
    check_weights(weights, network.state_dict(), where)
    network.load_state_dict(weights)
    return network, notes
