"""Swin of both versions against timm, transformers, torchvision, and the authors' files as timm reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import Gap, agree, convert, randomise, round_trip, stages_agree, wrong_keys_are_refused
from torch import Tensor, nn

from saccade.backbones.swin import SWIN, Swin, SwinConfig
from saccade.errors import UserError
from saccade.layers.windows import resize_bias_table
from saccade.models.classifier import Classifier
from saccade.weights.formats.swin import FORMATS, TIMM_NAMES
from saccade.weights.formats.table import Format, Rule, read_state, write_state

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

ALL = {form.dialect: form for form in FORMATS}
PEERS = ["timm", "huggingface", "torchvision"]
# At 64 pixels the three maps are 16, 8 and 4 tokens wide, so windows of 4 shift in the first two stages.
TINY = SwinConfig(dim=12, depths=(2, 2, 2), heads=(2, 3, 4), windows=(4, 4, 4), image_size=64)
ROWS = {1: TINY, 2: replace(TINY, version=2)}
WAYS: dict[tuple[str, int], dict[str, Any]] = {
    ("timm", 1): {"pad_first": False, "unshifted": "built"},
    ("timm", 2): {"pad_first": False, "unshifted": "built"},
    ("huggingface", 1): {"unshifted": "picture"},
    ("huggingface", 2): {"unshifted": "built"},
    ("torchvision", 1): {"unshifted": "axis"},
    ("torchvision", 2): {"unshifted": "axis"},
}
# the size of the row; larger; not square, and no multiple of windows in any stage; hardly larger than a window
SIZES = [(64, 64), (112, 160), (76, 100), (64, 84)]

dialects = pytest.mark.parametrize("dialect", PEERS)
versions = pytest.mark.parametrize("version", [1, 2])


def row_of(dialect: str, version: int) -> SwinConfig:
    return replace(ROWS[version], **WAYS[dialect, version])


def peer(form: Format, row: SwinConfig, classes: int = 5, config: Mapping[str, Any] | None = None) -> nn.Module:
    assert form.peer is not None
    torch.manual_seed(0)
    return randomise(form.peer.build(row, classes, config or {})).eval()


def ours_of(row: SwinConfig, classes: int) -> nn.Module:
    return Classifier(Swin(row), classes) if classes else Swin(row)


def rules_of(form: Format, row: SwinConfig, classes: int) -> list[Rule]:
    """Without a head, ours is a bare backbone."""
    rules = form.rules(row, classes)
    return rules if classes else [replace(rule, ours=rule.ours.removeprefix("backbone.")) for rule in rules]


def pictures(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@dialects
@versions
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_at_any_size(dialect, version, size, dtype):
    """Measured, the worst: logits 4.8e-7 and 1.6e-15, gradients 1.2e-5 and 2.2e-14 of their size."""
    compare(ALL[dialect], row_of(dialect, version), pictures(*size), dtype)


def compare(form: Format, row: SwinConfig, images: Tensor, dtype: torch.dtype, classes: int = 5) -> Gap:
    assert form.peer is not None
    targets = torch.arange(len(images)) % classes if classes else None
    return agree(
        ours_of(row, classes),
        peer(form, row, classes),
        rules_of(form, row, classes),
        images,
        targets,
        logits=form.peer.logits,
        dtype=dtype,
        ignored=form.ignored,
    )


@dialects
@versions
def test_features_agree_without_a_head(dialect, version):
    compare(ALL[dialect], row_of(dialect, version), pictures(76, 100), torch.float64, classes=0)


@pytest.mark.parametrize("dialect", ["timm", "huggingface"])
def test_agrees_with_windows_of_another_pretraining(dialect):
    """And with a last stage whose map is smaller than the window that was asked for."""
    row = replace(row_of(dialect, 2), windows=(6, 6, 4), trained_windows=(3, 3, 2))
    compare(ALL[dialect], row, pictures(96, 72), torch.float64)


@pytest.mark.parametrize("size", [(97, 71), (66, 130)], ids=str)
@versions
def test_agrees_with_transformers_where_patches_do_not_fit(size, version):
    """Only transformers appends pixels; timm refuses such pictures, and torchvision cuts them."""
    compare(ALL["huggingface"], row_of("huggingface", version), pictures(*size), torch.float64)


@versions
def test_the_ways_of_the_libraries_differ(version):
    """So the tests above would fail with another's way."""
    wide, large, answers = pictures(64, 112), pictures(76, 112), []
    ways = [WAYS["timm", version], *({"unshifted": each} for each in ("picture", "built", "axis"))]
    for way in ways:
        torch.manual_seed(0)
        model = Swin(replace(ROWS[version], **way))
        randomise(model)
        model.double().eval()
        answers.append(torch.cat((model.summary(wide), model.summary(large))))
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert (one - other).abs().max() > 1e-4


@dialects
@versions
def test_every_block_agrees(dialect, version):
    """Measured: 7.1e-15."""
    form, row = ALL[dialect], row_of(dialect, version)
    assert form.peer is not None
    ours, theirs = Classifier(Swin(row), 5), peer(form, row)
    convert(ours, theirs, form.rules(row, 5), torch.float64, form.ignored)
    stages = form.stages(row)
    assert len(stages) == sum(row.depths) + len(row.depths) - 1
    stages_agree(ours, theirs, stages, pictures(112, 160), logits=form.peer.logits, limit=1e-12)


@dialects
@versions
@pytest.mark.parametrize("classes", [0, 5])
def test_weights_go_there_and_back(dialect, version, classes):
    form, row = ALL[dialect], row_of(dialect, version)
    round_trip(ours_of(row, classes), peer(form, row, classes), rules_of(form, row, classes), form.ignored)


