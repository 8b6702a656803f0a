from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.layers.encoder import EncoderBlock, LayerScale, drop_path
from saccade.layers.feedforward import ACTIVATIONS, FeedForward, SwiGLU, feed_forward
from saccade.layers.positions import rotary_2d


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """For gradients, which grow with what they are summed over: of the largest, where that is over one."""
    return gap(a, b) / max(1.0, b.abs().max().item())


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)


TORCH_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.qkv.weight": "self_attn.in_proj_weight",
    "attention.qkv.bias": "self_attn.in_proj_bias",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "linear1",
    "mlp.down": "linear2",
}


def torch_name(name: str) -> str:
    return TORCH_NAMES.get(name) or f"{TORCH_NAMES[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
def test_equals_torch(norm_first, dtype, tolerance):
    """Measured: 4.8e-7 in float32, 4.4e-16 in float64; gradients, of the largest: 1.2e-7 and 3.1e-16."""
    torch.manual_seed(0)
    ours = EncoderBlock(24, 3, 40, norm_first=norm_first, norm_eps=1e-5).to(dtype)
    theirs = nn.TransformerEncoderLayer(
        24, 3, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first, dtype=dtype
    )
    randomise(ours)
    theirs.load_state_dict({torch_name(name): value for name, value in ours.state_dict().items()})
    x = torch.randn(2, 7, 24, dtype=dtype)
    upstream = torch.randn(2, 7, 24, dtype=dtype)

    got, expected = ours(x), theirs(x)
    assert gap(got, expected) <= tolerance
    assert gap(ours.with_weights(x)[0], expected) <= tolerance
    got.backward(upstream)
    expected.backward(upstream)
    of_theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = of_theirs[torch_name(name)].grad
        assert parameter.grad is not None and reference is not None
        assert relative(parameter.grad, reference) <= tolerance, name


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
def test_some_queries_equal_those_of_all(norm_first, rotary):
    torch.manual_seed(0)
    block = EncoderBlock(24, 3, 40, norm_first=norm_first, layer_scale=0.5, mlp="swiglu")
    randomise(block)
    x = torch.randn(2, 7, 24)
    tables = rotary_2d((2, 3), 8, prefix=1) if rotary else None
    for queries in (1, 3, 7):
        whole = block(x, rotary=tables)[:, :queries]
        assert gap(block(x, queries=queries, rotary=tables), whole) <= 2e-6  # measured 1.2e-7


def test_with_weights_equals_forward_and_rows_sum_to_one():
    torch.manual_seed(0)
    block = EncoderBlock(24, 3, 40, layer_scale=0.5)
    x, tables = torch.randn(2, 7, 24), rotary_2d((2, 3), 8, prefix=1)
    got, weights = block.with_weights(x, rotary=tables)
    assert weights.shape == (2, 3, 7, 7)
    assert gap(weights.sum(-1), torch.ones(2, 3, 7)) <= 1e-6  # measured 1.8e-7
    assert gap(got, block(x, rotary=tables)) <= 1e-6  # measured 2.4e-7


