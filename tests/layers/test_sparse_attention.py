from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.layers.attention import attention, attention_with_weights
from saccade.layers.mixing import Layout
from saccade.layers.sparse_attention import LSHAttention, WindowAttention, even_bands, lsh


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("grid", "window"), [((6, 8), 4), ((6, 8), 2), ((5, 7), 3), ((1, 10), (1, 4))], ids=str)
def test_windows_are_full_attention_under_a_mask(grid, window, prefix):
    layout = Layout(grid, prefix)
    q, k, v = inputs(2, 3, layout.tokens, 8)
    sides = (window, window) if isinstance(window, int) else window
    of_row, of_column = (
        torch.tensor([i for i, run in enumerate(torch.arange(n).tensor_split(-(-n // side))) for _ in run])
        for n, side in zip(grid, sides, strict=True)
    )
    window_of = (of_row[:, None] * 100 + of_column).flatten()
    keep = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    keep[prefix:, prefix:] = window_of[:, None] == window_of
    expected = attention_with_weights(q, k, v, bias=keep)[0]
    assert gap(WindowAttention(24, 3, window=window).mix(q, k, v, layout), expected) <= 1e-12  # measured 1.3e-15


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_window_over_everything_is_exact(prefix):
    layout = Layout((5, 7), prefix)
    q, k, v = inputs(2, 3, layout.tokens, 8)
    assert gap(WindowAttention(24, 3, window=7).mix(q, k, v, layout), attention(q, k, v)) <= 1e-12  # measured 5.6e-16


def test_bands():
    assert even_bands(14, 7) == [(0, 7, 2)]
    assert even_bands(16, 7) == [(0, 6, 1), (6, 5, 2)]
    assert even_bands(3, 7) == [(0, 3, 1)]
    for size in range(1, 40):
        for window in range(1, 12):
            bands = even_bands(size, window)
            assert sum(length * count for _, length, count in bands) == size
            assert max(length for _, length, _ in bands) <= window
            assert [start for start, _, _ in bands] == [0, *(length * count for _, length, count in bands[:-1])]


def test_windows_take_no_other_queries_than_the_prefix():
    with pytest.raises(ValueError, match="only be the prefix tokens"):
        WindowAttention(24, 3)(torch.randn(1, 4, 24), torch.randn(1, 36, 24), layout=Layout((5, 7), 1))


def slow_lsh(layer: LSHAttention, q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """A query at a time: the keys of all rounds with the number of times that each is met."""
    B, H, N, D = q.shape
    patches, c = N - prefix, layer.chunk
    chunks = -(-patches // c)
    hashes = lsh(q[:, :, prefix:], chunks, layer.rounds, layer.seed)
    out = torch.empty_like(v)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                met = torch.ones(N) if i < prefix else torch.zeros(N)
                if i >= prefix:
                    met[:prefix] = layer.rounds
                    for hash_of in hashes[b, h].tolist():
                        order = sorted(range(patches), key=lambda j: (hash_of[j], j))
                        chunk = order.index(i - prefix) // c
                        for near in {chunk, (chunk - 1) % chunks}:
                            for j in order[near * c : (near + 1) * c]:
                                met[prefix + j] += 1
                scores = q[b, h, i] @ k[b, h].T / D**0.5
                scores[i] -= 5e4
                weights = (scores - scores[met > 0].max()).exp() * met.double()
                out[b, h, i] = weights @ v[b, h] / weights.sum()
    return out


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("count", "chunk"), [(24, 8), (21, 8), (9, 4), (20, 10)], ids=str)
def test_lsh_written_out(count, chunk, prefix):
    layer = LSHAttention(24, 3, chunk=chunk, rounds=2, seed=5)
    layout = Layout((1, count), prefix)
    q, _, v = inputs(2, 3, layout.tokens, 8)
    q = q * 3
    k = q / q.norm(dim=-1, keepdim=True)
    assert gap(layer.mix(q, k, v, layout), slow_lsh(layer, q, k, v, prefix)) <= 1e-12  # measured 1.1e-15


@pytest.mark.parametrize("prefix", [0, 2])
def test_lsh_in_one_chunk_is_exact_with_shared_queries_and_keys(prefix):
    layout = Layout((5, 6), prefix)
    layer = LSHAttention(24, 3, chunk=30).double()
    x = torch.randn(2, layout.tokens, 24, dtype=torch.float64)
    q, k, v = layer.project(x, None, None)
    assert gap(k.norm(dim=-1), torch.ones_like(k[..., 0])) <= 1e-12
    not_itself = torch.eye(layout.tokens, dtype=torch.float64) * -5e4
    expected = layer.out(attention_with_weights(q, k, v, bias=not_itself)[0].transpose(1, 2).flatten(2))
    assert gap(layer(x, layout=layout), expected) <= 1e-12  # measured 1.7e-16


def test_lsh_is_decided_by_its_seed():
    torch.manual_seed(0)
    layer, layout = LSHAttention(24, 3, chunk=8), Layout((8, 8))
    x = torch.randn(2, 64, 24)
    first = layer(x, layout=layout)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x, layout=layout))
    layer.seed = 1
    assert gap(first, layer(x, layout=layout)) > 1e-3


@pytest.mark.parametrize(("buckets", "below"), [(2, 2), (5, 8), (16, 16), (100, 128), (1024, 1024)])
def test_hashes(buckets, below):
    x = inputs(1, 2, 512, 16)[0]
    hashes = lsh(x, buckets, 3, seed=0)
    assert hashes.shape == (1, 2, 3, 512) and hashes.min() >= 0 and hashes.max() < below
    assert len(hashes.unique()) > min(below, 512) * 0.7
    assert torch.equal(hashes, lsh(x * 7, buckets, 3, seed=0))  # it is the direction that counts
    noise = inputs(1, 2, 512, 16)[1]
    near = (lsh(x + 0.02 * noise, buckets, 3, seed=0) == hashes).double().mean()
    far = (lsh(noise, buckets, 3, seed=0) == hashes).double().mean()
    assert near > 0.8 and far < 3 / below


def test_lsh_finds_what_is_near():
    """Clusters of tokens: what a token attends to is nearly what it attends to among all."""
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(16, 8, dtype=torch.float64), dim=-1) * 40
    q = (centres.repeat(16, 1) + torch.randn(256, 8, dtype=torch.float64))[None, None]  # (1, 1, 256, 8)
    k, v = q / q.norm(dim=-1, keepdim=True), torch.randn(1, 1, 256, 8, dtype=torch.float64)
    exact = attention_with_weights(q, k, v, bias=torch.eye(256, dtype=torch.float64) * -5e4)[0]
    layout = Layout((16, 16))
    errors = []
    for rounds in (1, 8):
        layer = LSHAttention(8, 1, chunk=32, rounds=rounds)
        errors.append((layer.mix(q, k, v, layout) - exact).square().mean().sqrt().item() / exact.std().item())
    assert errors[1] < errors[0] and errors[1] <= 0.5  # measured 1.08 and 0.40
