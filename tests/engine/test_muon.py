"""Muon's rule, and that it is PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from saccade.engine.muon import Muon, orthogonal


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16), (1, 8)], ids=str)
def test_singular_values_become_about_one(shape: tuple[int, int], precision: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert orthogonal(matrix, precision).dtype == precision
    found = u.T @ orthogonal(matrix, precision).float() @ v.T
    rounding = 1e-4 if precision == torch.float32 else 5e-2
    assert ((found.diag() > 0.5) & (found.diag() < 1.3)).all()
    assert (found - found.diag().diag()).abs().max() < rounding, "the singular vectors are another's"
    assert torch.allclose(orthogonal(1024 * matrix, precision), orthogonal(matrix, precision), atol=1e-5)
    assert orthogonal(torch.zeros(shape), precision).eq(0).all()


def test_the_rule_is_pytorchs(precision: torch.dtype) -> None:
    """But for the rounding of bfloat16."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(24, 48, bias=False), nn.GELU(), nn.Linear(48, 8, bias=False))
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    optimizer = Muon(ours.parameters(), lr=0.02, momentum=0.9, weight_decay=0.3)
    optimizer.precision = precision
    rules = (
        (ours, optimizer),
        (theirs, torch.optim.Muon(
            theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
        )),
    )  # fmt: skip
    for seed in range(5):
        x = torch.randn(32, 24, generator=torch.Generator().manual_seed(seed))
        for model, optimizer in rules:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for own, foreign, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        moved = (foreign - before).norm()
        assert moved > 0.1 * before.norm()
        assert (own - foreign).norm() < 0.02 * moved


def test_state_goes_on_where_it_was_saved() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.1)

    def step(layer: nn.Linear, optimizer: Muon) -> None:
        optimizer.zero_grad()
        layer(torch.eye(8)).cos().sum().backward()
        optimizer.step()

    step(layer, optimizer)
    other = copy.deepcopy(layer)
    resumed = Muon(other.parameters(), lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((layer, optimizer), (other, resumed)):
        step(*each)
    assert torch.equal(layer.weight, other.weight)


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices alone, not a tensor of shape \(8,\)"):
        Muon([nn.Parameter(torch.zeros(8))], lr=0.1)
