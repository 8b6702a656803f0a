from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.layers.windows import (
    MASKED,
    ContinuousBias,
    RelativeBias,
    Tokens,
    log_offsets,
    merged,
    offsets,
    plain_layout,
    resize_bias_table,
    window_attention,
    window_layout,
)

CPU = torch.device("cpu")
# (grid, window, shift)
CASES = [
    ((8, 8), 4, (0, 0)),
    ((8, 8), 4, (2, 2)),
    ((8, 4), 4, (2, 0)),
    ((9, 14), 4, (2, 2)),
    ((3, 10), 4, (0, 2)),
    ((3, 2), 4, (0, 0)),
    ((14, 7), 7, (3, 0)),
    ((5, 5), 1, (0, 0)),
]
cases = pytest.mark.parametrize(("grid", "window", "shift"), CASES, ids=str)
ways = pytest.mark.parametrize("pad_first", [True, False])


def cut_by_rolling(x: Tensor, window: int, shift: tuple[int, int], pad_first: bool) -> Tensor:
    """The usual way, (B, h, w, C) -> (B, nW, N, C)."""
    B, H, W, C = x.shape
    pad = (0, 0, 0, -W % window, 0, -H % window)
    back = (-shift[0], -shift[1])
    x = F.pad(x, pad).roll(back, (1, 2)) if pad_first else F.pad(x.roll(back, (1, 2)), pad)
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)  # (B, nH, nW, window, window, C)
    return x.reshape(B, -1, window**2, C)


def in_windows(tokens: Tokens) -> Tensor:
    """(B, nW, N, C), in whatever order of windows."""
    layout = tokens.layout
    return tokens.x.view(-1, layout.batch, layout.length, tokens.x.shape[-1]).transpose(0, 1)


def plain(grid: tuple[int, int], batch: int = 3, width: int = 2) -> Tokens:
    """Numbered tokens; a token is never zero."""
    x = torch.arange(1.0, 1 + batch * grid[0] * grid[1] * width).view(-1, width).requires_grad_()
    return Tokens(x, plain_layout(batch, grid, CPU))


@cases
@ways
def test_windows_are_those_of_rolling_and_padding(grid, window, shift, pad_first):
    tokens = plain(grid)
    layout = window_layout(3, grid, window, shift, pad_first=pad_first, device=CPU)
    found = in_windows(tokens.arranged(layout))
    expected = cut_by_rolling(tokens.rows(), window, shift, pad_first)
    assert found.shape == expected.shape
    for picture in range(3):  # as sets of windows: their order is free
        assert sorted(found[picture].tolist()) == sorted(expected[picture].tolist())
    assert (layout.padding is None) == (grid[0] % window == 0 and grid[1] % window == 0)


@cases
@ways
def test_there_and_back(grid, window, shift, pad_first):
    tokens = plain(grid)
    layout = window_layout(3, grid, window, shift, pad_first=pad_first, device=CPU)
    moved = tokens.arranged(layout)
    assert torch.equal(moved.arranged(tokens.layout).x, tokens.x)
    assert torch.equal(moved.rows(), tokens.rows())
    assert torch.allclose(moved.mean(), tokens.rows().mean(dim=(1, 2)))
    assert tokens.arranged(tokens.layout) is tokens
    weights = torch.randn_like(moved.x)
    (gradient,) = torch.autograd.grad((moved.x * weights).sum(), tokens.x)
    assert torch.equal(gradient, Tokens(weights, layout).arranged(tokens.layout).x)