@dialects
@versions
def test_wrong_keys_are_refused(dialect, version):
    form, row = ALL[dialect], replace(row_of(dialect, version), depths=(1, 1, 1))
    wrong_keys_are_refused(Classifier(Swin(row), 5), peer(form, row).state_dict(), form.rules(row, 5), form.ignored)


@dialects
@versions
@pytest.mark.parametrize("classes", [0, 5])
def test_the_row_is_read_from_shapes_and_description(dialect, version, classes):
    form, row = ALL[dialect], replace(row_of(dialect, version), drop_path=0.1)
    shapes, config = shapes_of(peer(form, row, classes).state_dict()), form.write_config(row, classes)
    assert [each.dialect for each in FORMATS if each.recognises(shapes, config)] == [dialect]
    assert [each.dialect for each in FORMATS if each.recognises(shapes, {})] == [dialect]
    assert form.row(shapes, config) == row
    assert form.classes(shapes, config) == classes
    if version == 1 or dialect == "torchvision":  # whose second version saves a table with the window's size
        assert form.row(shapes, {}) == row
    else:
        with pytest.raises(UserError, match="config.json"):
            form.row(shapes, {})


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_every_row_of_the_table_is_timm_s(name):
    form, row = ALL["timm"], SWIN[name]
    with torch.device("meta"):
        theirs, ours = timm.create_model(TIMM_NAMES[name], num_classes=1000), Classifier(Swin(row), 1000)
    shapes = shapes_of(theirs.state_dict())
    config = {"architecture": TIMM_NAMES[name], "num_classes": 1000}
    found = form.row(shapes, config)
    assert isinstance(found, SwinConfig) and found.is_like(row)
    assert (found.image_size, found.pad_first) == (row.image_size, False)
    assert form.write_config(found, 1000)["architecture"] == TIMM_NAMES[name]
    assert "model_args" not in form.write_config(found, 1000)
    rules = form.rules(found, 1000)
    assert {name for rule in rules for name in rule.theirs} == set(shapes)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@versions
def test_a_folder_of_ours_is_read_by_transformers(version, tmp_path):
    """Files have other names than the modules of transformers 5; its own loader must understand ours."""
    import json

    from safetensors.torch import save_file
    from transformers import AutoModelForImageClassification

    form, row = ALL["huggingface"], row_of("huggingface", version)
    torch.manual_seed(0)
    ours = randomise(Classifier(Swin(row), 5)).eval()
    save_file(write_state(ours.state_dict(), form.rules(row, 5)), tmp_path / "model.safetensors", {"format": "pt"})
    config = form.write_config(row, 5) | {"id2label": {str(k): str(k) for k in range(5)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, told = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    images = pictures(64, 64).float()
    assert (theirs.eval()(images).logits - ours(images).logits).abs().max() <= 1e-5  # measured 3.6e-7


@versions
def test_a_file_of_the_authors_is_what_timm_makes_of_it(version):
    form, row = ALL["original"], row_of("timm", version)
    module = timm.models.swin_transformer if version == 1 else timm.models.swin_transformer_v2
    torch.manual_seed(0)
    ours = randomise(Classifier(Swin(row), 5)).double().eval()
    file = write_state(ours.state_dict(), form.rules(row, 5))
    file["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    file["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    if version == 2:
        for s in range(3):
            file[f"layers.{s}.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
    shapes = shapes_of(file)
    assert [each.dialect for each in FORMATS if each.recognises(shapes, {})] == ["original"]
    assert form.row(shapes, {}) == replace(row, drop_path=0.1)
    assert form.classes(shapes, {}) == 5
    theirs = peer(ALL["timm"], row).double()
    theirs.load_state_dict(module.checkpoint_filter_fn({"model": file}, theirs), strict=True)
    images = pictures(76, 112)
    assert (theirs(images) - ours(images).logits).abs().max() <= 1e-12  # measured 6.7e-16
    again = read_state(file, form.rules(row, 5), form.ignored, "file")
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())
    wrong_keys_are_refused(ours, file, form.rules(row, 5), form.ignored)


def test_bias_tables_are_resized_as_timm_s_plain_way_does():
    from timm.layers import resize_rel_pos_bias_table_simple

    table = torch.randn(13**2, 3)
    for window in (5, 9, 12):
        side = 2 * window - 1
        expected = resize_rel_pos_bias_table_simple(table, (window, window), (side**2, 3))
        assert (resize_bias_table(table, window) - expected).abs().max() <= 1e-6  # measured 0


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings = True"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"image_size": [64, 96]}, "only for squares"),
    ],
)
def test_what_cannot_be_read_is_refused(config, part):
    form, row = ALL["huggingface"], row_of("huggingface", 1)
    with pytest.raises(UserError, match=part):
        form.row(shapes_of(peer(form, row).state_dict()), form.write_config(row, 5) | config)


def test_what_cannot_be_written_is_refused():
    odd = replace(TINY, windows=(4, 4, 2))
    for dialect in ("huggingface", "torchvision"):
        with pytest.raises(UserError, match="windows"):
            ALL[dialect].write_config(odd, 5)


@pytest.mark.slow
@dialects
@versions
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_size(dialect, version, square, dtype):
    """Measured in float32, the worst: logits 9.6e-7, gradients 1.4e-5 of their size."""
    row = replace(SWIN["swin_tiny" if version == 1 else "swinv2_tiny"], drop_path=0.0, **WAYS[dialect, version])
    size = (row.image_size, row.image_size) if square else (256, 384) if version == 1 else (320, 384)
    compare(ALL[dialect], row, pictures(*size), dtype, classes=1000)
