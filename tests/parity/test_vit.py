"""The ViT family against timm, transformers and torchvision, and against timm's readers of original files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from compare import agree, convert, randomise, round_trip, stages_agree, wrong_keys_are_refused
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade.backbones.vit import VIT, ViT, ViTConfig
from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.models.embedder import Embedder
from saccade.weights.formats.reference import FileNamed
from saccade.weights.formats.table import Format, read_state, write_state
from saccade.weights.formats.vit import FORMATS
from saccade.weights.formats.vit_huggingface import HUGGINGFACE, HUGGINGFACE_OTHERWISE
from saccade.weights.formats.vit_others import DEIT3, DINOV2, DINOV2_QUARTERS, DINOV3, NPZ, TORCHVISION, TORCHVISION_1
from saccade.weights.formats.vit_timm import KNOWN, TIMM

TINY = ViTConfig(dim=32, depth=2, heads=2, hidden=48, patch_size=4, image_size=16)
WIDE = replace(TINY, hidden=64)  # transformers' DINOv2 knows whole multiples alone
SCALED = replace(WIDE, layer_scale=1.0)
GATED = replace(SCALED, mlp="swiglu", hidden=88)
ROTARY = replace(TINY, position="rotary", registers=3, layer_scale=1.0, norm_eps=1e-5, key_bias=False)
CLIP = replace(TINY, pre_norm=True, mlp="quick_gelu", norm_eps=1e-5)
SIGLIP = replace(TINY, pool="attention", mlp="gelu_tanh")
HF = replace(TINY, norm_eps=1e-12, resize="bicubic")


@dataclass(frozen=True)
class Case:
    format: Format
    row: ViTConfig
    classes: int = 5


CASES = {
    "timm vit": Case(TIMM, TINY),
    "timm vit features": Case(TIMM, TINY, 0),
    "timm vit without qkv bias": Case(TIMM, replace(TINY, qkv_bias=False)),
    "timm vit mean": Case(TIMM, replace(TINY, pool="mean")),
    "timm vit mean beside a class token": Case(TIMM, replace(TINY, pool="mean", class_token=True)),
    "timm vit norm after mean": Case(TIMM, replace(TINY, pool="mean", class_token=True, norm_pooled=True)),
    "timm deit": Case(TIMM, replace(TINY, pool="distilled")),
    "timm deit features": Case(TIMM, replace(TINY, pool="distilled"), 0),
    "timm deit3": Case(TIMM, replace(SCALED, class_position=False)),
    "timm dinov2": Case(TIMM, SCALED, 0),
    "timm dinov2 giant": Case(TIMM, GATED, 0),
    "timm dinov2 registers": Case(TIMM, replace(SCALED, registers=4, class_position=False), 0),
    "timm registers with positions": Case(TIMM, replace(TINY, registers=2)),
    "timm dinov3": Case(TIMM, replace(ROTARY, pool="mean", class_token=True), 0),
    "timm dinov3 token": Case(TIMM, ROTARY),
    "timm dinov3 without bias": Case(TIMM, replace(ROTARY, qkv_bias=False, key_bias=True)),
    "timm dinov3 gated": Case(TIMM, replace(ROTARY, mlp="swiglu")),
    "timm siglip": Case(TIMM, SIGLIP, 0),
    "timm siglip exact gelu": Case(TIMM, replace(SIGLIP, mlp="gelu")),
    "timm clip": Case(TIMM, CLIP),
    "huggingface vit": Case(HUGGINGFACE, HF),
    "huggingface vit features": Case(HUGGINGFACE, HF, 0),
    "huggingface vit features with prefix": Case(HUGGINGFACE_OTHERWISE, HF, 0),
    "huggingface deit": Case(HUGGINGFACE, replace(HF, pool="distilled")),
    "huggingface deit class token": Case(HUGGINGFACE, replace(HF, registers=1)),
    "huggingface deit features": Case(HUGGINGFACE, replace(HF, pool="distilled"), 0),
    "huggingface dinov2": Case(HUGGINGFACE, replace(SCALED, pool="token_mean", resize="bicubic")),
    "huggingface dinov2 features": Case(HUGGINGFACE, replace(SCALED, resize="bicubic"), 0),
    "huggingface dinov2 giant": Case(HUGGINGFACE, replace(GATED, resize="bicubic"), 0),
    "huggingface dinov2 registers": Case(HUGGINGFACE, replace(SCALED, registers=2, pool="token_mean")),
    "huggingface dinov2 registers features": Case(HUGGINGFACE, replace(GATED, registers=2), 0),
    "huggingface dinov3": Case(HUGGINGFACE, ROTARY, 0),
    "huggingface dinov3 gated": Case(HUGGINGFACE, replace(ROTARY, mlp="swiglu"), 0),
    "huggingface dinov3 without bias": Case(HUGGINGFACE, replace(ROTARY, qkv_bias=False, key_bias=True), 0),
    "huggingface siglip": Case(HUGGINGFACE, replace(SIGLIP, resize="bicubic"), 0),
    "huggingface siglip without prefix": Case(HUGGINGFACE_OTHERWISE, replace(SIGLIP, resize="bicubic"), 0),
    "huggingface clip": Case(HUGGINGFACE, replace(CLIP, resize="bicubic"), 0),
    "huggingface clip without prefix": Case(HUGGINGFACE_OTHERWISE, replace(CLIP, resize="bicubic"), 0),
    "huggingface clip projection": Case(HUGGINGFACE, replace(CLIP, resize="bicubic", projection=24), 0),
    "torchvision": Case(TORCHVISION, TINY),
    "torchvision published": Case(TORCHVISION_1, TINY),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
PACKAGES = {"timm": "timm", "huggingface": "transformers", "torchvision": "torchvision"}


def ours_of(row: ViTConfig, classes: int) -> nn.Module:
    backbone = ViT(row)
    return Classifier(backbone, classes) if classes else Embedder(backbone)


def both(case: Case, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Ours, and theirs of random weights."""
    pytest.importorskip(PACKAGES[case.format.dialect])
    assert case.format.peer is not None
    config = case.format.write_config(case.row, case.classes)
    theirs = case.format.peer.build(case.row, case.classes, config)
    return ours_of(case.row, case.classes), randomise(theirs, seed)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def picture(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@cases
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_loss_and_gradients(case, size, dtype):
    """The second size is no square, larger one way and smaller the other than what positions are made for.

    Measured in float32: logits 2.1e-6, loss 8.3e-7, gradients 6.2e-6 of each one's largest; in float64: 2.1e-15,
    8.9e-16 and 2.4e-15.
    """
    if case.format.dialect == "torchvision" and size != (16, 16):
        pytest.skip("torchvision takes the one size alone")
    assert case.format.peer is not None
    ours, theirs = both(case)
    agree(
        ours,
        theirs,
        case.format.rules(case.row, case.classes),
        picture(*size),
        torch.tensor([1, 4]) if case.classes else None,
        logits=case.format.peer.logits,
        dtype=dtype,
        ignored=case.format.ignored,
    )


@cases
def test_every_stage(case):
    """Measured: 4.0e-15."""
    assert case.format.peer is not None
    ours, theirs = both(case)
    convert(ours, theirs, case.format.rules(case.row, case.classes), torch.float64, case.format.ignored)
    stages = case.format.stages(case.row)
    assert len(stages) >= case.row.depth + 1
    stages_agree(ours, theirs, stages, picture(16, 16), logits=case.format.peer.logits)


@cases
def test_there_and_back(case):
    ours, theirs = both(case)
    rules = case.format.rules(case.row, case.classes)
    round_trip(ours, theirs, rules, case.format.ignored)
    wrong_keys_are_refused(ours, theirs.state_dict(), rules, case.format.ignored)


@cases
def test_row_from_config_and_shapes(case):
    """What is read is what was built, and no other dialect takes the file for its own."""
    _, theirs = both(case)
    shapes, config = shapes_of(theirs.state_dict()), case.format.write_config(case.row, case.classes)
    assert [each for each in FORMATS if each.recognises(shapes, config)] == [case.format]
    assert [each for each in FORMATS if each.recognises(shapes, {})] == [case.format]
    assert case.format.classes(shapes, config) == case.classes
    found = case.format.row(shapes, config)
    assert isinstance(found, ViTConfig)
    if case.format.dialect == "torchvision":
        found = replace(found, heads=2)  # no config.json there
    row = replace(case.row, layer_scale=found.layer_scale)
    assert (row.layer_scale is None) == (case.row.layer_scale is None)
    assert found == row


# --- what the peers themselves build and load ------------------------------------------------------------------------

OTHER_TIMM = {
    "vit_base_patch16_siglip_224": "siglip_base",
    "vit_large_patch16_siglip_256": "siglip_large",
    "vit_so400m_patch14_siglip_224": "siglip_so400m",
    "vit_base_patch16_clip_quickgelu_224": "clip_base_16",
    "vit_base_patch16_clip_224": None,
    "vit_giant_patch14_clip_224": None,
    "vit_so400m_patch16_siglip_256": None,
    "vit_base_patch16_siglip_gap_224": None,
    "vit_medium_patch16_reg4_gap_256": None,
    "vit_medium_patch16_gap_240": None,
    "vit_base_patch16_gap_224": None,
    "vit_small_patch16_dinov3": None,
    "deit_small_patch16_224": "vit_small",
}
# what a row of the table says and timm's model does not: its GELU and the place of its projection
SIMILAR = ("mlp", "projection")


@pytest.mark.parametrize(("name", "ours"), [*((timm, ours) for ours, timm in KNOWN.items()), *OTHER_TIMM.items()])
def test_timms_models_by_name(name, ours):
    """Every tensor has its place, and the rows of our table are what timm has under the name."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(name, depth=2)
    config = {
        "architecture": name,
        "num_classes": theirs.num_classes,
        "global_pool": "token" if "dinov3" in name else theirs.global_pool,
    }
    state = theirs.state_dict()
    shapes = shapes_of(state)
    assert [each for each in FORMATS if each.recognises(shapes, config)] == [TIMM]
    row, classes = TIMM.row(shapes, config), TIMM.classes(shapes, config)
    assert isinstance(row, ViTConfig)
    with torch.device("meta"):
        model = ours_of(row, classes)
    model.load_state_dict(read_state(state, TIMM.rules(row, classes), TIMM.ignored, name), strict=True, assign=True)
    assert row.heads == theirs.blocks[0].attn.num_heads
    assert row.norm_eps == theirs.blocks[0].norm1.eps
    activation = getattr(theirs.blocks[0].mlp, "act", None)
    expected = {"gelu": "GELU()", "gelu_tanh": "GELUTanh()", "quick_gelu": "QuickGELU()", "swiglu": "SiLU()"}
    assert repr(activation).replace("approximate='none'", "") == expected[row.mlp]
    if ours is not None:
        known = replace(VIT[ours], depth=2)
        for field in SIMILAR if "siglip" in name or "clip" in name else ():
            known = replace(known, **{field: getattr(row, field)})
        assert row.is_like(known), (row, known)


TIMM_CASES = {name: case for name, case in CASES.items() if case.format is TIMM}
HF_CASES = {name: case for name, case in CASES.items() if case.format is HUGGINGFACE}


@pytest.mark.parametrize("case", TIMM_CASES.values(), ids=TIMM_CASES.keys())
def test_timm_builds_from_our_config(case):
    """By the name and the arguments of the written config alone, as timm does with a folder of the hub."""
    timm = pytest.importorskip("timm")
    ours, theirs = both(case)
    rules = TIMM.rules(case.row, case.classes)
    convert(ours, theirs, rules, torch.float32)
    config = json.loads(json.dumps(TIMM.write_config(case.row, case.classes)))
    built = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
    built.load_state_dict(write_state(ours.state_dict(), rules), strict=True)
    images = picture(16, 16).float()
    with torch.no_grad():
        # the two heads of DeiT share the mean of their biases afterwards
        assert (built(images) - theirs(images)).abs().max() <= 1e-5  # measured 6.0e-8, and 0 for all others


@pytest.mark.parametrize("case", HF_CASES.values(), ids=HF_CASES.keys())
def test_transformers_loads_our_folder(case, tmp_path):
    """transformers' own loader, which renames what older files have, finds a place for everything."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = both(case)
    rules = HUGGINGFACE.rules(case.row, case.classes)
    convert(ours, theirs, rules, torch.float32, HUGGINGFACE.ignored)
    config = HUGGINGFACE.write_config(case.row, case.classes)
    if case.classes:
        config["id2label"] = {str(i): f"class {i}" for i in range(case.classes)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(write_state(ours.state_dict(), rules), tmp_path / "model.safetensors", metadata={"format": "pt"})
    built, info = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all("mask_token" in name or name.startswith("pooler.") for name in info["missing_keys"])
    assert isinstance(theirs, FileNamed)
    images = picture(16, 16).float()
    with torch.no_grad():
        expected = ours(images).logits if case.classes else ours(images).embedding
        assert (theirs.answer(built.eval(), images) - expected).abs().max() <= 1e-4  # measured 2.0e-6


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_the_image_tower_of_a_model_of_pictures_and_texts(name):
    """The text part is left aside, by the patterns that say so. Their configs leave out what is a default."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 32}
    config = getattr(transformers, name.replace("Model", "Config"))(
        vision_config={**tower, "image_size": 16, "patch_size": 4}, text_config=text, projection_dim=24
    )
    theirs: Any = randomise(getattr(transformers, name)(config)).eval()
    state, described = theirs.state_dict(), json.loads(config.to_json_string(use_diff=True))
    assert [each for each in FORMATS if each.recognises(shapes_of(state), described)] == [HUGGINGFACE]
    row = HUGGINGFACE.row(shapes_of(state), described)
    assert isinstance(row, ViTConfig)
    assert (row.heads, row.projection) == (2, 24 if name == "CLIPModel" else None)
    ours = Embedder(ViT(row)).eval()
    ours.load_state_dict(read_state(state, HUGGINGFACE.rules(row, 0), HUGGINGFACE.ignored, name), strict=True)
    with torch.no_grad():
        features = theirs.get_image_features(picture(16, 16).float())
        expected = features if isinstance(features, Tensor) else features.pooler_output
        assert (ours(picture(16, 16).float()).embedding - expected).abs().max() <= 1e-4  # measured 9.5e-7


def test_a_part_of_a_config_without_heads_has_those_of_base():
    """google/siglip-base-patch16-224 says no more of its vision part than its type."""
    pytest.importorskip("transformers")
    _, theirs = both(Case(HUGGINGFACE, replace(SIGLIP, dim=48, heads=12), 0))
    described = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    row = HUGGINGFACE.row(shapes_of(theirs.state_dict()), described)
    assert isinstance(row, ViTConfig) and row.heads == 12 and row.mlp == "gelu_tanh" and row.norm_eps == 1e-6


# --- original repositories, with timm's readers of their files as the reference --------------------------------------

ORIGINALS: dict[str, tuple[Format, ViTConfig, int]] = {
    "dinov2": (DINOV2, SCALED, 0),
    "dinov2 giant": (DINOV2, GATED, 0),
    "dinov2 registers": (DINOV2, replace(SCALED, registers=4), 0),
    "deit3": (DEIT3, replace(SCALED, class_position=False), 5),
    "dinov3": (DINOV3, ROTARY, 0),
    "dinov3 gated": (DINOV3, replace(ROTARY, mlp="swiglu"), 0),
    "npz": (NPZ, TINY, 5),
}
originals = pytest.mark.parametrize("name", ORIGINALS)


def original(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Ours of random weights, and the same as the authors' file, with what else is in there."""
    format, row, classes = ORIGINALS[name]
    ours = randomise(ours_of(row, classes)).eval()
    state = write_state(ours.state_dict(), format.rules(row, classes))
    if name.startswith("dino"):
        state["mask_token"] = torch.randn(1, row.dim)
    if name.startswith("dinov3"):
        state["rope_embed.periods"] = torch.randn(4)
        state |= {f"blocks.{i}.attn.qkv.bias_mask": torch.ones(3 * row.dim) for i in range(row.depth)}
    return ours, state


@originals
def test_original_files(name, tmp_path):
    pytest.importorskip("timm")
    from timm.models import deit, eva, vision_transformer

    format, row, classes = ORIGINALS[name]
    ours, state = original(name)
    in_timm = replace(row, class_position=row.class_position and not row.registers)
    theirs: Any = TIMM.peer.build(in_timm, classes, {}) if TIMM.peer else None
    if format is NPZ:
        arrays: dict[str, Any] = {key: value.numpy() for key, value in state.items()}
        np.savez(tmp_path / "vit.npz", **arrays)
        theirs.load_pretrained(str(tmp_path / "vit.npz"))
    else:
        reader = {DEIT3: deit.checkpoint_filter_fn, DINOV3: eva.checkpoint_filter_fn}.get(
            format, vision_transformer.checkpoint_filter_fn
        )
        options = {"adapt_layer_scale": True} if format is DEIT3 else {}
        theirs.load_state_dict(reader(dict(state), theirs, **options), strict=True)
    images = picture(16, 16).float()
    with torch.no_grad():
        got = ours(images).logits if classes else ours(images).embedding
        assert (theirs.eval()(images) - got).abs().max() <= 1e-4  # measured 1.3e-6


@originals
def test_original_files_are_recognised_and_come_back(name):
    format, row, classes = ORIGINALS[name]
    ours, state = original(name)
    shapes = shapes_of(state)
    assert [each for each in FORMATS if each.recognises(shapes, {})] == [format]
    assert format.classes(shapes, {}) == classes
    found = format.row(shapes, {})
    assert isinstance(found, ViTConfig) and found.is_like(replace(row, heads=found.heads))
    again = read_state(state, format.rules(row, classes), format.ignored, name)
    for key, value in ours.state_dict().items():
        assert torch.equal(again[key], value), key
    wrong_keys_are_refused(ours, state, format.rules(row, classes), format.ignored)


def test_blocks_saved_in_four_parts():
    """DINOv2 in training keeps its blocks in parts, and each block its number."""
    row = replace(SCALED, depth=8)
    ours = randomise(ours_of(row, 0))
    plain = write_state(ours.state_dict(), DINOV2.rules(row, 0))
    parts = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): v for key, v in plain.items()}
    assert "blocks.3.7.attn.qkv.weight" in parts
    assert [each for each in FORMATS if each.recognises(shapes_of(parts), {})] == [DINOV2_QUARTERS]
    found = DINOV2_QUARTERS.row(shapes_of(parts), {})
    assert isinstance(found, ViTConfig) and found.depth == 8 and found.resize == "offset"
    again = read_state(parts, DINOV2_QUARTERS.rules(row, 0), DINOV2_QUARTERS.ignored, "parts")
    assert all(torch.equal(again[key], value) for key, value in ours.state_dict().items())


