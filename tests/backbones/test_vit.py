from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones import BACKBONES, backbone_row, build_backbone, row_from_dict
from saccade.backbones.features import Features
from saccade.backbones.vit import VIT, ViT, ViTConfig
from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.layers.pooling import AttentionPooling
from saccade.models.classifier import Classifier

TINY = ViTConfig(dim=32, depth=3, heads=2, hidden=48, patch_size=4, image_size=16)
OPTIONS: dict[str, ViTConfig] = {
    "plain": TINY,
    "mean": replace(TINY, pool="mean"),
    "sequence": replace(TINY, pool="sequence"),
    "sinusoidal": replace(TINY, position="sinusoidal"),
    "rotary": replace(TINY, position="rotary"),
    "none": replace(TINY, position="none"),
    "registers": replace(TINY, registers=3),
    "registers_rotary_mean": replace(TINY, registers=2, position="rotary", pool="mean"),
    "layer_scale": replace(TINY, layer_scale=0.1),
    "swiglu": replace(TINY, mlp="swiglu"),
    "pixels": replace(TINY, patch_size=1, image_size=8),
    "patch_2": replace(TINY, patch_size=2),
    "patch_8": replace(TINY, patch_size=8),
    "distilled": replace(TINY, pool="distilled"),
    "token_mean": replace(TINY, pool="token_mean", registers=1),
    "attention": replace(TINY, pool="attention", mlp="gelu_tanh"),
    "mean_beside_class_token": replace(TINY, pool="mean", class_token=True, norm_pooled=True),
    "norm_pooled_sequence": replace(TINY, pool="sequence", norm_pooled=True),
    "clip": replace(TINY, pre_norm=True, mlp="quick_gelu", projection=24, norm_eps=1e-5),
    "dinov3": replace(TINY, position="rotary", registers=2, key_bias=False, layer_scale=0.1, mlp="swiglu"),
    "no_qkv_bias": replace(TINY, qkv_bias=False),
    "bicubic": replace(TINY, resize="bicubic"),
    "offset": replace(TINY, resize="offset"),
    "stem": replace(TINY, stem=(8, 16), stem_repeats=(1,), pool="sequence"),
    "all": replace(
        TINY, stem=(8,), registers=1, layer_scale=0.5, mlp="swiglu", position="rotary", drop_path=0.2, dropout=0.1
    ),
}
SIZES = [(16, 16), (8, 24), (32, 8), (8, 8)]

# Published, with 1000 classes, in millions; the class token's own position, which ours does not have, is no more than
# 1280 of them: https://arxiv.org/abs/2010.11929 (base, large, huge), https://arxiv.org/abs/2012.12877 (tiny, small).
PUBLISHED = {"vit_tiny": 5.7, "vit_small": 22.1, "vit_base": 86.6, "vit_large": 304.3, "vit_huge": 632.0}

# The same shift of all of a softmax's inputs changes nothing, so the gradient of this one is nothing but rounding.
IDLE = ("backbone.pooling.bias",)

options = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor, least: float = 1.0) -> float:
    """For gradients, which grow with what they are summed over: of the largest, where that is over `least`."""
    return gap(a, b) / max(least, b.abs().max().item())


def tiny(config: ViTConfig) -> ViT:
    """With weights large enough that every option shows."""
    torch.manual_seed(0)
    model = ViT(config)
    parts = [model.blocks, model.pooling] if isinstance(model.pooling, AttentionPooling) else [model.blocks]
    for parameter in (parameter for part in parts for parameter in part.parameters()):
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter; afterwards there are none."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        found[name], parameter.grad = parameter.grad, None
    return found


@pytest.fixture(scope="module")
def on_meta() -> dict[str, Classifier]:
    with torch.device("meta"):
        return {name: Classifier(build_backbone(name), 1000).eval() for name in PUBLISHED}


