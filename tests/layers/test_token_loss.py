"""Cross-entropy piece by piece: against PyTorch's of all scores, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from saccade.layers import token_loss
from saccade.layers.token_loss import linear_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("piece", [1, 100, 2**21])  # one row at a time, four with a rest, all
def test_as_pytorch_s_of_all_scores(monkeypatch, piece, biased, smoothing):
    monkeypatch.setattr(token_loss, "PIECE", piece)
    torch.manual_seed(0)
    hidden, table = 3 * torch.randn(11, 8, dtype=torch.float64), 9 * torch.randn(23, 8, dtype=torch.float64)
    bias = torch.randn(23, dtype=torch.float64) if biased else None
    wanted = torch.randint(0, 23, (11,))
    found = []
    for own in (True, False):
        parts = [part.clone().requires_grad_() for part in (hidden, table, bias) if part is not None]
        h, t, b = parts[0], parts[1], parts[2] if biased else None
        if own:
            loss = linear_cross_entropy(h, t, b, wanted, smoothing)
        else:
            loss = F.cross_entropy(F.linear(h, t, b), wanted, label_smoothing=smoothing)
        (1.7 * loss).backward()
        found.append([loss.detach(), *(part.grad for part in parts)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_large_scores_do_not_overflow_and_inference_keeps_nothing():
    hidden, table = torch.full((2, 4), 100.0), torch.stack((torch.full((4,), 10.0), torch.full((4,), -10.0)))
    loss = linear_cross_entropy(hidden, table, None, torch.tensor([0, 1]))
    assert loss == 4000 and not loss.requires_grad


def test_gradients_of_parts_alone():
    torch.manual_seed(0)
    hidden, table, wanted = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True), torch.randint(0, 7, (5,))
    linear_cross_entropy(hidden, table, None, wanted).backward()
    own, table.grad = table.grad, None
    F.cross_entropy(hidden @ table.T, wanted).backward()
    assert own is not None and table.grad is not None and torch.allclose(own, table.grad, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("narrow", [False, True])  # what autocast made of the layer before
def test_in_bfloat16(biased, narrow, monkeypatch):
    """Within the rounding of its products; loss and gradients are of the precision of what they are of."""
    monkeypatch.setattr(token_loss, "PIECE", 100)
    torch.manual_seed(0)
    hidden, table, bias = torch.randn(50, 16).bfloat16(), torch.randn(23, 16), torch.randn(23) if biased else None
    wanted = torch.randint(0, 23, (50,))
    found = []
    for low in (True, False):
        given = (hidden if low and narrow else hidden.float(), table, bias)
        parts = [part.clone().requires_grad_() for part in given if part is not None]
        given = (parts[0], parts[1], parts[2] if biased else None)
        loss = linear_cross_entropy(*given, wanted, 0.1, torch.bfloat16 if low else None)
        loss.backward()
        assert loss.dtype == torch.float32
        found.append([loss.detach(), *(part.grad for part in parts)])
    assert [part.dtype for part in found[0][1:3]] == [torch.bfloat16 if narrow else torch.float32, torch.float32]
    for one, other in zip(*found, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()