# --- what cannot be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "row", "classes", "what"),
    [
        (TIMM, VIT["cct_nano"], 5, "pools by sequence"),
        (TIMM, replace(TINY, stem=(8, 16)), 5, "no place elsewhere"),
        (HUGGINGFACE, replace(TINY, attention="linear"), 5, "no place elsewhere"),
        (TIMM, replace(TINY, pool="token_mean"), 5, "pools by token_mean"),
        (TIMM, replace(TINY, position="rotary"), 5, "a bias of keys"),
        (TIMM, replace(TINY, position="sinusoidal"), 5, "sinusoidal positions"),
        (TIMM, replace(CLIP, projection=8), 5, "without the head"),
        (HUGGINGFACE, replace(TINY, pool="mean"), 5, "pools by mean"),
        (HUGGINGFACE, ROTARY, 5, "no classifier on the summary"),
        (HUGGINGFACE, replace(TINY, mlp="swiglu"), 5, "no model of this form"),
        (HUGGINGFACE, replace(TINY, registers=2), 5, "no model of this form"),
        (TORCHVISION, SCALED, 5, "no place for LayerScale"),
        (TORCHVISION, replace(TINY, registers=2), 5, "only the plain one"),
        (NPZ, SCALED, 5, "only the plain one"),
        (DINOV2, ROTARY, 0, "no model of this form"),
    ],
)
def test_what_has_no_place_elsewhere_is_said(format, row, classes, what):
    with pytest.raises(UserError, match=what):
        format.rules(row, classes)


