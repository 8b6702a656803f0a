from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.layers import linear as module
from saccade.layers.linear import Linear, linear


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.fixture
def as_convolution(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On every processor; returns the rows of each product that went through it."""
    seen: list[int] = []
    convolve = module._convolve

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(x))
        return convolve(x, weight, bias)

    monkeypatch.setattr(module, "products_are_slow", lambda: True)
    monkeypatch.setattr(module, "_convolve", noted)
    return seen


@pytest.fixture
def of_few_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Returns the shape of each gradient of weights that was put as a layer."""
    seen: list[tuple[int, int]] = []
    put = module._of_few_rows

    def noted(upstream: Tensor, x: Tensor) -> Tensor:
        seen.append((upstream.shape[1], x.shape[1]))
        return put(upstream, x)

    monkeypatch.setattr(module, "_of_few_rows", noted)
    return seen


@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
@pytest.mark.parametrize("learns", ["all", "x", "weight", "bias", "x and bias", "nothing"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", [(600, 40), (3, 601, 40), (2, 3, 300, 40)])
def test_is_the_same_as_a_product(
    as_convolution: list[int],
    of_few_rows: list[tuple[int, int]],
    shape: tuple[int, ...],
    shift: bool,
    learns: str,
    large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of weights that are large for their rows, too, whose gradient is a layer of its own."""
    monkeypatch.setattr(module, "LARGE", 0 if large else 10**9)
    torch.manual_seed(0)
    parts = {"x": torch.randn(shape), "weight": torch.randn(24, 40)} | ({"bias": torch.randn(24)} if shift else {})
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        given = {name: part.to(dtype, copy=True) for name, part in parts.items()}
        for name, part in given.items():
            part.requires_grad_(learns == "all" or name in learns)
        out = function(given["x"], given["weight"], given.get("bias"))
        if out.requires_grad:
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            out.backward(upstream.to(dtype))
        results.append((out, {name: part.grad for name, part in given.items()}))
    (out, gradients), (exact, exact_gradients) = results
    assert as_convolution == [parts["x"].numel() // 40]
    assert of_few_rows == ([(24, 40)] if large and learns in ("all", "weight") else [])
    assert out.is_contiguous() and gap(out, exact) <= 1e-6  # measured 2e-7
    assert out.requires_grad == exact.requires_grad
    for name, gradient in exact_gradients.items():
        mine = gradients[name]
        assert (mine is None) == (gradient is None), name
        assert mine is None or gradient is None or gap(mine, gradient) <= 2e-6, name  # measured 4e-7


def test_what_is_not_in_order_is_put_in_order(as_convolution: list[int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 40, 700).transpose(1, 2)[:, :600], torch.randn(40, 24).T
    assert gap(linear(x, weight), F.linear(x, weight)) <= 1e-6
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    upstream = torch.randn(24).expand(5, 600, 24)  # such as the gradient of a sum: no order in memory
    of_linear = torch.autograd.grad(linear(x, weight), (x, weight), upstream)
    of_product = torch.autograd.grad(F.linear(x, weight), (x, weight), upstream)
    assert all(gap(a, b) <= 2e-6 for a, b in zip(of_linear, of_product, strict=True))
    assert as_convolution == [3000, 3000]


def test_only_where_it_gains(as_convolution: list[int]) -> None:
    """Few rows, little input, other precisions and mixed ones are products, as ever."""
    layer = Linear(384, 8)
    with torch.no_grad():
        for x in (torch.randn(39, 384), torch.randn(2, 1, 384), torch.randn(0, 384)):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert linear(torch.randn(200, 100), torch.randn(3, 100)).shape == (200, 3)
        assert linear(torch.randn(200, 384).double(), layer.weight.double()).dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.randn(200, 384)).dtype == torch.bfloat16
        assert as_convolution == []
        layer(torch.randn(40, 512)[:, :384])
        assert as_convolution == []  # few numbers
        layer(torch.randn(64, 384))
    assert as_convolution == [64]


def test_a_layer_is_an_ordinary_one() -> None:
    layer = Linear(4, 3, bias=False)
    assert isinstance(layer, torch.nn.Linear) and set(layer.state_dict()) == {"weight"} and layer.bias is None
