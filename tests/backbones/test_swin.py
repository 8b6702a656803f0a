from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones import swin as module
from saccade.backbones.features import Features
from saccade.backbones.swin import SWIN, Swin, SwinConfig
from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.models.classifier import Classifier

TINY = SwinConfig(dim=16, depths=(2, 1, 2), heads=(2, 2, 4), windows=(4, 4, 2), image_size=32, mlp_ratio=2.0)
V2 = replace(TINY, version=2)
OPTIONS: dict[str, SwinConfig] = {
    "v1": TINY,
    "v2": V2,
    "timm": replace(TINY, pad_first=False, unshifted="built"),
    "picture": replace(V2, unshifted="picture"),
    "trained": replace(V2, trained_windows=(3, 3, 2)),
    "patch_2": replace(TINY, patch_size=2, image_size=16),
    "wild": replace(TINY, windows=(3, 5, 4), drop_path=0.2, dropout=0.1),
}
SIZES = [(32, 32), (20, 48), (64, 4), (37, 18), (3, 1)]

# With 1000 classes, in millions; papers' tables 1 and 7 (first version) and A1 (second, as released)
PUBLISHED = {
    "swin_tiny": 28.3,
    "swin_small": 49.6,
    "swin_base": 87.8,
    "swin_large": 196.5,
    "swin_base_384": 87.9,
    "swinv2_tiny": 28.3,
    "swinv2_small": 49.7,
    "swinv2_base": 87.9,
    "swinv2_large": 196.7,
}

options = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())


