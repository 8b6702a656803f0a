"""What shapes do not tell is taken from where it stands, and what is not known here is not read as something else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade import UserError
from saccade.backbones import BACKBONES
from saccade.backbones.base import Row
from saccade.backbones.resnet import ResNetConfig
from saccade.backbones.swin import SWIN
from saccade.backbones.vit import VIT
from saccade.models import build_backbone
from saccade.models.classifier import Classifier
from saccade.weights import convert
from saccade.weights.convert import import_weights, recognise
from saccade.weights.descriptions import CLIP_MEAN, HALF, read_preprocessing
from saccade.weights.formats import resnet, swin, vit_huggingface, vit_others, vit_timm
from saccade.weights.formats.table import Format, NoWords, write_state
from saccade.weights.source import RawWeights

PLAIN = replace(VIT["vit_micro"], dim=32, depth=2, heads=2, hidden=64, patch_size=4, image_size=16)
SMALL = replace(SWIN["swinv2_tiny"], dim=16, depths=(1, 1), heads=(1, 2), windows=(4, 4), image_size=32, drop_path=0.0)


def theirs(row: Row, form: Format, classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = Classifier(build_backbone(row), max(1, classes)).state_dict()
    return write_state(state, form.rules(row, classes))


def raw(tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> RawWeights:
    return RawWeights("a.pth", tensors, config or {})


def form_of(tensors: dict[str, Tensor], config: dict[str, Any] | None = None, model: str | None = None) -> Any:
    """The form that weights are read as."""
    return import_weights(raw(tensors, config), model=model).row


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Names that `--model` knows."""
    names: dict[str, Row] = {}
    monkeypatch.setattr(convert, "model_row", names.__getitem__)
    return names


def test_timm_with_rotary_positions_is_not_read_as_something_else() -> None:
    deit3 = theirs(replace(PLAIN, layer_scale=1e-6, class_position=False), vit_others.DEIT3)
    assert recognise(raw(deit3)) is vit_others.DEIT3
    with pytest.raises(UserError, match="none that can be read"):
        recognise(raw(deit3, {"architecture": "vit_small_patch16_rope_ape_224"}))
    plain = theirs(PLAIN, vit_timm.TIMM)
    assert recognise(raw(plain, {"architecture": "vit_micro"})) is vit_timm.TIMM
    for architecture in ("vit_medium_patch16_rope_reg1_gap_256", "vit_pe_core_base_patch16_224"):
        with pytest.raises(UserError, match="none that can be read"):
            recognise(raw(plain, {"architecture": architecture}))
    rotary = theirs(replace(PLAIN, position="rotary", key_bias=False, qkv_bias=False, layer_scale=1e-5), vit_timm.TIMM)
    assert recognise(raw(rotary)) is vit_timm.TIMM
    with pytest.raises(UserError, match="none that can be read"):
        recognise(raw({name: tensor for name, tensor in rotary.items() if name != "cls_token"}))
    pooled = {**plain, "attn_pool.latent": torch.zeros(1, 1, 32), "norm_pre.weight": torch.ones(32)}
    with pytest.raises(UserError, match="none that can be read"):
        recognise(raw(pooled))


def test_activations_that_are_not_known_are_refused() -> None:
    plain = theirs(PLAIN, vit_timm.TIMM)
    config = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 2, "act_layer": "relu"}}
    with pytest.raises(UserError, match="a.pth: config.json: act_layer 'relu'"):
        import_weights(raw(plain, config))
    row = replace(BACKBONES["resnet18"], depths=(1, 1, 1, 1))
    assert isinstance(row, ResNetConfig)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs(row, resnet.FORMATS[0]).items()}
    assert resnet.plain_row(shapes, {}).depths == row.depths
    with pytest.raises(UserError, match="act_layer 'silu'"):
        resnet.plain_row(shapes, {"model_args": {"act_layer": "silu"}})


