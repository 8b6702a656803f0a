"""A few figures of the reference's answers, kept so that they can be compared with where the reference is not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, NonNegativeInt, ValidationError, field_validator
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
LARGEST = 256 * 2**20  # bytes of a certificate; those of large models have a few MB
SHOWN = 5  # faults of a damaged one
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
    if len(found.figures) != len(theirs.figures):
        return Gap(name, math.nan, math.nan, False, f"{len(theirs.projections)} projections are recorded of it")
    differences = [abs(a - b) for a, b in zip(found.figures, theirs.figures, strict=True)]
    worst = math.nan if any(math.isnan(each) for each in differences) else max(differences)
    return gap(name, worst, theirs.largest, limit, least)


# --- reading ---------------------------------------------------------------------------------------------------------


class _Digest(BaseModel):
    shape: list[NonNegativeInt]
    mean: FiniteFloat
    std: FiniteFloat
    largest: FiniteFloat
    projections: list[FiniteFloat] = Field(min_length=1)


def _numbers(values: Any) -> Any:
    """Nested lists as a tensor has them, of finite numbers that a tensor can hold, or a digest of them."""
    try:
        if isinstance(values, Mapping):
            return _Digest.model_validate(values).model_dump()
        sound = bool((torch.tensor(values, dtype=torch.float64).abs() < 2.0**63).all())
    except (ValueError, TypeError, ArithmeticError, RuntimeError):
        sound = False
    if not sound:
        raise ValueError("neither a table of numbers nor a digest of one")
    return values


_Numbers = Annotated[Any, AfterValidator(_numbers)]


class _Answers(BaseModel):
    """What `record` keeps."""

    given: dict[str, _Numbers] = {}
    stages: dict[str, _Digest]
    logits: _Numbers
    answers: dict[str, _Numbers] = {}
    loss: FiniteFloat
    gradients: dict[str, _Digest]


class _Weights(BaseModel):
    sha256: str


class _Pictures(BaseModel):
    sha256: str
    count: int
    origin: str
    height: int
    width: int


class _Texts(BaseModel):
    sha256: str
    count: int
    origin: str
    tokens: int


class _Certificate(BaseModel):
    """What is read of one; it says more, for people."""

    source: str
    architecture: dict[str, Any]
    versions: dict[str, str]
    weights: _Weights
    pictures: _Pictures | None = None  # or
    texts: _Texts | None = None
    recorded: dict[str, _Answers]

    @field_validator("pictures", "texts", mode="before")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("says nothing")
        return value


def read_certificate(path: str | Path) -> dict[str, Any]:
    """A certificate that `saccade verify --out` wrote, checked to the last figure: comparing takes long."""
    try:
        values = _read(Path(path))
    except OSError as error:
        raise UserError(f"--certificate {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--certificate {path}: not valid JSON ({error}); get it anew") from None
    needed = {"source", "architecture", "versions", "weights", "recorded"}
    if not isinstance(values, dict) or not needed <= values.keys() or not {"pictures", "texts"} & values.keys():
        raise UserError(f"--certificate {path}: not a certificate of saccade; `saccade verify SOURCE --out` writes one")
    if values.get("certificate") != FORMAT:
        raise UserError(f"--certificate {path}: written by a newer saccade; update the library")
    try:
        return _Certificate.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(
            f"--certificate {path}: incomplete or damaged ({'; '.join(faults[:SHOWN])}{more}); get it anew"
        ) from None


def refuse_other_file(path: str | Path) -> None:
    """Only a certificate makes way for another one."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    try:
        values = _read(path) if path.is_file() else None  # a terminal would have to be waited for
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not {"certificate", "verdict"} <= values.keys():
        raise UserError(f"--out {path}: exists and is no certificate, so it is not written over; choose another --out")


def _read(path: Path) -> Any:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.stat().st_size} bytes are too many")
    return json.loads(path.read_text(encoding="utf-8"))
