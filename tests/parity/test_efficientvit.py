"""EfficientViT against timm's."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.backbones.efficientvit import EFFICIENTVIT, EfficientViT, EfficientViTConfig
from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.weights.formats.efficientvit import FORMATS, original_name, timm_name
from saccade.weights.formats.reference import exact
from saccade.weights.formats.table import read_gradients, read_state, write_state

timm = pytest.importorskip("timm")

from compare import (  # noqa: E402
    Gap,
    agree,
    convert,
    gradients_differ_by_rounding_alone,
    randomise,
    round_trip,
    stages_agree,
    wrong_keys_are_refused,
)

TIMM, ORIGINAL = FORMATS
CLASSES = 7
COUNTS = ("*.num_batches_tracked",)  # which older files lack
TINY = EfficientViTConfig(
    widths=(4, 8, 12, 16, 32), depths=(2, 2, 1, 1, 2), head_dim=8, summary_widths=(24, 20), expansion=3
)
# Measured: float32 logits 4e-7, gradients 9.4e-5; float64 7e-16 and 3.2e-14; full size: see there
LIMITS = {torch.float32: Gap(1e-5, 1e-5, 1e-3), torch.float64: Gap(1e-12, 1e-12, 1e-11)}


def pair(row: EfficientViTConfig = TINY, classes: int = CLASSES) -> tuple[Classifier, nn.Module]:
    assert TIMM.peer is not None
    torch.manual_seed(0)
    return Classifier(EfficientViT(row), classes), randomise(TIMM.peer.build(row, classes, {}))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    assert TIMM.peer is not None
    return TIMM.peer.logits(model, images)


def batch(*size: int, pictures: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(pictures, 3, *size), torch.arange(pictures) % CLASSES


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (50, 75)], ids=str)
def test_outputs_and_gradients_are_timms(size, dtype):
    ours, theirs = pair()
    agree(ours, theirs, TIMM.rules(TINY, CLASSES), *batch(*size), logits=logits, dtype=dtype, tol=LIMITS[dtype])


@pytest.mark.parametrize("name", EFFICIENTVIT)
@pytest.mark.slow
def test_full_size_is_timms(name):
    """Measured: float32 logits 1.9e-6, gradients 2e-5 (b3: 3e-3); float64 2e-15 and 6e-14."""
    row = EFFICIENTVIT[name]
    ours, theirs = pair(row, 1000)
    images, targets = batch(224, 224)
    rules = TIMM.rules(row, 1000)
    agree(ours, theirs, rules, images, targets, logits=logits, tol=replace(LIMITS[torch.float32], gradient=math.inf))
    gradients_differ_by_rounding_alone(ours, theirs, rules, images, targets, logits=logits)
    agree(ours, theirs, rules, images[..., :160], targets, logits=logits, dtype=torch.float64)
    assert shapes_of(theirs) == shapes_of(timm.create_model(name))
    assert type(theirs) is type(timm.create_model(name))


def test_a_step_of_training_is_timms_statistics_included():
    """Batch statistics normalise, and the running ones move. Measured: 4e-15, gradients 6e-14."""
    ours, theirs = pair()
    rules = TIMM.rules(TINY, CLASSES)
    convert(ours, theirs, rules, torch.float64)
    images, targets = batch(64, 96, pictures=4)
    losses = [
        F.cross_entropy(call(images.double()), targets)
        for call in (lambda x: ours.train()(x).logits, partial(logits, theirs.train()))
    ]
    assert abs(losses[0] - losses[1]) < 1e-12
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    wanted = read_gradients(expected, [rule for rule in rules if rule.ours in found])
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    largest = max(value.abs().max().item() for value in wanted.values())
    for name, value in wanted.items():  # a shift that the next norm takes away again has a gradient of rounding only
        assert (found[name] - value).abs().max() <= 1e-11 * max(1e-3 * largest, value.abs().max().item()), name
    moved = read_state(theirs.state_dict(), rules, TIMM.ignored, "theirs")
    for name, value in ours.state_dict().items():
        assert (value - moved[name]).abs().max() <= 1e-13 * max(1.0, moved[name].abs().max().item()), name


def test_every_stage_is_timms():
    """Measured: 3e-15."""
    ours, theirs = pair()
    convert(ours, theirs, TIMM.rules(TINY, CLASSES), torch.float64)
    stages = TIMM.stages(TINY)
    assert len(stages) == 2 + len(ours.backbone.layers)
    stages_agree(ours, theirs, stages, batch(64, 96)[0].double(), logits=logits, limit=1e-12)


def test_summary_is_timms_vector_before_the_classes():
    assert TIMM.peer is not None
    theirs = randomise(TIMM.peer.build(TINY, 0, {})).double().eval()
    ours = EfficientViT(TINY).double().eval()
    read = read_state(theirs.state_dict(), TIMM.rules(TINY, 0), TIMM.ignored, "theirs")
    ours.load_state_dict({name.removeprefix("backbone."): value for name, value in read.items()})
    images = batch(64, 64)[0].double()
    torch.testing.assert_close(ours.summary(images), logits(theirs, images), rtol=0, atol=1e-12)
    with exact(images):
        maps = theirs.forward_intermediates(images, intermediates_only=True)  # pyright: ignore[reportCallIssue]
    for a, b in zip(ours(images).maps, maps, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.dialect)
def test_round_trip_is_bitwise_and_wrong_keys_are_refused(form):
    ours, theirs = pair()
    if form is TIMM:
        round_trip(ours, theirs, form.rules(TINY, CLASSES), form.ignored)
    state = write_state(ours.state_dict(), form.rules(TINY, CLASSES))
    again = read_state(state, form.rules(TINY, CLASSES), form.ignored, "theirs")
    assert all(torch.equal(value, again[name]) for name, value in ours.state_dict().items())
    if form is TIMM:
        wrong_keys_are_refused(ours, state, form.rules(TINY, CLASSES), COUNTS)


@pytest.mark.parametrize("name", EFFICIENTVIT)
def test_row_is_read_from_shapes_and_named_as_timm_names_it(name):
    with torch.device("meta"):
        shapes = shapes_of(timm.create_model(name, num_classes=11))
    row = EFFICIENTVIT[name]
    assert [form.recognises(shapes, {}) for form in FORMATS] == [True, False]
    assert TIMM.row(shapes, {}) == row and TIMM.classes(shapes, {}) == 11
    config = TIMM.write_config(replace(row, image_size=288), 11)
    assert config["architecture"] == name and "model_args" not in config
    assert TIMM.row(shapes, config) == replace(row, image_size=288)


def test_a_form_of_ones_own_is_described_so_that_timm_builds_it():
    row = replace(TINY, depths=(1, 3, 2, 2, 1), drop_path=0.1)
    config = TIMM.write_config(row, CLASSES)
    theirs = timm.create_model(config["architecture"], num_classes=CLASSES, **config["model_args"])
    written = write_state(Classifier(EfficientViT(row), CLASSES).state_dict(), TIMM.rules(row, CLASSES))
    theirs.load_state_dict(written, strict=True)
    assert TIMM.row(shapes_of(theirs), config) == replace(row, drop_path=0.0)


def test_other_families_are_not_taken_for_this_one():
    with torch.device("meta"):
        for name in ("efficientvit_l1", "efficientvit_m0", "resnet18", "vit_tiny_patch16_224", "levit_128s"):
            shapes = shapes_of(timm.create_model(name))
            assert not any(form.recognises(shapes, {}) for form in FORMATS), name


def test_half_a_file_is_refused():
    _, theirs = pair()
    shapes = shapes_of(theirs)
    for left_out in ("stages.3.", "head.", "stages.0.blocks.0."):
        with pytest.raises(UserError, match="is missing: is the file complete"):
            TIMM.row({name: shape for name, shape in shapes.items() if not name.startswith(left_out)}, {})


# As https://github.com/mit-han-lab/efficientvit names them.
AUTHORS = {
    "stem.in_conv.conv.weight": "backbone.input_stem.op_list.0.conv.weight",
    "stem.res0.main.depth_conv.norm.running_var": "backbone.input_stem.op_list.1.main.depth_conv.norm.running_var",
    "stages.0.blocks.0.main.inverted_conv.conv.weight": "backbone.stages.0.op_list.0.main.inverted_conv.conv.weight",
    "stages.2.blocks.1.context_module.main.aggreg.0.1.weight":
        "backbone.stages.2.op_list.1.context_module.main.aggreg.0.1.weight",
    "stages.3.blocks.2.local_module.main.depth_conv.conv.bias":
        "backbone.stages.3.op_list.2.local_module.main.depth_conv.conv.bias",
    "head.in_conv.norm.bias": "head.op_list.0.norm.bias",
    "head.classifier.0.weight": "head.op_list.2.linear.weight",
    "head.classifier.1.weight": "head.op_list.2.norm.weight",
    "head.classifier.4.bias": "head.op_list.3.linear.bias",
}  # fmt: skip


def test_the_authors_names():
    _, theirs = pair()
    state = theirs.state_dict()
    assert AUTHORS.keys() <= state.keys()
    assert {name: original_name(name) for name in AUTHORS} == AUTHORS
    assert [timm_name(original_name(name)) for name in state] == list(state)
    renamed = {original_name(name): value for name, value in state.items()}
    assert len(renamed) == len(state) and not renamed.keys() & state.keys()
    shapes = {name: tuple(value.shape) for name, value in renamed.items()}
    assert [form.recognises(shapes, {}) for form in FORMATS] == [False, True]
    row = ORIGINAL.row(shapes, {})
    assert row == replace(TINY, attention_eps=1e-15) and ORIGINAL.classes(shapes, {}) == CLASSES
    ours = read_state(renamed, ORIGINAL.rules(row, CLASSES), ORIGINAL.ignored, "authors'")
    expected = read_state(state, TIMM.rules(TINY, CLASSES), TIMM.ignored, "timm's")
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    paths = {stage.theirs for stage in ORIGINAL.stages(row)}
    assert {"backbone.input_stem", "backbone.stages.3.op_list.2", "head.op_list.0"} <= paths


def test_the_constant_in_the_divisor_is_the_rows():
    row = replace(TINY, attention_eps=0.5)
    ours, theirs = pair(row)
    images, targets = batch(32, 64)
    agree(ours, theirs, TIMM.rules(row, CLASSES), images, targets, logits=logits, dtype=torch.float64)
    other = Classifier(EfficientViT(TINY), CLASSES).double().eval()
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert (other(images.double()).logits - ours(images.double()).logits).abs().max() > 1e-6


def test_the_reference_is_built_as_its_source_describes_itself():
    assert TIMM.peer is not None
    config = TIMM.write_config(TINY, CLASSES)
    misread = TIMM.peer.build(replace(TINY, head_dim=4, attention_eps=0.5), CLASSES, config)
    assert shapes_of(misread) == shapes_of(TIMM.peer.build(TINY, CLASSES, {}))
    assert {part.eps for part in misread.modules() if hasattr(part, "kernel_func")} == {1e-5}
