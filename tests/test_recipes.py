"""What a run learns by, where the user names no more than data and a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from saccade.backbones import BACKBONES
from saccade.backbones.resnet import RESNET
from saccade.engine.optimizers import build_optimizers, set_lr
from saccade.errors import UserError
from saccade.models import DETECTORS, build_network
from saccade.models.detector import Detector
from saccade.models.detr import DETRConfig
from saccade.recipes import has_part_for_muon, resolve
from saccade.recipes.detect import of_family
from saccade.weights.load import initial_network
from saccade.weights.model_file import ModelCard, save_model

MICRO = DETRConfig(
    backbone=replace(RESNET["resnet18"], widths=(8, 8, 8, 8), stem=8, frozen_norm=True), image_size=64, dim=16, heads=2,
    hidden=16, encoder_depth=1, decoder_depth=2, queries=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO with a picture to learn from and one to measure on."""
    root = tmp_path_factory.mktemp("boxes")
    for split in ("train", "val"):
        Image.new("RGB", (80, 60), (30, 60, 90)).save(root / f"{split}.png")
        values = {
            "images": [{"id": 1, "file_name": f"{split}.png", "width": 80, "height": 60}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 20]}],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (root / f"{split}.json").write_text(json.dumps(values))
    return root


@pytest.fixture(scope="module", autouse=True)
def micro() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "detr_micro", MICRO)
        yield


@pytest.mark.parametrize("model", [*DETECTORS, "detr_micro"])
def test_detectors_from_scratch_learn_as_published(model: str, boxes: Path) -> None:
    config = resolve({"data": str(boxes), "model": model, "out": "x", "device": "cpu"})
    learns = config.lr, config.optimizer.weight_decay, config.optimizer.clip_norm
    assert (config.recipe, config.optimizer.name, config.optimizer.backbone_lr) == ("detect", "adamw", 1.0)
    if DETECTORS[model].family == "glance":
        assert learns == (1e-3, 0.05, 1.0) and config.network.frozen_norm is None
        return
    assert learns == (1e-4, 1e-4, 0.1) and config.optimizer.layer_decay == 1.0
    backbone = DETECTORS[model].changed(config.network).backbone
    assert not getattr(backbone, "frozen_norm", False), "a backbone from scratch has no statistics yet"


def test_flags_override_the_papers(boxes: Path) -> None:
    given = {"lr": 3e-4, "optimizer": {"weight_decay": 0.01}, "network": {"frozen_norm": True}}
    config = resolve({"data": str(boxes), "model": "detr_resnet50", "out": "x", "device": "cpu", **given})
    assert (config.lr, config.optimizer.weight_decay, config.optimizer.clip_norm) == (3e-4, 0.01, 0.1)
    assert config.network.frozen_norm is True


def test_a_trained_backbone_learns_gently(boxes: Path, tmp_path: Path) -> None:
    """DETR's at a tenth, with the statistics that it has; from scratch as all the rest, with its own."""
    scratch = resolve({"data": str(boxes), "model": "detr_micro", "out": "x", "device": "cpu"})
    network, _ = initial_network(scratch, ("thing",))
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    before = build_network(MICRO, 1).eval()
    card = ModelCard("detect", "detr_micro", MICRO.to_dict(), ("thing",), scratch.preprocessing)
    save_model(tmp_path / "micro.safetensors", before.state_dict(), card)
    tuned = resolve(
        {"data": str(boxes), "weights": str(tmp_path / "micro.safetensors"), "out": "x", "device": "cpu"}
    )
    assert tuned.recipe == "detect_fine_tune" and (tuned.lr, tuned.optimizer.backbone_lr) == (1e-4, 0.1)
    assert tuned.optimizer.weight_decay == 1e-4 and tuned.optimizer.clip_norm == 0.1
    network, _ = initial_network(tuned, ("thing",))
    assert isinstance(network, Detector)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    names = {parameter: name for name, parameter in network.named_parameters()}
    optimizers = build_optimizers(network, tuned.optimizer)
    set_lr(optimizers, tuned.lr)
    rates: dict[bool, set[float]] = {True: set(), False: set()}
    for group in optimizers[0].param_groups:
        for parameter in group["params"]:
            rates[names[parameter].startswith("backbone.")].add(round(group["lr"], 9))
    assert rates == {True: {1e-5}, False: {1e-4}}


@pytest.mark.parametrize(
    ("family", "gentle"),
    [
        ("glance", {}),
        ("detr", {"backbone_lr": 0.1}),
        ("deformable_detr", {"backbone_lr": 0.1}),
        ("lw_detr", {"layer_decay": 0.8}),
        ("rf_detr", {"layer_decay": 0.8}),
    ],
)
def test_what_a_family_needs_of_a_trained_backbone(family: str, gentle: dict[str, Any]) -> None:
    values = of_family(family, True)
    assert {k: v for k, v in values.get("optimizer", {}).items() if k in ("backbone_lr", "layer_decay")} == gentle
    assert "network" not in values, "its statistics are kept as the row says"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    for split in ("train", "val"):
        for name in ("one", "two"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (80, 60), (30, 60, 90)).save(root / split / name / "0.png")
    return root


@pytest.mark.parametrize("model", ["resnet18", "efficientvit_b0"])
def test_muon_is_refused_where_it_moves_nothing(model: str, labelled: Path, boxes: Path) -> None:
    """The recipe's Muon is AdamW there, as it has always been; the user's is an error."""
    wishes = {"data": str(labelled), "model": model, "out": "x", "device": "cpu"}
    assert resolve(wishes).optimizer.name == "adamw" and resolve(wishes).optimizer.weight_decay == 0.05
    muon = {"optimizer": {"name": "muon"}}
    with pytest.raises(UserError, match=f"optimizer.name muon: {model} has no matrices"):
        resolve({**wishes, **muon})
    with pytest.raises(UserError, match="optimizer.name muon: glance_nano has no matrices"):
        resolve({"data": str(boxes), "model": "glance_nano", "out": "x", "device": "cpu", **muon})


@pytest.mark.parametrize("name", BACKBONES)
def test_muon_is_for_what_has_blocks_of_matrices(name: str, labelled: Path) -> None:
    row = BACKBONES[name]
    convolutional = row.family in ("resnet", "efficientvit", "levit")
    assert has_part_for_muon(row, {}) is not convolutional
    assert not has_part_for_muon(row, {"train_part": "head"})
