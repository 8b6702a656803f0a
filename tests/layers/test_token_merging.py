from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.attention import MultiHeadAttention, attention, attention_with_weights
from saccade.layers.positions import rotary_2d
from saccade.layers.token_merging import Merged, attention_by_size, match, merge_rows


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_merge(
    x: Tensor, sizes: list[float], groups: list[list[int]], metric: Tensor, count: int, prefix: int
) -> tuple[Tensor, list[float], list[list[int]]]:
    """One sample, token by token: what is left, its sizes, and the original tokens in each."""
    N = len(x)
    even = [i for i in range(prefix, N) if i % 2 == 0]
    odd = [i for i in range(prefix, N) if i % 2 == 1]
    count = min(count, len(even), len(odd)) if odd else 0
    count = min(count, (N - prefix) // 2)

    def cosine(i: int, j: int) -> float:
        return (metric[i] @ metric[j] / metric[i].norm() / metric[j].norm()).item()

    best = {i: max(odd, key=lambda j: cosine(i, j)) for i in even} if odd else {}
    gone = sorted(best, key=lambda i: cosine(i, best[i]), reverse=True)[:count]
    after = [*range(prefix), *(i for i in even if i not in gone), *odd]
    rows, new_sizes, new_groups = [], [], []
    for i in after:
        members = [i, *(j for j in gone if best[j] == i)]
        total = sum(sizes[j] for j in members)
        rows.append(sum(x[j] * (sizes[j] / total) for j in members))
        new_sizes.append(total)
        new_groups.append([g for j in members for g in groups[j]])
    return torch.stack(rows), new_sizes, new_groups


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [1, 4, 100])
@pytest.mark.parametrize("N", [6, 16, 19])
def test_equals_a_loop_over_tokens(N, count, prefix):
    """Over several steps, so that sizes and the way back are tested, too."""
    x = random(2, N, 5)
    merged, got = Merged.none_of(x), x
    slow = [(x[b], [1.0] * N, [[i] for i in range(N)]) for b in range(2)]
    for step in range(3):
        metric = random(2, N, 4, seed=step + 1)[:, : got.shape[1]]
        got, merged = merged.step(got, match(metric, count, prefix))
        slow = [slow_merge(*sample, metric[b], count, prefix) for b, sample in enumerate(slow)]
        assert gap(got, torch.stack([rows for rows, _, _ in slow])) <= 1e-12  # measured 0
        assert merged.sizes.tolist() == [sizes for _, sizes, _ in slow]
        assert (merged.sizes.sum(1) == N).all()
        for b, (_, _, groups) in enumerate(slow):
            for place, group in enumerate(groups):
                assert [i for i in range(N) if merged.origin[b, i] == place] == sorted(group)
                assert merged.anchor[b, place] == group[0]
    assert got.shape[1] < N or N - prefix < 2


def test_the_prefix_stays_as_it_is_and_in_front():
    x = torch.cat((random(2, 1, 5).expand(2, 12, 5), random(2, 4, 5, seed=1)), dim=1)  # twelve that are the same
    got, merged = Merged.none_of(x).step(x, match(x, 4, prefix=3))
    assert torch.equal(got[:, :3], x[:, :3])
    assert (merged.sizes[:, :3] == 1).all() and got.shape[1] == 12


def test_what_is_alike_is_merged():
    """Pairs of neighbours that are nearly the same: each pair becomes its mean."""
    base = random(2, 6, 8).repeat_interleave(2, dim=1)
    x = base + 1e-3 * random(2, 12, 8, seed=1)
    got, merged = Merged.none_of(x).step(x, match(x, 6))
    assert gap(got, x.unflatten(1, (6, 2)).mean(2)) <= 1e-12  # measured 0
    assert (merged.sizes == 2).all()


