"""What every parity test of a detector does: outputs of all layers, matches, every part of the loss, gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compare import randomise
from torch import nn

from saccade.models import build_network
from saccade.models.detector import BoxTargets, Detector, DetectorRow
from saccade.verification.choices import Choices
from saccade.verification.detection import judge_ours, judge_theirs
from saccade.weights.formats.reference import FileNamed
from saccade.weights.formats.table import DetectorPeer, Format, read_gradients, read_state

SINGLE, DOUBLE = torch.float32, torch.float64
# outputs and parts of the loss; gradients of a parameter, relative to its largest. As in ResNet, what rounding moves
# across ReLU's corner has another gradient in float32.
LIMITS = {SINGLE: (1e-4, 5e-2), DOUBLE: (1e-9, 1e-8)}


@dataclass(frozen=True)
class Measured:
    outputs: float
    gradients: float
    worst: str  # the parameter with that gradient


def randomise_all(model: nn.Module) -> None:
    """Parameters and frozen norms; counts of batches, which nothing reads, are zero."""
    randomise(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
            elif name.endswith(("weight", "bias")):
                noise = 0.2 * torch.randn(buffer.shape, generator=generator)
                buffer.copy_(noise + (1 if name.endswith("weight") else 0))


def pair(form: Format, row: DetectorRow, classes: int) -> tuple[Detector, FileNamed]:
    """Theirs has random weights."""
    assert form.peer is not None
    torch.manual_seed(0)
    theirs = form.peer.build(row, classes, {})
    assert isinstance(theirs, FileNamed)
    randomise_all(theirs.inner)
    ours = build_network(row, classes)
    assert isinstance(ours, Detector)
    return ours, theirs


def convert(ours: Detector, theirs: FileNamed, form: Format, classes: int, dtype: torch.dtype) -> None:
    """Both in `dtype` and in evaluation, with the weights of theirs."""
    ours.to(dtype).eval()
    theirs.to(dtype).eval().requires_grad_(True)
    rules = form.rules(ours.config, classes)
    ours.load_state_dict(read_state(theirs.state_dict(), rules, form.ignored, "theirs"), strict=True)


def agree(
    ours: Detector,
    theirs: FileNamed,
    form: Format,
    size: tuple[int, int],
    targets: BoxTargets,
    classes: int,
    dtype: torch.dtype,
) -> Measured:
    """With weights that are converted already. Pictures are as many as `targets` have, and one without things."""
    row, peer = ours.config, form.peer
    assert isinstance(peer, DetectorPeer)
    pictures = int(targets.picture.max()) + 2 if len(targets.picture) else 2
    images = torch.randn(pictures, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    choices = Choices(LIMITS[dtype][0])
    with choices.noted():
        got = judge_ours(row, targets)(ours(images))
    with choices.repeated():
        expected = judge_theirs(theirs, peer, targets)(peer.outputs(theirs, images))
    assert expected.logits.std() > 0.1, "a reference without contrast proves nothing"
    assert expected.answers["boxes"].std() > 0.03
    assert got.answers.keys() == expected.answers.keys()
    limit, gradient_limit = LIMITS[dtype]
    worst = (got.logits - expected.logits).abs().max().item()
    for name, answer in got.answers.items():
        reference = expected.answers[name]
        assert answer.shape == reference.shape, name
        if answer.is_floating_point():
            gap = (answer - reference).abs().max().item()
            worst = max(worst, gap if answer.ndim else gap / max(1.0, abs(reference.item())))
        else:
            assert torch.equal(answer, reference), name
        assert worst <= limit, name
    assert abs(got.loss.item() - expected.loss.item()) <= limit * max(1.0, expected.loss.item())
    got.loss.backward()
    expected.loss.backward()
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    state |= {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    own = dict(ours.named_parameters())
    of_theirs = read_gradients(state, [rule for rule in form.rules(row, classes) if rule.ours in own])
    assert of_theirs.keys() == own.keys()
    least = 1e-3 * max(g.abs().max().item() for g in of_theirs.values())  # smaller ones are rounding alone
    gaps = {}
    for name, parameter in own.items():
        scale = max(least, of_theirs[name].abs().max().item())
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gaps[name] = (found - of_theirs[name]).abs().max().item() / scale
    name = max(gaps, key=lambda each: gaps[each])
    measured = Measured(worst, gaps[name], name)
    print(f"{dtype}: {measured}")
    assert gaps[name] <= gradient_limit, measured
    return measured