@pytest.mark.parametrize("name", VIT)
def test_every_row_has_the_shapes_it_promises(name):
    row = VIT[name]
    stride, side = row.stride, row.image_size
    assert side % stride == 0 and row.dim % row.heads == 0
    with torch.device("meta"):
        model = Classifier(build_backbone(replace(row, depth=2)), 1000).eval()  # blocks are alike
    for H, W in [(side, side), (side, 2 * side), (3 * stride, stride)]:
        images = torch.empty(2, 3, H, W, device="meta")
        features = model.backbone(images)
        assert isinstance(features, Features)
        assert features.strides == model.backbone.strides == (stride,)
        assert [m.shape for m in features.maps] == [(2, row.dim, H // stride, W // stride)]
        assert features.summary.shape == (2, model.backbone.summary_channels)
        assert model.backbone.channels == (row.dim,)
        assert model(images).logits.shape == (2, 1000)


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_parameters_are_the_published_number(name, millions, on_meta):
    assert round(sum(p.numel() for p in on_meta[name].parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["vit_micro", "vit_tiny", "cct_nano", "cct_small"])
def test_small_rows_run(name):
    torch.manual_seed(0)
    model = build_backbone(name).eval()
    with torch.inference_mode():
        features = model(torch.randn(1, 3, 2 * model.config.stride, 3 * model.config.stride))
    assert features.maps[0].shape[2:] == (2, 3)
    assert features.summary.isfinite().all() and features.summary.std() > 0.1


@options
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_of_any_shape(config, size):
    model, stride = tiny(config).eval(), config.stride
    features = model(torch.randn(2, 3, *size))
    assert features.strides == (stride,)
    assert len(features.maps) == 1
    assert features.maps[0].shape == (2, config.dim, size[0] // stride, size[1] // stride)
    assert features.summary.shape == (2, model.summary_channels)
    assert all(values.isfinite().all() for values in (*features.maps, features.summary))


def test_maps_lie_where_the_pixels_lay():
    """Without blocks, in which tokens mix, a change of one patch changes that place of the map alone."""
    model = tiny(replace(TINY, depth=0)).eval()
    images = torch.randn(1, 3, 8, 24)
    changed = images.clone()
    changed[:, :, 4:8, 12:16] += 1.0
    moved = (model(changed).maps[0] - model(images).maps[0]).abs().amax(dim=(0, 1)) > 1e-3
    assert moved.nonzero().tolist() == [[1, 3]]


@options
def test_gradient_reaches_every_parameter(config):
    torch.manual_seed(0)
    model = Classifier(tiny(replace(config, drop_path=0.0)), 5)
    logits = model(torch.randn(4, 3, 8, 16)).logits
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for name, gradient in take_gradients(model).items():
        assert gradient.isfinite().all(), name
        assert name in IDLE or gradient.abs().max() > 1e-6, name


@options
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str)
def test_summary_is_that_of_forward(config, dtype, tolerance):
    """It goes another way where the last block computes the class token alone.

    Measured: 4.8e-7 in float32, 1.1e-15 in float64; gradients, of the largest: 1.4e-6 and 1.8e-15.
    """
    model = tiny(replace(config, drop_path=0.0, dropout=0.0)).to(dtype)
    upstream = torch.randn(4, model.summary_channels, dtype=dtype)
    images = torch.randn(4, 3, 8, 16, dtype=dtype)
    fast = model.summary(images)
    (fast * upstream).sum().backward()
    of_fast = take_gradients(model)
    whole = model(images).summary
    (whole * upstream).sum().backward()
    of_whole = take_gradients(model)
    assert gap(fast, whole) <= tolerance
    for name in of_whole:
        assert relative(of_fast[name], of_whole[name]) <= tolerance, name


@options
@pytest.mark.parametrize("form", ["forward", "summary"])
def test_activation_checkpointing_changes_no_gradient(config, form):
    """Bitwise, with stochastic depth and dropout: the second pass draws what the first drew."""
    config = replace(config, drop_path=0.3, dropout=0.2)
    images, upstream = torch.randn(4, 3, 8, 16), torch.randn(4, tiny(config).summary_channels)
    found = []
    for checkpointing in (False, True):
        model = tiny(config)
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        summary = model.summary(images) if form == "summary" else model(images).summary
        (summary * upstream).sum().backward()
        found.append({"summary": summary, **take_gradients(model)})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@options
def test_batch_mates_change_nothing(config):
    model = Classifier(tiny(config), 5)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 16, 16))  # gives batch norms statistics that are no single picture's
        model.eval()
        images = torch.randn(5, 3, 8, 16)
        together = model(images).logits
        images[1:] = 100 * torch.randn(4, 3, 8, 16)
        alone = torch.cat([model(images[:1]).logits, model(images).logits[:1]])
    assert gap(alone, together[:1].expand(2, -1)) <= 1e-6  # measured 6.0e-8


def test_drop_path_and_dropout_are_off_in_evaluation():
    images = torch.randn(4, 3, 16, 16)
    still, wild = tiny(TINY).eval(), tiny(replace(TINY, drop_path=0.9, dropout=0.9)).eval()
    assert torch.equal(still.summary(images), wild.summary(images))
    wild.train()
    assert not torch.equal(wild.summary(images), wild.summary(images))
    assert [block.drop_path for block in wild.blocks] == pytest.approx([0.0, 0.45, 0.9])


@options
@pytest.mark.parametrize("size", [(18, 15), (15, 18)], ids=str)
def test_a_size_that_is_no_multiple_of_the_stride_is_refused(config, size):
    if config.stride == 1:
        pytest.skip("every size is a multiple of one")
    model = ViT(config)
    for call in (model, model.summary, model.trace):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels: .* multiples of {config.stride}"):
            call(torch.randn(1, 3, *size))


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("pool", ["token", "mean", "sequence"])
def test_the_order_of_patches_matters_with_positions_only(position, pool):
    model = tiny(replace(TINY, position=position, pool=pool)).eval()
    images = torch.randn(2, 3, 16, 16)
    swapped = images.clone()
    swapped[:, :, :4, :4], swapped[:, :, 8:12, 4:8] = images[:, :, 8:12, 4:8], images[:, :, :4, :4]
    summary = model.summary(images)
    if position == "none":
        assert gap(model.summary(swapped), summary) <= 5e-6  # measured 8.0e-7
    else:
        assert gap(model.summary(swapped), summary) > 1e-3  # measured 6.7e-3 or more


@options
def test_trace_is_the_attention_of_forward(config):
    model = tiny(config).eval()
    trace = model.trace(torch.randn(2, 3, 8, 24))
    grid = (8 // config.stride, 24 // config.stride)
    N = model.prefix + grid[0] * grid[1]
    assert trace.grid == grid and trace.prefix == model.prefix
    assert [w.shape for w in trace.weights] == config.depth * [(2, config.heads, N, N)]
    for shares in (*trace.weights, trace.pooling):
        assert gap(shares.sum(-1), torch.ones(shares.shape[:-1])) <= 1e-6  # measured 2.4e-7
    of_prefix = {"token": 1.0, "distilled": 1.0, "token_mean": 0.5}.get(config.pool, 0.0)
    assert (trace.pooling[:, : model.prefix].sum(1) == of_prefix).all()


@pytest.mark.parametrize("name", ["attention", "sequence", "mean", "token_mean", "mean_beside_class_token"])
def test_trace_tells_which_patches_the_pool_reads(name):
    """The share of a patch is how much a summary of values would move with it: a weighted mean by these shares."""
    model = tiny(replace(OPTIONS[name], depth=0, norm_pooled=False)).eval()
    images = torch.randn(1, 3, 8, 24)
    trace, x = model.trace(images), model.norm(model.embed(images)[0])
    shares = trace.pooling[0, model.prefix :]
    if name == "attention":
        assert isinstance(model.pooling, AttentionPooling)
        C = model.config.dim
        values = F.linear(x[0], model.pooling.attention.qkv.weight[2 * C :], model.pooling.attention.qkv.bias[2 * C :])
        q, k, _ = model.pooling.attention.project(model.pooling.query.expand(1, 1, C), x, None)
        weights = (q @ k.transpose(-2, -1) / (C // 2) ** 0.5).softmax(-1)[0, :, 0]  # (H, N)
        assert gap(shares, weights.mean(0)) <= 1e-6  # measured 0
        assert values.shape == (12, C) and shares.std() > 1e-4
    elif name == "sequence":
        assert gap(shares @ x[0, model.prefix :], model.summary(images)[0]) <= 1e-6  # measured 8.9e-8
    else:
        scale = 0.5 if name == "token_mean" else 1.0
        expected = model.summary(images)[0, -model.config.dim :] * scale
        assert gap(shares @ x[0, model.prefix :], expected) <= 1e-6  # measured 6.0e-8


def test_every_parameter_has_a_depth():
    model = Classifier(tiny(OPTIONS["all"]), 5)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(TINY.depth + 2))
    assert depths["head.weight"] == depths["backbone.norm.weight"] == TINY.depth + 1
    assert depths["backbone.class_token"] == depths["backbone.registers"] == 0
    clip = Classifier(tiny(OPTIONS["clip"]), 5)
    assert clip.depth_of("backbone.pre_norm.weight") == 0
    assert clip.depth_of("backbone.projection.weight") == TINY.depth + 1
    attention = Classifier(tiny(OPTIONS["attention"]), 5)
    assert attention.depth_of("backbone.pooling.attention.qkv.weight") == TINY.depth + 1
    assert all(depth == int(name.split(".")[2]) + 1 for name, depth in depths.items() if "blocks." in name)


def test_settings_change_a_row():
    row = backbone_row("vit_tiny").changed(NetworkConfig(patch_size=8, pool="mean", registers=4), image_size=64)
    assert isinstance(row, ViTConfig)
    assert (row.patch_size, row.pool, row.registers, row.image_size, row.dim) == (8, "mean", 4, 64, 192)
    model = build_backbone("vit_micro", NetworkConfig(mlp="swiglu", drop_path=0.5), image_size=48)
    assert isinstance(model, ViT) and model.positions is not None and model.positions.grid == (12, 12)
    with pytest.raises(UserError, match="patch_size: this model has a convolutional stem"):
        build_backbone("cct_nano", NetworkConfig(patch_size=8))
    with pytest.raises(UserError, match="unknown model 'vit_tinny'; did you mean vit_tiny"):
        build_backbone("vit_tinny")
    assert set(VIT) <= set(BACKBONES)
    with pytest.raises(UserError, match="network.pool: token_mean needs normed tokens"):
        replace(TINY, pool="mean", norm_pooled=True).changed(NetworkConfig(pool="token_mean"))


def test_rows_that_differ_only_by_their_source_are_one_model():
    row = VIT["dinov2_small"]
    assert row.is_like(replace(row, resize="offset", norm_eps=1e-5, class_position=False, layer_scale=1.0))
    assert not row.is_like(replace(row, registers=4)) and not row.is_like(VIT["vit_small"])
    again = row_from_dict(VIT["cct_nano"].to_dict(), "a file")
    assert again == VIT["cct_nano"]


@pytest.mark.parametrize("name", ["plain", "bicubic", "offset"])
def test_positions_adapt_to_another_resolution(name):
    """What was interpolated once, on loading, is what the model would interpolate at each step."""
    config = OPTIONS[name]
    small, large = tiny(config).eval(), tiny(replace(config, image_size=24)).eval()
    weights = {key: value.clone() for key, value in small.state_dict().items()}
    assert large.adapt(weights, config) == ["positions interpolated from 4x4 to 6x6"]
    large.load_state_dict(weights)
    images = torch.randn(1, 3, 24, 24)
    assert gap(large(images).summary, small(images).summary) == 0
    assert small.adapt(weights, config) == [] and tiny(OPTIONS["rotary"]).adapt({}, OPTIONS["rotary"]) == []