def test_clips_projection_is_timms_classifier():
    row = replace(CLIP, projection=24)
    ours = randomise(ours_of(row, 0)).eval()
    state = write_state(ours.state_dict(), TIMM.rules(row, 0))
    assert state["head.weight"].shape == (24, 32) and not state["head.bias"].any()
    theirs: Any = TIMM.peer.build(row, 0, {}) if TIMM.peer else None
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        gap = theirs.eval()(picture(16, 16).float()) - ours(picture(16, 16).float()).embedding
    assert gap.abs().max() <= 1e-4  # measured 4.2e-7


# --- in full size ----------------------------------------------------------------------------------------------------

FULL: dict[str, tuple[Format, str, int, dict[str, Any]]] = {
    "timm vit": (TIMM, "vit_base", 1000, {}),
    "timm deit": (TIMM, "deit_base", 1000, {}),
    "timm deit3": (TIMM, "deit3_base", 1000, {}),
    "timm dino": (TIMM, "dino_small_8", 0, {}),
    "timm dinov2": (TIMM, "dinov2_base", 0, {}),
    "timm dinov2 registers": (TIMM, "dinov2_base_registers", 0, {}),
    "timm dinov3": (TIMM, "dinov3_base", 0, {}),
    "timm dinov3 gated": (TIMM, "dinov3_small_plus", 0, {}),
    "timm siglip": (TIMM, "siglip_base", 0, {}),
    "timm clip": (TIMM, "clip_base_32", 512, {"projection": None}),
    "huggingface vit": (HUGGINGFACE, "vit_base", 1000, {"resize": "bicubic", "norm_eps": 1e-12}),
    "huggingface deit": (HUGGINGFACE, "deit_base", 1000, {"resize": "bicubic", "norm_eps": 1e-12}),
    "huggingface dinov2": (HUGGINGFACE, "dinov2_base", 1000, {"resize": "bicubic", "pool": "token_mean"}),
    "huggingface dinov2 registers": (HUGGINGFACE, "dinov2_base_registers", 0, {}),
    "huggingface dinov3": (HUGGINGFACE, "dinov3_base", 0, {}),
    "huggingface siglip": (HUGGINGFACE, "siglip_base", 0, {"resize": "bicubic"}),
    "huggingface clip": (HUGGINGFACE, "clip_base_32", 0, {"resize": "bicubic"}),
    "torchvision vit": (TORCHVISION, "vit_base", 1000, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FULL)
def test_full_size(name, dtype):
    """On a grid that is no square, and not the one that the positions are made for, but with torchvision.

    Measured in float32: logits 4.1e-6, loss 9.5e-7, gradients 8.6e-6 of each one's largest; in float64: 7.3e-15,
    1.8e-15 and 9.7e-15.
    """
    format, ours, classes, changes = FULL[name]
    row = replace(VIT[ours], **changes)
    case = Case(format, row, classes)
    network, theirs = both(case)
    assert format.peer is not None
    side = row.image_size
    size = (side, side) if format is TORCHVISION else (6 * row.stride, 10 * row.stride)
    targets = torch.tensor([3]) if classes else None
    rules = format.rules(row, classes)
    images = picture(*size, count=1)
    agree(network, theirs, rules, images, targets, logits=format.peer.logits, dtype=dtype, ignored=format.ignored)


def test_the_reference_is_built_as_its_source_describes_itself() -> None:
    """Else what was misread would be built twice, and agree."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    assert timm and transformers and TIMM.peer is not None and HUGGINGFACE.peer is not None
    written = TIMM.write_config(TINY, 10)
    theirs: Any = TIMM.peer.build(TINY, 10, {**written, "architecture": "vit_base_patch16_clip_quickgelu_224.openai"})
    assert theirs.blocks[0].norm1.eps == 1e-5 != TINY.norm_eps
    unknown: Any = TIMM.peer.build(TINY, 10, {**written, "architecture": "vit_of_another_library"})
    assert unknown.blocks[0].norm1.eps == TINY.norm_eps
    written = HUGGINGFACE.write_config(HF, 10)
    inner: Any = HUGGINGFACE.peer.build(HF, 10, {**written, "hidden_act": "relu", "id2label": {"0": "one"}})
    assert inner.inner.config.hidden_act == "relu" and inner.inner.config.num_labels == 10