@cases
@ways
def test_masks_part_what_the_shift_brought_together(grid, window, shift, pad_first):
    """Two tokens of a window see each other if neither axis wrapped around between them: the slices of the paper."""
    layout = window_layout(2, grid, window, shift, pad_first=pad_first, device=CPU)
    padded = [math.ceil(n / window) * window for n in grid]
    zone = torch.zeros(1, *padded, 1)
    number = 0
    for rows in _slices(padded[0], window, shift[0]):
        for columns in _slices(padded[1], window, shift[1]):
            zone[:, rows, columns] = number = number + 1
    zones = cut_by_rolling(zone, window, (0, 0), True)[0, :, :, 0]  # (nW, N)
    apart = (zones[:, :, None] != zones[:, None]) * MASKED
    masks = [layout.mask(i, i + 1) for i in range(layout.windows)]
    found = torch.stack([torch.zeros(window**2, window**2) if mask is None else mask[0] for mask in masks])
    per_picture = found.view(-1, 2, window**2, window**2)
    assert torch.equal(per_picture[:, 0], per_picture[:, 1])
    assert sorted(per_picture[:, 0].tolist()) == sorted(apart.tolist())
    whole = layout.mask(0, layout.windows)
    assert torch.equal(torch.zeros_like(found) if whole is None else whole.expand_as(found), found)
    assert layout.kinds()[0][0] == 0 and layout.kinds()[-1][1] == layout.windows


def _slices(size: int, window: int, shift: int) -> list[slice]:
    if not shift:
        return [slice(0, size)]
    return [slice(0, size - window), slice(size - window, size - shift), slice(size - shift, size)]


