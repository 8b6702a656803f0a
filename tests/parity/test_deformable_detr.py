"""Deformable DETR against transformers, with random weights: outputs, matches, loss, gradients; and its files."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_detectors import DOUBLE, SINGLE, agree, convert, pair, randomise_all
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.backbones.resnet import ResNetConfig
from saccade.errors import UserError
from saccade.models import DETECTORS, build_network
from saccade.models.deformable_detr import DeformableDETRConfig
from saccade.models.detector import BoxTargets, Detector
from saccade.tasks.set_loss import DEFORMABLE_DETR
from saccade.verification import verify
from saccade.verification.detection import made_up_targets
from saccade.weights.convert import import_weights, recognise
from saccade.weights.export import convert as convert_file
from saccade.weights.formats.deformable_detr import FORMATS
from saccade.weights.formats.detection_loss import labels_of
from saccade.weights.formats.table import Format, read_state, write_state
from saccade.weights.load import load_network
from saccade.weights.published import PUBLISHED
from saccade.weights.source import RawWeights

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

TIMM_NAMED, HF_NAMED, ORIGINAL = FORMATS
CLASSES = 7

SMALL: dict[str, Any] = {
    "dim": 64,  # two channels in each normalised group: the shift of one alone would be normalised away
    "heads": 4,
    "hidden": 48,
    "encoder_depth": 2,
    "decoder_depth": 3,
    "queries": 9,
    "image_size": 64,
}
NARROW = ResNetConfig(
    depths=(1, 2, 1, 1), bottleneck=True, widths=(8, 8, 16, 16), stem=12, frozen_norm=True, image_size=64
)
RESNET18 = ResNetConfig(depths=(2, 2, 2, 2), bottleneck=False, frozen_norm=True, image_size=64)
PLAIN = DeformableDETRConfig(backbone=NARROW, **SMALL)
TWO_STAGE = replace(PLAIN, refine=True, two_stage=True)
ROWS: dict[str, tuple[Format, DeformableDETRConfig]] = {
    "plain": (HF_NAMED, PLAIN),
    "refine": (HF_NAMED, replace(PLAIN, refine=True)),
    "two_stage": (HF_NAMED, TWO_STAGE),
    "single": (HF_NAMED, replace(PLAIN, levels=1)),
    "five_levels": (HF_NAMED, replace(TWO_STAGE, levels=5, encoder_points=3, decoder_points=2)),
    "timm": (TIMM_NAMED, replace(PLAIN, backbone=RESNET18)),
    "timm_dilated": (TIMM_NAMED, replace(PLAIN, levels=1, backbone=replace(RESNET18, dilated=True))),
}
VARIANTS = ("plain", "refine", "two_stage")
dtypes = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
variants = pytest.mark.parametrize("kind", VARIANTS)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in ROWS for dtype in (SINGLE, DOUBLE) if "timm" not in kind or dtype is DOUBLE],
    ids=str,
)
def test_tiny(kind, dtype):
    """Measured: outputs and losses 3.8e-6 in float32, 6.7e-15 in float64; gradients 2.7e-5 and 1.8e-11."""
    form, row = ROWS[kind]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, dtype)
    size = (64, 64) if row.backbone is not NARROW else (64, 96)
    agree(ours, theirs, form, size, made_up_targets(2, CLASSES, dtype), CLASSES, dtype)


@variants
@pytest.mark.parametrize("things", [0, 14], ids=["no things at all", "more things than queries"])
def test_odd_numbers_of_things(kind, things):
    form, row = ROWS[kind]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, DOUBLE)
    boxes = 0.1 + 0.5 * torch.rand(things, 4, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    targets = BoxTargets(boxes, torch.arange(things) % CLASSES, torch.zeros(things, dtype=torch.long))
    agree(ours, theirs, form, (64, 96), targets, CLASSES, DOUBLE)


@variants
def test_their_own_loss_and_a_full_mask(kind):
    """Ours is the loss that transformers itself computes of all layers, its class counted twice, and of proposals more;
    and a mask that masks nothing, which its processor always gives, changes nothing."""
    form, row = ROWS[kind]
    ours, theirs = pair(form, row, CLASSES)
    convert(ours, theirs, form, CLASSES, DOUBLE)
    targets = made_up_targets(2, CLASSES, DOUBLE)
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    model: Any = theirs.inner
    model.config.class_cost = 2
    mask = torch.ones(2, 96, 64, dtype=torch.long)
    answer = model(pixel_values=images, pixel_mask=mask, labels=labels_of(targets, 2))
    outputs = ours(images)
    assert (outputs.logits - answer.logits).abs().max() <= 1e-5  # theirs rounds some constants to float32
    assert (outputs.boxes - answer.pred_boxes).abs().max() <= 1e-5
    losses = DEFORMABLE_DETR(outputs, targets)
    assert ("proposals" in losses) == row.two_stage
    expected = answer.loss + sum(value for name, value in answer.loss_dict.items() if name.startswith("loss_ce"))
    found = torch.stack([value for name, value in losses.items() if name != "proposals"]).sum()
    assert abs(found.item() - expected.item()) <= 1e-4 * expected.item()


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize(
    "name",
    [
        "deformable_detr_resnet50",
        "deformable_detr_resnet50_refine",
        "deformable_detr_resnet50_two_stage",
        "deformable_detr_resnet50_single_dc5",
    ],
)
def test_full_size(name, dtype):
    """Measured: outputs and losses 6.2e-6 in float32, 1.1e-14 in float64; gradients 1.1e-2 and 1.9e-14."""
    row = DETECTORS[name]
    assert isinstance(row, DeformableDETRConfig)
    ours, theirs = pair(TIMM_NAMED, row, 91)
    convert(ours, theirs, TIMM_NAMED, 91, dtype)
    agree(ours, theirs, TIMM_NAMED, (160, 224), made_up_targets(2, 91, dtype), 91, dtype)


# --- files -----------------------------------------------------------------------------------------------------------


def saved(kind: str, folder: Path) -> None:
    """As transformers saves it, which leaves out what is there already."""
    form, row = ROWS[kind]
    _, theirs = pair(form, row, CLASSES)
    model: Any = theirs.inner
    model.config.auxiliary_loss = False
    model.save_pretrained(folder)


def images() -> Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def same_network(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert state.keys() == one.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("kind", [*VARIANTS, "single"])
def test_there_and_back(tmp_path: Path, kind: str):
    """A folder that transformers saved -> ours -> a folder that it loads strictly, with the same bits."""
    form, row = ROWS[kind]
    saved(kind, tmp_path / "theirs")
    result = convert_file(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert (result.read_as, result.classes) == ("huggingface deformable_detr", CLASSES)
    ours, card = load_network(tmp_path / "ours.safetensors")
    assert isinstance(ours, Detector) and ours.config.is_like(row)
    assert card.preprocessing.interpolation == "bilinear" and card.preprocessing.stride == row.stride
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    again, report = transformers.AutoModelForObjectDetection.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back")
    assert type(processor).__name__.startswith("DeformableDetr") and processor.size["shortest_edge"] == 800
    convert_file(tmp_path / "back", tmp_path / "again.safetensors")
    third, of_third = load_network(tmp_path / "again.safetensors")
    assert of_third.preprocessing == card.preprocessing and of_third.class_names == card.class_names
    same_network(ours, third)
    with torch.no_grad():
        assert (again.eval()(images()).logits - ours(images()).logits).abs().max() <= 1e-5  # measured 1.9e-6


@variants
def test_every_name_matters(kind):
    _, row = ROWS[kind]
    for form in (HF_NAMED, ORIGINAL):
        rules = form.rules(row, CLASSES)
        network = build_network(row, CLASSES)
        written = write_state(network.state_dict(), rules)
        for name in written:
            with pytest.raises(UserError, match="missing"):
                read_state({k: v for k, v in written.items() if k != name}, rules, form.ignored, "x")
        with pytest.raises(UserError, match="left over: extra"):
            read_state({**written, "extra": torch.zeros(1)}, rules, form.ignored, "x")
        spoilt = {**written, "bbox_embed.1.layers.0.bias": written["bbox_embed.1.layers.0.bias"] + 1}
        with pytest.raises(UserError, match="unfit: bbox_embed.*should be the same tensor"):
            read_state(spoilt, rules, form.ignored, "x")


def without(state: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(beginnings)}


@variants
def test_files_that_hold_each_head_once(kind):
    """As published files do, or those of transformers' versions, whichever names they left out."""
    form, row = ROWS[kind]
    torch.manual_seed(0)
    network = build_network(row, CLASSES)
    randomise_all(network)
    full = write_state(network.state_dict(), form.rules(row, CLASSES))
    config = form.write_config(row, CLASSES)
    files = {
        "plain": [without(full, *(f"{part}_embed.{i}." for part in ("class", "bbox") for i in (1, 2)))],
        "refine": [without(full, "bbox_embed."), without(full, "model.decoder.bbox_embed.")],
        "two_stage": [
            without(full, "bbox_embed.", "class_embed."),
            without(full, "model.decoder.bbox_embed.", "model.decoder.class_embed."),
        ],
    }[kind]
    for state in (full, *files):
        found = import_weights(RawWeights("a file", state, config))
        assert found.row.is_like(row) and found.classes == CLASSES
        assert found.weights.keys() == network.state_dict().keys()
        assert all(torch.equal(found.weights[name], value) for name, value in network.state_dict().items())
        assert found.theirs.keys() == full.keys()  # what the reference is given
    name = next(name for name in files[0] if ".layers.1.weight" in name and "bbox" in name)
    lacking = {key: value for key, value in files[0].items() if key != name}
    with pytest.raises(UserError, match="missing: "):
        import_weights(RawWeights("a file", lacking, config))


