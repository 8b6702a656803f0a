"""Feed-forward networks: what they compute does not depend on how it is cut."""

from __future__ import annotations

import pytest
import torch

from saccade.layers import feedforward
from saccade.layers.feedforward import FeedForward


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((5, 4, 6), [4, 4, 4, 4, 4]),
        ((5, 2, 6), [4, 4, 2]),
        ((2, 9, 6), [3, 3, 3, 3, 3, 3]),
        ((5, 6), [5]),
        ((2, 3, 4, 6), [24]),
        ((0, 7, 6), [0]),
    ],
    ids=str,
)
def test_in_pieces(monkeypatch: pytest.MonkeyPatch, activation: str, shape: tuple[int, ...], pieces: list[int]):
    torch.manual_seed(0)
    network = FeedForward(6, 16, activation=activation).double()
    found = []
    for large in (2**25, 0):
        monkeypatch.setattr(feedforward, "LARGE", large)
        monkeypatch.setattr(feedforward, "PIECE", 4 * 16 * 8)  # four rows
        x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape).requires_grad_()
        calls: list[int] = []
        handle = network.up.register_forward_hook(
            lambda *call, calls=calls: calls.append(call[-1].shape[:-1].numel())
        )
        y = network(x)
        handle.remove()
        assert calls == ([sum(pieces)] if large else pieces)
        network.zero_grad()
        y.sin().sum().backward()
        found.append([y.detach(), x.grad, *(parameter.grad for parameter in network.parameters())])
    assert all((a - b).abs().sum() <= 1e-12 for a, b in zip(*found, strict=True))


def test_only_large_ones_are_cut():
    network = FeedForward(4, 2**13)
    calls = []
    network.up.register_forward_hook(lambda module, inputs, output: calls.append(output.numel()))
    with torch.no_grad():
        network(torch.zeros(4, 2**8, 4))
        network(torch.zeros(5, 2**8, 4))
    assert calls == [2**23, *[2**21] * 5]