def test_permutation_equivariance_without_positions_and_none_with():
    torch.manual_seed(0)
    block = EncoderBlock(24, 3, 40)
    randomise(block)
    x, tables = torch.randn(2, 6, 24), rotary_2d((2, 3), 8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert gap(block(x[:, order]), block(x)[:, order]) <= 2e-6  # measured 2.4e-7
    assert gap(block(x[:, order], rotary=tables), block(x, rotary=tables)[:, order]) > 0.001


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.randn(20_000, 2, 3)
    dropped = drop_path(x, 0.3, training=True)
    gone = (dropped == 0).flatten(1).all(dim=1)
    assert gap(dropped[~gone], x[~gone] / 0.7) <= 1e-6  # measured 4.8e-7
    # four standard errors of a share of 0.3 among 20,000
    assert abs(gone.float().mean().item() - 0.3) <= 4 * (0.3 * 0.7 / len(x)) ** 0.5
    ones = drop_path(torch.ones(20_000, 1), 0.3, training=True)
    assert abs(ones.mean().item() - 1.0) <= 4 * (0.3 / 0.7 / len(x)) ** 0.5


def test_drop_path_is_nothing_in_evaluation_and_at_zero():
    x = torch.randn(4, 2, 3)
    assert drop_path(x, 0.9, training=False) is x
    assert drop_path(x, 0.0, training=True) is x


def test_block_in_training_skips_branches_by_sample():
    torch.manual_seed(0)
    block = EncoderBlock(24, 3, 40, drop_path=0.5)
    x = torch.randn(1, 7, 24).expand(64, -1, -1)
    kinds = block(x).flatten(1).unique(dim=0)
    assert len(kinds) == 4  # each of two branches there or not
    assert (kinds == x[0].flatten()).all(dim=1).any()
    assert gap(block.eval()(x)[0], block(x[:1])[0]) <= 1e-6  # measured 0


def test_layer_scale():
    x = torch.randn(2, 5, 24)
    scale = LayerScale(24, 0.1)
    assert gap(scale(x), 0.1 * x) == 0
    block = EncoderBlock(24, 3, 40, layer_scale=1e-9)
    assert gap(block(x), x) <= 1e-6  # measured 4.7e-10: the block begins as nothing
    assert {"scale1.scale", "scale2.scale"} <= {name for name, _ in block.named_parameters()}
    assert not any("scale" in name for name, _ in EncoderBlock(24, 3, 40).named_parameters())


def test_feed_forward_formula():
    torch.manual_seed(0)
    module = FeedForward(6, 10)
    x = torch.randn(2, 5, 6)
    hidden = x @ module.up.weight.T + module.up.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    assert gap(module(x), hidden @ module.down.weight.T + module.down.bias) <= 1e-6  # measured 3.0e-8


def test_swiglu_shape_and_formula():
    torch.manual_seed(0)
    module = SwiGLU(6, 10)
    x = torch.randn(2, 5, 6)
    assert module.gate_up.weight.shape == (20, 6) and module.down.weight.shape == (6, 10)
    gate = x @ module.gate_up.weight[:10].T + module.gate_up.bias[:10]
    up = x @ module.gate_up.weight[10:].T + module.gate_up.bias[10:]
    expected = (gate * torch.sigmoid(gate) * up) @ module.down.weight.T + module.down.bias
    assert module(x).shape == x.shape
    assert gap(module(x), expected) <= 1e-6  # measured 6.0e-8


def test_activations_by_their_formulas():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    erf = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    tanh = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    expected = {"gelu": erf, "gelu_tanh": tanh, "quick_gelu": x / (1 + torch.exp(-1.702 * x))}
    expected |= {"relu": x * (x > 0), "silu": x / (1 + torch.exp(-x))}
    assert expected.keys() == ACTIVATIONS.keys()
    for name, activation in ACTIVATIONS.items():
        assert gap(activation(x), expected[name]) <= 1e-12, name  # measured 8.9e-16
        assert feed_forward(name, 4, 8)(torch.zeros(1, 2, 4)).shape == (1, 2, 4)
    assert 1e-4 < gap(erf, tanh) < 1e-2 < gap(erf, expected["quick_gelu"]) < 1e-1  # three that can be told apart
    assert isinstance(feed_forward("swiglu", 4, 8), SwiGLU)


@pytest.mark.parametrize("kind", [FeedForward, SwiGLU])
def test_dropout_only_in_training(kind):
    torch.manual_seed(0)
    module, x = kind(6, 10, dropout=0.5), torch.randn(4, 5, 6)
    assert 0.2 < (module(x) == 0).float().mean() < 0.8
    module.eval()
    assert torch.equal(module(x), module(x)) and (module(x) != 0).all()
