"""From a name, a run folder or a file to a network with weights."""

from __future__ import annotations

from pathlib import Path

import torch

from saccade.backbones import build_backbone
from saccade.config import RunConfig, closest
from saccade.errors import UserError
from saccade.layers.positions import resize_positions
from saccade.models.classifier import Classifier
from saccade.weights.model_file import ModelCard, check_weights, find_model, load_model_file


def build_network(card: ModelCard) -> Classifier:
    """The network that a model file describes, with random weights."""
    backbone = build_backbone(card.model, card.network, card.preprocessing.image_size)
    return Classifier(backbone, len(card.class_names))


def load_network(source: str | Path) -> tuple[Classifier, ModelCard]:
    """The network of a model file or run folder, with its weights, ready to predict."""
    path = find_model(source)
    weights, card = load_model_file(path)
    try:
        network = build_network(card)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    check_weights(weights, network.state_dict(), str(path))
    network.load_state_dict(weights)
    return network.eval(), card


def initial_network(config: RunConfig, class_names: tuple[str, ...]) -> tuple[Classifier, list[str]]:
    """The network a run begins with, and what was changed on the way: from scratch, or from `config.weights`.

    A head for other classes is made anew, and positions of another grid are interpolated; both are said.
    """
    backbone = build_backbone(config.model, config.network, config.preprocessing.image_size)
    network = Classifier(backbone, len(class_names))
    if config.weights is None:
        return network, []
    path = find_weights(config.weights)
    weights, card = load_model_file(path)
    if card.model != config.model:
        raise UserError(f"{path}: holds a {card.model}, not a {config.model}; leave --model out, or give that name")
    described = build_network(card)
    check_weights(weights, described.state_dict(), str(path))
    notes = [f"weights from {path} ({card.training_data or 'unknown data'}; licence: {card.licence})"]
    if card.class_names != class_names:
        if card.class_names and set(card.class_names) == set(class_names):
            order = torch.tensor([card.class_names.index(name) for name in class_names])
            weights.update({name: weights[name][order] for name in ("head.weight", "head.bias")})
        else:
            fresh = network.state_dict()
            weights.update({name: fresh[name] for name in ("head.weight", "head.bias")})
            old_head = f"its head for {len(card.class_names)} other classes"
            notes.append(f"{old_head} is left out; a new one for {len(class_names)}")
    old = described.backbone.positions
    new = backbone.positions
    table = weights.get("backbone.positions.table")
    if old is not None and new is not None and table is not None and old.grid != new.grid and table.ndim == 2:
        weights["backbone.positions.table"] = resize_positions(table, old.grid, new.grid)
        notes.append(f"positions interpolated from {old.grid[0]}x{old.grid[1]} to {new.grid[0]}x{new.grid[1]}")
    check_weights(weights, network.state_dict(), str(path))
    network.load_state_dict(weights)
    return network, notes


def find_weights(source: str) -> Path:
    """The file of `--weights`: a model file, a run folder, or (not yet any) a name of the catalog."""
    if not Path(source).exists():
        raise UserError(
            f"--weights {source}: no such file or run folder{closest(source, [p.name for p in Path.cwd().iterdir()])}"
        )
    return find_model(source)
