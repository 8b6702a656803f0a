"""Choices of the surest: repeated where they could have been made, and only there. Matches: settled where they tie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.verification.choices import Choices
from saccade.verification.compare import Comparison, Gap
from saccade.verification.detection import settled


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


def compared(otherwise: int, l1: float, layer: int = 2) -> Comparison:
    """One layer's match, of three things, and parts of the loss; those of another layer are far apart."""
    parts = {"class": 4e-7, "l1": l1, "giou": 1e-7}
    gaps = [Gap(f"layer {layer}: matched", otherwise, otherwise / 3, not otherwise, "1 of 3" if otherwise else "")]
    gaps += [Gap(f"layer {layer}: {part}", relative, relative, True) for part, relative in parts.items()]
    return Comparison((*gaps, Gap("layer 1: l1", 1e-2, 1e-2, False)), ())


def test_of_two_queries_that_cost_the_same_rounding_matches_either():
    found = settled({"float32": compared(1, 3e-7), "float64": compared(0, 1e-16)})
    matched = found["float32"].forward[0]
    assert matched.agrees and matched.note == "1 of 3 cost the same"
    assert found["float32"].forward[1:] == compared(1, 3e-7).forward[1:] and found["float64"] == compared(0, 1e-16)


@pytest.mark.parametrize(
    "comparisons",
    [
        {"float32": compared(1, 2e-6), "float64": compared(0, 1e-16)},  # it cost something
        {"float32": compared(1, float("nan")), "float64": compared(0, 1e-16)},
        {"float32": compared(1, 3e-7), "float64": compared(1, 3e-7)},  # no rounding explains it
        {"float32": compared(1, 3e-7), "float64": compared(0, 1e-16, layer=1)},
        {"float32": compared(1, 3e-7)},  # nothing to tell rounding by
    ],
)
def test_other_matches_depart(comparisons: dict[str, Comparison]):
    assert not settled(comparisons)["float32"].forward[0].agrees
