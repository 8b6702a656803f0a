"""LeViT against timm's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade.backbones.levit import LEVIT, LeViT, LeViTConfig
from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.verification import verify
from saccade.weights.formats.levit import FORMATS
from saccade.weights.formats.table import read_state, write_state

timm = pytest.importorskip("timm")

from compare import Gap, agree, convert, randomise, round_trip, stages_agree, wrong_keys_are_refused  # noqa: E402

(TIMM,) = FORMATS
CLASSES = 7
COUNTS = ("*.num_batches_tracked",)  # which older files lack
TINY = LeViTConfig(dims=(16, 24, 32), depths=(1, 2, 1), heads=(2, 2, 3), key_dim=8, image_size=96)
# Measured, full size included: float32 logits 1.1e-6, gradients 1.3e-3; float64 1.6e-15 and 3.9e-12. Gradients of the
# last queries and biases are a thousand times smaller than the terms that they sum: there float32 ends.
LIMITS = {torch.float32: Gap(1e-5, 1e-5, 5e-3), torch.float64: Gap(1e-12, 1e-12, 1e-10)}


def pair(row: LeViTConfig = TINY, classes: int = CLASSES) -> tuple[Classifier, nn.Module]:
    assert TIMM.peer is not None
    torch.manual_seed(0)
    return Classifier(LeViT(row), classes), settled(randomise(TIMM.peer.build(row, classes, {})), row.image_size)


def settled(model: nn.Module, size: int) -> nn.Module:
    """With variances of the size of its own activations: with any others they grow from block to block.

    The square of the mean is added, because a channel that hardly varies would otherwise make rounding large.
    """
    inner = [module for name, module in model.named_modules() if not name.startswith("head")]
    norms = [module for module in inner if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_var += norm.running_mean**2 + 0.1
    return model


def logits(model: nn.Module, images: Tensor) -> Tensor:
    assert TIMM.peer is not None
    return TIMM.peer.logits(model, images)


def batch(size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, size, size), torch.tensor([1, 3])


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [160, 224])
@pytest.mark.parametrize("summaries", [1, 2])
def test_outputs_and_gradients_are_timms(summaries, size, dtype):
    row = replace(TINY, image_size=size, summaries=summaries)
    ours, theirs = pair(row)
    agree(ours, theirs, TIMM.rules(row, CLASSES), *batch(size), logits=logits, dtype=dtype, tol=LIMITS[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVIT)
def test_full_size_is_timms(name):
    row = LEVIT[name]
    ours, theirs = pair(row, 1000)
    for dtype in LIMITS:
        agree(ours, theirs, TIMM.rules(row, 1000), *batch(224), logits=logits, dtype=dtype, tol=LIMITS[dtype])
    assert shapes_of(theirs) == shapes_of(timm.create_model(name))


def test_every_stage_is_timms():
    ours, theirs = pair()
    convert(ours, theirs, TIMM.rules(TINY, CLASSES), torch.float64)
    stages = TIMM.stages(TINY)
    assert len(stages) == 1 + len(ours.backbone.layers)
    stages_agree(ours, theirs, stages, batch(96)[0].double(), logits=logits, limit=1e-12)


def test_without_classes_the_summary_is_the_mean():
    assert TIMM.peer is not None
    row = replace(TINY, summaries=0)
    ours, theirs = LeViT(row), randomise(TIMM.peer.build(row, 0, {}))
    assert TIMM.row(shapes_of(theirs), {}) == row and TIMM.classes(shapes_of(theirs), {}) == 0
    read = read_state(theirs.state_dict(), TIMM.rules(row, 0), TIMM.ignored, "theirs")
    ours.load_state_dict({name.removeprefix("backbone."): value for name, value in read.items()})
    images = batch(96)[0].double()
    torch.testing.assert_close(
        ours.double().eval().summary(images), logits(theirs.double().eval(), images), rtol=0, atol=1e-12
    )


def test_round_trip_is_bitwise_and_wrong_keys_are_refused():
    ours, theirs = pair()
    rules = TIMM.rules(TINY, CLASSES)
    round_trip(ours, theirs, rules, TIMM.ignored)
    wrong_keys_are_refused(ours, write_state(ours.state_dict(), rules), rules, COUNTS)


@pytest.mark.parametrize("name", LEVIT)
def test_row_is_read_from_shapes_and_named_as_timm_names_it(name):
    with torch.device("meta"):
        shapes = shapes_of(timm.create_model(name, num_classes=11))
        convolutional = shapes_of(timm.create_model(name.replace("levit_", "levit_conv_")))
    assert TIMM.recognises(shapes, {}) and not TIMM.recognises(convolutional, {})
    assert TIMM.row(shapes, {}) == LEVIT[name] and TIMM.classes(shapes, {}) == 11
    config = TIMM.write_config(LEVIT[name], 11)
    assert config["architecture"] == name and "model_args" not in config


def test_a_form_of_ones_own_is_described_so_that_timm_builds_it():
    row = replace(TINY, depths=(2, 1, 1), image_size=128, summaries=1)
    config = TIMM.write_config(row, CLASSES)
    theirs = timm.create_model(config["architecture"], num_classes=CLASSES, **config["model_args"])
    written = write_state(Classifier(LeViT(row), CLASSES).state_dict(), TIMM.rules(row, CLASSES))
    theirs.load_state_dict(written, strict=True)
    assert TIMM.row(shapes_of(theirs), config) == row


def test_half_a_file_is_refused():
    _, theirs = pair()
    shapes = {name: shape for name, shape in shapes_of(theirs).items() if not name.startswith("stages.2.")}
    with pytest.raises(UserError, match="is missing: is the file complete"):
        TIMM.row(shapes, {})


def test_the_reference_is_built_as_its_source_describes_itself():
    assert TIMM.peer is not None
    config = TIMM.write_config(TINY, CLASSES)
    read = replace(TINY, key_dim=12)  # as if it had been misread
    assert shapes_of(TIMM.peer.build(read, CLASSES, config)) == shapes_of(TIMM.peer.build(TINY, CLASSES, {}))


def test_pictures_that_the_reference_does_not_take(tmp_path):
    _, theirs = pair()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TIMM.write_config(TINY, CLASSES)))
    assert verify(tmp_path, dtype="float64").agrees
    with pytest.raises(UserError, match=r"reference code takes no pictures of 64x128 \(.*\); give --image-size 96$"):
        verify(tmp_path, dtype="float64", image_size="64x128")
