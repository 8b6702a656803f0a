"""Run two models of the same weights on the same pictures, and measure how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.base import Backbone
from saccade.errors import UserError
from saccade.weights.formats.table import Rule, Stage, read_gradients


@dataclass(frozen=True)
class Judged:
    """What is made of a model's outputs; `answers` are compared beside the logits, whole numbers exactly."""

    logits: Tensor
    loss: Tensor
    answers: Mapping[str, Tensor] = field(default_factory=dict)


Judge = Callable[[Any], Judged]
Watched = Mapping[str, tuple[str, Callable[[Any], Tensor] | None]]  # stage -> path of a module, and a change of layout

# A gradient that is zero in theory (such as of a bias of the keys) is nothing but rounding in practice. Differences are
# taken relative to the parameter's largest gradient, or to this share of a usual parameter's where that is more.
LEAST_GRADIENT = 0.01


@dataclass(frozen=True)
class Tolerance:
    """Stages and gradients: relative to the largest magnitude. Logits and loss: absolute, or relative where above 1."""

    stages: float
    logits: float
    gradients: float


# In float32 a ReLU or a maximum may choose another side, which moves a gradient by more than rounding does: measured
# 7.2e-3 in a ResNet-50, 5e-6 in a Swin. It is float64 that tells an error in gradients from that.
TOLERANCES = {"float32": Tolerance(1e-4, 1e-4, 3e-2), "float64": Tolerance(1e-9, 1e-9, 1e-8)}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Outcome:
    """All that one side gives for the pictures, in names and layouts that both sides share."""

    stages: dict[str, Tensor]  # in the order of computation; a stage that did not run is absent
    logits: Tensor  # (B, K), or a summary (B, C) without classes, a detector's (B, Q, K), a translator's (B, T, V)
    loss: Tensor
    gradients: dict[str, Tensor]  # by our names
    predicted: Tensor | None = None  # the logits again, by the way that `predict` takes
    answers: Mapping[str, Tensor] = field(default_factory=dict)  # of a detector: boxes, matches and parts of the loss
    given: Mapping[str, Tensor] = field(default_factory=dict)  # whole numbers that texts were made into before all else


@dataclass(frozen=True)
class Gap:
    """How far two values of one name are apart."""

    name: str
    absolute: float
    relative: float
    agrees: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON knows no NaN: a figure that is none is null."""
        values = asdict(self)
        for name in ("absolute", "relative"):
            values[name] = values[name] if math.isfinite(values[name]) else None
        return values if self.note else {key: value for key, value in values.items() if key != "note"}


@dataclass(frozen=True)
class Comparison:
    """One number format: the gaps of all stages, of logits and loss, and of every parameter's gradient."""

    forward: tuple[Gap, ...]
    gradients: tuple[Gap, ...]

    @property
    def agrees(self) -> bool:
        return all(gap.agrees for gap in (*self.forward, *self.gradients))

    @property
    def worst_gradients(self) -> list[Gap]:
        return sorted(self.gradients, key=lambda gap: (gap.agrees, -_or_infinite(gap.relative)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "agrees": self.agrees,
            "forward": [gap.to_dict() for gap in self.forward],
            "gradients": [gap.to_dict() for gap in self.gradients],
        }


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def compare(ours: Outcome, theirs: Outcome, stages: Iterable[str], tolerance: Tolerance) -> Comparison:
    """What was given, stages in their order, then logits, other answers and loss, then gradients."""
    forward = [answer_gap(name, ours.given.get(name), theirs.given.get(name), 0.0) for name in ours.given]
    forward += [tensor_gap(name, ours.stages.get(name), theirs.stages.get(name), tolerance.stages) for name in stages]
    forward.append(tensor_gap("logits", ours.logits, theirs.logits, tolerance.logits, least=1.0))
    if ours.predicted is not None:
        forward.append(tensor_gap("logits of predict", ours.predicted, theirs.logits, tolerance.logits, least=1.0))
    forward += [
        answer_gap(name, ours.answers.get(name), theirs.answers.get(name), tolerance.logits)
        for name in dict.fromkeys((*ours.answers, *theirs.answers))
    ]
    forward.append(tensor_gap("loss", ours.loss, theirs.loss, tolerance.logits, least=1.0))
    least = least_gradient(float(g.abs().max()) for g in theirs.gradients.values())
    gradients = [
        tensor_gap(name, ours.gradients[name], theirs.gradients.get(name), tolerance.gradients, least)
        for name in ours.gradients
    ]
    return Comparison(tuple(forward), tuple(gradients))


def least_gradient(largest: Iterable[float]) -> float:
    usual = [value for value in largest if value > 0 and math.isfinite(value)]
    return LEAST_GRADIENT * median(usual) if usual else 0.0


def tensor_gap(name: str, ours: Tensor | None, theirs: Tensor | None, limit: float, least: float = 0.0) -> Gap:
    """Agrees where the largest difference is within `limit` times the larger of `least` and theirs' magnitude."""
    if ours is None or theirs is None:
        side = "here" if ours is None else "in the reference"
        return Gap(name, math.nan, math.nan, False, f"did not run {side}")
    if ours.shape != theirs.shape:
        return Gap(name, math.nan, math.nan, False, f"shape {tuple(ours.shape)} against {tuple(theirs.shape)}")
    return gap(name, float((ours - theirs).abs().max()), float(theirs.abs().max()), limit, least)


def answer_gap(name: str, ours: Tensor | None, theirs: Tensor | None, limit: float) -> Gap:
    """As `tensor_gap`; whole numbers are choices, which agree or do not."""
    if ours is None or theirs is None or ours.is_floating_point() or ours.shape != theirs.shape:
        return tensor_gap(name, ours, theirs, limit, least=1.0)
    others, count = int((ours != theirs).sum()), ours.numel()
    return Gap(name, others, others / max(1, count), others == 0, f"{others} of {count}" if others else "")


def gap(name: str, difference: float, largest: float, limit: float, least: float) -> Gap:
    scale = max(largest, least)
    relative = difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)
    return Gap(name, difference, relative, relative <= limit)  # NaN departs