def test_none_merged_changes_nothing():
    x = random(2, 9, 5)
    start = Merged.none_of(x)
    matching = match(x, 0, prefix=1)
    got, merged = start.step(x, matching)
    assert got is x and merged is start and not merged.started
    assert torch.equal(matching.place(), torch.arange(9).expand(2, -1))
    one = Merged.none_of(x[:, :2])
    assert one.step(x[:, :2], match(x[:, :2], 5, prefix=1))[0].shape == (2, 2, 5)  # a patch alone has no partner
    q, k, v = (random(2, 3, 9, 4, seed=seed) for seed in range(3))
    assert gap(attention_by_size(q, k, v, start.sizes), attention(q, k, v)) <= 1e-15  # measured 0


def block(x: Tensor, attend: MultiHeadAttention, mlp: nn.Module, merged: Merged, count: int) -> tuple[Tensor, Merged]:
    """As in a ViT, without norms."""
    q, k, v = attend.project(x, None, None)
    x = x + attend.out(attention_by_size(q, k, v, merged.sizes).transpose(1, 2).flatten(2))
    x, merged = merged.step(x, match(k.mean(dim=1), count, prefix=1))
    return x + mlp(x), merged


def test_a_constant_picture_is_not_changed_by_merging():
    """Many equal tokens are one token of their number: attention by sizes gives what all of them would give."""
    torch.manual_seed(0)
    layers = [(MultiHeadAttention(12, 3).double(), nn.Linear(12, 12).double()) for _ in range(3)]
    x = torch.cat((random(2, 1, 12), random(2, 1, 12, seed=1).expand(2, 24, 12)), dim=1)
    whole, less = x, x
    nothing, merged = Merged.none_of(x), Merged.none_of(x)
    for attend, mlp in layers:
        whole, nothing = block(whole, attend, mlp, nothing, 0)
        less, merged = block(less, attend, mlp, merged, 7)
    assert less.shape[1] < 10 and merged.started
    assert gap(merged.unmerge(less), whole) <= 1e-12  # measured 1.3e-15
    q, k, v = layers[0][0].project(less, None, None)
    flat = attention(q, k, v)
    assert gap(flat, attention_by_size(q, k, v, merged.sizes)) > 1e-3  # without sizes it would have changed


def test_attention_by_size_is_attention_to_copies():
    q, k, v = (random(2, 3, 6, 4, seed=seed) for seed in range(3))
    sizes = torch.tensor([1, 3, 1, 2, 5, 1])
    copies = attention(q, k.repeat_interleave(sizes, dim=2), v.repeat_interleave(sizes, dim=2))
    assert gap(attention_by_size(q, k, v, sizes.double().expand(2, -1)), copies) <= 1e-12  # measured 7.8e-16


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_size_in_other_precisions(dtype, learns):
    q, k, v = (random(2, 3, 40, 8, seed=seed).to(dtype).requires_grad_(learns) for seed in range(3))
    sizes = torch.arange(1.0, 41.0).expand(2, -1)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    got = attention_by_size(q, k, v, sizes)
    expected = attention_with_weights(*exact, bias=sizes.double().log()[:, None, None])[0]
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-6  # measured 6.9e-3 and 1.2e-2; 4e-7
    assert got.dtype == dtype and gap(got.double(), expected) <= tolerance
    if not learns:
        return
    upstream = random(2, 3, 40, 8, seed=5)
    of_got = torch.autograd.grad(got, (q, k, v), upstream.to(dtype))
    of_expected = torch.autograd.grad(expected, exact, upstream)
    for a, b in zip(of_got, of_expected, strict=True):
        assert gap(a.double(), b) <= tolerance * max(1.0, b.abs().max().item())


def test_gradients():
    x = random(2, 11, 5).requires_grad_()
    matching = match(x, 4, prefix=1)
    merged = Merged.none_of(x)
    assert torch.autograd.gradcheck(lambda x: merged.step(x, matching)[0], (x,))
    half = merged.step(x.detach(), matching)[1]
    assert torch.autograd.gradcheck(half.unmerge, (random(2, 7, 5).requires_grad_(),))
    merged.step(x, matching)[0].sum().backward()
    assert x.grad is not None and (x.grad > 0).all()