def test_shared_classes_of_a_model_that_refines(tmp_path: Path):
    """transformers begins with one head of classes for all blocks, and then saves it once."""
    form, row = ROWS["refine"]
    described = transformers.DeformableDetrConfig.from_dict({**form.write_config(row, CLASSES), "num_labels": CLASSES})
    torch.manual_seed(0)
    model = transformers.DeformableDetrForObjectDetection(described).eval()
    model.save_pretrained(tmp_path / "theirs")
    assert "class_embed.1.weight" not in load_file(tmp_path / "theirs" / "model.safetensors")
    ours, _ = load_network(tmp_path / "theirs")
    assert isinstance(ours, Detector)
    with torch.no_grad():
        assert (ours(images()).logits - model(images()).logits).abs().max() <= 1e-5  # measured 2.4e-7
        assert torch.equal(ours.get_parameter("classes.0.weight"), ours.get_parameter("classes.2.weight"))


def their_names(row: DeformableDETRConfig) -> list[str]:
    """The keys of the original repository's files, as they are published; written down without our table."""
    both = ("weight", "bias")
    heads = row.decoder_depth + row.two_stage
    places = [""] + (["transformer.decoder."] if row.refine else [])
    names = [
        f"{place}bbox_embed.{i}.layers.{k}.{part}"
        for place in places for i in range(heads) for k in range(3) for part in both
    ]  # fmt: skip
    places = places if row.two_stage else [""]
    names += [f"{place}class_embed.{i}.{part}" for place in places for i in range(heads) for part in both]
    names += [f"input_proj.{i}.{k}.{part}" for i in range(row.levels) for k in (0, 1) for part in both]
    layers = ["enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm"] if row.two_stage else ["reference_points"]
    names += [f"transformer.{layer}.{part}" for layer in layers for part in both] + ["transformer.level_embed"]
    names += [] if row.two_stage else ["query_embed.weight"]
    deformable = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    for stack, depth in (("encoder", row.encoder_depth), ("decoder", row.decoder_depth)):
        for i in range(depth):
            looks = "self_attn" if stack == "encoder" else "cross_attn"
            inner = [f"{looks}.{each}" for each in deformable]
            inner += ["linear1", "linear2", *(f"norm{k + 1}" for k in range(2 if stack == "encoder" else 3))]
            inner += ["self_attn.out_proj"] if stack == "decoder" else []
            names += [f"transformer.{stack}.layers.{i}.{each}.{part}" for each in inner for part in both]
            if stack == "decoder":
                names += [f"transformer.decoder.layers.{i}.self_attn.in_proj_{part}" for part in both]
    assert isinstance(row.backbone, ResNetConfig)
    with torch.device("meta"):
        import torchvision

        body = torchvision.models.resnet50().state_dict()
    assert row.backbone.depths == (3, 4, 6, 3)
    skipped = ("fc.weight", "fc.bias")
    kept = [name for name in body if name not in skipped and not name.endswith("num_batches_tracked")]
    return names + [f"backbone.0.body.{name}" for name in kept]


