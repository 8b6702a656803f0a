"""Weights of others become ours, and ours theirs: recognised, checked, described, and never in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import saccade
from saccade import UserError
from saccade.backbones.base import Row
from saccade.backbones.vit import VIT
from saccade.cli import main
from saccade.config import PreprocessingConfig
from saccade.models import build_backbone, model_row
from saccade.models.classifier import Classifier
from saccade.weights import convert as convert_module
from saccade.weights import export, recognition
from saccade.weights.convert import import_weights, recognise
from saccade.weights.descriptions import (
    read_class_names,
    read_preprocessing,
    write_preprocessor,
    write_pretrained_cfg,
)
from saccade.weights.export import convert, export_weights
from saccade.weights.formats.table import Format, NoWords, Rule, Shapes, same
from saccade.weights.load import load_network
from saccade.weights.model_file import load_model_file, save_model
from saccade.weights.published import Published
from saccade.weights.source import UNKNOWN_LICENCE, RawWeights

ROW = replace(VIT["vit_micro"], dim=32, depth=2, heads=2, hidden=64, patch_size=4, image_size=16)


# --- a dialect of our own, so that these tests need no peer ----------------------------------------------------------


def ours_of(row: Row, classes: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = Classifier(build_backbone(row), max(classes, 1)).state_dict()
    return {name: tensor for name, tensor in state.items() if classes or not name.startswith("head.")}


def toy_name(name: str) -> str:
    return name.replace("backbone.", "net.").replace("head.", "fc.")


def toy_rules(row: Row, classes: int) -> list[Rule]:
    with torch.device("meta"):
        return [same(name, toy_name(name)) for name in ours_of(row, classes)]


def toy_row(shapes: Shapes, config: Mapping[str, Any]) -> Row:
    dim = shapes["net.norm.weight"][0]
    depth = config.get("depth", len({name.split(".")[2] for name in shapes if name.startswith("net.blocks.")}))
    return replace(ROW, dim=dim, depth=depth, image_size=config.get("image_size", 16), mlp=config.get("mlp", "gelu"))


def toy_config(row: Row, classes: int) -> dict[str, Any]:
    if row.image_size > 100:
        raise NoWords("too large")
    return {"model_type": "toy", "architecture": "toy"}


def toy(dialect: str = "huggingface", key: str = "net.norm.weight") -> Format:
    return Format(
        dialect=dialect,
        family="vit",
        recognises=lambda shapes, config: key in shapes and config["model_type"] == "toy" if config else key in shapes,
        row=toy_row,
        classes=lambda shapes, config: shapes["fc.weight"][0] if "fc.weight" in shapes else 0,
        rules=toy_rules,
        stages=lambda row: [],
        write_config=toy_config,
        ignored=("mask", "*.index"),
        preprocessing=PreprocessingConfig(mean=(0.1, 0.2, 0.3), crop=0.9),
    )


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recognition, export):
        monkeypatch.setattr(module, "FORMATS", (toy(), toy("timm", key="never")))
    monkeypatch.setattr(recognition, "BACKBONES", {"toy": ROW})


def raw(classes: int = 3, config: dict[str, Any] | None = None, **changes: Any) -> RawWeights:
    tensors = {toy_name(name): tensor for name, tensor in ours_of(ROW, classes).items()}
    values = {"config": {"model_type": "toy"} if config is None else config, "origin": "the file x", "licence": "mit"}
    return RawWeights("x", {**tensors, **changes.pop("tensors", {})}, **{**values, **changes})


def folder_of(path: Path, weights: RawWeights) -> Path:
    """As the hub would have it."""
    path.mkdir()
    save_file({name: tensor.clone() for name, tensor in weights.tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(weights.config))
    (path / "README.md").write_text(f"---\nlicense: {weights.licence}\n---\n")
    return path


def fails(weights: RawWeights, *parts: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        import_weights(weights, **options)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    return str(caught.value)


# --- import ----------------------------------------------------------------------------------------------------------


def test_import() -> None:
    found = import_weights(raw(config={"model_type": "toy", "id2label": {"0": "a", "1": "b", "2": "c"}}))
    ours = ours_of(ROW, 3)
    assert found.weights.keys() == ours.keys() and all(torch.equal(found.weights[name], ours[name]) for name in ours)
    assert found.row == ROW and found.classes == 3 and found.class_names == ("a", "b", "c")
    assert found.format.name == "huggingface vit" and found.licence == "mit"
    assert found.preprocessing.mean == (0.1, 0.2, 0.3) and found.preprocessing.stride == 4
    assert "the file x; read as huggingface vit by saccade" in found.provenance
    assert found.notes == ("nothing beside the weights says how pictures are prepared; the usual way is assumed",)
    card = found.card()
    assert card.task == "classify" and card.model == "vit-custom" and card.architecture == ROW.to_dict()


def test_weights_are_a_copy() -> None:
    """What is imported does not depend on the file, which may be mapped into memory and change."""
    weights = raw()
    found = import_weights(weights)
    weights.tensors["net.norm.weight"].fill_(5.0)
    assert not (found.weights["backbone.norm.weight"] == 5.0).any()


def test_head_is_dropped_only_when_asked() -> None:
    found = import_weights(raw(), keep_head=False)
    assert found.classes == 0 and found.class_names == () and found.weights.keys() == ours_of(ROW, 0).keys()
    assert "the head for 3 classes is left out, as asked" in found.notes
    assert found.card().task == "embed"
    headless = import_weights(raw(0))
    assert headless.classes == 0 and not any("head" in note for note in headless.notes)


def test_what_carries_nothing_is_left_aside_and_said() -> None:
    found = import_weights(raw(tensors={"mask": torch.zeros(2), "net.a.index": torch.zeros(2)}))
    assert "left aside, being of no use here: mask, net.a.index" in found.notes


def test_bare_file() -> None:
    found = import_weights(raw(config={}))
    assert found.row == ROW and any("read from the shapes" in note and "--model" in note for note in found.notes)


def test_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "model_row", lambda name: replace(ROW, heads=4, image_size=224))
    found = import_weights(raw(config={}), model="toy4")
    assert found.row == replace(ROW, heads=4), "heads as named, the grid as the weights have it"
    monkeypatch.setattr(convert_module, "model_row", lambda name: replace(ROW, depth=3))
    fails(raw(config={}), "missing: net.blocks.2.", model="toy4")
    monkeypatch.setattr(convert_module, "model_row", model_row)
    fails(raw(), "unknown model 'vit_mikro'", model="vit_mikro")


# --- refused ---------------------------------------------------------------------------------------------------------


def test_every_fault_is_listed() -> None:
    weights = raw(tensors={"net.extra": torch.zeros(7), "net.blocks.1.norm1.bias": torch.zeros(5)})
    del weights.tensors["net.blocks.0.norm1.weight"]
    fails(weights, "missing: net.blocks.0.norm1.weight", "left over: net.extra (7,)")
    del weights.tensors["net.extra"]
    fails(raw(tensors={"net.blocks.1.norm1.bias": torch.zeros(5)}), "backbone.blocks.1.norm1.bias is (5,)", "(32,)")


def test_head_of_another_shape() -> None:
    fails(raw(tensors={"fc.bias": torch.zeros(4)}), "head.bias is (4,), the model has (3,)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value: float) -> None:
    weights = raw()
    weights.tensors["net.blocks.1.norm1.bias"][3] = value
    weights.tensors["fc.bias"][0] = value
    fails(weights, "2 of ", "NaN or infinity (fc.bias, net.blocks.1.norm1.bias)")
    import_weights(raw(tensors={"mask": torch.tensor([value])}))  # what is left aside may hold anything


def test_other_families_say_what_they_look_like() -> None:
    weights = raw()
    tensors = {
        name.replace("norm1", "ln_1"): tensor for name, tensor in weights.tensors.items() if "net.norm" not in name
    }
    message = fails(RawWeights("x", tensors, {"model_type": "convnext"}), "looks most like huggingface vit (")
    assert "lacking" in message and "left over net.blocks.#.ln_#.bias" in message and "says 'convnext'" in message
    assert message.endswith("Known are: huggingface vit, timm vit")
    fails(RawWeights("x", {"a": torch.zeros(1)}), "weights of an unknown family (a, ...)", "Known are")
    fails(RawWeights("x", {}), "unknown family (nothing, ...)")
    assert recognise(raw()).family == "vit"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "toy", "depth": 10**9},
        {"model_type": "toy", "depth": -1},
        {"model_type": "toy", "image_size": 10**12},
        {"model_type": "toy", "depth": "many"},
        {"model_type": "toy", "depth": None},
        {"model_type": "toy", "image_size": [3]},
        {"model_type": "toy", "mlp": 7},
        {"model_type": ["toy"]},
        {"architecture": "toy"},
    ],
)
def test_hostile_config(config: dict[str, Any]) -> None:
    fails(raw(config=config), "x: ")


def test_absurd_sizes_are_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "build_network", lambda row, classes: pytest.fail("built"))
    fails(raw(config={"model_type": "toy", "depth": 10**9}), "claims depth = 1000000000")


# --- preprocessing ---------------------------------------------------------------------------------------------------

MEAN, STD = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]


def prepared(config: Any = None, preprocessor: Any = None) -> tuple[PreprocessingConfig, list[str]]:
    return read_preprocessing("x", config or {}, preprocessor or {}, ROW, None)


@pytest.mark.parametrize(
    ("given", "size", "crop"),
    [
        ({"size": 224}, 224, 1.0),
        ({"size": {"height": 384, "width": 384}}, 384, 1.0),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 224, 0.875),
        ({"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True}, 224, 0.875),
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, 256, 1.0),
        ({"size": {"shortest_edge": 224}, "image_processor_type": "ConvNextImageProcessor"}, 224, 0.875),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": 0.9, "feature_extractor_type": "ConvNextFeatureExtractor"},
            224,
            0.9,
        ),
        ({"size": {"shortest_edge": 384}, "image_processor_type": "ConvNextImageProcessor"}, 384, 1.0),
        ({"size": {"shortest_edge": 224}, "image_processor_type": "LevitImageProcessor"}, 224, 0.875),
        ({"size": {"height": 128, "width": 512}}, 256, 1.0),
        ({}, 16, 1.0),
    ],
)
def test_sizes_of_hugging_face(given: dict[str, Any], size: int, crop: float) -> None:
    found, notes = prepared(preprocessor={"image_mean": MEAN, "image_std": STD, **given})
    assert (found.image_size, found.crop) == (size, pytest.approx(crop)) and found.stride == 4
    assert bool(notes) == (size == 256 and crop == 1.0 and "crop_size" not in given)


def test_pixels_of_hugging_face() -> None:
    found, notes = prepared(preprocessor={"image_mean": MEAN, "image_std": STD, "resample": 2})
    assert found.mean == tuple(MEAN) and found.std == tuple(STD) and found.interpolation == "bilinear" and not notes
    found, _ = prepared(preprocessor={"do_normalize": False, "image_mean": MEAN})
    assert found.mean == (0, 0, 0) and found.std == (1, 1, 1)
    found, notes = prepared(preprocessor={"resample": 0})
    assert found.interpolation == "bicubic" and any("'nearest' is not known" in note for note in notes)
    # pixels of 0 to 255 times 1 / 127.5, less 1: the same as 0 to 1, less 0.5, by 0.5
    found, _ = prepared(preprocessor={"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3})
    assert found.mean == pytest.approx((0.5,) * 3) and found.std == pytest.approx((0.5,) * 3)


@pytest.mark.parametrize("nested", [True, False])
def test_preprocessing_of_timm(nested: bool) -> None:
    given = {"mean": MEAN, "std": STD, "input_size": [3, 256, 256], "crop_pct": 0.95, "interpolation": "bicubic"}
    found, notes = prepared(
        {"architecture": "x", "pretrained_cfg": given} if nested else {"architecture": "x", **given}
    )
    assert found.mean == tuple(MEAN) and found.std == tuple(STD) and not notes
    assert (found.image_size, found.crop, found.interpolation) == (256, 0.95, "bicubic")


@pytest.mark.parametrize(
    "given", [{"image_mean": "red"}, {"image_mean": [1, 2]}, {"size": 10**9}, {"size": -3}, {"rescale_factor": 0}]
)
def test_preprocessing_that_makes_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="x: its description of the preprocessing cannot be used"):
        prepared(preprocessor=given)


@pytest.mark.parametrize("crop", [1.0, 0.875, 0.9, 0.95, 224 / 248])
@pytest.mark.parametrize("size", [224, 256, 518])
def test_preprocessing_survives_both_dialects(size: int, crop: float) -> None:
    given = PreprocessingConfig(image_size=size, crop=crop, mean=(0.1, 0.2, 0.3), interpolation="lanczos", stride=4)
    assert prepared(preprocessor=json.loads(json.dumps(write_preprocessor(given))))[0] == given
    assert prepared({"pretrained_cfg": json.loads(json.dumps(write_pretrained_cfg(given, 5)))})[0] == given


# --- names of classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}, ("0", "1")),
        ({"label_names": ["x", "y"]}, ("x", "y")),
        ({"label_names": {"0": "x", "1": "y"}}, ("x", "y")),
        ({"label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat", "n2": "dog"}}, ("cat", "dog")),
        ({"pretrained_cfg": {"label_names": ["x", "y"]}}, ("x", "y")),
        ({"id2label": {"0": "crane", "1": "crane"}}, ("crane", "crane (1)")),
        ({"id2label": {"0": "a\x1b[31m\n", "1": ""}}, ("a [31m", "1")),
        ({"id2label": {"0": "a", "2": "b"}}, ("0", "1")),
        ({"id2label": {"0": "a"}}, ("0", "1")),
        ({"id2label": 5, "label_names": 7}, ("0", "1")),
        ({}, ("0", "1")),
    ],
)
def test_class_names(config: dict[str, Any], names: tuple[str, ...]) -> None:
    assert read_class_names(config, 2, imagenet=True)[0] == names
    assert read_class_names(config, 0, imagenet=True) == ((), [])


def test_class_names_say_what_is_odd() -> None:
    assert "names 1 classes, the head has 2" in read_class_names({"id2label": {"0": "a"}}, 2, False)[1][0]
    assert "such as 'a'" in read_class_names({"id2label": {"0": "a", "1": "a"}}, 2, False)[1][0]


def test_imagenet_is_known_where_the_source_says_so() -> None:
    names, notes = read_class_names({"id2label": {str(k): f"LABEL_{k}" for k in range(1000)}}, 1000, True)
    assert names[0] == "tench" and len(set(names)) == 1000 and "ImageNet-1k" in notes[0]
    assert read_class_names({}, 1000, False)[0][0] == "0"


# --- what is published -----------------------------------------------------------------------------------------------


def test_licence_that_only_our_table_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Published("owner/toy", "huggingface", "apache-2.0", "ImageNet-1k")
    monkeypatch.setattr(convert_module, "PUBLISHED", {"toy": (known,)})
    weights = replace(raw(), where="owner/toy", licence=UNKNOWN_LICENCE)
    found = import_weights(weights)
    assert found.licence == "apache-2.0" and found.training_data == "ImageNet-1k"
    assert import_weights(replace(weights, licence="mit")).licence == "mit", "the publisher comes first"


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = (
        folder_of(tmp_path / "hub", raw(tensors={"mask": torch.zeros(1)})),
        tmp_path / "new" / "out.safetensors",
    )
    assert main(["convert", str(source), str(out)]) == 0
    printed = capsys.readouterr().out
    for part in ("vit-custom", "3 classes", "16x16 pixels", "huggingface vit", "licence:  mit", "mask", str(out)):
        assert part in printed
    weights, card = load_model_file(out)
    assert card.class_names == ("0", "1", "2") and card.licence == "mit" and card.library_version
    assert "sha256" in card.provenance and str(tmp_path) not in card.provenance
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours_of(ROW, 3).items())
    network, _ = load_network(out)
    assert network(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)  # type: ignore[union-attr]
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("command", ["predict", "embed", "evaluate"])
def test_what_is_assumed_of_such_weights_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source = folder_of(tmp_path / "hub", raw(tensors={"mask": torch.zeros(1)}))
    for name in "012":
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "photos" / name / "a.png")
    out = {"predict": "--json", "embed": f"--out={tmp_path / 'v.npz'}", "evaluate": "--json"}[command]
    assert main([command, str(source), str(tmp_path / "photos"), "--device=cpu", out]) == 0
    said = capsys.readouterr()
    assert "note: left aside, being of no use here: mask" in said.err and "mask" not in said.out
    assert "note: nothing beside the weights says how pictures are prepared; the usual way is assumed" in said.err
    assert main(["convert", str(source), str(tmp_path / "ours.safetensors")]) == 0
    capsys.readouterr()
    out = out.replace("v.npz", "w.npz")
    assert main([command, str(tmp_path / "ours.safetensors"), str(tmp_path / "photos"), "--device=cpu", out]) == 0
    assert "note:" not in capsys.readouterr().err, "a model file says all of it itself"


def test_what_is_assumed_is_warned_of_in_python(tmp_path: Path) -> None:
    source = str(folder_of(tmp_path / "hub", raw()))
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="nothing beside the weights says how pictures are prepared"):
        saccade.load(source, device="cpu")
    with pytest.warns(UserWarning, match="nothing beside the weights says how pictures are prepared") as told:
        saccade.embed(source, [tmp_path / "a.png"], device="cpu")
    assert {each.filename for each in told} == {__file__}


def test_command_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = folder_of(tmp_path / "hub", raw()), tmp_path / "out.safetensors"
    assert main(["convert", str(source), str(out), "--drop-head", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["classes"] == 0 and facts["read_as"] == "huggingface vit" and facts["out"] == str(out)
    assert facts["parameters"] == sum(tensor.numel() for tensor in ours_of(ROW, 0).values())
    assert load_model_file(out)[1].task == "embed"


@pytest.mark.parametrize("dialect", ["timm", "hf"])
@pytest.mark.parametrize("through_ours", [True, False])
def test_command_to_others(tmp_path: Path, dialect: str, through_ours: bool) -> None:
    source = folder_of(tmp_path / "hub", raw())
    if through_ours:
        assert main(["convert", str(source), str(tmp_path / "ours.safetensors")]) == 0
        source = tmp_path / "ours.safetensors"
    out = tmp_path / "theirs"
    assert main(["convert", str(source), str(out), "--to", dialect]) == 0
    files = {"model.safetensors", "config.json", "README.md"} | (
        {"preprocessor_config.json"} if dialect == "hf" else set()
    )
    assert {path.name for path in out.iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    written, original = load_file(out / "model.safetensors"), raw().tensors
    assert written.keys() == original.keys() and all(torch.equal(written[name], original[name]) for name in original)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "toy"
    if dialect == "timm":
        assert config["num_classes"] == 3 and config["label_names"] == ["0", "1", "2"]
        assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    else:
        assert config["id2label"] == {"0": "0", "1": "1", "2": "2"} and config["label2id"]["2"] == 2
    assert main(["convert", str(out), str(tmp_path / "again.safetensors")]) == 0
    weights, card = load_model_file(tmp_path / "again.safetensors")
    assert card.licence == "mit" and all(torch.equal(weights[name], t) for name, t in ours_of(ROW, 3).items())


def test_own_model_loses_its_head_when_asked(tmp_path: Path) -> None:
    convert(folder_of(tmp_path / "hub", raw()), tmp_path / "a.safetensors")
    result = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", keep_head=False)
    assert result.classes == 0 and any("left out, as asked" in note for note in result.notes)
    weights, card = load_model_file(tmp_path / "b.safetensors")
    assert card.task == "embed" and weights.keys() == ours_of(ROW, 0).keys()
    with pytest.raises(UserError, match=r"b.safetensors: has no classes that could be right; train a head on it"):
        saccade.evaluate(str(tmp_path / "b.safetensors"), str(tmp_path))


def test_tokens_are_merged_without_learning_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = replace(import_weights(raw()).card(), metrics={"top1": 0.9}, task="classify", class_names=("a", "b", "c"))
    whole, fast, slow = (tmp_path / f"{name}.safetensors" for name in ("whole", "fast", "slow"))
    save_model(whole, ours_of(ROW, 3), card)
    assert main(["convert", str(whole), str(fast), "--merge-tokens", "5", "--merge-schedule", "decreasing"]) == 0
    said = capsys.readouterr().out
    assert "5 tokens merged a block, most in the first ones" in said and "figures are left out" in said
    weights, changed = load_model_file(fast)
    assert changed.metrics == {} and changed.class_names == card.class_names
    assert all(torch.equal(weights[name], value) for name, value in load_model_file(whole)[0].items())
    convert(fast, slow, merge_tokens=0)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, merged, again = (load_network(path)[0](images).logits for path in (whole, fast, slow))
    assert torch.equal(exact, again) and not torch.allclose(exact, merged, rtol=1e-5)
    assert convert(whole, tmp_path / "same.safetensors", merge_tokens=0).notes == ()
    assert load_model_file(tmp_path / "same.safetensors")[1].metrics == {"top1": 0.9}
    assert any("merging" in note for note in convert(fast, tmp_path / "theirs", to="timm").notes)


def test_merging_that_cannot_be(tmp_path: Path) -> None:
    path, out = tmp_path / "ours.safetensors", tmp_path / "out.safetensors"
    save_model(path, ours_of(ROW, 3), import_weights(raw()).card())
    for tokens in (-1, 16):
        with pytest.raises(UserError, match=f"--merge-tokens {tokens}: give 0 for none, or up to 15"):
            convert(path, out, merge_tokens=tokens)
    with pytest.raises(UserError, match="--merge-schedule rising: not known"):
        convert(path, out, merge_tokens=5, merge_schedule="rising")
    with pytest.raises(UserError, match="--merge-schedule decreasing: of how many tokens"):
        convert(path, out, merge_schedule="decreasing")
    with pytest.raises(UserError, match="--merge-tokens 5: --to timm has no merging"):
        convert(path, tmp_path / "theirs", to="timm", merge_tokens=5)
    row = model_row("levit_128s")
    card = replace(import_weights(raw()).card(), model="levit_128s", architecture=row.to_dict(), class_names=())
    save_model(tmp_path / "levit.safetensors", ours_of(row, 0), card)
    with pytest.raises(UserError, match=r"levit.safetensors: a levit_128s, which merges no tokens"):
        convert(tmp_path / "levit.safetensors", out, merge_tokens=5)
    assert not out.exists()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of(tmp_path / "hub", raw())
    (tmp_path / "out.safetensors").write_text("precious")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for out, to in (("out.safetensors", "saccade"), ("theirs", "hf"), ("link.safetensors", "saccade")):
        assert main(["convert", str(source), str(tmp_path / out), "--to", to]) == 2
        assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_text() == "precious"


def test_faults_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of(tmp_path / "hub", raw())
    weights = folder_of(tmp_path / "large", raw())
    (weights / "preprocessor_config.json").write_text("{")
    pointer = folder_of(tmp_path / "clone", raw())
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    ours = tmp_path / "ours.safetensors"
    convert(source, ours)
    for arguments, part in (
        ([source, tmp_path / "out.pth"], "named *.safetensors"),
        ([source, tmp_path / "out.safetensors", "--to=hf"], "writes a folder"),
        ([source, tmp_path / "out.safetensors", "--to=onnx"], "onnx"),
        ([source, tmp_path / "out.safetensors", "--branch=teacher"], "no part 'teacher'"),
        ([tmp_path / "nowhere.pth", tmp_path / "out.safetensors"], "no such file"),
        ([weights, tmp_path / "out.safetensors"], "not valid JSON"),
        ([source, tmp_path / "hub" / "config.json" / "out.safetensors"], "cannot be made"),
        ([ours, tmp_path / "out.safetensors", "--model=vit_micro"], "leave --model and --branch out"),
        ([pointer, tmp_path / "out.safetensors"], "git lfs pull"),
        ([source], "required: out"),
    ):
        assert main(["convert", *map(str, arguments)]) == 2
        answer = capsys.readouterr()
        assert part in answer.err and "Traceback" not in answer.err
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))


def test_form_that_the_peer_lacks(tmp_path: Path) -> None:
    card = replace(import_weights(raw()).card(), architecture=replace(ROW, image_size=128).to_dict())
    with pytest.raises(UserError, match="cannot be written as huggingface vit: too large"):
        export_weights(card, ours_of(replace(ROW, image_size=128), 3), "huggingface")
    with pytest.raises(UserError, match="cannot be written for torchvision"):
        export_weights(card, {}, "torchvision")


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    source = folder_of(tmp_path / "hub", raw())
    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        convert(source, tmp_path / "theirs", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
