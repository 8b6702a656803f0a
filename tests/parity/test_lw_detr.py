"""LW-DETR and RF-DETR against transformers, with random weights: outputs of all layers and of proposals, matches, every
part of the loss, gradients; in training, too, with all groups of queries; and their files."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_detectors import DOUBLE, LIMITS, SINGLE, agree, convert, pair, randomise_all
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.backbones.windowed_vit import WindowedViTConfig
from saccade.errors import UserError
from saccade.models import DETECTORS, build_network, name_of
from saccade.models.detector import BoxTargets, Detector
from saccade.models.lw_detr import LWDetr, LWDETRConfig, RFDETRConfig
from saccade.tasks.lw_detr_loss import LW_DETR
from saccade.verification import verify
from saccade.verification.detection import made_up_targets
from saccade.weights.convert import import_weights, recognise
from saccade.weights.export import convert as convert_file
from saccade.weights.formats.detection_loss import labels_of
from saccade.weights.formats.lw_detr import FORMATS
from saccade.weights.formats.reference import exact
from saccade.weights.formats.table import Format, read_gradients, read_state, write_state
from saccade.weights.load import load_network
from saccade.weights.source import RawWeights

transformers = pytest.importorskip("transformers")

LW_SAVED, LW_MODULES, LW_ORIGINAL = (form for form in FORMATS if form.family == "lw_detr")
# with a block that is of no use, and without
RF_SAVED, RF_SAVED_IDLE, RF_MODULES, _, RF_OLDER, _, RF_ORIGINAL, RF_ORIGINAL_IDLE = (
    form for form in FORMATS if form.family == "rf_detr"
)
CLASSES = 7

SMALL: dict[str, Any] = {
    "dim": 32,
    "heads": 2,
    "cross_heads": 4,
    "hidden": 48,
    "decoder_depth": 2,
    "queries": 6,
    "groups": 3,
    "image_size": 64,
}
LW_BODY = WindowedViTConfig(
    dim=48, depth=3, heads=3, hidden=192, patch_size=8, grid=5, windows=2, whole=(1,), taken=(1, 3), layer_scale=0.1,
    key_bias=False, image_size=64,
)  # fmt: skip
RF_BODY = replace(LW_BODY, layer_scale=1.0, key_bias=True, class_token=True, norm=True, resize="antialias")
LW = LWDETRConfig(backbone=LW_BODY, **SMALL)
RF = RFDETRConfig(backbone=RF_BODY, norm_eps=1e-5, **SMALL)
ROWS: dict[str, tuple[Format, LWDETRConfig]] = {
    "lw": (LW_SAVED, LW),
    "lw_two_levels": (LW_SAVED, replace(LW, scales=(2.0, 0.5), points=4)),
    "lw_wide": (LW_SAVED, replace(LW, scales=(2.0,), backbone=replace(LW_BODY, dim=516, hidden=2064, depth=1, whole=(),
                                                                     taken=(1,)))),
    "lw_modules": (LW_MODULES, LW),
    "rf": (RF_SAVED, RF),
    "rf_modules": (RF_MODULES, RF),
    "rf_older": (RF_OLDER, RF),
    "rf_no_windows": (RF_SAVED, replace(RF, backbone=replace(RF_BODY, windows=1))),
}  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)


def size(kind: str) -> tuple[int, int]:
    """transformers' RF-DETR is right on squares alone; see below."""
    return (64, 96) if kind.startswith("lw") else (64, 64)


@pytest.mark.parametrize("kind", ROWS)
@dtypes
def test_tiny(kind, dtype):
    """Measured: outputs and losses 7.9e-6 in float32, 5.1e-15 in float64; gradients 1.6e-5 and 2.4e-14."""
    form, row = ROWS[kind]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, dtype)
    agree(ours, theirs, form, size(kind), made_up_targets(2, CLASSES, dtype), CLASSES, dtype)