def tiny(config: SwinConfig) -> Swin:
    """With weights large enough that every part shows, norms that begin as zeros among them."""
    torch.manual_seed(0)
    model = Swin(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
        elif "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("name", SWIN)
def test_every_row_has_the_shapes_it_promises(name):
    row = SWIN[name]
    with torch.device("meta"):
        model = Classifier(Swin(row), 1000)
    assert row.stride == 32 and row.image_size % row.stride == 0
    assert model.backbone.channels == tuple(32 * heads for heads in row.heads)
    assert all(row.built_grid(s) % window == 0 for s, window in enumerate(row.windows))
    if name in PUBLISHED:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == PUBLISHED[name]
    assert model.backbone.strides == (4, 8, 16, 32)
    assert model.backbone.channels == tuple(row.dim * 2**s for s in range(4))


@options
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_of_any_size(config, size):
    model = tiny(config).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = model(images)
        assert gap(model.summary(images), features.summary) <= 1e-6  # measured 1.2e-7
    assert isinstance(features, Features)
    assert features.strides == model.strides == tuple(config.patch_size * 2**i for i in range(3))
    for maps, channels, stride in zip(features.maps, model.channels, model.strides, strict=True):
        assert maps.shape == (2, channels, *(-(-n // stride) for n in size))
    assert features.summary.shape == (2, model.summary_channels)
    assert all(values.isfinite().all() for values in (*features.maps, features.summary))
    mean = model.norm(features.maps[-1].permute(0, 2, 3, 1)).mean(dim=(1, 2))
    assert gap(features.summary, mean) <= 1e-6  # measured 1.2e-7


@options
def test_appended_pixels_are_zeros(config):
    model = tiny(config).eval()
    images = torch.randn(1, 3, 31, 45)
    p = config.patch_size
    filled = F.pad(images, (0, -45 % p, 0, -31 % p))
    assert torch.equal(model.summary(images), model.summary(filled))


def test_maps_lie_where_the_pixels_lay():
    """With windows of one token, which do not mix, a change of one patch changes that place of the maps alone."""
    model = tiny(replace(TINY, windows=(1, 1, 1))).eval()
    images = torch.randn(1, 3, 48, 32)
    changed = images.clone()
    changed[:, :, 36:40, 12:16] += 1.0
    for one, other, place in zip(model(changed).maps, model(images).maps, ([9, 3], [4, 1], [2, 0]), strict=True):
        assert ((one - other).abs().amax(dim=(0, 1)) > 1e-3).nonzero().tolist() == [place]


def test_shifted_windows_carry_over_the_borders_of_windows():
    """One unshifted block keeps a change inside its window; a shifted one takes it further, but never around."""
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, :4, :4] += 1.0
    for depth, reach in ((1, 4), (2, 6)):
        model = tiny(replace(TINY, depths=(depth,), heads=(2,), windows=(4,), image_size=64)).eval()
        moved = ((model(changed).maps[0] - model(images).maps[0]).abs().amax(dim=(0, 1)) > 1e-6).nonzero()
        assert moved.amax(dim=0).tolist() == [reach - 1, reach - 1]


@options
@pytest.mark.parametrize("size", [(32, 48), (37, 18)], ids=str)
def test_gradient_reaches_every_parameter(config, size):
    model = Classifier(tiny(replace(config, drop_path=0.0)), 5)
    F.cross_entropy(model(torch.randn(4, 3, *size)).logits, torch.tensor([0, 1, 2, 3])).backward()
    for name, gradient in take_gradients(model).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@options
def test_without_gradients_the_same_comes_out(config):
    """Another kernel for attention, and pieces written in place."""
    model = tiny(config).eval()
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        still = model.summary(images)
    assert gap(model.summary(images), still) <= 5e-6  # measured 1.2e-6


@options
@pytest.mark.parametrize("size", [(32, 48), (37, 18)], ids=str)
def test_the_size_of_pieces_changes_nothing(config, size, monkeypatch):
    images, upstream = torch.randn(3, 3, *size), torch.randn(3, 64)
    found = []
    for cache in (1, 10_000, 2**30):
        monkeypatch.setattr(module, "CACHE", cache)
        model = tiny(config)
        torch.manual_seed(1)
        summary = model.eval().summary(images) if config.dropout else model.summary(images)
        (summary * upstream).sum().backward()
        found.append({"summary": summary, **take_gradients(model)})
        with torch.no_grad():
            found[-1]["still"] = model.eval().summary(images)
    for other in found[1:]:
        for name, value in found[0].items():
            assert gap(value, other[name]) <= 1e-4 * max(1.0, value.abs().max().item()), name  # measured 6.0e-6


@options
@pytest.mark.parametrize("size", [(32, 48), (37, 18)], ids=str)
def test_activation_checkpointing_changes_no_gradient(config, size):
    """Bitwise, with stochastic depth and dropout: the second pass draws what the first drew."""
    config = replace(config, drop_path=0.3, dropout=0.2)
    images, upstream = torch.randn(4, 3, *size), torch.randn(4, 64)
    found = []
    for checkpointing in (False, True):
        model = tiny(config)
        model.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        summary = model(images).summary
        (summary * upstream).sum().backward()
        found.append({"summary": summary, **take_gradients(model)})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@options
@pytest.mark.parametrize("size", [(32, 48), (37, 18)], ids=str)
def test_batch_mates_change_nothing(config, size):
    model = Classifier(tiny(config), 5).eval()
    images = torch.randn(5, 3, *size)
    with torch.no_grad():
        together = model(images).logits
        images[1:] = 100 * torch.randn(4, 3, *size)
        alone = torch.cat([model(images[:1]).logits, model(images).logits[:1]])
    assert gap(alone, together[:1].expand(2, -1)) <= 2e-6  # measured 4.8e-7


@pytest.mark.parametrize("config", [TINY, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [(32, 48), (37, 18)], ids=str)
def test_stochastic_depth_drops_branches_of_whole_pictures(config, size):
    """Where a picture's branches are all dropped, its tokens pass unchanged, whatever its mates do."""
    wild = tiny(replace(config, depths=(2,), heads=(2,), windows=(4,), drop_path=0.999))
    images = torch.randn(64, 3, *size)
    torch.manual_seed(3)
    first, second = wild.stages[0]  # type: ignore[misc]
    first.drop_path = 0.5
    tokens = wild.embed(images)
    changed = (first(tokens).rows() - tokens.rows()).abs().flatten(1).amax(dim=1) > 0
    assert 32 < changed.sum() < 62, "three quarters of the pictures lose at most one of two branches"
    assert second.drop_path == pytest.approx(0.999)
    assert gap(second(tokens).rows()[:8], tokens.rows()[:8]) <= 1e3
    wild.eval()
    still = tiny(replace(config, depths=(2,), heads=(2,), windows=(4,))).eval()
    assert torch.equal(wild.summary(images), still.summary(images))
    assert [block.drop_path for block in Swin(replace(config, drop_path=0.8)).layers] == pytest.approx(
        [0.0, 0.2, 0.4, 0.6, 0.8]
    )


@pytest.mark.parametrize("config", [TINY, V2], ids=["v1", "v2"])
def test_biases_kept_in_evaluation_follow_the_weights(config):
    model = tiny(config).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model.summary(images)
        bias = model.layers[0].bias()
        assert model.layers[0].bias() is bias
        for name, parameter in model.named_parameters():
            if ".bias." in name:
                parameter.add_(torch.randn_like(parameter))
        after = model.summary(images)
        assert gap(before, after) > 1e-3
        fresh = Swin(config).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.summary(images), after)
        assert torch.equal(copy.deepcopy(model).summary(images), after)
        assert gap(model.double().summary(images.double()).float(), after) <= 1e-5  # measured 5.0e-7
    with torch.inference_mode():
        made_inside = Swin(config).eval()
        made_inside.load_state_dict(fresh.state_dict())
        assert torch.equal(made_inside.summary(images), after)


def test_every_parameter_has_a_depth():
    model = Classifier(tiny(TINY), 5)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(5 + 2))
    assert depths["head.weight"] == depths["backbone.norm.weight"] == 6
    assert depths["backbone.patches.projection.weight"] == depths["backbone.patch_norm.bias"] == 0
    assert depths["backbone.stages.1.0.norm1.weight"] == depths["backbone.merges.0.norm.weight"] == 3
    assert depths["backbone.stages.2.1.mlp.up.bias"] == 5
    assert len(model.backbone.layers) == 5


def test_blocks_of_the_second_version_begin_as_the_identity():
    torch.manual_seed(0)
    model = Swin(V2)
    tokens = model.embed(torch.randn(2, 3, 32, 32))
    block = model.layers[1]
    assert torch.equal(block(tokens).rows(), tokens.rows())
    assert not torch.equal(Swin(TINY).layers[1](tokens).rows(), tokens.rows())


def test_bias_tables_of_other_windows_are_adapted_and_it_is_said():
    old, new = replace(TINY, windows=(3, 4, 3)), TINY
    weights = dict(tiny(old).state_dict())
    kept = {name: value.clone() for name, value in weights.items()}
    model = Swin(new)
    notes = model.adapt(weights, old)
    assert len(notes) == 2 and "stage 1" in notes[0] and "from windows of 3 to 4" in notes[0] and "stage 3" in notes[1]
    model.load_state_dict(weights, strict=True)
    changed = {name for name in kept if kept[name].shape != weights[name].shape}
    assert changed == {f"stages.{s}.{b}.attention.bias.table" for s in (0, 2) for b in (0, 1)}
    assert all(torch.equal(weights[name], kept[name]) for name in kept if name not in changed)
    assert Swin(V2).adapt({}, replace(V2, windows=(3, 4, 3))) == []


def test_a_row_survives_a_file_and_takes_settings():
    for row in SWIN.values():
        values = json.loads(json.dumps(row.to_dict()))
        assert values.pop("family") == "swin"
        assert TypeAdapter(SwinConfig).validate_python(values) == row
    row = TINY.changed(NetworkConfig(drop_path=0.3, patch_size=2), image_size=64)
    assert (row.drop_path, row.patch_size, row.image_size, row.windows) == (0.3, 2, 64, TINY.windows)
    with pytest.raises(UserError, match="registers"):
        TINY.changed(NetworkConfig(registers=2))
    assert TINY.is_like(OPTIONS["timm"]) and TINY.is_like(replace(TINY, drop_path=0.5, image_size=64))
    assert not TINY.is_like(V2) and not TINY.is_like(replace(TINY, windows=(4, 4, 4)))
    with pytest.raises(ValueError, match="for every stage"):
        Swin(replace(TINY, heads=(2, 2)))


@pytest.mark.parametrize("config", [TINY, V2], ids=["v1", "v2"])
def test_bfloat16_learns(config):
    model = tiny(config).to(torch.bfloat16)
    model(torch.randn(2, 3, 32, 48).bfloat16()).summary.sum().backward()
    assert all(gradient.isfinite().all() for gradient in take_gradients(model).values())
    model = tiny(config)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.summary(images := torch.randn(2, 3, 32, 48))
    mixed.sum().backward()
    take_gradients(model)
    assert gap(mixed.float(), model.summary(images)) <= 0.1  # measured 1.9e-2


@options
def test_no_pictures(config: SwinConfig) -> None:
    """As of a process that has no share of a batch: all of its parameters take part, with a gradient of zero."""
    model = tiny(config)
    features = model(torch.zeros(0, 3, 33, 40))
    assert [each.shape[:2] for each in features.maps] == [(0, width) for width in model.channels]
    (features.summary.sum() + model.summary(torch.zeros(0, 3, 33, 40)).sum()).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
