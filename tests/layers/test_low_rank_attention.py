from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.layers.attention import MultiHeadAttention, attention
from saccade.layers.low_rank_attention import (
    LinformerAttention,
    NystromAttention,
    SpatialReductionAttention,
    nystrom,
    pseudo_inverse,
    resize_projection,
    segment_means,
)
from saccade.layers.mixing import Layout

LAYOUT = Layout((4, 6), prefix=2)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_linformer_written_out():
    torch.manual_seed(0)
    layer = LinformerAttention(24, 3, layout=LAYOUT, rank=5).double()
    q, k, v = inputs(2, 3, 26, 8)
    expected = torch.empty_like(v)
    for b in range(2):
        for h in range(3):
            keys = torch.cat((k[b, h, :2], layer.project_keys @ k[b, h, 2:]))
            values = torch.cat((v[b, h, :2], layer.project_values @ v[b, h, 2:]))
            expected[b, h] = softmax_attention(q[b, h], keys, values)
    assert gap(layer.mix(q, k, v, LAYOUT), expected) <= 1e-12  # measured 4.4e-16


def test_linformer_of_full_rank_is_exact():
    layer = LinformerAttention(24, 3, layout=LAYOUT, rank=24).double()
    with torch.no_grad():
        layer.project_keys.copy_(torch.eye(24))
        layer.project_values.copy_(torch.eye(24))
    q, k, v = inputs(2, 3, 26, 8)
    assert gap(layer.mix(q, k, v, LAYOUT), attention(q, k, v)) <= 1e-12  # measured 0


def test_linformer_on_another_grid():
    """A projection that takes means over the picture, or over its left half, does so on any grid."""
    torch.manual_seed(0)
    mean = torch.full((1, 24), 1 / 24)
    assert gap(resize_projection(mean, (4, 6), (8, 10)), torch.full((1, 80), 1 / 80)) <= 1e-7  # measured 1.9e-9
    half = torch.zeros(1, 4, 6)
    half[:, :, :3] = 1 / 12
    wide = resize_projection(half.flatten(1), (4, 6), (8, 12)).unflatten(1, (8, 12))
    assert wide[0, :, :3].mean().item() == pytest.approx(1 / 48, rel=0.1)
    assert wide[0, :, 9:].abs().max() <= 1e-3
    with pytest.raises(ValueError, match="must know the layout"):
        LinformerAttention(24, 3)
    layer = LinformerAttention(24, 3, layout=LAYOUT, rank=5)
    for grid in ((4, 6), (7, 3), (1, 1)):
        layout = Layout(grid, 2)
        assert layer(torch.randn(2, layout.tokens, 24), layout=layout).shape == (2, layout.tokens, 24)


def test_nystrom_written_out():
    q, k, v = inputs(2, 3, 26, 8)
    expected = torch.empty_like(v)
    runs = [[0], [1], *(list(range(start, stop)) for start, stop in [(2, 7), (7, 12), (12, 17), (17, 22), (22, 26)])]
    for b in range(2):
        for h in range(3):
            q_marks, k_marks = (torch.stack([x[b, h, run].mean(0) for run in runs]) for x in (q, k))
            kernel = (q_marks @ k_marks.T / 8**0.5).softmax(-1)
            left = (q[b, h] @ k_marks.T / 8**0.5).softmax(-1)
            right = (q_marks @ k[b, h].T / 8**0.5).softmax(-1)
            expected[b, h] = left @ torch.linalg.pinv(kernel) @ right @ v[b, h]
    got = nystrom(q, k, v, 5, prefix=2, iterations=20)
    assert gap(got, expected) <= 1e-9  # measured 4.7e-13
    layer = NystromAttention(24, 3, landmarks=5, iterations=20)
    assert torch.equal(layer.mix(q, k, v, LAYOUT), got)