@pytest.mark.parametrize(
    "name", [f"deformable_detr_resnet50{each}" for each in ("", "_refine", "_two_stage", "_single")]
)
def test_names_of_the_original_repository(name):
    row = DETECTORS[name]
    assert isinstance(row, DeformableDETRConfig)
    with torch.device("meta"):
        network = build_network(row, 91)
        written = write_state(network.state_dict(), ORIGINAL.rules(row, 91))
    assert sorted(written) == sorted(their_names(row))
    shapes = {key: tuple(tensor.shape) for key, tensor in written.items()}
    assert recognise(RawWeights("detr.pth", written)) is ORIGINAL
    assert ORIGINAL.classes(shapes, {}) == 91 and ORIGINAL.row(shapes, {}).is_like(row)
    if not row.two_stage:
        assert shapes["query_embed.weight"] == (300, 512)
    assert shapes["transformer.encoder.layers.0.self_attn.sampling_offsets.weight"] == (64 * row.levels, 256)


@variants
def test_a_checkpoint_of_the_original_repository(tmp_path: Path, kind: str):
    """Its decoder numbers its norms in another order than they come in; the same weights in both dialects agree."""
    row = replace(ROWS[kind][1], heads=1, backbone=replace(RESNET18, widths=(64, 128, 256, 512)))
    if row.two_stage:
        row = replace(row, queries=300)  # which no tensor tells
    torch.manual_seed(0)
    network = build_network(row, 91)
    randomise_all(network)
    state = write_state(network.state_dict(), ORIGINAL.rules(row, 91))
    checkpoint = {"model": state, "epoch": 49, "args": argparse.Namespace(backbone="resnet18", lr=1e-4)}
    torch.save(checkpoint, tmp_path / "detr-r18.pth")
    result = convert_file(tmp_path / "detr-r18.pth", tmp_path / "ours.safetensors")
    assert (result.read_as, result.classes, result.family) == ("original deformable_detr", 91, "deformable_detr")
    again, card = load_network(tmp_path / "ours.safetensors")
    assert (card.task, card.class_names[1], card.class_names[90]) == ("detect", "person", "toothbrush")
    same_network(network, again)
    layer = "transformer.decoder.layers.0"
    assert torch.equal(state[f"{layer}.norm2.weight"], again.get_parameter("decoder.0.norm1.weight"))
    written = write_state(network.state_dict(), TIMM_NAMED.rules(row, 91))
    other = "model.decoder.layers.0"
    assert torch.equal(state[f"{layer}.norm2.bias"], written[f"{other}.self_attn_layer_norm.bias"])
    assert torch.equal(state[f"{layer}.norm1.bias"], written[f"{other}.encoder_attn_layer_norm.bias"])