class Network(nn.Module):
    """A backbone, and a head where there are classes: the names of a `Classifier`, with all maps on the way."""

    def __init__(self, backbone: Backbone, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.summary_channels, classes) if classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).summary)

    def predict(self, images: Tensor) -> Tensor:
        return self.head(self.backbone.summary(images))


def run_ours(
    network: nn.Module,
    call: Callable[[Any], Any],
    predict: Callable[[Any], Tensor],
    images: Any,
    stages: Sequence[Stage],
    judge: Judge,
) -> Outcome:
    """`call` gives what is judged, of pictures or texts; `predict` the logits by the way that prediction takes."""
    watched = {stage.name: (_path_of(network, stage.ours), stage.ours_as) for stage in stages}
    seen, judged, gradients = _run(network, call, images, watched, judge)
    with torch.no_grad():
        predicted = predict(images)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    return Outcome(seen, judged.logits, judged.loss, {**zeros, **gradients}, predicted, judged.answers)


def run_theirs(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    images: Any,
    stages: Sequence[Stage],
    judge: Judge,
    rules: Sequence[Rule],
    ours: Iterable[str],
) -> Outcome:
    """The reference; its gradients are brought under our parameters' names (`ours`) by the format's rules."""
    watched = {stage.name: (stage.theirs, stage.theirs_as) for stage in stages}
    seen, judged, gradients = _run(model, lambda x: call(model, x), images, watched, judge)
    names = set(ours)
    wanted = [rule for rule in rules if rule.ours in names]
    known = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    read = read_gradients({**known, **gradients}, wanted)
    return Outcome(seen, judged.logits, judged.loss, read, answers=judged.answers)


def _path_of(network: nn.Module, path: str) -> str:
    """Tables may leave out the `backbone.` that every stage lies in."""
    known = {name for name, _ in network.named_modules()}
    return path if path in known else f"backbone.{path}"


def _run(
    model: nn.Module, call: Callable[[Any], Any], images: Any, watched: Watched, judge: Judge
) -> tuple[dict[str, Tensor], Judged, dict[str, Tensor]]:
    """Stages, what is made of the outputs, and the gradients by the model's own names, in evaluation mode."""
    model.eval()
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    raw: dict[str, Any] = {}
    handles = []
    for name, (path, _) in watched.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue  # counts as a stage that did not run
        handles.append(module.register_forward_hook(_keeper(raw, name)))
    try:
        outputs = call(images)
    finally:
        for handle in handles:
            handle.remove()
    judged = judge(outputs)
    judged.loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    stages = {name: _tensor(raw[name], change) for name, (_, change) in watched.items() if name in raw}
    answers = {name: answer.detach() for name, answer in judged.answers.items()}
    return stages, Judged(judged.logits.detach(), judged.loss.detach(), answers), gradients


def _keeper(raw: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # a copy, because the next layer may work in place
        raw[name] = output.detach().clone() if isinstance(output, Tensor) else output

    return keep


def _tensor(output: Any, change: Callable[[Any], Tensor] | None) -> Tensor:
    if change is not None:
        output = change(output)
    elif isinstance(output, tuple | list):
        output = output[0]
    assert isinstance(output, Tensor), f"a stage gave a {type(output).__name__}; its table needs a function for it"
    return output.detach()


def cross_entropy(logits: Tensor) -> Judged:
    """With a fixed class for each picture."""
    B, K = logits.shape
    targets = torch.tensor([(7919 * b + 3) % K for b in range(B)])
    return Judged(logits, F.cross_entropy(logits, targets))


def functional(summary: Tensor) -> Judged:
    """A fixed linear functional in which every number of the summary has its own weight."""
    B, C = summary.shape
    return Judged(summary, (summary * pattern(B * C).to(summary.dtype).view(B, C)).sum() / (B * C) ** 0.5)


PRIME = 2**31 - 1


def pattern(count: int) -> Tensor:
    """Numbers that look random and come from a formula, so that they are the same everywhere: float64 (count,).

    The angles of a quadratic sequence; whole numbers up to the cosine, which keeps them exact for any length.
    """
    steps = torch.arange(1, count + 1) % PRIME
    angles = (steps * steps % PRIME) * 1_327_217_885 % PRIME
    return math.sqrt(2) * torch.cos(angles.double() * (2 * math.pi / PRIME))


def load_reference(
    model: nn.Module, weights: Mapping[str, Tensor], ignored: Callable[[str], bool], where: str
) -> nn.Module:
    """Put the very tensors of the source into the reference, strictly but for keys that carry nothing to learn."""
    known = model.state_dict()
    faults = [f"missing: {name}" for name in known if name not in weights and not ignored(name)]
    faults += [f"left over: {name}" for name in weights if name not in known and not ignored(name)]
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:40])
        raise UserError(f"{where}: the reference code refuses these weights ({len(faults)} faults):{listed}")
    try:
        model.load_state_dict({name: weights.get(name, known[name]) for name in known}, strict=True)
    except RuntimeError as error:
        raise UserError(f"{where}: the reference code refuses these weights ({error})") from None
    return model.eval()