@pytest.mark.parametrize("kind", ["lw", "rf"])
@pytest.mark.parametrize("things", [0, 9], ids=["no things at all", "more things than queries"])
def test_odd_numbers_of_things(kind, things):
    form, row = ROWS[kind]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, DOUBLE)
    boxes = 0.1 + 0.5 * torch.rand(things, 4, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    targets = BoxTargets(boxes, torch.arange(things) % CLASSES, torch.zeros(things, dtype=torch.long))
    agree(ours, theirs, form, size(kind), targets, CLASSES, DOUBLE)


@pytest.mark.parametrize("kind", ["lw", "lw_two_levels", "rf"])
@pytest.mark.parametrize("things", [True, False], ids=["things", "no things at all"])
@dtypes
def test_training(kind, things, dtype):
    """All groups, and statistics of batches. Measured: losses 1.5e-7 in float32, 1.8e-16 in float64, relative;
    gradients 3.1e-5 and 4.6e-14."""
    form, row = ROWS[kind]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, dtype)
    ours.train()
    theirs.train()
    targets = made_up_targets(3, CLASSES, dtype)
    if not things:
        targets = BoxTargets(targets.boxes[:0], targets.labels[:0], targets.picture[:0])
    images = torch.randn(3, 3, *size(kind), generator=torch.Generator().manual_seed(1)).to(dtype)
    with exact(images):
        answer = theirs.inner(pixel_values=images, labels=labels_of(targets, 3))
    outputs = ours(images)
    assert outputs.logits.shape == answer.logits.shape == (3, row.groups * row.queries, CLASSES)
    found, expected = LW_DETR(outputs, targets), answer.loss_dict
    limit, gradient_limit = LIMITS[dtype]
    for name, theirs_name, weight in (("class", "loss_ce", 1), ("l1", "loss_bbox", 5), ("giou", "loss_giou", 2)):
        assert abs(found[name] - weight * expected[theirs_name]) <= limit * max(1.0, found[name].item()), name
    total = torch.stack(list(found.values())).sum()
    assert abs(total - answer.loss) <= limit * answer.loss.item()
    total.backward()
    answer.loss.backward()
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    state |= {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    own = dict(ours.named_parameters())
    gradients = read_gradients(state, [rule for rule in form.rules(row, CLASSES) if rule.ours in own])
    least, worst = 1e-3 * max(g.abs().max().item() for g in gradients.values()), 0.0
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        gap = (parameter.grad - gradients[name]).abs().max().item() / max(least, gradients[name].abs().max().item())
        worst = max(worst, gap)
        assert gap <= gradient_limit, name
    print(f"{dtype}: loss {abs(total - answer.loss).item() / answer.loss.item():.1e}, gradients {worst:.1e}")
    after = read_state(theirs.state_dict(), form.rules(row, CLASSES), form.ignored, "theirs")
    for name, buffer in ours.named_buffers():
        assert (buffer - after[name]).abs().max() <= 1e-5, name


def test_transformers_needs_a_place_for_each_query():
    form, row = ROWS["lw_two_levels"]
    _, theirs = pair(form, replace(row, queries=9), CLASSES)
    assert form.peer is not None
    assert form.peer.logits(theirs.eval(), torch.randn(1, 3, 16, 32)).shape == (1, 9, CLASSES)
    with pytest.raises(UserError, match="each of its 9 queries, and pictures of 16 x 8 pixels have 8;"):
        form.peer.logits(theirs, torch.randn(1, 3, 16, 8))


def test_an_rf_detr_of_any_shape(monkeypatch: pytest.MonkeyPatch):
    """transformers cuts windows as if height were width. With windows cut from where they lie, it agrees."""
    from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Embeddings

    def cut(self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
        W, patch = self.config.num_windows, self.patch_size
        h, w = height // patch // W, width // patch // W
        inside = embeddings[:, 1:].unflatten(1, (W, h, W, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        return torch.cat((embeddings[:, :1].repeat_interleave(W**2, 0), inside), dim=1)

    form, row = ROWS["rf"]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, DOUBLE)
    images = torch.randn(2, 3, 96, 64, dtype=DOUBLE)
    assert form.peer is not None
    with pytest.raises(UserError, match="compare an RF-DETR on squares"):
        form.peer.logits(theirs, images)
    monkeypatch.setattr(RfDetrDinov2Embeddings, "window_partition", cut)
    with exact(images):
        answer = theirs.inner(pixel_values=images)
    outputs = ours(images)
    assert (outputs.logits - answer.logits).abs().max() <= 1e-9  # measured 4e-15
    assert (outputs.boxes - answer.pred_boxes).abs().max() <= 1e-9


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("name", ["lw_detr_tiny", "lw_detr_large", "rf_detr_nano", "rf_detr_base"])
def test_full_size(name, dtype):
    """Measured: outputs and losses 1.2e-5 in float32, 2.9e-14 in float64; gradients 7.5e-3 and 1.6e-14."""
    row = DETECTORS[name]
    assert isinstance(row, LWDETRConfig)
    form = LW_SAVED if row.family == "lw_detr" else RF_SAVED
    ours, theirs = pair(form, replace(row, norm_eps=1e-5), 91)
    convert(ours, theirs, form, 91, dtype)
    side = 384 if name == "rf_detr_nano" else 5 * row.stride  # a place for each query, which transformers needs
    agree(ours, theirs, form, (side, side), made_up_targets(2, 91, dtype), 91, dtype)


# --- files -----------------------------------------------------------------------------------------------------------


def images_of(kind: str) -> Tensor:
    return torch.randn(1, 3, *size(kind), generator=torch.Generator().manual_seed(1))


def same_network(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert state.keys() == one.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("kind", ["lw", "lw_two_levels", "lw_modules", "rf", "rf_modules"])
def test_there_and_back(tmp_path: Path, kind: str):
    """A folder that transformers saved in either way -> ours -> a folder that it loads strictly, with the same bits."""
    form, row = ROWS[kind]
    _, theirs = pair(form, row, CLASSES)
    model: Any = theirs.inner
    model.save_pretrained(tmp_path / "theirs", save_original_format=not kind.endswith("modules"))
    result = convert_file(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert (result.read_as, result.classes) == (f"huggingface {row.family}", CLASSES)
    ours, card = load_network(tmp_path / "ours.safetensors")
    assert isinstance(ours, LWDetr) and ours.config.is_like(row) and type(ours.config) is type(row)
    assert ours.config.norm_eps == 1e-5 or row.family == "lw_detr"
    assert card.preprocessing.interpolation == "bilinear" and card.preprocessing.stride == row.stride
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    again, report = transformers.AutoModelForObjectDetection.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    side = card.preprocessing.image_size
    size_of_theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back").size
    assert (size_of_theirs["height"], size_of_theirs["width"]) == (side, side)
    convert_file(tmp_path / "back", tmp_path / "again.safetensors")
    third, of_third = load_network(tmp_path / "again.safetensors")
    assert of_third.preprocessing == card.preprocessing and of_third.class_names == card.class_names
    same_network(ours, third)
    with torch.no_grad():
        assert (again.eval()(images_of(kind)).logits - ours(images_of(kind)).logits).abs().max() <= 1e-5
        assert (model.eval()(images_of(kind)).logits - ours(images_of(kind)).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("form", [LW_SAVED, LW_MODULES, LW_ORIGINAL, RF_SAVED, RF_MODULES, RF_OLDER])
def test_every_name_matters(form: Format):
    row = replace(LW, scales=(2.0, 0.5)) if form.family == "lw_detr" else RF
    rules = form.rules(row, CLASSES)
    written = write_state(build_network(row, CLASSES).state_dict(), rules)
    for name in written:
        with pytest.raises(UserError, match="missing"):
            read_state({k: v for k, v in written.items() if k != name}, rules, form.ignored, "x")
    with pytest.raises(UserError, match="left over: extra"):
        read_state({**written, "extra": torch.zeros(1)}, rules, form.ignored, "x")


def test_the_older_spelling(tmp_path: Path):
    """Of attention, as files have it that were made while transformers learnt the model."""
    _, theirs = pair(RF_OLDER, RF, CLASSES)
    state = dict(theirs.state_dict())
    name = "model.backbone.backbone.encoder.layer.0.attention.attention.query.weight"
    assert name in state and "model.decoder.layers.0.self_attn.q_proj.weight" in state
    found = import_weights(RawWeights("a file", state, RF_OLDER.write_config(RF, CLASSES)))
    assert found.format is RF_OLDER and found.row.is_like(RF)


LW_CONFIG = {  # what the config.json of a published model says that matters here, of a small one
    "architectures": ["LwDetrForObjectDetection"],
    "model_type": "lw_detr",
    "activation_function": "silu",
    "attention_bias": True,
    "backbone_config": {
        "model_type": "lw_detr_vit",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 1024,
        "pretrain_image_size": 40,
        "patch_size": 8,
        "num_windows": 4,
        "window_block_indices": [0, 2],
        "out_indices": [1, 3],
        "out_features": ["stage1", "stage3"],
        "cae_init_values": 0.1,
    },
    "c2f_num_blocks": 3,
    "d_model": 32,
    "decoder_cross_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_n_points": 2,
    "decoder_self_attention_heads": 2,
    "group_detr": 3,
    "hidden_expansion": 0.5,
    "num_queries": 6,
    "num_feature_levels": 1,
    "projector_scale_factors": [1.0],
    "id2label": {"0": "N/A", "1": "person", "2": "N/A", "3": "cat"},
}
PREPROCESSOR = {
    "image_processor_type": "DeformableDetrImageProcessor",
    "do_pad": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "size": {"height": 640, "width": 640},
}


def published(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ours = build_network(LW, 4)
    randomise_all(ours)
    folder.mkdir()
    save_file(write_state(ours.state_dict(), LW_SAVED.rules(LW, 4)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return ours.state_dict()


def test_a_folder_as_it_is_published(tmp_path: Path):
    state = published(tmp_path / "lw", LW_CONFIG)
    network, card = load_network(tmp_path / "lw")
    assert isinstance(network, LWDetr) and network.config.is_like(LW)
    assert card.class_names == ("N/A", "person", "N/A", "cat") and card.task == "detect"
    assert (card.preprocessing.image_size, card.preprocessing.interpolation) == (640, "bilinear")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "relu"}, "activation_function = 'relu' is not supported"),
        ({"backbone_config": {"hidden_act": "relu"}}, "backbone_config.hidden_act = 'relu'"),
        ({"backbone_config": {"out_features": ["stage1", "stage2"]}}, "after .1, 2. of 3 blocks"),
        ({"hidden_expansion": 1.0}, "hidden_expansion"),
        ({"decoder_n_points": "many"}, "describes a model that cannot be built|incomplete"),
        ({"decoder_n_points": 3}, "shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_forms_are_refused(tmp_path: Path, change: dict[str, Any], words: str):
    backbone = {**LW_CONFIG["backbone_config"], **change.get("backbone_config", {})}  # type: ignore[dict-item]
    published(tmp_path / "lw", {**LW_CONFIG, **change, "backbone_config": backbone})
    with pytest.raises(UserError, match=words):
        load_network(tmp_path / "lw")


def test_masks_are_refused(tmp_path: Path):
    config = transformers.RfDetrConfig.from_dict({**RF_SAVED.write_config(RF, CLASSES), "num_labels": CLASSES})
    transformers.RfDetrForInstanceSegmentation(config).save_pretrained(tmp_path / "masks")
    with pytest.raises(UserError, match=r"looks most like \w+ rf_detr.*left over segmentation_head"):
        load_network(tmp_path / "masks")


def original_names(row: LWDETRConfig) -> list[str]:
    """The keys of the original repositories' files, as they are published; written down without our table."""
    both, batch = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    lw, body = row.family == "lw_detr", row.backbone
    assert isinstance(body, WindowedViTConfig)
    names = [f"class_embed.{part}" for part in both] + ["query_feat.weight", "refpoint_embed.weight"]
    names += [f"bbox_embed.layers.{k}.{part}" for k in range(3) for part in both]
    names += [f"transformer.decoder.ref_point_head.layers.{k}.{part}" for k in range(2) for part in both]
    for g in range(row.groups):
        names += [f"transformer.{layer}.{g}.{part}" for layer in ("enc_output", "enc_output_norm") for part in both]
        names += [f"transformer.enc_out_class_embed.{g}.{part}" for part in both]
        names += [f"transformer.enc_out_bbox_embed.{g}.layers.{k}.{part}" for k in range(3) for part in both]
    layers = ["self_attn.out_proj", *(f"norm{k}" for k in (1, 2, 3)), "linear1", "linear2"]
    layers += [f"cross_attn.{each}" for each in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")]
    for i in range(row.decoder_depth):
        names += [f"transformer.decoder.layers.{i}.{layer}.{part}" for layer in layers for part in both]
        names += [f"transformer.decoder.layers.{i}.self_attn.in_proj_{part}" for part in both]
    names += [f"transformer.decoder.norm.{part}" for part in both]
    statistics = batch if lw else both
    for s, scale in enumerate(row.scales):
        stage = f"backbone.0.projector.stages.{s}"
        for conv in ("cv1", "cv2", *(f"m.{j}.cv{k}" for j in range(3) for k in (1, 2))):
            names += [f"{stage}.0.{conv}.conv.weight", *(f"{stage}.0.{conv}.bn.{part}" for part in statistics)]
        names += [f"{stage}.1.{part}" for part in both]
        for m in range(len(body.taken)):
            each = f"backbone.0.projector.stages_sampling.{s}.{m}"
            if scale == 0.5 or (scale == 2.0 and body.dim > 512):
                names += [f"{each}.0.conv.weight", *(f"{each}.0.bn.{part}" for part in statistics)]
            if scale == 2.0:
                names += [f"{each}.{int(body.dim > 512)}.{part}" for part in both]
    encoder = "backbone.0.encoder" if lw else "backbone.0.encoder.encoder"
    if lw:
        names += [f"{encoder}.pos_embed", *(f"{encoder}.patch_embed.proj.{part}" for part in both)]
        inner = ["norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"]
        more = ["gamma_1", "gamma_2", "attn.qkv.weight", "attn.q_bias", "attn.v_bias"]
        blocks = [f"{encoder}.blocks.{i}" for i in range(body.depth)]
    else:
        tables = ("cls_token", "position_embeddings", *(f"patch_embeddings.projection.{part}" for part in both))
        names += [f"{encoder}.embeddings.{each}" for each in tables]
        names += [f"{encoder}.layernorm.{part}" for part in both]
        inner = ["norm1", "norm2", "attention.output.dense", "mlp.fc1", "mlp.fc2"]
        inner += [f"attention.attention.{each}" for each in ("query", "key", "value")]
        more = ["layer_scale1.lambda1", "layer_scale2.lambda1"]
        blocks = [f"{encoder}.encoder.layer.{i}" for i in range(body.depth)]
    more += [f"{layer}.{part}" for layer in inner for part in both]
    return names + [f"{block}.{each}" for block in blocks for each in more]


@pytest.mark.parametrize("name", [name for name, row in DETECTORS.items() if isinstance(row, LWDETRConfig)])
def test_names_of_the_original_repositories(name):
    """They tell of every published model which one it is."""
    row = DETECTORS[name]
    assert isinstance(row, LWDETRConfig)
    form = LW_ORIGINAL if row.family == "lw_detr" else RF_ORIGINAL
    with torch.device("meta"):
        network = build_network(row, 91)
        written = write_state(network.state_dict(), form.rules(row, 91))
    assert sorted(written) == sorted(original_names(row))
    shapes = {key: tuple(tensor.shape) for key, tensor in written.items()}
    assert recognise(RawWeights("detr.pth", written)) is form
    assert form.classes(shapes, {}) == 91
    found = form.row(shapes, {})
    assert name_of(found) == name and found.image_size == row.image_size


def test_names_are_those_that_transformers_saves(tmp_path: Path):
    """It writes the original names of an RF-DETR, all of them."""
    model: Any = pair(RF_SAVED, RF, CLASSES)[1].inner
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(original_names(RF))


# heads and points that are those of the published ones, relative to the width; no file tells them
LIKE_LW = replace(
    LW, dim=64, heads=2, cross_heads=4, scales=(2.0, 0.5),
    backbone=replace(
        LW_BODY, depth=6, heads=12, whole=(1, 3, 5), taken=(2, 4, 6), patch_size=16, grid=14, windows=4
    ),
)  # fmt: skip
LIKE_RF = replace(
    RF, dim=64, heads=2, cross_heads=4, norm_eps=1e-6,
    backbone=replace(
        RF_BODY, dim=64, hidden=256, heads=1, depth=12, whole=(3, 6, 9), taken=(3, 6, 9, 12), patch_size=16, grid=6,
        windows=2,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("form", "row"), [(LW_ORIGINAL, LIKE_LW), (RF_ORIGINAL, LIKE_RF)], ids=["lw_detr", "rf_detr"]
)
def test_a_checkpoint_of_the_original_repository(tmp_path: Path, form: Format, row: LWDETRConfig):
    torch.manual_seed(0)
    network = build_network(row, 91)
    randomise_all(network)
    state = write_state(network.state_dict(), form.rules(row, 91))
    if row.family == "rf_detr":
        state["backbone.0.encoder.encoder.embeddings.mask_token"] = torch.zeros(1, 64)
    checkpoint = {"model": state, "epoch": 59, "args": argparse.Namespace(encoder="a ViT", lr=1e-4)}
    torch.save(checkpoint, tmp_path / "detr.pth")
    result = convert_file(tmp_path / "detr.pth", tmp_path / "ours.safetensors")
    assert (result.read_as, result.classes, result.family) == (f"original {row.family}", 91, row.family)
    again, card = load_network(tmp_path / "ours.safetensors")
    assert isinstance(again, LWDetr) and again.config.is_like(row) and again.config.norm_eps == 1e-6
    assert (card.task, card.class_names[1], card.class_names[90]) == ("detect", "person", "toothbrush")
    same_network(network, again)
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    back, _ = load_network(tmp_path / "back")
    same_network(network, back)


def test_the_idle_block_of_the_first_rf_detr(tmp_path: Path):
    """It has twelve blocks, and its last map comes before the last of them; ours has eleven, and answers the same."""
    body = replace(
        RF_BODY, depth=12, whole=(2, 5, 8, 11), taken=(2, 5, 8, 11, 12), patch_size=14, grid=4, windows=4, heads=3
    )
    row = replace(RF, backbone=body)
    with pytest.raises(UserError, match="no rf_detr of transformers"):
        RF_SAVED.write_config(replace(row, backbone=replace(body, whole=(2,))), CLASSES)
    config = {**RF_SAVED.write_config(replace(row, backbone=replace(body, whole=(2, 5, 8, 11))), CLASSES)}
    config["backbone_config"] = {**config["backbone_config"], "out_features": [f"stage{i}" for i in (2, 5, 8, 11)]}
    described = transformers.RfDetrConfig.from_dict({**config, "num_labels": CLASSES})
    model = transformers.RfDetrForObjectDetection(described)
    randomise_all(model)
    for saved in (True, False):
        folder = tmp_path / f"theirs {saved}"
        model.save_pretrained(folder, save_original_format=saved)
        found = load_network(folder)[0]
        assert isinstance(found, LWDetr) and isinstance(found.config.backbone, WindowedViTConfig)
        assert (found.config.backbone.depth, found.config.backbone.whole) == (11, (2, 5, 8))
        images = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert (model.eval()(images).logits - found(images).logits).abs().max() <= 1e-5
    assert verify(tmp_path / "theirs True", image_size="112", dtype="float64").agrees
    convert_file(tmp_path / "theirs True", tmp_path / "back", to="hf")
    _, report = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report


# --- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lw_two_levels", "rf", "rf_older"])
def test_verify(tmp_path: Path, kind: str):
    torch.set_num_threads(1)
    form, row = ROWS[kind]
    _, theirs = pair(form, row, CLASSES)
    (tmp_path / "theirs").mkdir()
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "theirs" / "model.safetensors")
    config = {**form.write_config(row, CLASSES), "id2label": {str(k): str(k) for k in range(CLASSES)}}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    shape = "64x96" if kind.startswith("lw") else "64"
    result = verify(tmp_path / "theirs", image_size=shape)
    assert result.agrees, result.verdict
    names = [gap.name for gap in result.comparisons["float64"].forward]
    assert {"patches", "block 0", "block 2", "level 1", "decoder, block 2", "proposals: logits"} <= {*names}
    assert ("level 2" in names) == (len(row.scales) == 2)
    for layer in ("layer 1", "layer 2", "proposals"):
        assert {f"{layer}: {part}" for part in ("matched", "class", "l1", "giou")} <= {*names}
    parameters = len(list(build_network(row, CLASSES).parameters()))
    assert len(result.comparisons["float64"].gradients) == parameters
    convert_file(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert verify(tmp_path / "ours.safetensors", image_size=shape, dtype="float64").agrees


def test_verify_of_an_original_file(tmp_path: Path):
    """Whose own code cannot be run: ours is written for transformers."""
    torch.manual_seed(0)
    network = build_network(LIKE_LW, 91)
    randomise_all(network)
    torch.save({"model": write_state(network.state_dict(), LW_ORIGINAL.rules(LIKE_LW, 91))}, tmp_path / "lw.pth")
    result = verify(tmp_path / "lw.pth", image_size="128x64", dtype="float64")
    assert result.agrees and result.facts["reference_weights"] == "written from ours"


def test_the_idle_formats_are_for_idle_blocks_alone():
    assert RF_SAVED_IDLE.ignored != RF_SAVED.ignored and RF_ORIGINAL_IDLE.ignored != RF_ORIGINAL.ignored
    network: Detector = build_network(RF, CLASSES)  # type: ignore[assignment]
    written = write_state(network.state_dict(), RF_SAVED.rules(RF, CLASSES))
    shapes = {key: tuple(tensor.shape) for key, tensor in written.items()}
    config = RF_SAVED.write_config(RF, CLASSES)
    assert RF_SAVED.recognises(shapes, config) and not RF_SAVED_IDLE.recognises(shapes, config)