def test_offsets_of_swin_v2_are_divided_as_they_were_when_trained() -> None:
    state = theirs(SMALL, swin.FORMATS[3])

    def table(window: int, trained: int) -> Tensor:
        steps = torch.arange(1 - window, window) / (trained - 1) * 8
        logs = steps.sign() * (steps.abs() + 1).log2() / math.log2(8)
        return torch.stack(torch.meshgrid(logs, logs, indexing="ij"), dim=-1)[None]

    for trained, found in (((3, 3), (3, 3)), ((4, 4), None), ((4, 2), (4, 2))):
        tables = {f"layers.{s}.blocks.0.attn.relative_coords_table": table(4, trained[s]) for s in (0, 1)}
        row = form_of({**state, **tables})
        assert row.windows == (4, 4) and row.trained_windows == found


def test_a_named_vit_keeps_what_was_read(named: dict[str, Row]) -> None:
    dinov2 = replace(PLAIN, pool="token_mean", layer_scale=1.0)
    state = theirs(dinov2, vit_huggingface.HUGGINGFACE)
    named["two"] = replace(PLAIN, layer_scale=1.0, image_size=224)
    found = form_of(state, model="two")
    assert (found.pool, found.heads, found.image_size, found.resize) == ("token_mean", 2, 16, "bicubic")
    config = {"model_type": "dinov2", "num_attention_heads": 4, "layer_norm_eps": 1e-6}
    assert form_of(state, config, "two").heads == 4
    named["wide"] = replace(PLAIN, dim=64, layer_scale=1.0)
    with pytest.raises(UserError, match="a.pth: --model means a dim of 64, but the weights have 32"):
        import_weights(raw(state), model="wide")
    bare = theirs(replace(PLAIN, layer_scale=1e-5, registers=2, class_position=False), vit_timm.TIMM)
    named["registers"] = replace(PLAIN, layer_scale=1e-5, registers=2, class_position=True)
    assert not form_of(bare, model="registers").class_position


def test_a_named_swin_keeps_the_ways_of_its_dialect(named: dict[str, Row]) -> None:
    named["small"] = replace(SMALL, pad_first=True, unshifted="picture")
    found = form_of(theirs(SMALL, swin.FORMATS[3]), model="small")
    assert (found.pad_first, found.unshifted) == (False, "built")


def test_half_of_a_classifier_is_not_lost() -> None:
    row = replace(PLAIN, layer_scale=1.0)
    (rule,) = (rule for rule in vit_huggingface.HUGGINGFACE.rules(row, 3) if rule.ours == "head.weight")
    weight = torch.randn(3, 32)
    (both,) = rule.write(weight)
    assert torch.equal(rule.read(both), weight)
    with pytest.raises(ValueError, match="mean of the patches"):
        rule.read(both + 1)
    assert rule.gradient is not None and torch.equal(rule.gradient(both + 1), weight + 1), "not zero there"


def test_preprocessing_that_is_not_described() -> None:
    def read(row: Row, preprocessor: dict[str, Any]) -> tuple[Any, list[str]]:
        return read_preprocessing("weights", {}, preprocessor, row, vit_huggingface.HUGGINGFACE.usual(row))

    given = {"image_processor_type": "ViTImageProcessor", "size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    found, notes = read(PLAIN, given)
    assert found.interpolation == "bilinear" and not notes
    found, notes = read(PLAIN, {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224})
    assert found.mean == pytest.approx(CLIP_MEAN) and "image_mean and image_std; those of CLIPFeature" in notes[0]
    found, notes = read(PLAIN, {"size": 224, "do_normalize": False})
    assert found.mean == (0, 0, 0) and not notes
    found, notes = read(PLAIN, {})
    assert (found.mean, found.interpolation, len(notes)) == (HALF, "bilinear", 1)
    found, _ = read(replace(PLAIN, layer_scale=1.0), {})
    assert (found.crop, found.interpolation) == (0.875, "bicubic")
    for name, edge in (("swin_tiny", 232), ("swin_small", 246), ("swin_base", 238)):
        usual = swin.FORMATS[2].usual(SWIN[name])
        assert usual is not None and usual.crop == pytest.approx(224 / edge)


def test_eps_that_timm_does_not_have_is_not_written() -> None:
    assert vit_timm.timm_config(replace(PLAIN, norm_eps=1e-12), 3)["architecture"] == "vit_base_patch16_224"
    for row in (replace(PLAIN, norm_eps=1e-3), replace(PLAIN, norm_eps=1e-5, pool="distilled")):
        with pytest.raises(NoWords, match="eps"):
            vit_timm.timm_config(row, 3)
