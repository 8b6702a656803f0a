"""The command with a tiny RF-DETR and LW-DETR: from scratch, from a folder of the hub, on pictures of many shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import saccade
from saccade.backbones.windowed_vit import WindowedViTConfig
from saccade.cli import main
from saccade.models import DETECTORS
from saccade.models.lw_detr import LWDETRConfig, RFDETRConfig
from saccade.weights.load import load_network

BODY = WindowedViTConfig(
    dim=24, depth=2, heads=2, hidden=96, patch_size=8, grid=4, windows=2, whole=(1,), taken=(1, 2), layer_scale=1.0,
    class_token=True, norm=True, resize="antialias", image_size=64,
)  # fmt: skip
MICRO: dict[str, Any] = {
    "dim": 32, "heads": 2, "cross_heads": 4, "hidden": 48, "decoder_depth": 2, "queries": 6, "groups": 2,
    "image_size": 64,
}  # fmt: skip
RF = RFDETRConfig(backbone=BODY, norm_eps=1e-5, **MICRO)
LW = LWDETRConfig(
    backbone=replace(BODY, class_token=False, norm=False, key_bias=False, resize="bicubic"), scales=(2.0, 0.5), **MICRO
)
USUAL = ["--image-size=64", "--batch-size=4", "--device=cpu", "--precision=float32", "--evaluations=1"]


@pytest.fixture(scope="module", autouse=True)
def micro() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "rf_detr_micro", RF)
        patch.setitem(DETECTORS, "lw_detr_micro", LW)
        yield


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO: a rectangle in each picture but the last; wide, tall and square pictures."""
    root = tmp_path_factory.mktemp("data") / "rectangles"
    (root / "images").mkdir(parents=True)
    for split in ("train", "val"):
        rows: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
        rows["categories"] = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
        for i in range(6):
            w, h = ((96, 48), (48, 96), (64, 64))[i % 3]
            x, y = (int(n) for n in np.random.default_rng(i).integers(2, 20, 2))
            image = Image.new("RGB", (w, h), (120, 120, 120))
            if i < 5:
                ImageDraw.Draw(image).rectangle((x, y, x + 19, y + 14), fill=((220, 30, 30), (30, 30, 220))[i % 2])
                thing = {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [x, y, 20, 15]}
                rows["annotations"].append({**thing, "area": 300, "iscrowd": 0})
            rows["images"].append({"id": i, "file_name": f"{split}{i}.png", "width": w, "height": h})
            image.save(root / "images" / f"{split}{i}.png")
        (root / f"{split}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        answer = capsys.readouterr()
        assert "Traceback" not in answer.out + answer.err
        return code, answer.out, answer.err

    return call


@pytest.mark.parametrize("model", ["rf_detr_micro", "lw_detr_micro"])
def test_from_scratch(model: str, boxes: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = run("train", boxes, "--model", model, *USUAL, "--steps=3", "--network.drop-path=0.2", "--out=run")
    assert code == 0, err
    network, card = load_network(tmp_path / "run")
    assert (card.model, card.class_names) == (model, ("red", "blue"))
    assert network.config.is_like(DETECTORS[model])
    code, out, _ = run("evaluate", "run", boxes, "--json")
    assert code == 0 and json.loads(out)["pictures"] == 6
    code, out, _ = run("predict", "run", boxes / "images", "--threshold=0", "--json")
    found = json.loads(out)
    assert code == 0 and len(found) == 12 and all(one["detections"] for one in found)
    for one in found:
        for thing in one["detections"]:
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= one["width"] and 0 <= top < bottom <= one["height"]
    explained = saccade.load("run", device="cpu").predict(boxes / "images" / "val0.png", threshold=0, attention=True)[0]
    assert explained.maps is not None and len(explained.maps) == len(explained)
    w, h = explained.maps.shape[2], explained.maps.shape[1]
    assert w > h, "a map in the shape of the wide picture"


def test_from_a_folder_of_the_hub(boxes: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    """Predicts as it is; and goes on with other classes, for which every group of queries gets new heads."""
    transformers = pytest.importorskip("transformers")
    from saccade.weights.formats.lw_detr import FORMATS

    form = next(each for each in FORMATS if each.family == "rf_detr")
    described = {**form.write_config(RF, 91), "num_labels": 91}
    torch.manual_seed(0)
    model = transformers.RfDetrForObjectDetection(transformers.RfDetrConfig.from_dict(described))
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "DetrImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2})
    )
    code, out, _ = run("predict", tmp_path / "hub", boxes / "images" / "val1.png", "--threshold=0", "--json")
    assert code == 0 and json.loads(out)[0]["detections"]
    code, _, err = run("train", boxes, "--weights", tmp_path / "hub", *USUAL, "--steps=2", "--out=run")
    assert code == 0, err
    network, card = load_network(tmp_path / "run")
    assert card.class_names == ("red", "blue") and card.preprocessing.interpolation == "bilinear"
    before, _ = load_network(tmp_path / "hub")
    old, new = before.state_dict(), network.state_dict()
    changed = {name for name in old if old[name].shape != new[name].shape}
    heads = ("classes", "proposers.0.classes", "proposers.1.classes")
    assert changed == {f"{head}.{each}" for head in heads for each in ("weight", "bias")}
    code, _, err = run("train", boxes, "--weights", tmp_path / "hub", "--model=lw_detr_micro", *USUAL, "--out=bad")
    assert code == 2 and "holds an rf_detr_micro, not an lw_detr_micro" in err


@pytest.mark.parametrize("aspect", ["1", "3"])
def test_squares_alone_or_every_shape(aspect: str, boxes: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    """The published models saw squares alone; with max_aspect = 1 so does ours, and pads what is not square."""
    seen: set[tuple[int, int]] = set()
    flags = [*USUAL, f"--preprocessing.max-aspect={aspect}"]
    code, _, err = run("train", boxes, "--model=rf_detr_micro", *flags, "--steps=1", "--out=run")
    assert code == 0, err
    model = saccade.load("run", device="cpu")
    model.network.register_forward_pre_hook(lambda module, inputs: seen.add(tuple(inputs[0].shape[2:])))
    model.predict(boxes / "images", threshold=0)
    assert (seen == {(64, 64)}) == (aspect == "1") and (64, 64) in seen
