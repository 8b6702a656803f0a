"""The block against PyTorch's own layers; positions, which those do not know, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.attention import MultiHeadAttention
from saccade.layers.feedforward import FeedForward, perceptron
from saccade.layers.positions import sinusoidal_2d_of_shares
from saccade.layers.transformer import TransformerBlock, xavier

PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)], ids=str)
NAMES = {
    "self_attention": "self_attn",
    "cross_attention": "multihead_attn",
    "mlp.up": "linear1",
    "mlp.down": "linear2",
    "qkv.": "in_proj_",
    "out.": "out_proj.",
}


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def torch_names(names: list[str], cross: bool) -> dict[str, str]:
    renamed = {}
    for name in names:
        theirs = name if cross else name.replace("norm3", "norm2")
        for ours, their in NAMES.items():
            theirs = theirs.replace(ours, their)
        renamed[name] = theirs
    return renamed


@PRECISIONS
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_equals_torch(cross, norm_first, dtype, tolerance):
    """Measured, outputs and gradients, relative where above one: 3.1e-7 in float32 and 1.3e-15 in float64."""
    torch.manual_seed(0)
    ours = TransformerBlock(24, 3, 40, cross=cross, norm_first=norm_first).to(dtype)
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = kind(24, 3, 40, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=dtype)
    randomise(ours)
    names = torch_names(list(ours.state_dict()), cross)
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    x, context = torch.randn(2, 7, 24, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)
    upstream = torch.randn(2, 7, 24, dtype=dtype)
    got = ours(x, context) if cross else ours(x)
    expected = theirs(x, context) if cross else theirs(x)
    assert gap(got, expected) <= tolerance
    got.backward(upstream)
    expected.backward(upstream)
    of_theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = of_theirs[names[name]].grad
        assert parameter.grad is not None and reference is not None
        assert gap(parameter.grad, reference) <= tolerance * max(1.0, reference.abs().max().item()), name


@pytest.mark.parametrize("norm_first", [True, False])
def test_masks_equal_torchs(norm_first):
    """A causal decoder whose context has padding: what a translator needs."""
    torch.manual_seed(0)
    ours = TransformerBlock(24, 3, 40, norm_first=norm_first).double()
    theirs = nn.TransformerDecoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    randomise(ours)
    names = torch_names(list(ours.state_dict()), True)
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    x, context = torch.randn(2, 7, 24).double(), torch.randn(2, 5, 24).double()
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    expected = theirs(
        x, context, tgt_mask=nn.Transformer.generate_square_subsequent_mask(7).double(),
        memory_key_padding_mask=padding, tgt_is_causal=True,
    )  # fmt: skip
    got = ours(x, context, causal=True, context_bias=~padding[:, None, None])
    assert gap(got, expected) <= 1e-12


def test_positions_go_to_queries_and_keys_alone():
    torch.manual_seed(0)
    attention = MultiHeadAttention(24, 3).double()
    randomise(attention)
    x, context = torch.randn(2, 7, 24).double(), torch.randn(2, 5, 24).double()
    places, context_places = torch.randn(7, 24).double(), torch.randn(2, 5, 24).double()
    weight, bias = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)

    def by_hand(q_of: Tensor, k_of: Tensor, v_of: Tensor) -> Tensor:
        q, k, v = (
            F.linear(each, weight[i], bias[i]).unflatten(-1, (3, 8)).transpose(1, 2)
            for i, each in enumerate((q_of, k_of, v_of))
        )
        mixed = ((q @ k.mT) / 8**0.5).softmax(-1) @ v
        return attention.out(mixed.transpose(1, 2).flatten(2))

    for got, expected in (
        (attention(x, positions=places), by_hand(x + places, x + places, x)),
        (
            attention(x, context, positions=places, context_positions=context_places),
            by_hand(x + places, context + context_places, context),
        ),
        (attention(x, context, positions=places), by_hand(x + places, context, context)),
        (attention(x, context, context_positions=context_places), by_hand(x, context + context_places, context)),
    ):
        assert gap(got, expected) <= 1e-12
    explicit = attention.with_weights(x, context, positions=places, context_positions=context_places)[0]
    assert gap(explicit, by_hand(x + places, context + context_places, context)) <= 1e-12


def test_with_weights_equals_forward():
    torch.manual_seed(0)
    for norm_first in (True, False):
        block = TransformerBlock(24, 3, 40, norm_first=norm_first, dropout=0.5).eval()
        x, context, places = torch.randn(2, 7, 24), torch.randn(2, 5, 24), torch.randn(7, 24)
        got, weights = block.with_weights(x, context, places, torch.ones(5, 24))
        assert gap(got, block(x, context, places, torch.ones(5, 24))) <= 3e-6  # measured 4.8e-7
        assert weights.shape == (2, 3, 7, 5) and gap(weights.sum(-1), torch.ones(2, 3, 7)) <= 1e-6


def test_dropout_is_after_every_branch_and_only_in_training():
    torch.manual_seed(0)
    block = TransformerBlock(24, 3, 40, norm_first=True, dropout=0.999999)
    x, context = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    assert torch.equal(block(x, context), x)  # all branches are gone
    assert gap(block.eval()(x, context), x) > 0.1


def test_initial_weights():
    torch.manual_seed(0)
    block = TransformerBlock(64, 4, 256)
    xavier(block)
    qkv = block.self_attention.qkv
    assert qkv.weight.abs().max() <= (6 / (64 + 192)) ** 0.5 and qkv.weight.std() > 0.08
    assert qkv.bias.abs().max() == 0 and block.self_attention.out.bias.abs().max() == 0
    assert isinstance(block.mlp, FeedForward) and block.mlp.up.weight.abs().max() <= (6 / (64 + 256)) ** 0.5


def test_positions_of_shares_are_detrs():
    """The formula of https://arxiv.org/abs/2005.12872's code, written out for single channels."""
    h, w, dim = 3, 5, 16
    table = sinusoidal_2d_of_shares((h, w), dim, dtype=torch.float64).view(h, w, dim)
    turn = 2 * torch.pi
    for row, column in ((0, 0), (2, 4), (1, 3)):
        y = torch.tensor(turn * (row + 1) / (h + 1e-6), dtype=torch.float64)
        x = torch.tensor(turn * (column + 1) / (w + 1e-6), dtype=torch.float64)
        for i in range(4):
            rate = 10_000 ** (2 * i / 8)
            expected = torch.stack([(y / rate).sin(), (y / rate).cos(), (x / rate).sin(), (x / rate).cos()])
            assert gap(table[row, column, [2 * i, 2 * i + 1, 8 + 2 * i, 8 + 2 * i + 1]], expected) <= 1e-12
    with pytest.raises(ValueError, match="multiple of 4"):
        sinusoidal_2d_of_shares((2, 2), 6)


def test_perceptron():
    torch.manual_seed(0)
    net = perceptron(3, 8, 8, 4)
    x = torch.randn(5, 3)
    first, second, third = (nn.Linear(before, after) for before, after in ((3, 8), (8, 8), (8, 4)))
    for i, each in ((0, first), (2, second), (4, third)):
        each.load_state_dict(net[i].state_dict())
    expected = third(second(first(x).relu()).relu())
    assert gap(net(x), expected) == 0 and len(net) == 5
