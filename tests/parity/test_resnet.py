"""ResNet against torchvision, timm and transformers, with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from compare import LIMITS, agree, convert, randomise, round_trip, stages_agree, wrong_keys_are_refused
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.resnet import RESNET, ResNet, ResNetConfig
from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.weights.formats.resnet import FORMATS
from saccade.weights.formats.table import Format, read_gradients, read_state

pytest.importorskip("torchvision")
DIALECTS = {form.dialect: form for form in FORMATS}
BASIC = ResNetConfig(depths=(1, 2, 1, 1), bottleneck=False)
BOTTLENECK = ResNetConfig(depths=(1, 1, 2, 1), bottleneck=True)
TINY = {"basic": BASIC, "bottleneck": BOTTLENECK}
NARROW = {  # torchvision's widths are fixed, timm's stem is
    "torchvision": TINY,
    "timm": {name: replace(row, widths=(8, 16, 24, 32)) for name, row in TINY.items()},
    "huggingface": {name: replace(row, widths=(8, 16, 24, 32), stem=12) for name, row in TINY.items()},
}
COUNTS = ("*.num_batches_tracked",)  # not in old files
SINGLE, DOUBLE = torch.float32, torch.float64
# Where rounding moves a value across ReLU's corner, its gradient is another: one place of many, seen as up to 2 %.
TOLERANCE = {SINGLE: replace(LIMITS[SINGLE], gradient=5e-2), DOUBLE: LIMITS[DOUBLE]}

dialects = pytest.mark.parametrize("dialect", DIALECTS)
kinds = pytest.mark.parametrize("kind", TINY)
sizes = pytest.mark.parametrize("size", [(64, 64), (72, 104)], ids=str)
dtypes = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)


def pair(form: Format, row: ResNetConfig, classes: int = 7) -> tuple[Classifier, nn.Module]:
    assert form.peer is not None
    pytest.importorskip(form.peer.package)
    torch.manual_seed(0)
    theirs = randomise(form.peer.build(row, classes, form.write_config(row, classes)))
    return Classifier(ResNet(row), classes), theirs


def compare(form: Format, row: ResNetConfig, size: tuple[int, int], dtype: torch.dtype) -> None:
    assert form.peer is not None
    ours, theirs = pair(form, row)
    images = torch.randn(2, 3, *size)
    targets = torch.arange(len(images)) % 7
    agree(ours, theirs, form.rules(row, 7), images, targets, logits=form.peer.logits, dtype=dtype, tol=TOLERANCE[dtype])
    if dtype == DOUBLE:
        stages_agree(ours, theirs, form.stages(row), images.double(), logits=form.peer.logits)


@dialects
@kinds
@sizes
@dtypes
def test_equals_peer(dialect, kind, size, dtype):
    """Measured: logits 1.6e-6, gradients 1.6e-2 (3e-6 without corners); in float64 1.8e-15, 4.6e-15, blocks 1.6e-14."""
    compare(DIALECTS[dialect], NARROW[dialect][kind], size, dtype)


FULL = [
    (dialect, name)
    for dialect in DIALECTS
    for name in (RESNET if dialect == "torchvision" else ("resnet18", "resnet50"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "name"), FULL)
@pytest.mark.parametrize("size", [(224, 224), (160, 288)], ids=str)
@dtypes
def test_equals_peer_in_full_size(dialect, name, size, dtype):
    """Measured: logits 2.7e-5, gradients 1.3e-2; in float64 3.6e-14, 2.9e-15, blocks 5.5e-13."""
    compare(DIALECTS[dialect], RESNET[name], size, dtype)


@pytest.mark.parametrize(
    ("dialect", "kind"), [("torchvision", "bottleneck"), ("timm", "basic"), ("timm", "bottleneck")]
)
def test_dilated_equals_peer(dialect, kind):
    """torchvision has it for bottlenecks only. Measured: 8.9e-16, gradients 3.2e-15."""
    compare(DIALECTS[dialect], replace(NARROW[dialect][kind], dilated=True), (72, 104), DOUBLE)


@dialects
@kinds
def test_training_equals_peer(dialect, kind):
    """With the statistics of the batch: logits, gradients, and the running statistics afterwards.

    Measured: 8.4e-15, gradients 7.2e-12, statistics under 1e-13.
    """
    form, row = DIALECTS[dialect], NARROW[dialect][kind]
    assert form.peer is not None
    ours, theirs = pair(form, row)
    rules = form.rules(row, 7)
    convert(ours, theirs, rules, DOUBLE)
    ours.train()
    theirs.train()
    images, targets = torch.randn(4, 3, 64, 96, dtype=DOUBLE), torch.tensor([0, 1, 2, 3])
    logits, expected = ours(images).logits, form.peer.logits(theirs, images)
    assert (logits - expected).abs().max() <= 1e-9
    F.cross_entropy(logits, targets).backward()
    F.cross_entropy(expected, targets).backward()
    after = read_state(theirs.state_dict(), rules, (), "theirs")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-9)
    own = dict(ours.named_parameters())
    foreign = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = read_gradients(foreign, [rule for rule in rules if rule.ours in own])
    for name, parameter in own.items():
        scale = gradients[name].abs().max().item()
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-8 * max(1e-3, scale), name


@kinds
def test_frozen_norm_equals_torchvisions_in_training(kind):
    """Measured: logits under 1e-14, gradients 7.2e-12."""
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.models.resnet import ResNet as Theirs
    from torchvision.ops import FrozenBatchNorm2d

    row = replace(TINY[kind], frozen_norm=True)
    theirs = Theirs(
        Bottleneck if row.bottleneck else BasicBlock, list(row.depths), num_classes=7, norm_layer=FrozenBatchNorm2d
    )
    randomise(theirs)
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.normal_(cast(Tensor, module.weight), 1, 0.2)
            nn.init.normal_(cast(Tensor, module.bias), 0, 0.2)
    ours = Classifier(ResNet(row), 7)
    rules = DIALECTS["torchvision"].rules(row, 7)  # the peer has no counts of batches: as in old files
    convert(ours, theirs, rules, DOUBLE)
    ours.train()
    theirs.train()
    images = torch.randn(2, 3, 64, 96, dtype=DOUBLE)
    logits, expected = ours(images).logits, theirs(images)
    assert (logits - expected).abs().max() <= 1e-9
    (logits * expected.detach()).sum().backward()
    (expected * expected.detach()).sum().backward()
    own = dict(ours.named_parameters())
    foreign = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = read_gradients(foreign, [rule for rule in rules if rule.ours in own])
    for name, parameter in own.items():
        scale = gradients[name].abs().max().item()
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-8 * scale, name


@dialects
@kinds
@pytest.mark.parametrize("classes", [7, 0])
def test_round_trip_and_recognition(dialect, kind, classes):
    form, row = DIALECTS[dialect], NARROW[dialect][kind]
    _, theirs = pair(form, row, classes)
    ours = Classifier(ResNet(row), 7) if classes else nn.ModuleDict({"backbone": ResNet(row)})
    rules = form.rules(row, classes)
    assert {rule.ours for rule in rules} == ours.state_dict().keys()
    round_trip(ours, theirs, rules)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    config = form.write_config(row, classes)
    assert [other.dialect for other in FORMATS if other.recognises(shapes, config)] == [dialect]
    assert form.row(shapes, config) == row
    assert form.classes(shapes, config) == classes


@dialects
def test_a_bare_file_is_recognised(dialect):
    """timm's names are torchvision's, and so is what a file without a description is taken for."""
    form, row = DIALECTS[dialect], NARROW[dialect]["bottleneck"]
    _, theirs = pair(form, row)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    (found,) = [other for other in FORMATS if other.recognises(shapes, {})]
    assert found.dialect == ("torchvision" if dialect == "timm" else dialect)
    assert found.row(shapes, {}) == row and found.classes(shapes, {}) == 7


@dialects
def test_wrong_keys_are_refused(dialect):
    form, row = DIALECTS[dialect], NARROW[dialect]["basic"]
    ours, theirs = pair(form, row)
    wrong_keys_are_refused(ours, theirs.state_dict(), form.rules(row, 7), COUNTS)


@dialects
def test_files_without_counts_of_batches_are_read(dialect):
    """torchvision's first weights are from before PyTorch kept them."""
    form, row = DIALECTS[dialect], NARROW[dialect]["basic"]
    ours, theirs = pair(form, row)
    state = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    ours.load_state_dict(read_state(state, form.rules(row, 7), (), "theirs"), strict=True)
    assert ours.state_dict()["backbone.stem.norm.num_batches_tracked"] == 0


