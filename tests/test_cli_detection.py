"""The command with boxes: train, evaluate and predict with a tiny detector, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import saccade
from saccade.backbones.resnet import RESNET
from saccade.cli import main
from saccade.metrics.detection_report import DetectionReport
from saccade.models import DETECTORS
from saccade.models.detr import DETRConfig
from saccade.predictions import CocoIds, Detections

TINY = ["--model=detr_micro", "--image-size=64", "--batch-size=4", "--device=cpu", "--precision=float32"]
MICRO = DETRConfig(
    backbone=replace(RESNET["resnet18"], widths=(8, 8, 8, 8), stem=8), image_size=64, dim=16, heads=2, hidden=16,
    encoder_depth=1, decoder_depth=2, queries=5,
)  # fmt: skip


def make_set(root: Path, pictures: int = 8) -> Path:
    """COCO, with one or two rectangles in each picture of a split but the last, which is empty."""
    (root / "images").mkdir(parents=True)
    for split in ("train", "val"):
        rows: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
        rows["categories"] = [{"id": 3, "name": "red"}, {"id": 9, "name": "blue"}]
        for i in range(pictures):
            random = np.random.default_rng(i)
            image = Image.new("RGB", (80, 60), (120, 120, 120))
            rows["images"].append({"id": 100 + i, "file_name": f"{split}{i}.png", "width": 80, "height": 60})
            for k in range(0 if i == pictures - 1 else 1 + i % 2):
                x, y = 4 + 40 * k, int(random.integers(2, 20))
                box = [x, y, 30, 35]
                colour = ((220, 30, 30), (30, 30, 220))[k]
                ImageDraw.Draw(image).rectangle((x, y, x + 29, y + 34), fill=colour)
                rows["annotations"].append(
                    {"id": len(rows["annotations"]), "image_id": 100 + i, "category_id": (3, 9)[k], "bbox": box,
                     "area": box[2] * box[3], "iscrowd": 0}
                )  # fmt: skip
            image.save(root / "images" / f"{split}{i}.png")
        (root / f"{split}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "rectangles")


@pytest.fixture(scope="module", autouse=True)
def micro() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "detr_micro", MICRO)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, boxes: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "rectangles"
    strong = ["--augment.mosaic=0.5", "--augment.copy-paste=0.5", "--augment.mixup=8", "--augment.mix-prob=0.3"]
    assert main(["train", str(boxes), *TINY, *strong, "--steps=6", "--evaluations=2", "--out", str(out)]) == 0
    return out


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


def test_train_says_what_it_kept(boxes: Path, trained: Path, run: Callable[..., Any]) -> None:
    assert (trained / "model.safetensors").exists()
    header = (trained / "metrics.csv").read_text().splitlines()[0]
    assert all(name in header for name in ("val_ap", "val_ap50", "val_ap75", "val_f1", "val_threshold"))
    code, out, _ = run("train", boxes, *TINY, "--steps=1", "--evaluations=1", "--out=again")
    assert code == 0 and "kept model on the validation split: ap " in out and "next: saccade predict again" in out


def test_what_is_not_for_boxes_is_refused(boxes: Path, run: Callable[..., Any]) -> None:
    code, _, err = run("train", boxes, *TINY, "--steps=1", "--augment.cutmix=1", "--out=bad")
    assert code == 2 and "augment.cutmix" in err
    unfit = {"--loss.label-smoothing=0.1": "leave it out", "--augment.crop-scale=0.5,1": "--augment.zoom"}
    for flag, remedy in unfit.items():
        code, _, err = run("train", boxes, *TINY, "--steps=1", flag, "--out=bad")
        assert code == 2 and flag.split("=")[0] in err and remedy in err
    code, _, err = run("train", boxes, *TINY, "--steps=1", "--augment.zoom=0,1")
    assert code == 2 and "augment.zoom" in err


def test_evaluate(trained: Path, boxes: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = run("evaluate", trained, boxes, "--json")
    report = json.loads(out)
    assert code == 0 and report["pictures"] == 8 and report["objects"] == 10 and 0 <= report["ap"] <= 1
    code, out, err = run("evaluate", trained, boxes, "--split=val", "--out", tmp_path / "figures")
    assert code == 0 and "average precision" in out
    named = err.strip().splitlines()[-1]
    for file in (tmp_path / "figures").iterdir():
        assert file.name in named
    assert named.count(",") == len(list((tmp_path / "figures").iterdir())) - 1


def test_evaluate_says_what_is_left_out_of_the_split(
    trained: Path, boxes: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(boxes, tmp_path / "faulty")
    for split, faulty in (("train", 0), ("val", 2)):
        path = tmp_path / "faulty" / f"{split}.json"
        values = json.loads(path.read_text())
        for annotation in values["annotations"][:faulty]:
            annotation["category_id"] = 99
        path.write_text(json.dumps(values))
    code, out, err = run("evaluate", trained, tmp_path / "faulty", "--json")
    assert code == 0 and json.loads(out)["objects"] == 8
    assert "note: " in err and "2 objects of unknown classes are left out, such as " in err and "val.json" in err
    code, _, err = run("evaluate", trained, tmp_path / "faulty", "--split=train", "--json")
    assert code == 0 and "left out" not in err


def test_predict(trained: Path, boxes: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = run("predict", trained, boxes / "images", "--threshold=0", "--json")
    found = json.loads(out)
    assert code == 0 and len(found) == 16 and all(len(one["detections"]) == 5 for one in found)
    for one in found:
        assert (one["width"], one["height"]) == (80, 60)
        for thing in one["detections"]:
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60 and thing["label"] in ("red", "blue")
            assert thing["label"] == ("red", "blue")[thing["class"]] and 0 <= thing["score"] <= 1
    code, out, _ = run("predict", trained, boxes / "images" / "val0.png", "--threshold=1", "--save", tmp_path / "out")
    assert code == 0 and out.strip().endswith("val0.png: nothing found")
    code, out, _ = run("predict", trained, boxes / "images" / "val0.png", "--threshold=0", "--save", tmp_path / "out")
    assert code == 0 and sorted(file.name for file in (tmp_path / "out").iterdir()) == ["val0-1.png", "val0.png"]
    with Image.open(tmp_path / "out" / "val0.png") as plain, Image.open(tmp_path / "out" / "val0-1.png") as with_tiles:
        assert with_tiles.height > plain.height + 100


def test_pictures_of_one_name_are_saved_apart(
    trained: Path, boxes: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes((boxes / "images" / "val0.png").read_bytes())
    for already in (1, 2):
        code, out, _ = run("predict", trained, "left", "right/x.png", "--save=out", "--json")
        saved = {one["source"]: Path(one["picture"]).name for one in json.loads(out)}
        again = "" if already == 1 else "-1"
        assert code == 0 and saved == {"left/x.png": f"left-x{again}.png", "right/x.png": f"right-x{again}.png"}
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_coco_results_have_the_ids_of_the_annotations(trained: Path, boxes: Path, run: Callable[..., Any]) -> None:
    code, out, _ = run("predict", trained, *sorted((boxes / "images").glob("val*")), "--coco", boxes / "val.json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 40  # all of them, whatever the threshold of the model
    assert {row["image_id"] for row in rows} == set(range(100, 108)) and {row["category_id"] for row in rows} <= {3, 9}
    coco = pytest.importorskip("pycocotools.coco")
    assert len(coco.COCO(str(boxes / "val.json")).loadRes(rows).anns) == 40
    code, _, err = run("predict", trained, boxes / "images" / "train0.png", "--coco", boxes / "val.json")
    assert code == 2 and "names no picture train0.png" in err


def test_coco_ids_that_do_not_fit(boxes: Path, tmp_path: Path) -> None:
    ids = CocoIds.read(boxes / "val.json", ("green", "blue"))
    found = Detections(
        np.array([[1, 2, 3, 4]] * 2, np.float32), np.array([0.9, 0.8], np.float32), ("green", "blue"), np.array([0, 1]),
        (60, 80), "somewhere/val3.png",
    )  # fmt: skip
    assert [(row["image_id"], row["category_id"]) for row in ids.rows(found)] == [(103, 9)]
    with pytest.raises(saccade.UserError, match="none of its classes"):
        CocoIds.read(boxes / "val.json", ("dog",))
    (tmp_path / "other.json").write_text('{"images": 3}')
    with pytest.raises(saccade.UserError, match="not a COCO annotation file"):
        CocoIds.read(tmp_path / "other.json", ("dog",))
    twice = {"images": [{"id": 1, "file_name": "a/x.png"}, {"id": 2, "file_name": "b/x.png"}], "categories": []}
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    with pytest.raises(saccade.UserError, match=r"several pictures are called x\.png"):
        CocoIds.read(tmp_path / "twice.json", ("dog",))
    with pytest.raises(saccade.UserError, match="cannot be read"):
        CocoIds.read(tmp_path / "absent.json", ("dog",))


@pytest.mark.parametrize("text", ["-0.1", "1.5", "much", "nan"])
def test_thresholds_that_are_none(trained: Path, run: Callable[..., Any], text: str) -> None:
    code, _, err = run("predict", trained, "x.png", f"--threshold={text}")
    assert code == 2 and f"'{text}' is not a number from 0 to 1" in err


def test_large_pictures_are_taken_a_few_at_a_time(trained: Path) -> None:
    model = saccade.load(str(trained), device="cpu")
    assert model.usual_batch_size == 64
    preprocessing = model.preprocessing.model_copy(update={"image_size": 928})
    assert replace(model, card=replace(model.card, preprocessing=preprocessing)).usual_batch_size == 3


def test_from_python(trained: Path, boxes: Path) -> None:
    model = saccade.load(str(trained), device="cpu")
    found = model.predict(boxes / "images" / "val1.png", threshold=0, attention=True)[0]
    assert isinstance(found, saccade.Detections) and found.maps is not None and len(found.maps) == len(found) == 5
    report = saccade.evaluate(str(trained), str(boxes), device="cpu")
    assert isinstance(report, DetectionReport) and report.pictures == 8
    assert repr(model) == "<Model detr_micro: detect, 2 classes, about 64 px; cpu, float32>"
    assert str(report).startswith("<DetectionReport: 8 pictures with 10 objects; AP ") and len(str(report)) < 150
    assert repr(saccade.inspect(str(boxes))) == f"<Report on {boxes}: coco, 16 pictures, 9 problems>"


def test_data_of_another_task_is_refused(trained: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """Also where the classes have the same names."""
    for split in ("train", "val"):
        for name in ("red", "blue"):
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (200, 30 * i, 30)).save(folder / f"{i}.png")
    code, _, error = run("evaluate", trained, tmp_path / "colours")
    assert code == 2 and "holds a class for each picture" in error and "Traceback" not in error
    code, _, error = run("train", tmp_path / "colours", "--weights", trained, "--steps=1", "--out", tmp_path / "run")
    assert code == 2 and "holds a detector" in error


def test_a_head_on_a_backbone_of_chance_is_refused(boxes: Path, trained: Path, run: Callable[..., Any]) -> None:
    code, _, err = run("train", boxes, *TINY, "--steps=1", "--train-part=head", "--out=head")
    assert code == 2 and "--train-part head: " in err and "give --weights" in err and not Path("head").exists()
    code, _, err = run("train", boxes, "--steps=1", "--train-part=head", "--weights", trained, "--device=cpu")
    assert code == 0


@pytest.mark.parametrize("recipe", ["linear_probe", "large", "translate"])
def test_recipes_of_another_task_are_refused(boxes: Path, run: Callable[..., Any], recipe: str) -> None:
    code, _, err = run("train", boxes, "--recipe", recipe, "--steps=1")
    assert code == 2 and f"--recipe {recipe}: is not for data like" in err and "use detect, detect_fine_tune" in err


@pytest.mark.parametrize("threshold", [3, -1, "x", float("nan")])
def test_thresholds_from_python(trained: Path, boxes: Path, threshold: Any) -> None:
    with pytest.raises(saccade.UserError, match="from 0 to 1"):
        saccade.load(str(trained)).predict(boxes / "images" / "val0.png", threshold=threshold)


def test_coco_ids_are_read_as_training_reads_them(tmp_path: Path) -> None:
    values = {"images": [{"id": 7, "file_name": "images\\a.png"}], "categories": [{"id": 3, "name": "dog "}]}
    (tmp_path / "val.json").write_text(json.dumps(values), encoding="utf-8-sig")
    ids = CocoIds.read(tmp_path / "val.json", ("dog",))
    assert ids.pictures == {"a.png": 7} and ids.categories == (3,)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(saccade.UserError, match=r"deep\.json: not a COCO annotation file"):
        CocoIds.read(tmp_path / "deep.json", ("dog",))
