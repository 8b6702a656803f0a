"""DETR against transformers, with random weights: outputs of all layers, matches, every part of the loss, gradients."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import error_of, last_bits, no_further_off, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade.backbones.resnet import ResNetConfig
from saccade.errors import UserError
from saccade.models import DETECTORS, build_network
from saccade.models.detector import BoxTargets, Detector
from saccade.models.detr import DETRConfig
from saccade.tasks import detection, set_loss
from saccade.tasks.matching import Weights
from saccade.verification import verify
from saccade.verification.detection import judge_ours, judge_theirs, made_up_targets
from saccade.weights.convert import import_weights, recognise
from saccade.weights.export import convert
from saccade.weights.formats.detr import FORMATS
from saccade.weights.formats.reference import FileNamed
from saccade.weights.formats.table import DetectorPeer, Format, read_gradients, read_state, write_state
from saccade.weights.load import load_network
from saccade.weights.source import RawWeights

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

TIMM_NAMED, HF_NAMED, ORIGINAL = FORMATS
SINGLE, DOUBLE = torch.float32, torch.float64
# outputs, matches' queries and parts of the loss; gradients of a parameter, relative to its largest. As in ResNet, what
# rounding moves across ReLU's corner has another gradient in float32.
LIMITS = {SINGLE: 1e-4, DOUBLE: 1e-9}
GRADIENT_LIMITS = {SINGLE: 5e-2, DOUBLE: 1e-8}
CLASSES = 7

SMALL: dict[str, Any] = {
    "dim": 64,
    "heads": 4,
    "hidden": 96,
    "encoder_depth": 2,
    "decoder_depth": 3,
    "queries": 12,
    "image_size": 96,
}
NARROW = ResNetConfig(
    depths=(1, 2, 1, 1), bottleneck=True, widths=(8, 8, 16, 16), stem=12, frozen_norm=True, image_size=96
)
RESNET18 = ResNetConfig(depths=(2, 2, 2, 2), bottleneck=False, frozen_norm=True, image_size=96)
ROWS = {
    "own": (HF_NAMED, DETRConfig(backbone=NARROW, **SMALL)),
    "timm": (TIMM_NAMED, DETRConfig(backbone=RESNET18, **SMALL)),
    "timm_dilated": (TIMM_NAMED, DETRConfig(backbone=replace(RESNET18, dilated=True), **SMALL)),
}
dtypes = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)


def pair(form: Format, row: DETRConfig, classes: int = CLASSES) -> tuple[Detector, FileNamed]:
    """Theirs has random weights, those of its frozen norms included."""
    assert form.peer is not None
    torch.manual_seed(0)
    theirs = form.peer.build(row, classes, {})
    assert isinstance(theirs, FileNamed)
    randomise(theirs.inner)
    with torch.no_grad():
        for name, buffer in theirs.inner.named_buffers():
            if name.endswith(("weight", "bias")):
                buffer.copy_(0.2 * torch.randn_like(buffer) + (1 if name.endswith("weight") else 0))
    ours = build_network(row, classes)
    assert isinstance(ours, Detector)
    return ours, theirs


def save(theirs: FileNamed, folder: Path) -> None:
    model: Any = theirs.inner
    model.save_pretrained(folder)


def agree(
    form: Format,
    row: DETRConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    targets: BoxTargets,
    classes: int,
    bits: int | None = None,
    gradient_limits: dict[torch.dtype, float] = GRADIENT_LIMITS,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the gradients of both, under our names. `bits`: see `last_bits`."""
    ours, theirs = pair(form, row, classes)
    rules, peer = form.rules(row, classes), form.peer
    assert isinstance(peer, DetectorPeer)
    ours.to(dtype).eval()
    theirs.to(dtype).eval().requires_grad_(True)
    ours.load_state_dict(read_state(theirs.state_dict(), rules, form.ignored, "theirs"), strict=True)
    torch.manual_seed(1)
    pictures = int(targets.picture.max()) + 2 if len(targets.picture) else 2  # the last has no things
    images = torch.randn(pictures, 3, *size)
    images = (images if bits is None else last_bits(images, bits)).to(dtype)
    got = judge_ours(row, targets)(ours(images))
    expected = judge_theirs(theirs, peer, targets)(peer.outputs(theirs, images))
    assert expected.logits.std() > 0.1, "a reference without contrast proves nothing"
    assert got.answers.keys() == expected.answers.keys()
    layers = row.decoder_depth
    assert len(got.answers) == 2 * (layers - 1) + 1 + layers + 3 * layers  # outputs, boxes, matches, parts of the loss
    limit, gradient_limit = LIMITS[dtype], gradient_limits.get(dtype, torch.inf)
    worst = (got.logits - expected.logits).abs().max().item()
    for name, answer in got.answers.items():
        reference = expected.answers[name]
        if answer.is_floating_point():
            worst = max(worst, (answer - reference).abs().max().item())
        else:
            assert torch.equal(answer, reference), name
        assert worst <= limit, name
    assert abs(got.loss.item() - expected.loss.item()) <= limit * max(1.0, expected.loss.item())
    got.loss.backward()
    expected.loss.backward()
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    state |= {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    own = dict(ours.named_parameters())
    of_theirs = read_gradients(state, [rule for rule in rules if rule.ours in own])
    assert of_theirs.keys() == own.keys()
    least = 1e-3 * max(g.abs().max().item() for g in of_theirs.values())  # smaller ones are rounding alone
    worst_gradient = 0.0
    for name, parameter in own.items():
        assert parameter.grad is not None, name
        scale = max(least, of_theirs[name].abs().max().item())
        worst_gradient = max(worst_gradient, (parameter.grad - of_theirs[name]).abs().max().item() / scale)
        assert worst_gradient <= gradient_limit, name
    print(f"{dtype}: outputs and losses {worst:.1e}, gradients {worst_gradient:.1e}")
    return {name: p.grad for name, p in own.items() if p.grad is not None}, of_theirs


@dtypes
@pytest.mark.parametrize(
    ("kind", "size"), [("own", (96, 96)), *((kind, (64, 160)) for kind in ROWS)], ids=lambda value: str(value)
)
def test_tiny(kind, size, dtype):
    """Measured: outputs and losses 2.0e-6 in float32, 4.4e-15 in float64; gradients 8.8e-6 and 2.4e-14."""
    form, row = ROWS[kind]
    agree(form, row, size, dtype, made_up_targets(2, CLASSES, dtype), CLASSES)


@dtypes
@pytest.mark.parametrize("things", [0, 20], ids=["no things at all", "more things than queries"])
def test_odd_numbers_of_things(things, dtype):
    form, row = ROWS["own"]
    generator = torch.Generator().manual_seed(2)
    boxes = 0.1 + 0.5 * torch.rand(things, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(things) % CLASSES
    targets = BoxTargets(boxes.to(dtype), labels, torch.zeros(things, dtype=torch.long))
    agree(form, row, (64, 96), dtype, targets, CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet101_dc5"])
def test_full_size(name):
    """Measured: outputs and losses 1.0e-5 in float32, 1.8e-14 in float64; gradients of float64 3.5e-12.

    Single gradients of float32 are up to 6e-2 apart, which is rounding: all of ours together are as near to those of
    float64 as theirs are.
    """
    row = DETECTORS[name]
    assert isinstance(row, DETRConfig)

    def gradients(dtype: torch.dtype, bits: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        targets = made_up_targets(2, 91, dtype)
        return agree(TIMM_NAMED, row, (160, 224), dtype, targets, 91, bits, {DOUBLE: GRADIENT_LIMITS[DOUBLE]})

    exact = gradients(DOUBLE)[1]
    own, foreign = (error_of(each, exact) for each in gradients(SINGLE))
    no_further_off(own, foreign, lambda k: error_of(gradients(SINGLE, k)[1], exact))


# --- files -----------------------------------------------------------------------------------------------------------


def their_names(row: DETRConfig) -> list[str]:
    """The keys of the original repository's files, as they are published; written down without our table."""
    names = [f"{each}.{part}" for each in ("class_embed", "input_proj") for part in ("weight", "bias")]
    names += [f"bbox_embed.layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    names += ["query_embed.weight", "transformer.decoder.norm.weight", "transformer.decoder.norm.bias"]
    within = {"encoder": ("self_attn",), "decoder": ("self_attn", "multihead_attn")}
    for stack, depth in (("encoder", row.encoder_depth), ("decoder", row.decoder_depth)):
        for i in range(depth):
            layer = f"transformer.{stack}.layers.{i}"
            for attention in within[stack]:
                names += [f"{layer}.{attention}.in_proj_weight", f"{layer}.{attention}.in_proj_bias"]
                names += [f"{layer}.{attention}.out_proj.weight", f"{layer}.{attention}.out_proj.bias"]
            norms = [f"norm{k + 1}" for k in range(2 if stack == "encoder" else 3)]
            for part in ("linear1", "linear2", *norms):
                names += [f"{layer}.{part}.weight", f"{layer}.{part}.bias"]
    body = ["conv1.weight", *(f"bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
    backbone = row.backbone
    assert isinstance(backbone, ResNetConfig)
    for stage, depth in enumerate(backbone.depths):
        for b in range(depth):
            block = f"layer{stage + 1}.{b}"
            for k in range(3 if backbone.bottleneck else 2):
                body.append(f"{block}.conv{k + 1}.weight")
                body += [f"{block}.bn{k + 1}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
            if b == 0 and (stage or backbone.bottleneck):
                body.append(f"{block}.downsample.0.weight")
                body += [f"{block}.downsample.1.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    return names + [f"backbone.0.body.{name}" for name in body]


@pytest.mark.parametrize("kind", ["timm", "detr_resnet50"])
def test_names_of_the_original_repository(kind):
    row = DETECTORS["detr_resnet50"] if kind == "detr_resnet50" else ROWS[kind][1]
    assert isinstance(row, DETRConfig)
    with torch.device("meta"):
        ours = build_network(row, 91).state_dict()
        written = write_state(ours, ORIGINAL.rules(row, 91))
    assert sorted(written) == sorted(their_names(row))
    shapes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    assert recognise(RawWeights("detr.pth", written)) is ORIGINAL
    assert ORIGINAL.classes(shapes, {}) == 91
    expected = row if kind == "detr_resnet50" else replace(row, heads=2)  # which no shape tells; 32 channels each
    assert ORIGINAL.row(shapes, {}).is_like(expected)
    assert shapes["transformer.decoder.layers.0.multihead_attn.in_proj_weight"] == (3 * row.dim, row.dim)


def test_a_checkpoint_of_the_original_repository(tmp_path: Path):
    row = replace(ROWS["own"][1], heads=2)
    torch.manual_seed(0)
    ours = build_network(row, 91)
    randomise_all(ours)
    state = write_state(ours.state_dict(), ORIGINAL.rules(row, 91))
    checkpoint = {"model": state, "epoch": 299, "args": argparse.Namespace(backbone="resnet50", lr=1e-4)}
    torch.save(checkpoint, tmp_path / "detr-r50.pth")
    result = convert(tmp_path / "detr-r50.pth", tmp_path / "ours.safetensors")
    assert (result.read_as, result.classes, result.family) == ("original detr", 91, "detr")
    assert any("COCO" in note for note in result.notes)
    again, card = load_network(tmp_path / "ours.safetensors")
    assert (card.task, card.class_names[0], card.class_names[1], card.class_names[90]) == (
        "detect", "N/A", "person", "toothbrush",
    )  # fmt: skip
    assert sum(name == "N/A" for name in card.class_names) == 11
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    theirs = convert(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    assert theirs.written_as == "hf" and (tmp_path / "back" / "config.json").is_file()


def randomise_all(model: nn.Module) -> None:
    """Parameters and frozen norms; counts of batches, which nothing reads, stay zero."""
    randomise(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
            elif name.endswith(("norm.weight", "norm.bias")):
                buffer.copy_(torch.rand_like(buffer))


@pytest.mark.parametrize("kind", ["own", "timm", pytest.param("timm_dilated", marks=pytest.mark.slow)])
def test_there_and_back(tmp_path: Path, kind: str):
    """A folder that transformers saved -> ours -> a folder that it loads strictly, with the same bits."""
    form, row = ROWS[kind]
    ours, theirs = pair(form, row)
    save(theirs, tmp_path / "theirs")
    result = convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert (result.read_as, result.classes) == ("huggingface detr", CLASSES)
    ours, card = load_network(tmp_path / "ours.safetensors")
    assert isinstance(ours, Detector) and ours.config == replace(
        row, image_size=928, backbone=replace(row.backbone, image_size=928)
    )
    assert card.preprocessing.interpolation == "bilinear" and card.preprocessing.stride == row.stride
    written = convert(tmp_path / "ours.safetensors", tmp_path / "back", to="hf")
    assert any(note.startswith("written for pictures whose shorter side has 800 pixels") for note in written.notes)
    again, report = transformers.AutoModelForObjectDetection.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report.values()), report
    size = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back").size
    assert (size["shortest_edge"], size["longest_edge"]) == (800, 1333), "as it was"
    result = convert(tmp_path / "back", tmp_path / "again.safetensors")
    assert any("shorter side has 800 pixels, or less where the longer one" in note for note in result.notes)
    third, of_third = load_network(tmp_path / "again.safetensors")
    assert of_third.preprocessing == card.preprocessing and of_third.class_names == card.class_names
    for name, value in ours.state_dict().items():
        assert torch.equal(third.state_dict()[name], value), name
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert (again.eval()(images).logits - ours(images).logits).abs().max() <= 1e-5  # measured 9.5e-7
    written = write_state({**ours.state_dict()}, form.rules(row, CLASSES))
    for name in written:
        with pytest.raises(UserError, match="missing"):
            read_state({k: v for k, v in written.items() if k != name}, form.rules(row, CLASSES), form.ignored, "x")
    with pytest.raises(UserError, match="left over: extra"):
        read_state({**written, "extra": torch.zeros(1)}, form.rules(row, CLASSES), form.ignored, "x")


PUBLISHED = {  # what the config.json of the published models says that matters here
    "activation_function": "relu",
    "architectures": ["DetrForObjectDetection"],
    "auxiliary_loss": False,
    "backbone": "resnet18",
    "dilation": False,
    "dropout": 0.1,
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_queries": 12,
    "model_type": "detr",
    "num_channels": 3,
    "position_embedding_type": "sine",
    "use_timm_backbone": True,
    "use_pretrained_backbone": True,
    "id2label": {"0": "N/A", "1": "person", "2": "N/A", "3": "cat"},
    "label2id": {"N/A": 2, "person": 1, "cat": 3},
}


def published(folder: Path, config: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Tensor]:
    row = ROWS["timm"][1]
    torch.manual_seed(0)
    ours = build_network(row, 4)
    randomise_all(ours)
    state = write_state(ours.state_dict(), TIMM_NAMED.rules(row, 4))
    # some of the published files count batches in one place
    state["model.backbone.conv_encoder.model.layer2.0.downsample.1.num_batches_tracked"] = torch.tensor(3)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return ours.state_dict()


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"feature_extractor_type": "DetrFeatureExtractor", "size": 800, "max_size": 1333},
        {"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 800, "longest_edge": 1333}},
    ],
    ids=["old", "new"],
)
def test_a_folder_as_it_is_published(tmp_path: Path, preprocessor: dict[str, Any]):
    state = published(tmp_path / "detr", PUBLISHED, {**preprocessor, "image_mean": [0.485, 0.456, 0.406]})
    network, card = load_network(tmp_path / "detr")
    assert isinstance(network, Detector) and network.config.is_like(ROWS["timm"][1])
    assert card.class_names == ("N/A", "person", "N/A", "cat") and card.task == "detect"
    assert (card.preprocessing.image_size, card.preprocessing.interpolation) == (928, "bilinear")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auxiliary_loss": True}, "auxiliary_loss = true"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu' is not supported"),
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"decoder_ffn_dim": 128}, "ffn_dim differ"),
        ({"encoder_attention_heads": "many", "decoder_attention_heads": "many"}, "incomplete"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_forms_are_refused(tmp_path: Path, change: dict[str, Any], words: str):
    published(tmp_path / "detr", {**PUBLISHED, **change}, {})
    with pytest.raises(UserError, match=words):
        load_network(tmp_path / "detr")


@pytest.mark.parametrize("family", ["ConditionalDetr", "TableTransformer"])
def test_relatives_are_not_taken_for_it(family: str):
    small = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("layers", 1), ("ffn_dim", 32), ("attention_heads", 2))}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        d_model=32, num_queries=5, use_timm_backbone=True, backbone="resnet18", use_pretrained_backbone=False, **small
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForObjectDetection")(config)
    state = model.state_dict()
    with pytest.raises(UserError):
        import_weights(RawWeights(family, state))
    with pytest.raises(UserError, match=f"says '{config.model_type}'"):
        import_weights(RawWeights(family, state, {"model_type": config.model_type}))


def test_a_head_is_part_of_a_detector(tmp_path: Path):
    published(tmp_path / "detr", PUBLISHED, {})
    with pytest.raises(UserError, match="nothing without its head"):
        convert(tmp_path / "detr", tmp_path / "ours.safetensors", keep_head=False)
    convert(tmp_path / "detr", tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match="nothing without its head"):
        convert(tmp_path / "ours.safetensors", tmp_path / "bare.safetensors", keep_head=False)
    with pytest.raises(UserError, match="a detr cannot be written for timm.*--to hf can"):
        convert(tmp_path / "ours.safetensors", tmp_path / "timm", to="timm")


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On real pictures, one of which has no things; with a certificate; and it finds what is spoilt."""
    torch.set_num_threads(1)
    form, row = ROWS["own"]
    _, theirs = pair(form, row)
    save(theirs, tmp_path / "theirs")
    result = verify(tmp_path / "theirs", image_size="64x96")
    assert result.agrees, result.verdict
    names = [gap.name for gap in result.comparisons["float64"].forward]
    assert {"stem", "encoder, block 2", "decoder, block 3", "logits", "boxes", "layer 1: boxes", "loss"} <= {*names}
    assert {f"layer {i}: {part}" for i in (1, 2, 3) for part in ("matched", "class", "l1", "giou")} <= {*names}
    assert "made-up things in the pictures: 3, 0" in result.facts["notes"]
    parameters = len(list(build_network(row, CLASSES).parameters()))
    assert len(result.comparisons["float64"].gradients) == parameters
    result.save(tmp_path / "certificate.json")
    assert verify(tmp_path / "theirs", image_size="64x96", certificate=tmp_path / "certificate.json").agrees
    convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    assert verify(tmp_path / "ours.safetensors", image_size="64x96", dtype="float64").agrees

    def first(loss: set_loss.SetLoss, certificate: bool) -> str:
        monkeypatch.setitem(detection.LOSSES, "detr", lambda row, config: loss)
        recorded = tmp_path / "certificate.json" if certificate else None
        found = verify(tmp_path / "theirs", image_size="64x96", dtype="float64", certificate=recorded)
        assert not found.agrees and found.first_departure is not None
        return found.first_departure[1].name

    for certificate in (False, True):
        assert first(replace(set_loss.DETR, weights=Weights(1.0, 5.0, 2.1)), certificate) == "layer 1: giou"
        assert first(replace(set_loss.DETR, costs=Weights(9.0, 0.0, 0.0)), certificate) == "layer 1: matched"
