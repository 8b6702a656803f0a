"""The losses of transformers' detectors, layer by layer, in any precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.models.detector import BoxTargets, DetectionOutputs, LayerOutputs
from saccade.weights.formats.table import ReferenceLoss, part_of

TERMS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}  # ours and theirs


def loss_by_layers(
    criterion: Any,
    weights: Mapping[str, float],
    outputs: DetectionOutputs,
    targets: BoxTargets,
    *,
    proposals_of_classes: bool = False,
) -> ReferenceLoss:
    """What their criterion and its matcher say of every layer; `weights` are of the terms by our names.

    Their class asks a first stage's proposals for one class that stands for all, as ours does, or for the things' own.
    """
    terms: dict[str, Tensor] = {}
    matched: dict[str, Tensor] = {}
    labels = labels_of(targets, len(outputs.logits))
    for i, layer in enumerate(outputs.layers):
        _judge(criterion, weights, layer, labels, f"layer {i + 1}", terms, matched)
    if outputs.encoder is not None:
        if not proposals_of_classes:
            labels = [{**each, "class_labels": torch.zeros_like(each["class_labels"])} for each in labels]
        _judge(criterion, weights, outputs.encoder, labels, "proposals", terms, matched)
    return ReferenceLoss(terms, matched)


def labels_of(targets: BoxTargets, pictures: int) -> list[dict[str, Tensor]]:
    """Targets as transformers takes them: a table for each picture."""
    each = [targets.picture == b for b in range(pictures)]
    return [{"class_labels": targets.labels[here], "boxes": targets.boxes[here]} for here in each]


def _judge(
    criterion: Any,
    weights: Mapping[str, float],
    layer: LayerOutputs,
    labels: list[dict[str, Tensor]],
    name: str,
    terms: dict[str, Tensor],
    matched: dict[str, Tensor],
) -> None:
    theirs = {"logits": layer.logits, "pred_boxes": layer.boxes}
    found = criterion(theirs, labels)
    terms.update({part_of(name, ours): weights[ours] * found[their] for ours, their in TERMS.items()})
    queries = []
    for (query, thing), each in zip(criterion.matcher(theirs, labels), labels, strict=True):
        of_things = torch.full((len(each["class_labels"]),), -1, dtype=torch.long)
        of_things[thing] = query
        queries.append(of_things)
    matched[part_of(name, "matched")] = torch.cat(queries)
