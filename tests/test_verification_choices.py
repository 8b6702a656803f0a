"""Choices of the surest: repeated where they could have been made, and only there."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.verification.choices import Choices


def choose(values: Tensor, count: int = 2) -> list[list[int]]:
    return values.topk(count, dim=1).indices.tolist()


SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.500001], [3.0, 2.0, 1.0, 0.0]])
OTHERWISE = torch.tensor([[0.1, 0.9, 0.500001, 0.5], [3.0, 2.0, 1.0, 0.0]])  # but for rounding the same


def test_rounding_does_not_choose_otherwise():
    choices = Choices(1e-4)
    with choices.noted():
        assert choose(SCORES) == [[1, 3], [0, 1]]
    assert choose(OTHERWISE) == [[1, 2], [0, 1]]
    with choices.repeated():
        values, indices = torch.topk(input=OTHERWISE, k=2, dim=1)
    assert indices.tolist() == [[1, 3], [0, 1]] and values.tolist()[0][1] == 0.5
    with choices.repeated():
        assert torch.topk(OTHERWISE, 2)[1].tolist() == [[1, 3], [0, 1]]


def test_what_is_wrong_stays_wrong():
    choices = Choices(1e-4)
    with choices.noted():
        choose(SCORES)
    wrong = torch.tensor([[0.1, 0.9, 0.51, 0.5], [3.0, 2.0, 1.0, 0.0]])
    with choices.repeated():
        assert choose(wrong) == [[1, 2], [0, 1]]
    with Choices(1e-4).repeated():
        assert choose(wrong) == [[1, 2], [0, 1]]


def test_call_after_call():
    choices = Choices(1e-4)
    with choices.noted():
        choose(SCORES)
        choose(SCORES, 3)
    with choices.repeated():
        assert choose(OTHERWISE) == [[1, 3], [0, 1]]
        assert choose(OTHERWISE, 1) == [[1], [0]]  # of another form than what was chosen
        assert choose(OTHERWISE) == [[1, 2], [0, 1]]  # there is no third
    with choices.repeated():
        assert choose(OTHERWISE) == [[1, 3], [0, 1]]


def test_places_that_cannot_be_chosen():
    values = torch.tensor([[1.0, -torch.inf, -torch.inf, 0.5]])
    choices = Choices(1e-4)
    with choices.noted():
        first = choose(values, 3)
    with choices.repeated():
        assert choose(values, 3) == first


def test_gradients_go_through():
    choices = Choices(1e-4)
    with choices.noted():
        choose(SCORES)
    values = OTHERWISE.clone().requires_grad_()
    with choices.repeated():
        values.topk(2, dim=1).values.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
