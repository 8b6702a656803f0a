from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones import BACKBONES, backbone_row, build_backbone
from saccade.backbones.features import Features
from saccade.backbones.vit import VIT, ViT, ViTConfig
from saccade.config import NetworkConfig
from saccade.errors import UserError
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
    for parameter in model.blocks.parameters():
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
        return {name: Classifier(build_backbone(name), 1000).eval() for name in VIT}


@pytest.mark.parametrize("name", VIT)
def test_every_row_has_the_shapes_it_promises(name, on_meta):
    model, row = on_meta[name], VIT[name]
    stride, side = row.stride, row.image_size
    assert side % stride == 0 and row.dim % row.heads == 0
    for H, W in [(side, side), (side, 2 * side), (3 * stride, stride)]:
        images = torch.empty(2, 3, H, W, device="meta")
        features = model.backbone(images)
        assert isinstance(features, Features)
        assert features.strides == model.backbone.strides == (stride,)
        assert [m.shape for m in features.maps] == [(2, row.dim, H // stride, W // stride)]
        assert features.summary.shape == (2, row.dim) and model.backbone.channels == (row.dim,)
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
    assert features.summary.shape == (2, config.dim)
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

    Measured: 7.2e-7 in float32, 1.1e-15 in float64; gradients, of the largest: 9.3e-7 and 2.0e-15.
    """
    model = tiny(replace(config, drop_path=0.0, dropout=0.0)).to(dtype)
    images, upstream = torch.randn(4, 3, 8, 16, dtype=dtype), torch.randn(4, config.dim, dtype=dtype)
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
    images, upstream = torch.randn(4, 3, 8, 16), torch.randn(4, config.dim)
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


@pytest.mark.parametrize("name", ["plain", "registers_rotary_mean", "stem", "all"])
def test_trace_is_the_attention_of_forward(name):
    config = OPTIONS[name]
    model = tiny(config).eval()
    trace = model.trace(torch.randn(2, 3, 8, 24))
    grid = (8 // config.stride, 24 // config.stride)
    N = model.prefix + grid[0] * grid[1]
    assert trace.grid == grid and trace.prefix == model.prefix
    assert [w.shape for w in trace.weights] == config.depth * [(2, config.heads, N, N)]
    for shares in (*trace.weights, trace.pooling):
        assert gap(shares.sum(-1), torch.ones(shares.shape[:-1])) <= 1e-6  # measured 2.4e-7
    assert (trace.pooling[:, : model.prefix].sum(1) == (config.pool == "token")).all()


def test_every_parameter_has_a_depth():
    model = Classifier(tiny(OPTIONS["all"]), 5)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(TINY.depth + 2))
    assert depths["head.weight"] == depths["backbone.norm.weight"] == TINY.depth + 1
    assert depths["backbone.class_token"] == depths["backbone.registers"] == 0
    assert all(depth == int(name.split(".")[2]) + 1 for name, depth in depths.items() if "blocks." in name)


def test_settings_change_a_row():
    row = backbone_row("vit_tiny").changed(NetworkConfig(patch_size=8, pool="mean", registers=4), image_size=64)
    assert (row.patch_size, row.pool, row.registers, row.image_size, row.dim) == (8, "mean", 4, 64, 192)
    model = build_backbone("vit_micro", NetworkConfig(mlp="swiglu", drop_path=0.5), image_size=48)
    assert model.positions is not None and model.positions.grid == (12, 12)
    with pytest.raises(UserError, match="patch_size: this model has a convolutional stem"):
        build_backbone("cct_nano", NetworkConfig(patch_size=8))
    with pytest.raises(UserError, match="unknown model 'vit_tinny'; did you mean vit_tiny"):
        build_backbone("vit_tinny")
    assert set(VIT) <= set(BACKBONES)


TIMM_NAMES = {
    "patch_embed.proj": "patches.projection",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}


def from_timm(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """timm's state dict under our names. Its class token has a position, which is part of the token in ours."""
    for name, value in weights.items():
        if name == "cls_token":
            yield "backbone.class_token", (value + weights["pos_embed"][:, :1])[0]
        elif name == "pos_embed":
            yield "backbone.positions.table", value[0, 1:]
        else:
            for theirs, ours in TIMM_NAMES.items():
                name = name.replace(theirs, ours)
            yield name if name.startswith("head.") else f"backbone.{name}", value


@pytest.mark.parametrize("size", [(224, 224), (160, 256)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
def test_equals_timm(size, dtype, tolerance):
    """The other size is no square and not the one that the positions are made for: timm interpolates with its own code.

    Measured: 2.0e-6 in float32, 5.0e-16 in float64; gradients, of each one's largest: 2.5e-6 and 2.8e-15.
    """
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, dynamic_img_size=True)
    with torch.no_grad():
        for parameter in theirs.parameters():  # no zeros and ones, behind which a wrong place could hide
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = theirs.to(dtype)
    ours = Classifier(build_backbone("vit_tiny"), 10).to(dtype)
    ours.load_state_dict(dict(from_timm(theirs.state_dict())))
    images, targets = torch.randn(2, 3, *size, dtype=dtype), torch.tensor([3, 7])

    logits, expected = ours(images).logits, theirs(images)
    assert expected.abs().max() > 0.5
    assert gap(logits, expected) <= tolerance
    F.cross_entropy(logits, targets).backward()
    F.cross_entropy(expected, targets).backward()
    reference = {name: p.grad for name, p in theirs.named_parameters()}
    # token and position are added, so both have this gradient, and so has our sum of them
    assert gap(reference["pos_embed"][:, :1], reference["cls_token"]) <= tolerance  # measured 0
    reference["pos_embed"][:, 0] = 0
    of_theirs, of_ours = dict(from_timm(reference)), take_gradients(ours)
    assert of_ours.keys() == of_theirs.keys()
    for name, gradient in of_ours.items():
        assert relative(gradient, of_theirs[name], least=1e-6) <= tolerance, name
