"""Dropout by few random numbers: as many values are dropped as asked, independently of each other, and no more."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from saccade.layers.dropout import dropout

COUNT = 400_003  # no multiple of four


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_drops_what_is_asked(p: float):
    torch.manual_seed(0)
    found = dropout(torch.ones(COUNT), p, True)
    kept = found > 0
    assert (found[kept] - 1 / (1 - p)).abs().max() <= 1e-3 / (1 - p) ** 2  # `p` is rounded
    spread = (p * (1 - p) / COUNT) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) <= 4 * spread + 1e-5
    for distance in (1, 2, 3, 4, 7):  # four neighbours come from one number
        together = (kept[distance:] & kept[:-distance]).double().mean()
        assert abs(together - (1 - p) ** 2) <= 5 * (p / COUNT) ** 0.5
    halves = [kept[i::4].double().mean() for i in range(4)]
    assert max(halves) - min(halves) <= 12 * spread + 1e-5


def test_gradient_is_that_of_what_is_kept():
    torch.manual_seed(0)
    x = torch.randn(3, 50, 7, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25, True)
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    factor = torch.where(y == 0, 0.0, 4 / 3)
    assert torch.allclose(y, x * factor, atol=1e-12) and torch.allclose(gradient, upstream * factor, atol=1e-12)


def test_same_seed_same_values():
    x = torch.ones(5, 11)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append((dropout(x, 0.3, True), torch.rand(1)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_where_nothing_is_to_be_drawn():
    x = torch.randn(4, 5)
    state = torch.get_rng_state()
    assert torch.equal(dropout(x, 0.5, False), x) and torch.equal(dropout(x, 0.0, True), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dropout(x, 1.0, True), F.dropout(x, 1.0)) and dropout(x[:0], 0.5, True).shape == (0, 5)
    assert dropout(x.bfloat16(), 0.5, True).dtype == torch.bfloat16
