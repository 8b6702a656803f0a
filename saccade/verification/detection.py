"""What both sides are asked about a detector: made-up things in the pictures, which query has which, every loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saccade.config import RunConfig
from saccade.models.detector import BoxTargets, DetectionOutputs, DetectorRow
from saccade.tasks.detection import LOSSES
from saccade.tasks.set_loss import SetLoss, Terms, mean_count
from saccade.verification.compare import Comparison, Gap, Judge, Judged, pattern
from saccade.weights.formats.table import DetectorPeer, ReferenceLoss, part_of

FEWEST, MORE = 3, 2  # things in the first picture, and more in each one after it; the last of several has none
PARTS = ("class", "l1", "giou")  # of the loss
ROUNDING = 1e-6  # relative to a part of the loss, or to 1 where that is more; of float32


def made_up_counts(pictures: int) -> list[int]:
    """How many things each picture has."""
    counts = [FEWEST + MORE * b for b in range(pictures)]
    return [*counts[:-1], 0] if pictures > 1 else counts


def made_up_targets(pictures: int, classes: int, dtype: torch.dtype) -> BoxTargets:
    """Boxes inside the pictures, of a side between a tenth and four tenths, the same everywhere."""
    counts = made_up_counts(pictures)
    M = sum(counts)
    # the angles of `pattern` are spread evenly, so of these as many are small as large
    shares = 0.5 + torch.asin((pattern(4 * M) / 2**0.5).clamp(-1, 1)).view(M, 4) / torch.pi
    sides = 0.1 + 0.3 * shares[:, 2:]
    centres = sides / 2 + (1 - sides) * shares[:, :2]
    labels = torch.tensor([(7919 * m + 3) % classes for m in range(M)], dtype=torch.long)
    picture = torch.repeat_interleave(torch.arange(pictures), torch.tensor(counts))
    return BoxTargets(torch.cat((centres, sides), dim=1).to(dtype), labels, picture)


def judge_ours(row: DetectorRow, targets: BoxTargets) -> Judge:
    """By the loss that the model is trained with."""
    loss = LOSSES[row.loss](row, RunConfig(data=""))
    assert isinstance(loss, SetLoss), f"the loss {row.loss!r} does not say its parts"

    def judge(outputs: DetectionOutputs) -> Judged:
        count = mean_count(targets)
        parts: dict[str, Tensor] = {}
        matched: dict[str, Tensor] = {}
        terms = loss.terms(outputs.layers, targets, count)
        for i in range(len(outputs.layers)):
            _say(terms, i, f"layer {i + 1}", len(targets.labels), parts, matched)
        if outputs.encoder is not None:
            terms = loss.terms((outputs.encoder,), loss.targets_of_proposals(targets), count)
            _say(terms, 0, "proposals", len(targets.labels), parts, matched)
        return _judged(outputs, ReferenceLoss(parts, matched))

    return judge


def judge_theirs(model: torch.nn.Module, peer: DetectorPeer, targets: BoxTargets) -> Judge:
    """By the loss of the reference."""

    def judge(outputs: DetectionOutputs) -> Judged:
        return _judged(outputs, peer.loss(model, outputs, targets))

    return judge


def _say(
    terms: Terms, layer: int, name: str, things: int, parts: dict[str, Tensor], matched: dict[str, Tensor]
) -> None:
    for what, values in zip(PARTS, (terms.label, terms.l1, terms.giou), strict=True):
        parts[part_of(name, what)] = values[layer]
    queries = torch.full((things,), -1, dtype=torch.long)
    queries[terms.matches.target[layer]] = terms.matches.query[layer]
    matched[part_of(name, "matched")] = queries


def _judged(outputs: DetectionOutputs, loss: ReferenceLoss) -> Judged:
    answers: dict[str, Tensor] = {}
    if outputs.encoder is not None:
        answers[part_of("proposals", "logits")] = outputs.encoder.logits
        answers[part_of("proposals", "boxes")] = outputs.encoder.boxes
    for i, layer in enumerate(outputs.layers[:-1]):
        answers[part_of(f"layer {i + 1}", "logits")] = layer.logits
        answers[part_of(f"layer {i + 1}", "boxes")] = layer.boxes
    answers["boxes"] = outputs.boxes
    total = torch.stack(list(loss.terms.values())).sum()
    return Judged(outputs.logits, total, {**answers, **loss.matched, **loss.terms})


def settled(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Rounding may match another of two queries that cost the same, as all do in a model that has learnt nothing.

    Such a match in float32 agrees, where float64 has the same matches, and no part of that layer's loss is further
    apart than rounding is.
    """
    exact = comparisons.get("float64")
    sure = {gap.name for gap in exact.forward if gap.agrees} if exact else set()
    return {
        dtype: replace(
            each, forward=tuple(_settled(gap, each.forward) if gap.name in sure else gap for gap in each.forward)
        )
        for dtype, each in comparisons.items()
    }


def _settled(gap: Gap, others: Sequence[Gap]) -> Gap:
    layer, _, what = gap.name.rpartition(": ")
    parts = {part_of(layer, part) for part in PARTS}
    alike = sum(other.relative <= ROUNDING for other in others if other.name in parts)
    if gap.agrees or what != "matched" or alike != len(parts):
        return gap
    return replace(gap, agrees=True, note=f"{gap.note} cost the same")