AS_PUBLISHED = {  # what the config.json of the published models says that matters here
    "activation_function": "relu",
    "architectures": ["DeformableDetrForObjectDetection"],
    "auxiliary_loss": False,
    "backbone": "resnet18",
    "class_cost": 1,
    "d_model": 64,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_layers": 3,
    "decoder_n_points": 4,
    "dilation": False,
    "dropout": 0.1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layers": 2,
    "encoder_n_points": 4,
    "id2label": {"0": "N/A", "1": "person", "2": "N/A", "3": "cat"},
    "label2id": {"N/A": 2, "person": 1, "cat": 3},
    "model_type": "deformable_detr",
    "num_feature_levels": 4,
    "num_queries": 300,
    "position_embedding_type": "sine",
    "return_intermediate": True,
    "two_stage": True,
    "two_stage_num_proposals": 9,
    "with_box_refine": True,
}


def published(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    row = replace(TWO_STAGE, backbone=RESNET18)
    torch.manual_seed(0)
    network = build_network(row, 4)
    randomise_all(network)
    state = without(write_state(network.state_dict(), TIMM_NAMED.rules(row, 4)), "model.decoder.bbox_embed.")
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {"feature_extractor_type": "DeformableDetrFeatureExtractor", "size": 800, "max_size": 1333}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return network.state_dict()


def test_a_folder_as_it_is_published(tmp_path: Path):
    state = published(tmp_path / "detr", AS_PUBLISHED)
    network, card = load_network(tmp_path / "detr")
    assert isinstance(network, Detector) and network.config.is_like(replace(TWO_STAGE, backbone=RESNET18))
    assert card.class_names == ("N/A", "person", "N/A", "cat") and card.task == "detect"
    assert (card.preprocessing.image_size, card.preprocessing.interpolation) == (928, "bilinear")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "gelu"}, "activation_function = 'gelu' is not supported"),
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"decoder_ffn_dim": 128}, "ffn_dim differ"),
        ({"with_box_refine": False}, "proposals are boxes"),
        ({"encoder_attention_heads": "many", "decoder_attention_heads": "many"}, "incomplete"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_forms_are_refused(tmp_path: Path, change: dict[str, Any], words: str):
    published(tmp_path / "detr", {**AS_PUBLISHED, **change})
    with pytest.raises(UserError, match=words):
        load_network(tmp_path / "detr")


def test_relatives_are_not_taken_for_it():
    small = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 1, "num_queries": 5}
    config = transformers.RTDetrConfig(encoder_hidden_dim=32, **small)
    model = transformers.RTDetrForObjectDetection(config)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with pytest.raises(UserError):
        import_weights(RawWeights("RT-DETR", state))
    row = PLAIN
    ours = write_state(build_network(row, CLASSES).state_dict(), HF_NAMED.rules(row, CLASSES))
    with pytest.raises(UserError, match="says 'deta'"):
        import_weights(RawWeights("DETA", ours, {"model_type": "deta"}))


