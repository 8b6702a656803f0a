"""EfficientFormer against timm, with random weights.

timm's takes pictures of 7 x 7 tokens alone. For other shapes its attention is made anew, for that grid, and gets the
values that our interpolation gives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from compare import agree, convert, randomise, round_trip, stages_agree, wrong_keys_are_refused
from torch import nn
from torch.nn import functional as F

from saccade.backbones.efficientformer import EFFICIENTFORMER, EfficientFormer, EfficientFormerConfig, offset_bias
from saccade.errors import UserError
from saccade.models.classifier import Classifier
from saccade.weights.formats.efficientformer import FORMATS, original_name, timm_name
from saccade.weights.formats.table import Format, read_gradients, read_state, write_state

timm = pytest.importorskip("timm")
from timm.models import efficientformer as reference  # noqa: E402

TIMM, ORIGINAL = FORMATS
TINY = EfficientFormerConfig(depths=(1, 2, 1, 3), widths=(8, 12, 16, 24), attention_blocks=2)
ALL_ATTENTION = replace(TINY, attention_blocks=3, expansion=2)
ROWS = {"tiny": TINY, "all_attention": ALL_ATTENTION}
COUNTS = ("*.num_batches_tracked",)  # not needed
SINGLE, DOUBLE = torch.float32, torch.float64

rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
dtypes = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)


def pair(form: Format, row: EfficientFormerConfig, classes: int = 7) -> tuple[Classifier, nn.Module]:
    assert TIMM.peer is not None
    torch.manual_seed(0)
    theirs = randomise(TIMM.peer.build(row, classes, form.write_config(row, classes)))
    return Classifier(EfficientFormer(row), classes), theirs


def compare(row: EfficientFormerConfig, size: tuple[int, int], dtype: torch.dtype) -> None:
    assert TIMM.peer is not None
    ours, theirs = pair(TIMM, row)
    images, targets = torch.randn(2, 3, *size), torch.tensor([3, 5])
    logits = TIMM.peer.logits
    agree(ours, theirs, TIMM.rules(row, 7), images, targets, logits=logits, dtype=dtype)
    if dtype == DOUBLE:
        stages = TIMM.stages(row)
        stages_agree(ours, theirs, stages, images.double(), logits=logits)


@rows
@pytest.mark.parametrize("size", [(224, 224), (200, 217)], ids=str)  # both of 7 x 7 tokens
@dtypes
def test_equals_timm(row, size, dtype):
    """Measured: logits 6.0e-7, gradients 8.6e-6; in float64 5.0e-16, 1.6e-14, blocks 6.8e-15."""
    compare(row, size, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFICIENTFORMER)
@pytest.mark.parametrize("size", [(224, 224), (200, 217)], ids=str)
@dtypes
def test_equals_timm_in_full_size(name, size, dtype):
    """Measured: logits 4.3e-7, gradients 2.2e-4; in float64 7.3e-16, 3.2e-13, blocks 2.3e-12."""
    compare(EFFICIENTFORMER[name], size, dtype)


@rows
@pytest.mark.parametrize("size", [(96, 320), (256, 160), (32, 64)], ids=str)
def test_other_shapes_equal_timms_blocks_of_that_grid(row, size):
    """Measured: under 1e-14."""
    ours, theirs = pair(TIMM, row)
    convert(ours, theirs, TIMM.rules(row, 7), DOUBLE)
    grid = (size[0] // 32, size[1] // 32)
    blocks = theirs.get_submodule("stages.3.blocks")
    assert isinstance(blocks, nn.Sequential)
    for block in blocks:
        if isinstance(block, reference.MetaBlock1d):
            old = block.token_mixer
            new = reference.Attention(row.widths[-1], resolution=cast(int, grid)).double()  # it takes both sides, too
            with torch.no_grad():
                table = offset_bias(old.attention_biases, (7, 7), grid)[:, 0]  # the first token's: all offsets in order
            state = {**old.state_dict(), "attention_biases": table}
            new.load_state_dict({**state, "attention_bias_idxs": new.attention_bias_idxs}, strict=True)
            block.token_mixer = new
    theirs.eval()
    images = torch.randn(2, 3, *size, dtype=DOUBLE)
    expected = theirs(images)
    assert expected.std() > 0.1
    assert (ours(images).logits - expected).abs().max() <= 1e-9


@rows
def test_training_equals_timm(row):
    """With the statistics of the batch: logits, gradients, and the running statistics afterwards.

    Measured: 8.4e-15, gradients 7.2e-12, statistics under 1e-13.
    """
    ours, theirs = pair(TIMM, row)
    rules = TIMM.rules(row, 7)
    convert(ours, theirs, rules, DOUBLE)
    ours.train()
    theirs.train()
    images, targets = torch.randn(4, 3, 224, 224, dtype=DOUBLE), torch.tensor([0, 1, 2, 3])
    logits, expected = ours(images).logits, theirs(images)
    assert (logits - expected).abs().max() <= 1e-9
    F.cross_entropy(logits, targets).backward()
    F.cross_entropy(expected, targets).backward()
    after = read_state(theirs.state_dict(), rules, (), "theirs")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-9)
    own = dict(ours.named_parameters())
    foreign = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    foreign |= {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = read_gradients(foreign, [rule for rule in rules if rule.ours in own])
    for name, parameter in own.items():
        scale = gradients[name].abs().max().item()
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-8 * max(1e-3, scale), name


@rows
@pytest.mark.parametrize("classes", [7, 0])
def test_round_trip_and_recognition(row, classes):
    _, theirs = pair(TIMM, row, classes)
    ours = Classifier(EfficientFormer(row), 7) if classes else nn.ModuleDict({"backbone": EfficientFormer(row)})
    rules = TIMM.rules(row, classes)
    assert {rule.ours for rule in rules} == ours.state_dict().keys()
    round_trip(ours, theirs, rules)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    for config in (TIMM.write_config(row, classes), {}):
        assert [form.dialect for form in FORMATS if form.recognises(shapes, config)] == ["timm"]
        assert TIMM.row(shapes, config) == row
        assert TIMM.classes(shapes, config) == classes


@rows
def test_the_authors_names_are_those_that_timm_reads(row):
    """timm turns their files into its own names: that of what we write is what we would write for timm."""
    ours, _ = pair(TIMM, row)
    written = write_state(ours.state_dict(), ORIGINAL.rules(row, 7))
    in_order = sorted(written, key=lambda name: name.split(".")[: 2 if name.startswith("network.") else 0])
    read = reference.checkpoint_filter_fn(
        {name: written[name] for name in in_order}, None
    )  # it counts stages on the way
    expected = write_state(ours.state_dict(), TIMM.rules(row, 7))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], value) for name, value in expected.items())
    assert all(timm_name(original_name(name)) == name for name in expected)
    again = read_state(written, ORIGINAL.rules(row, 7), ORIGINAL.ignored, "written")
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())
    shapes = {name: tuple(value.shape) for name, value in written.items()}
    assert [form.dialect for form in FORMATS if form.recognises(shapes, {})] == ["original"]
    assert ORIGINAL.row(shapes, {}) == row and ORIGINAL.classes(shapes, {}) == 7


def test_wrong_keys_are_refused():
    ours, theirs = pair(TIMM, TINY)
    wrong_keys_are_refused(ours, theirs.state_dict(), TIMM.rules(TINY, 7), COUNTS)


def test_offsets_in_another_order_are_refused():
    _, theirs = pair(TIMM, TINY)
    state = theirs.state_dict()
    name = "stages.3.blocks.2.token_mixer.attention_bias_idxs"
    with pytest.raises(UserError, match="offsets in another order"):
        read_state({**state, name: state[name].flip(0)}, TIMM.rules(TINY, 7), (), "theirs")


def test_two_heads_are_one_of_their_mean():
    ours, theirs = pair(TIMM, TINY)
    state = theirs.state_dict()
    mean = read_state(state, TIMM.rules(TINY, 7), (), "theirs")["head.weight"]
    assert not torch.equal(state["head.weight"], state["head_dist.weight"])
    assert torch.equal(mean, (state["head.weight"] + state["head_dist.weight"]) / 2)


@pytest.mark.parametrize("name", ["efficientformerv2_s0", "levit_128s", "vit_tiny_patch16_224", "poolformer_s12"])
def test_other_families_are_not_taken_for_it(name):
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in timm.create_model(name).state_dict().items()}
    assert not [form.name for form in FORMATS if form.recognises(shapes, {})]


def test_attention_that_timm_does_not_build_is_said():
    for changed in (replace(TINY, heads=4), replace(TINY, grid=5)):
        with pytest.raises(UserError, match="timm has no EfficientFormer whose attention"):
            TIMM.write_config(changed, 7)


@pytest.mark.slow
@pytest.mark.parametrize("row", [*EFFICIENTFORMER.values(), TINY], ids=[*EFFICIENTFORMER, "tiny"])
def test_timm_builds_what_the_config_says(row):
    """From the name and arguments alone, as a folder of the hub gives them."""
    config = TIMM.write_config(row, 7)
    model = timm.create_model(config["architecture"], num_classes=7, **config.get("model_args", {}))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert TIMM.row(theirs, config) == row


def test_the_reference_is_built_as_its_source_describes_itself():
    assert TIMM.peer is not None
    misread = TIMM.peer.build(replace(TINY, attention_blocks=1), 7, TIMM.write_config(TINY, 7)).state_dict()
    right = TIMM.peer.build(TINY, 7, {}).state_dict()
    assert {name: value.shape for name, value in misread.items()} == {n: value.shape for n, value in right.items()}