def test_nystrom_with_all_tokens_as_landmarks_is_exact():
    q, k, v = inputs(2, 3, 26, 8)
    exact = attention(q, k, v)
    assert gap(nystrom(q, k, v, 24, prefix=2, iterations=30), exact) <= 1e-8  # measured 6.6e-14
    few = [gap(nystrom(q, k, v, 24, prefix=2, iterations=steps), exact) for steps in (2, 6, 12, 20)]
    assert all(later < earlier for earlier, later in pairwise(few))
    assert torch.equal(NystromAttention(24, 3, landmarks=24).mix(q, k, v, LAYOUT), exact)


def test_pseudo_inverse():
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64).softmax(-1)
    assert gap(pseudo_inverse(square, 30), torch.linalg.pinv(square)) <= 1e-8  # measured 7.4e-13
    left, right = (torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    flat = left * torch.tensor([1.0, 0.7, 0.5], dtype=torch.float64) @ right.T  # of rank 3
    assert gap(pseudo_inverse(flat, 8), torch.linalg.pinv(flat)) <= 1e-9  # measured 1.3e-13


def test_segment_means():
    x = torch.arange(10.0)[None, None, :, None]
    assert segment_means(x, 3, prefix=2).flatten().tolist() == [0.0, 1.0, 3.0, 6.0, 8.5]
    assert segment_means(x, 5).flatten().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert torch.equal(segment_means(x, 8, prefix=2), x)


@pytest.mark.parametrize(("grid", "ratio"), [((4, 6), 2), ((5, 7), 3), ((2, 3), 4)], ids=str)
def test_spatial_reduction_written_out(grid, ratio):
    torch.manual_seed(0)
    layer = SpatialReductionAttention(24, 3, ratio=ratio).double()
    layout = Layout(grid, 2)
    x = torch.randn(2, layout.tokens, 24, dtype=torch.float64)
    q_weight, k_weight, v_weight = layer.qkv.weight.chunk(3)
    q_bias, k_bias, v_bias = layer.qkv.bias.chunk(3)
    h, w = grid
    picture = torch.zeros(2, h + ratio, w + ratio, 24, dtype=torch.float64)
    picture[:, :h, :w] = x[:, 2:].unflatten(1, grid)
    reduced = []
    assert layer.reduce.bias is not None
    for top in range(0, h, ratio):
        for left in range(0, w, ratio):
            square = picture[:, top : top + ratio, left : left + ratio].permute(0, 3, 1, 2)  # (B, C, ratio, ratio)
            token = (square[:, None] * layer.reduce.weight).sum((2, 3, 4)) + layer.reduce.bias
            reduced.append(F.layer_norm(token, (24,), layer.norm.weight, layer.norm.bias))
    source = torch.cat((x[:, :2], torch.stack(reduced, 1)), 1)
    q, k, v = x @ q_weight.T + q_bias, source @ k_weight.T + k_bias, source @ v_weight.T + v_bias
    heads = [softmax_attention(*(t[..., i : i + 8] for t in (q, k, v))) for i in (0, 8, 16)]
    expected = layer.out(torch.cat(heads, -1))
    assert gap(layer(x, layout=layout), expected) <= 1e-12  # measured 4.4e-16


def test_spatial_reduction_by_one_with_the_identity_is_exact():
    layer = SpatialReductionAttention(24, 3, ratio=1).double()
    assert layer.reduce.bias is not None
    with torch.no_grad():
        layer.reduce.weight.copy_(torch.eye(24)[..., None, None])
        layer.reduce.bias.zero_()
    full = MultiHeadAttention(24, 3).double()
    full.load_state_dict({key: value for key, value in layer.state_dict().items() if key.startswith(("qkv", "out"))})
    x = F.layer_norm(torch.randn(2, 26, 24, dtype=torch.float64), (24,), eps=0)  # which the norm leaves as they are
    assert gap(layer(x, layout=LAYOUT), full(x)) <= 1e-4  # measured 1.4e-6; the norm's epsilon is 1e-5