def test_published_names():
    rows = {name: row for name, row in DETECTORS.items() if isinstance(row, DeformableDETRConfig)}
    assert {each.name for name in rows for each in PUBLISHED[name]} == {
        f"SenseTime/deformable-detr{each}"
        for each in ("", "-with-box-refine", "-with-box-refine-two-stage", "-single-scale", "-single-scale-dc5")
    }


# --- verify ----------------------------------------------------------------------------------------------------------


@variants
def test_verify(tmp_path: Path, kind: str):
    """On real pictures, one of which has no things; with a certificate; and it finds what is spoilt."""
    form, row = ROWS[kind]
    saved(kind, tmp_path / "theirs")
    result = verify(tmp_path / "theirs", image_size="64x96")
    assert result.agrees, result.verdict
    names = [gap.name for gap in result.comparisons["float64"].forward]
    assert {"stem", "level 4", "encoder, block 2", "decoder, block 3", "logits", "boxes", "layer 1: boxes"} <= {*names}
    assert {f"layer {i}: {part}" for i in (1, 2, 3) for part in ("matched", "class", "l1", "giou")} <= {*names}
    of_proposals = {f"proposals: {part}" for part in ("logits", "boxes", "matched", "class", "l1", "giou")}
    assert ({"proposals", *of_proposals} <= {*names}) == row.two_stage
    parameters = len(list(build_network(row, CLASSES).parameters()))
    assert len(result.comparisons["float64"].gradients) == parameters
    result.save(tmp_path / "certificate.json")
    certificate = tmp_path / "certificate.json"
    assert verify(tmp_path / "theirs", image_size="64x96", dtype="float64", certificate=certificate).agrees
    if kind == "refine":
        convert_file(tmp_path / "theirs", tmp_path / "ours.safetensors")
        assert verify(tmp_path / "ours.safetensors", image_size="64x96", dtype="float64").agrees
