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
