"""A few figures of the reference's answers, kept so that they can be compared with where the reference is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.verification.compare import (
    Comparison,
    Gap,
    Outcome,
    Tolerance,
    answer_gap,
    gap,
    least_gradient,
    pattern,
    tensor_gap,
)

FORMAT = 1
STAGE_PARTS, GRADIENT_PARTS = 32, 4  # of a tensor, each with a projection: more parts show smaller changes
WHOLE = 8192  # as many logits are recorded one by one; of more, a digest


@dataclass(frozen=True)
class Digest:
    """A tensor in a few numbers: a projection of each of its parts moves with any change, also of places alone."""

    shape: tuple[int, ...]
    mean: float
    std: float
    largest: float
    projections: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor, parts: int) -> Digest:
        flat = tensor.detach().reshape(-1).double()
        # a difference of one size everywhere moves a projection by about that size
        pieces = (flat * pattern(len(flat))).chunk(parts)
        projections = tuple(float(piece.sum()) * len(piece) ** -0.5 for piece in pieces)
        std = float(flat.std(correction=0))
        return cls(tuple(tensor.shape), float(flat.mean()), std, float(flat.abs().max()), projections)

    def to_dict(self) -> dict[str, Any]:
        return {"shape": list(self.shape), **{name: getattr(self, name) for name in ("mean", "std", "largest")}} | {
            "projections": list(self.projections)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Digest:
        mean, std, largest = (float(values[name]) for name in ("mean", "std", "largest"))
        return cls(tuple(map(int, values["shape"])), mean, std, largest, tuple(map(float, values["projections"])))

    @property
    def figures(self) -> tuple[float, ...]:
        return self.mean, self.std, *self.projections


def record(outcome: Outcome) -> dict[str, Any] | None:
    """What a certificate keeps of the reference's answers in one number format; none where they are not finite."""
    answers, given = list(outcome.answers.values()), outcome.given
    tensors = [*outcome.stages.values(), outcome.logits, *answers, outcome.loss, *outcome.gradients.values()]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return None
    return {
        **({"given": {name: value.tolist() for name, value in given.items()}} if given else {}),
        "stages": {name: Digest.of(tensor, STAGE_PARTS).to_dict() for name, tensor in outcome.stages.items()},
        "logits": _figures(outcome.logits),
        **({"answers": {name: _figures(value) for name, value in outcome.answers.items()}} if answers else {}),
        "loss": float(outcome.loss),
        "gradients": {name: Digest.of(tensor, GRADIENT_PARTS).to_dict() for name, tensor in outcome.gradients.items()},
    }


def _figures(values: Tensor) -> Any:
    return values.tolist() if values.numel() <= WHOLE else Digest.of(values, STAGE_PARTS).to_dict()


def compare_recorded(
    ours: Outcome, recorded: Mapping[str, Any], stages: Iterable[str], tolerance: Tolerance
) -> Comparison:
    """As `compare`, with the recorded figures in place of the reference's tensors."""
    kept = {name: Digest.from_dict(values) for name, values in recorded["stages"].items()}
    forward = [_recorded_gap(name, ours.given.get(name), v, tolerance) for name, v in recorded.get("given", {}).items()]
    forward += [digest_gap(name, ours.stages.get(name), kept.get(name), tolerance.stages) for name in stages]
    for name, logits in (("logits", ours.logits), ("logits of predict", ours.predicted)):
        if logits is not None:
            forward.append(_recorded_gap(name, logits, recorded["logits"], tolerance))
    for name, expected in recorded.get("answers", {}).items():
        forward.append(_recorded_gap(name, ours.answers.get(name), expected, tolerance))
    loss = torch.tensor(recorded["loss"], dtype=torch.float64)
    forward.append(tensor_gap("loss", ours.loss.double(), loss, tolerance.logits, least=1.0))
    of_theirs = {name: Digest.from_dict(values) for name, values in recorded["gradients"].items()}
    least = least_gradient(digest.largest for digest in of_theirs.values())
    gradients = [
        digest_gap(name, tensor, of_theirs.get(name), tolerance.gradients, least)
        for name, tensor in ours.gradients.items()
    ]
    return Comparison(tuple(forward), tuple(gradients))


def _recorded_gap(name: str, ours: Tensor | None, recorded: Any, tolerance: Tolerance) -> Gap:
    if isinstance(recorded, Mapping):
        return digest_gap(name, ours, Digest.from_dict(recorded), tolerance.logits, least=1.0)
    if ours is not None and not ours.is_floating_point():
        return answer_gap(name, ours, torch.tensor(recorded, dtype=ours.dtype), 0.0)
    expected = torch.tensor(recorded, dtype=torch.float64)
    return answer_gap(name, None if ours is None else ours.double(), expected, tolerance.logits)


def digest_gap(name: str, ours: Tensor | None, theirs: Digest | None, limit: float, least: float = 0.0) -> Gap:
    if ours is None or theirs is None:
        return Gap(name, math.nan, math.nan, False, f"did not run {'here' if ours is None else 'in the reference'}")
    if tuple(ours.shape) != theirs.shape:
        return Gap(name, math.nan, math.nan, False, f"shape {tuple(ours.shape)} against {theirs.shape}")
    found = Digest.of(ours, len(theirs.projections))
    differences = [abs(a - b) for a, b in zip(found.figures, theirs.figures, strict=True)]
    worst = math.nan if any(math.isnan(each) for each in differences) else max(differences)
    return gap(name, worst, theirs.largest, limit, least)


def read_certificate(path: str | Path) -> dict[str, Any]:
    """A certificate that `saccade verify --out` wrote."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--certificate {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--certificate {path}: not valid JSON ({error}); get it anew") from None
    needed = {"source", "architecture", "versions", "weights", "recorded"}
    if not isinstance(values, dict) or not needed <= values.keys() or not {"pictures", "texts"} & values.keys():
        raise UserError(f"--certificate {path}: not a certificate of saccade; `saccade verify SOURCE --out` writes one")
    if values.get("certificate") != FORMAT:
        raise UserError(f"--certificate {path}: written by a newer saccade; update the library")
    return values
