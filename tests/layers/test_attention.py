from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.layers.attention import MultiHeadAttention, attention, attention_with_weights
from saccade.layers.positions import rotary_2d

# Measured worst case of the tests that use it, outputs and gradients: 2.4e-7 in float32, 6.7e-16 in float64.
PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
MASKS = ["none", "bias", "bias_per_head", "boolean", "causal", "causal_bias", "causal_boolean"]


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """For gradients, which grow with what they are summed over: of the largest, where that is over one."""
    return gap(a, b) / max(1.0, b.abs().max().item())


def mask(kind: str, B: int, H: int, N: int, M: int, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
    """What goes into `bias` and `causal`."""
    bias = None
    if kind.endswith("bias"):
        bias = torch.randn(N, M, dtype=dtype)
    elif kind == "bias_per_head":
        bias = torch.randn(B, H, N, M, dtype=dtype)
    elif kind.endswith("boolean"):
        bias = torch.rand(B, 1, N, M) > 0.4
        bias[..., 0] = True  # something is left for every query
    return bias, kind.startswith("causal")


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("N", "M"), [(12, 12), (5, 9), (9, 5)], ids=str)
def test_explicit_equals_fused(kind, N, M, dtype, tolerance):
    torch.manual_seed(0)
    B, H, D = 2, 3, 8
    q, k, v = (torch.randn(B, H, n, D, dtype=dtype).div(2).requires_grad_() for n in (N, M, M))
    bias, causal = mask(kind, B, H, N, M, dtype)
    learned = [bias.requires_grad_()] if bias is not None and bias.is_floating_point() else []
    upstream = torch.randn(B, H, N, D, dtype=dtype)

    fused = attention(q, k, v, bias=bias, causal=causal)
    explicit, weights = attention_with_weights(q, k, v, bias=bias, causal=causal)
    assert gap(fused, explicit) <= tolerance
    assert gap(weights.sum(-1), torch.ones(B, H, N, dtype=dtype)) <= tolerance
    assert weights.min() >= 0
    inputs = [q, k, v, *learned]
    of_fused = torch.autograd.grad(fused, inputs, upstream)
    of_explicit = torch.autograd.grad(explicit, inputs, upstream)
    for a, b in zip(of_fused, of_explicit, strict=True):
        assert b.abs().max() > 0 and relative(a, b) <= tolerance


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    "kind", [*MASKS, "of_keys", "boolean_of_keys", "nothing", "nothing_of_keys", "infinite_of_keys"]
)
@pytest.mark.parametrize(("N", "M"), [(12, 12), (5, 9)], ids=str)
def test_half_precision_is_the_same_within_its_rounding(N, M, kind, gradient):
    """Where gradients are wanted, processors take plain products for bfloat16 if they can, and the fused kernel
    elsewhere."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16().requires_grad_(gradient) for n in (N, M, M))
    exact = [x.detach().double().requires_grad_(gradient) for x in (q, k, v)]
    bias, causal = mask(kind, 2, 3, N, M, torch.bfloat16)
    if "of_keys" in kind or "nothing" in kind:
        bias = torch.rand(2, 1, 1, M) > 0.4 if kind != "of_keys" else torch.randn(2, 1, 1, M).bfloat16()
        if "nothing" in kind:  # for the second sample, or a query of it, to see
            bias = (bias if "of_keys" in kind else bias.repeat(1, 1, N, 1)) | (torch.arange(M) == 0)
            bias[1, :, -1:] = False
        if kind == "infinite_of_keys":
            bias[1] = False
            bias = torch.zeros(2, 1, 1, M).masked_fill(~bias, -torch.inf).bfloat16()
    low = None if bias is None or bias.dtype == torch.bool else bias.double()
    got = attention(q, k, v, bias=bias, causal=causal)
    expected = attention_with_weights(*exact, bias=bias if low is None else low, causal=causal)[0]
    assert got.dtype == torch.bfloat16 and got.shape == expected.shape
    assert gap(got.double(), expected) <= 0.03  # a bfloat16 near 1 is 0.008 from the next; measured 5.8e-3
    if gradient:
        upstream = torch.randn(2, 3, N, 8).bfloat16()
        of_got = torch.autograd.grad(got, (q, k, v), upstream)
        of_expected = torch.autograd.grad(expected, exact, upstream.double())
        for a, b in zip(of_got, of_expected, strict=True):
            assert relative(a.double(), b) <= 0.03  # measured 5.9e-3


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(("B", "M"), [(0, 4), (2, 0)])
def test_half_precision_of_nothing(B, M, gradient):
    """Such as a batch of a process that has no share of it."""
    q, k, v = (torch.randn(B, 3, n, 8).bfloat16().requires_grad_(gradient) for n in (4, M, M))
    out = attention(q, k, v)
    assert out.shape == (B, 3, 4, 8) and (out == 0).all()
    heads = torch.rand(3, 1, 1) > 0.5  # a mask that is of no keys
    heads[0] = True
    q = torch.randn(2, 3, 4, 8).bfloat16().requires_grad_(gradient)
    assert gap(attention(q, q, q, bias=heads).float(), attention(*3 * [q.float()], bias=heads)) <= 0.03


@pytest.mark.parametrize("kind", ["boolean", "causal_boolean", "causal_bias"])
def test_masks_keep_out_what_they_should(kind):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
    bias, causal = mask(kind, 2, 3, 6, 6, torch.float32)
    weights = attention_with_weights(q, k, v, bias=bias, causal=causal)[1]
    keep = torch.ones(2, 3, 6, 6, dtype=torch.bool)
    if causal:
        keep = keep.tril()
    if bias is not None and bias.dtype == torch.bool:
        keep = keep & bias
    assert (weights[~keep] == 0).all() and (weights[keep] > 0).all()


def test_a_query_that_may_see_nothing_gets_zeros_and_no_nan():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[2] = False
    explicit, weights = attention_with_weights(q, k, v, bias=keep)
    fused = attention(q, k, v, bias=keep)
    assert (explicit[:, :, 2] == 0).all() and (weights[:, :, 2] == 0).all()
    assert gap(fused, explicit) <= 1e-6  # measured 1.8e-7
    for output in (fused, explicit):
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (q, k, v)))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("form", ["self", "cross", "rotary", "causal"])
def test_module_with_weights_equals_forward(form, dtype, tolerance):
    torch.manual_seed(0)
    module = MultiHeadAttention(24, 3).to(dtype)
    x = torch.randn(2, 7, 24, dtype=dtype, requires_grad=True)
    context = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True) if form == "cross" else None
    rotary = rotary_2d((2, 3), 8, prefix=1) if form == "rotary" else None
    upstream = torch.randn(2, 7, 24, dtype=dtype)

    fused = module(x, context, rotary=rotary, causal=form == "causal")
    explicit, weights = module.with_weights(x, context, rotary=rotary, causal=form == "causal")
    assert weights.shape == (2, 3, 7, 7 if context is None else 5)
    assert gap(fused, explicit) <= tolerance
    inputs = [*module.parameters(), x, *([] if context is None else [context])]
    of_fused = torch.autograd.grad(fused, inputs, upstream)
    of_explicit = torch.autograd.grad(explicit, inputs, upstream)
    for a, b in zip(of_fused, of_explicit, strict=True):
        assert relative(a, b) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("cross", [False, True])
def test_equals_torch(cross, dtype, tolerance):
    torch.manual_seed(0)
    ours = MultiHeadAttention(24, 3).to(dtype)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, dtype=dtype)
    assert theirs.in_proj_bias is not None
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 7, 24, dtype=dtype)
    context = torch.randn(2, 5, 24, dtype=dtype) if cross else x
    upstream = torch.randn(2, 7, 24, dtype=dtype)

    got, weights = ours.with_weights(x, context if cross else None)
    fused = ours(x, context if cross else None)
    expected, their_weights = theirs(x, context, context, average_attn_weights=False)
    assert gap(got, expected) <= tolerance and gap(fused, expected) <= tolerance
    assert gap(weights, their_weights) <= tolerance
    of_ours = torch.autograd.grad(fused, [ours.qkv.weight, ours.qkv.bias, ours.out.weight, ours.out.bias], upstream)
    of_theirs = torch.autograd.grad(
        expected, [theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj.weight, theirs.out_proj.bias], upstream
    )
    for a, b in zip(of_ours, of_theirs, strict=True):
        assert relative(a, b) <= tolerance


def test_without_bias_and_with_wrong_heads():
    x = torch.randn(2, 5, 24)
    module = MultiHeadAttention(24, 3, qkv_bias=False)
    assert gap(module(x), module(x, x)) <= 1e-6  # measured 0
    with pytest.raises(ValueError, match="24 is not a multiple of heads 5"):
        MultiHeadAttention(24, 5)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    module = MultiHeadAttention(24, 3, dropout=0.5)
    x = torch.randn(2, 5, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert gap(module(x), module.with_weights(x)[0]) <= 1e-6  # measured 7.5e-8


def test_permutation_equivariance_without_positions_and_none_with():
    torch.manual_seed(0)
    module = MultiHeadAttention(24, 3)
    x, positions = torch.randn(2, 6, 24), torch.randn(6, 24)
    rotary = rotary_2d((2, 3), 8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert gap(module(x[:, order]), module(x)[:, order]) <= 1e-6  # measured 6.0e-8
    assert gap(module(x[:, order] + positions), module(x + positions)[:, order]) > 0.05
    assert gap(module(x[:, order], rotary=rotary), module(x, rotary=rotary)[:, order]) > 0.01


@pytest.mark.parametrize("cross", [False, True])
def test_without_key_bias_is_a_key_bias_of_zero(cross):
    torch.manual_seed(0)
    whole, part = MultiHeadAttention(24, 3), MultiHeadAttention(24, 3, key_bias=False)
    assert part.query_value_bias is not None and part.qkv.bias is None
    nn.init.normal_(part.query_value_bias)
    assert whole.qkv.bias is not None
    with torch.no_grad():
        q, v = part.query_value_bias.chunk(2)
        state = part.state_dict() | {"qkv.bias": torch.cat((q, torch.zeros(24), v))}
        del state["query_value_bias"]
        whole.load_state_dict(state)
    x, context = torch.randn(2, 7, 24), torch.randn(2, 5, 24) if cross else None
    tables = None if cross else rotary_2d((2, 3), 8, prefix=1)
    assert gap(part(x, context, rotary=tables), whole(x, context, rotary=tables)) <= 1e-6  # measured 0
    part(x, context).sum().backward()
    # a shift of all values shifts the sum alike; where rotary positions are absent, so does one of all queries nothing
    assert part.query_value_bias.grad is not None and part.query_value_bias.grad[24:].abs().min() > 1e-3
    none = MultiHeadAttention(24, 3, qkv_bias=False, key_bias=False)
    assert none.bias() is None and none.query_value_bias is None
