"""From a name, a run folder, a folder of the hub or a file to a network with weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from saccade.backbones.base import Row
from saccade.config import RunConfig
from saccade.errors import UserError
from saccade.models import BACKBONES, DETECTORS, TRANSLATORS, Network, build_network, model_row, read_row
from saccade.models.classifier import Classifier
from saccade.models.detector import Detector, DetectorRow
from saccade.models.translator import Translator, TranslatorRow
from saccade.tokenizer import Tokenizer
from saccade.weights.convert import check_tokenizer, import_weights, refuse_absurd
from saccade.weights.model_file import ModelCard, check_weights, find_model, load_model_file, read_metadata
from saccade.weights.recognition import ODD
from saccade.weights.source import open_weights
from saccade.words import with_article

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
        row = read_row(card.architecture, str(path))
        refuse_absurd(str(path), row, len(weights))
        return Loaded(weights, row, card, str(path), [])
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


def load_network(source: str | Path, notes: list[str] | None = None) -> tuple[Network, ModelCard]:
    """The network of any source of weights, strictly loaded, ready to predict.

    What was guessed, changed and left aside on the way is added to `notes`.
    """
    loaded = load_weights(source)
    if notes is not None:
        notes += loaded.notes
    return fill(loaded.weights, loaded.row, loaded.card, loaded.where).eval(), loaded.card


def described_network(card: ModelCard, where: str = "model file") -> Network:
    """The network that a model file describes, with random weights."""
    return build_network(read_row(card.architecture, where), len(card.class_names))


def fill(weights: dict[str, Tensor], row: Row, card: ModelCard, where: str) -> Network:
    """The described network with these weights. They are checked before memory is taken for it."""
    try:
        with torch.device("meta"):
            described = build_network(row, len(card.class_names)).state_dict()
    except ODD as error:
        raise UserError(f"{where}: describes a model that cannot be built ({error})") from None
    check_weights(weights, described, where)
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{where}: {', '.join(bad[:3])} hold NaN or infinity; it is damaged, so get it anew")
    network = build_network(row, len(card.class_names))
    network.load_state_dict(weights)
    return network


def initial_network(
    config: RunConfig, class_names: tuple[str, ...], tokenizer: Tokenizer | None = None
) -> tuple[Network, list[str]]:
    """The network a run begins with, and what was changed on the way: from scratch, or from `config.weights`.

    What scores classes is made anew for other classes, and what belongs to another resolution is interpolated. A
    detector may begin with a backbone alone, such as a classifier's. All of it is said.
    """
    if tokenizer is not None:
        return initial_translator(config, tokenizer)
    size, K = config.preprocessing.image_size, len(class_names)
    if config.weights is None:
        return build_network(model_row(config.model).changed(config.network, size), K), []
    loaded = load_weights(config.weights)
    card, where = loaded.card, loaded.where
    row = starting_row(config, loaded)
    fill(loaded.weights, loaded.row, card, where)
    network = build_network(row.changed(config.network, size), K)
    assert isinstance(network, Classifier | Detector)  # there are classes
    notes = [f"weights from {where} ({card.training_data or 'unknown data'}; licence: {card.licence})", *loaded.notes]
    weights, fresh = dict(loaded.weights), network.state_dict()
    if isinstance(network, Detector) and not isinstance(loaded.row, DetectorRow):
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIX) and name in fresh}
        weights = {**{name: tensor for name, tensor in fresh.items() if not name.startswith(PREFIX)}, **weights}
        notes.append(f"only its backbone is taken; what finds {K} classes of things is new")
    elif card.class_names != class_names:
        head = network.class_tensors()
        if card.class_names and set(card.class_names) == set(class_names):
            order = torch.tensor([card.class_names.index(name) for name in class_names])
            for name in head:
                moved = weights[name].clone()
                moved[:K] = weights[name][order]  # beyond the classes there may be one for nothing
                weights[name] = moved
        else:
            weights.update({name: fresh[name] for name in head})
            for name in network.proposal_tensors() if isinstance(network, Detector) else ():
                first = weights[name][0]
                weights[name] = fresh[name].clone()
                weights[name][0] = first
            old = f"its head for {len(card.class_names)} other classes is left out; " if card.class_names else ""
            notes.append(f"{old}a new head for {K}")
    inner = {name.removeprefix(PREFIX): weights.pop(name) for name in list(weights) if name.startswith(PREFIX)}
    backbone = loaded.row.backbone if isinstance(loaded.row, DetectorRow) else loaded.row
    notes += network.backbone.adapt(inner, backbone)
    weights.update({PREFIX + name: tensor for name, tensor in inner.items()})
    check_weights(weights, network.state_dict(), where)
    network.load_state_dict(weights)
    return network, notes


def initial_translator(config: RunConfig, tokenizer: Tokenizer) -> tuple[Translator, list[str]]:
    """From scratch with the tokenizer's vocabulary, or from weights, which then have that tokenizer."""
    if config.weights is None:
        row = model_row(config.model)
        if not isinstance(row, TranslatorRow):
            raise UserError(f"--model {config.model}: does not translate; {', '.join(TRANSLATORS)} do")
        row = replace(
            row.changed(config.network),
            vocabulary=tokenizer.size,
            pad=tokenizer.pad,
            begin=tokenizer.start,
            end=tokenizer.end,
            max_length=max(row.max_length, config.text.max_length),
        )
        network, notes = build_network(row, 0), []
    else:
        loaded = load_weights(config.weights)
        row = loaded.row
        held = f"{loaded.where}: holds {with_article(loaded.card.model)}"
        if not isinstance(row, TranslatorRow):
            raise UserError(f"{held}, which does not translate")
        if config.model != loaded.card.model:
            raise UserError(f"{held}, not {with_article(config.model)}; leave --model out, or give that")
        check_tokenizer(row, tokenizer, loaded.where)
        known = loaded.card.training_data or "unknown data"
        notes = [f"weights from {loaded.where} ({known}; licence: {loaded.card.licence})", *loaded.notes]
        network = build_network(row.changed(config.network), 0)
        check_weights(loaded.weights, network.state_dict(), loaded.where)
        network.load_state_dict(loaded.weights)
    assert isinstance(network, Translator)
    return network, notes


def starting_row(config: RunConfig, loaded: Loaded) -> Row:
    """The architecture of a run that starts from weights: theirs, or a detector around them."""
    model, where, row = config.model, loaded.where, loaded.row
    wanted = {**BACKBONES, **DETECTORS}.get(model)
    held = f"{where}: holds {with_article(loaded.card.model)}"
    if isinstance(wanted, DetectorRow) and not isinstance(row, DetectorRow):
        if wanted.backbone.is_like(row):
            return wanted
        raise UserError(f"{held}; {with_article(model)} is built on {wanted.backbone.about}")
    if model != loaded.card.model and not (wanted is not None and wanted.is_like(row)):
        raise UserError(f"{held}, not {with_article(model)}; leave --model out, or give that name")
    return row
