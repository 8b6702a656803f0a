from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.layers.feedforward import FeedForward
from saccade.layers.pooling import AttentionPooling


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def pooling() -> AttentionPooling:
    torch.manual_seed(0)
    module = AttentionPooling(24, 3, 40, mlp="gelu_tanh", norm_eps=1e-5)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_equals_torchs_attention_and_the_formula(dtype, tolerance):
    """Measured: 6.0e-7 in float32, 1.3e-15 in float64."""
    module = pooling().to(dtype)
    reference = nn.MultiheadAttention(24, 3, batch_first=True, dtype=dtype)
    reference.load_state_dict(
        {
            "in_proj_weight": module.attention.qkv.weight,
            "in_proj_bias": module.attention.qkv.bias,
            "out_proj.weight": module.attention.out.weight,
            "out_proj.bias": module.attention.out.bias,
        }
    )
    x = torch.randn(2, 7, 24, dtype=dtype)
    mixed, shares = reference(module.query.expand(2, 1, 24), x, x)
    hidden = F.layer_norm(mixed[:, 0], (24,), module.norm.weight, module.norm.bias, 1e-5)
    assert isinstance(module.mlp, FeedForward)
    hidden = F.gelu(hidden @ module.mlp.up.weight.T + module.mlp.up.bias, approximate="tanh")
    expected = mixed[:, 0] + hidden @ module.mlp.down.weight.T + module.mlp.down.bias
    assert gap(module(x), expected) <= tolerance
    pooled, weights = module.with_weights(x)
    assert gap(pooled, expected) <= tolerance and gap(weights, shares[:, 0]) <= tolerance


def test_order_of_tokens_does_not_matter_and_tokens_do():
    module, x = pooling(), torch.randn(2, 7, 24)
    assert gap(module(x[:, torch.randperm(7)]), module(x)) <= 1e-5  # measured 6.0e-7
    assert gap(module(x[:, :6]), module(x)) > 0.01


def test_gradient_reaches_every_parameter():
    module, x = pooling(), torch.randn(2, 7, 24)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4, name