@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (1, 5), (4, 12)], ids=str)
@pytest.mark.parametrize("window", [None, 2, 4])
def test_merging_takes_neighbours_down_the_columns_first(grid, window):
    half = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    tokens = plain(grid)
    start = tokens if window is None else tokens.arranged(window_layout(3, grid, 4, (2, 2), pad_first=True, device=CPU))
    if start.layout.padding is not None:
        start = tokens
    goal = plain_layout(3, half, CPU)
    if window is not None and half[0] % window == half[1] % window == 0:
        goal = window_layout(3, half, window, (0, 0), pad_first=True, device=CPU)
    out = Tokens(merged(start, goal), goal)
    x = F.pad(tokens.rows(), (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
    expected = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    assert torch.equal(out.rows(), expected)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((out.rows() * weights).sum(), tokens.x, retain_graph=True)[0]
    assert torch.equal(found, torch.autograd.grad((expected * weights).sum(), tokens.x)[0])


def reference(qkv: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    M, N, _ = qkv.shape
    q, k, v = qkv.view(M, N, 3, len(bias), -1).permute(2, 0, 3, 1, 4)
    scores = scale * q @ k.transpose(-2, -1) + bias
    scores = scores if mask is None else scores + mask[:, None]
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(M, N, -1)


@pytest.mark.parametrize("masks", [None, 1, 5])
@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_attention_in_windows(masks, scale):
    torch.manual_seed(0)
    qkv = torch.randn(5, 9, 3 * 3 * 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 9, 9, dtype=torch.float64, requires_grad=True)
    mask = None if masks is None else MASKED * (torch.rand(masks, 9, 9) < 0.3) * (1 - torch.eye(9))
    expected = reference(qkv, bias, mask, scale)
    found = window_attention(qkv, bias, mask, scale)
    assert (found - expected).abs().max() <= 1e-13  # measured 8.9e-16
    with torch.no_grad():
        assert (window_attention(qkv, bias, mask, scale) - expected).abs().max() <= 1e-13  # measured 1.1e-15
    weights = torch.randn_like(expected)
    one, other = (torch.autograd.grad((out * weights).sum(), (qkv, bias)) for out in (found, expected))
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-12  # measured 1.8e-14


def test_attention_with_a_frozen_bias_or_frozen_tokens():
    torch.manual_seed(0)
    for learns in (0, 1):
        inputs = [torch.randn(2, 4, 12), torch.randn(2, 4, 4)]
        inputs[learns].requires_grad_()
        found = window_attention(inputs[0], inputs[1], None, 0.7)
        expected = reference(inputs[0], inputs[1], None, 0.7)
        gradients = [torch.autograd.grad(out.square().sum(), inputs[learns])[0] for out in (found, expected)]
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-4  # measured 2.9e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_the_precision_of_its_input(dtype):
    """A float32 bias, as under autocast."""
    torch.manual_seed(0)
    qkv, bias = torch.randn(3, 16, 24).to(dtype).requires_grad_(), torch.randn(2, 16, 16, requires_grad=True)
    out = window_attention(qkv, bias, None, 0.5)
    out.float().sum().backward()
    assert out.dtype == dtype and bias.grad is not None and bias.grad.dtype == torch.float32
    assert (out - reference(qkv.float(), bias, None, 0.5)).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-2)


def test_offsets_are_numbered_as_in_saved_tables():
    index = offsets(3, CPU)
    table = torch.arange(25).view(5, 5)  # by offset down and right, from -2
    for i in range(9):
        for j in range(9):
            down, right = i // 3 - j // 3, i % 3 - j % 3
            assert index[i, j] == table[down + 2, right + 2]


def test_log_offsets():
    found = log_offsets(3, 4, CPU).view(5, 5, 2)
    for i, j in [(0, 0), (4, 1), (2, 3)]:
        for axis, step in enumerate((i - 2, j - 2)):
            assert found[i, j, axis].item() == pytest.approx(
                math.copysign(math.log2(1 + 8 * abs(step) / 4) / 3, step) if step else 0.0, abs=1e-6
            )


@pytest.mark.parametrize("kind", [RelativeBias, ContinuousBias])
def test_biases_depend_on_the_offset_alone_and_learn(kind):
    torch.manual_seed(0)
    module = kind(4, 2)
    bias = module()
    assert bias.shape == (2, 16, 16) and bias.is_contiguous()
    assert torch.equal(bias[:, 0, 5], bias[:, 5, 10]) and torch.equal(bias[:, 0, 5], bias[:, 10, 15])
    assert not torch.equal(bias[:, 0, 5], bias[:, 5, 0])
    bias.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_continuous_bias_of_a_larger_window_contains_the_smaller_one():
    """Measured in units of the smaller window, an offset has the same bias in both."""
    torch.manual_seed(0)
    small, large = ContinuousBias(3, 2), ContinuousBias(5, 2, trained_window=3)
    large.load_state_dict(small.state_dict())
    inner = [0, 1, 2, 5, 6, 7, 10, 11, 12]  # the upper left 3x3 of 5x5
    assert (large()[:, inner][:, :, inner] - small()).abs().max() <= 1e-6  # measured 0
    assert (ContinuousBias(5, 2, trained_window=5)()[:, 0] != large()[:, 0]).any()


def test_a_table_is_resized():
    table = torch.randn(49, 2)
    assert resize_bias_table(table, 4) is table
    flat = resize_bias_table(torch.full((49, 2), 3.0), 6)
    assert flat.shape == (121, 2) and (flat - 3).abs().max() <= 1e-5
    ramp = torch.arange(-6.0, 7)[:, None].expand(13, 13).reshape(-1, 1)
    smaller = resize_bias_table(ramp, 4).view(7, 7)
    assert (smaller[1:] > smaller[:-1]).all() and smaller[3].abs().max() <= 1e-5  # no offset stays no offset
    assert resize_bias_table(table.bfloat16(), 6).dtype == torch.bfloat16
    for wrong in (48, 36):
        with pytest.raises(ValueError, match="no square window"):
            resize_bias_table(torch.randn(wrong, 2), 5)


def test_orders_made_without_gradients_serve_training():
    """They are kept for later, so they must not be inference tensors."""
    grid = (6, 10)  # of no other test
    with torch.inference_mode():
        layout = window_layout(1, grid, 2, (1, 1), pad_first=True, device=CPU)
        layout.mask(0, layout.windows)
        plain(grid, batch=1).arranged(layout)
    assert window_layout(1, grid, 2, (1, 1), pad_first=True, device=CPU) is layout
    tokens = plain(grid, batch=1)
    tokens.arranged(layout).x.square().sum().backward()
    assert tokens.x.grad is not None and torch.equal(tokens.x.grad, 2 * tokens.x)
    mask = layout.mask(0, layout.windows)
    assert mask is not None and not mask.is_inference()