def test_other_kinds_of_resnet_are_not_taken_for_it():
    timm = pytest.importorskip("timm")
    from torchvision.models import resnext50_32x4d, wide_resnet50_2

    with torch.device("meta"):
        models = [
            timm.create_model(name) for name in ("resnet50d", "seresnet50", "resnetblur18", "vit_tiny_patch16_224")
        ]
        models += [resnext50_32x4d(), wide_resnet50_2()]
    for model in models:
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        config = {"architecture": cfg["architecture"]} if (cfg := getattr(model, "pretrained_cfg", None)) else {}
        assert not [form.name for form in FORMATS if form.recognises(shapes, config)], type(model)


def test_unsupported_settings_are_said():
    row = NARROW["huggingface"]["bottleneck"]
    form = DIALECTS["huggingface"]
    _, theirs = pair(form, row)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    with pytest.raises(UserError, match="downsample_in_bottleneck = True is not supported"):
        form.row(shapes, {**form.write_config(row, 7), "downsample_in_bottleneck": True})
    with pytest.raises(UserError, match="dilated"):
        form.write_config(replace(row, dilated=True), 7)
    with pytest.raises(UserError, match="torchvision has no ResNet of widths"):
        pair(DIALECTS["torchvision"], row)
    with pytest.raises(UserError, match="output stride of 8"):
        _, of_timm = pair(DIALECTS["timm"], NARROW["timm"]["basic"])
        shapes = {name: tuple(value.shape) for name, value in of_timm.state_dict().items()}
        DIALECTS["timm"].row(shapes, {"architecture": "resnet18", "model_args": {"output_stride": 8}})


@pytest.mark.slow
@pytest.mark.parametrize("name", RESNET)
def test_timm_builds_what_the_config_says(name):
    """From the name and arguments alone, as a folder of the hub gives them."""
    timm = pytest.importorskip("timm")
    form = DIALECTS["timm"]
    for row in (RESNET[name], replace(RESNET[name], depths=(1, 2, 1, 1)), replace(RESNET[name], dilated=True)):
        config = form.write_config(row, 7)
        model = timm.create_model(config["architecture"], num_classes=7, **config.get("model_args", {}))
        theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert form.row(theirs, config) == row
