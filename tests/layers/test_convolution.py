"""Convolution and normalisation in one: against PyTorch's two layers, in every mode."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from saccade.layers.convolution import ConvNorm, FrozenBatchNorm, convolve, statistics_kept

FORMS = {
    "plain": {},
    "pointwise": {"kernel": 1},
    "bias": {"bias": True},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 4},
    "activated": {"activation": torch.relu_},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
scaled = pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
sizes = pytest.mark.parametrize("size", [(9, 13), (2, 1)], ids=["large", "small"])  # folded, and not


def layer(form: dict, **more) -> ConvNorm:
    torch.manual_seed(0)
    made = ConvNorm(8, 12, **form, **more).double()
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + (0.2 if name.endswith("var") else -0.4))
        else:
            value.fill_(5)
    return made


def by_hand(made: ConvNorm, x: Tensor, scale: Tensor | None) -> Tensor:
    norm = made.norm
    training = made.training and isinstance(norm, nn.BatchNorm2d)
    x = F.batch_norm(made.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.1, norm.eps)
    x = x if scale is None else x * scale[:, None, None]
    return x if made.activation is None else made.activation(x)


def outcome(made: ConvNorm, call, x: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    """Output, statistics, and the gradient of all that goes in."""
    inputs = {"x": x, **dict(made.named_parameters())} | ({} if scale is None else {"scale": scale})
    y = call(made, x, scale)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y, **dict(made.named_buffers()), **dict(zip((f"d {name}" for name in inputs), gradients, strict=True))}


@forms
@scaled
@sizes
@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen", "frozen training"])
def test_equals_two_layers(form, scaled, size, mode):
    """Measured: 1.5e-14."""
    made = layer(form, frozen=mode.startswith("frozen")).train(mode.endswith("training"))
    other = copy.deepcopy(made)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(12, dtype=torch.float64, requires_grad=True) if scaled else None
    got = outcome(made, lambda m, *inputs: m(*inputs), x, scale)
    expected = outcome(other, by_hand, x, scale)
    count = got.pop("norm.num_batches_tracked")
    expected.pop("norm.num_batches_tracked")
    assert count.item() == (6 if mode == "training" else 5)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_frozen_norm_has_the_names_of_batch_norm_and_nothing_to_train():
    frozen = FrozenBatchNorm(3)
    of_torch = nn.BatchNorm2d(3).state_dict()
    assert {name: value.shape for name, value in frozen.state_dict().items()} == {
        name: value.shape for name, value in of_torch.items()
    }
    assert not list(frozen.parameters())
    frozen.load_state_dict(of_torch)


def test_folding_is_for_maps_larger_than_the_weights(monkeypatch):
    """A small map is normalised in a pass of its own; with a large one, it is the weights that are."""
    seen = []
    batch_norm = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *a, **k: seen.append(True) or batch_norm(*a, **k))
    made = layer({}).eval()
    made(torch.randn(1, 8, 30, 30, dtype=torch.float64))
    assert not seen
    made(torch.randn(1, 8, 3, 3, dtype=torch.float64))
    assert seen


@scaled
def test_statistics_count_a_batch_once_with_checkpointing(scaled):
    made = layer({}).train()
    other = copy.deepcopy(made)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.full((12,), 0.5, dtype=torch.float64, requires_grad=True) if scaled else None

    def contexts():
        return statistics_kept(nn.Sequential()), statistics_kept(made)

    checkpoint(made, x, scale, use_reentrant=False, context_fn=contexts).sum().backward()
    other(x, scale)
    for name, value in made.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert made.norm.momentum == 0.1


def test_statistics_kept_ends_well_after_an_error():
    norm = nn.BatchNorm2d(3)
    with pytest.raises(RuntimeError), statistics_kept(norm):
        norm(torch.randn(2, 3, 4, 4))
        raise RuntimeError
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 0
    fresh = nn.BatchNorm2d(3).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())


FEW_CHANNELS = """
import torch
from saccade.layers.convolution import ConvNorm

torch.manual_seed(0)
made = ConvNorm(4, 8, kernel=1, stride=2)
factors = torch.randn(32, 8, 16, 16, dtype=torch.float64)
x = torch.randn(32, 4, 32, 32).to(memory_format=torch.channels_last)
gradients = []
for kind in (torch.float64, torch.float32):
    made.zero_grad()
    (made.to(kind)(x.to(kind)) * factors).sum().backward()
    gradients.append(made.conv.weight.grad.double())
assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()
"""


def test_few_channels_and_a_stride_stay_within_their_memory() -> None:
    """In a process of its own: without what prevents it, oneDNN aborts or never ends."""
    subprocess.run([sys.executable, "-c", FEW_CHANNELS], check=True, timeout=120)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_in_bfloat16(groups: int, stride: int) -> None:
    """The same within its rounding, forward and backward; channels of their own in large steps are computed in float32,
    which shows in their gradients."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride, 1, groups=groups)
    x = torch.randn(2, 8, 9, 7)
    found = {}
    for low in (False, True):
        place = x.clone().requires_grad_()
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = convolve(place, conv.weight, conv.bias, conv.stride, conv.padding, groups=groups)
        assert out.dtype == (torch.bfloat16 if low else torch.float32)
        out.float().cos().sum().backward()
        assert place.grad is not None and conv.weight.grad is not None
        found[low] = (out.float(), place.grad, conv.weight.grad)
    for exact, rounded in zip(found[False], found[True], strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):  # also of weights that are so already
        weight = conv.weight.bfloat16()
        assert convolve(x, weight, None, conv.stride, conv.padding, groups=groups).dtype == torch.bfloat16
    exact, rounded = (found[low][1] for low in (False, True))
    alone = groups > 1 and stride > 1
    assert (rounded == rounded.bfloat16().float()).all().item() != alone