def test_unmerge_gives_each_token_its_own():
    x = random(2, 11, 5)
    got, merged = Merged.none_of(x).step(x, match(x, 4, prefix=1))
    back = merged.unmerge(got)
    for b in range(2):
        for i in range(11):
            assert torch.equal(back[b, i], got[b, merged.origin[b, i]])
    alone = merged.sizes.gather(1, merged.origin) == 1
    assert alone.any() and gap(back[alone], x[alone]) == 0


def test_merging_many_rows_into_one():
    """All even tokens are nearest to the same odd one."""
    x = torch.eye(8, dtype=torch.float64)[None] * 0.01 + 1.0
    x[:, 1::2] *= torch.tensor([1.0, -1, -1, -1], dtype=torch.float64)[:, None]
    got, merged = Merged.none_of(x).step(x, match(x, 4))
    assert merged.sizes.tolist() == [[5, 1, 1, 1]]
    assert gap(got[0, 0], x[0, [0, 1, 2, 4, 6]].mean(0)) <= 1e-15  # measured 0


def test_weights_are_spread_to_original_tokens():
    x = random(2, 11, 12)
    torch.manual_seed(0)
    attend = MultiHeadAttention(12, 3).double()
    got, merged = Merged.none_of(x).step(x, match(x, 4, prefix=1))
    bias = merged.sizes.double().log()[:, None, None]
    mixed, weights = attend.with_weights(got, bias=bias)
    spread = merged.spread(weights)
    assert spread.shape == (2, 3, 11, 11) and gap(spread.sum(-1), torch.ones(2, 3, 11).double()) <= 1e-12
    expanded = attend.with_weights(merged.unmerge(got))[1]  # between copies, as attention by size means it
    assert gap(spread, expanded) <= 1e-12  # measured 5.6e-17


def test_rotary_follows_the_anchor():
    x = random(2, 10, 12)
    tables = rotary_2d((3, 3), 4, prefix=1)
    got, merged = Merged.none_of(x).step(x, match(x, 3, prefix=1))
    turned = merged.rotary(tables)
    assert turned[0].shape == turned[1].shape == (2, 1, 7, 4)
    for b in range(2):
        for place in range(7):
            original = int(merged.anchor[b, place])
            assert merged.origin[b, original] == place
            assert all(torch.equal(t[b, 0, place], table[original]) for t, table in zip(turned, tables, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_and_batch_mates(dtype):
    x = random(3, 30, 16).to(dtype)
    got, merged = Merged.none_of(x).step(x, match(x, 8, prefix=1))
    assert got.dtype == dtype and got.isfinite().all() and merged.sizes.dtype == torch.float32
    for b in range(3):
        alone = Merged.none_of(x[b : b + 1]).step(x[b : b + 1], match(x[b : b + 1], 8, prefix=1))
        assert torch.equal(alone[0][0], got[b]) and torch.equal(alone[1].origin[0], merged.origin[b])


def test_matching_needs_no_gradient_and_is_by_direction():
    x = random(2, 12, 6).requires_grad_()
    first, scaled = match(x, 3), match(x * torch.rand(2, 12, 1) * 9, 3)
    assert not first.stays.requires_grad
    assert torch.equal(first.place(), scaled.place())
    assert F.cosine_similarity(x[0, first.gone[0, 0]], x[0, 1::2]).max() >= 0.3


def test_merge_rows_is_a_weighted_sum():
    x, matching, share = random(1, 4, 2), match(random(1, 4, 3), 1), torch.tensor([[2.0, 3.0, 5.0, 7.0]])
    got = merge_rows(x, matching, share.gather(1, matching.stays), share.gather(1, matching.gone))
    expected = torch.zeros(1, 3, 2, dtype=torch.float64)
    for i, place in enumerate(matching.place()[0].tolist()):
        expected[0, place] += share[0, i] * x[0, i]
    assert matching.place()[0].unique().tolist() == [0, 1, 2]
    assert gap(got, expected) <= 1e-15  # measured 0
