from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saccade.config import DataConfig
from saccade.data.decode import Picture
from saccade.data.loader import measure_sizes
from saccade.data.source import BoxSource
from saccade.data.sources import detect_format, find, fit_to_pictures, open_source, open_splits
from saccade.data.sources.boxes import upright
from saccade.errors import UserError


def same_as(things, split: str) -> dict[str, list]:
    return {name: inside for name, (_, inside) in things[split].items()}


def test_everything_of_a_healthy_set(coco_set, things, contents):
    root = coco_set.write()
    assert detect_format(root) == "coco"
    found = find(root)
    assert found.task == "detect" and found.problems == [] and found.notes == []
    splits = open_splits(root)
    assert (splits.format, splits.task, splits.notes) == ("coco", "detect", [])
    train, val = splits.train, splits.val
    assert isinstance(train, BoxSource)
    assert train.class_names == val.class_names == ("dog", "cat", "bird")  # by the numbers 2, 5, 90
    assert contents(train) == same_as(things, "train") and contents(val) == same_as(things, "val")
    assert train.boxes.dtype == np.float32 and train.labels.dtype == np.int64 and train.crowd.dtype == np.bool_
    assert train.numbers == (10, 17, 24, 31)
    assert train.counts().tolist() == [4, 3, 3] and train.declared.tolist() == [[60, 80], [48, 64], [72, 54], [60, 60]]
    assert train.place(1, 5) == f"{root / 'train.json'}, annotation 116"
    again = pickle.loads(pickle.dumps(train))
    assert contents(again) == contents(train) and again.read(0) == train.read(0)
    part = train.subset([2, 3])
    assert contents(part) == {name: same_as(things, "train")[name] for name in ("c.png", "d.jpg")}
    assert part.numbers == (24, 31) and part.place(0, 1).endswith("annotation 128") and len(part.target(1)) == 0


def official(coco_set, things, pictures_of, tmp_path) -> Path:
    root = tmp_path / "official"
    (root / "annotations").mkdir(parents=True)
    for split, data in (("train", coco_set.train), ("val", coco_set.val)):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
        captions = {"images": data["images"], "annotations": [{"id": 1, "image_id": 10, "caption": "a"}]}
        (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(captions))
        (root / "annotations" / f"person_keypoints_{split}2017.json").write_text(json.dumps(data))
        panoptic = {**data, "annotations": [{"image_id": 10, "file_name": "a.png", "segments_info": []}]}
        (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(panoptic))
        pictures_of(split, root / f"{split}2017")
    return root


def below_images(coco_set, things, pictures_of, tmp_path) -> Path:
    root = official(coco_set, things, pictures_of, tmp_path)
    (root / "images").mkdir()
    for split in things:
        (root / f"{split}2017").rename(root / "images" / f"{split}2017")
    return root


def roboflow(coco_set, things, pictures_of, tmp_path) -> Path:
    """Beside the pictures, with a group of classes as the class 0."""
    root = tmp_path / "roboflow"
    for split, folder, data in (("train", "train", coco_set.train), ("val", "valid", coco_set.val)):
        for category in data["categories"]:
            category["supercategory"] = "animals"
        data["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        pictures_of(split, root / folder)
        (root / folder / "_annotations.coco.json").write_text(json.dumps(data))
    return root


def deep_names(coco_set, things, pictures_of, tmp_path) -> Path:
    """Names with folders, one of them as Windows writes it, one absolute and of another machine, one in capitals."""
    root = tmp_path / "deep"
    for split, data in (("train", coco_set.train), ("val", coco_set.val)):
        pictures_of(split, root / "images" / split / "day 1")
        for k, image in enumerate(data["images"]):
            ways = ("{s}/day 1/{n}", "{s}\\day 1\\{n}", "./{s}/day 1/{n}", "{s}/day 1/{u}")
            image["file_name"] = ways[k].format(s=split, n=image["file_name"], u=image["file_name"].upper())
        (root / f"{split}_annotations.json").write_text(json.dumps(data))
    return root


def elsewhere(coco_set, things, pictures_of, tmp_path) -> Path:
    """As exported on another machine, whose folders the names hold."""
    for data in (coco_set.train, coco_set.val):
        for image in data["images"]:
            image["file_name"] = f"/data/someone/upload/{image['file_name']}"
    return coco_set.write()


@pytest.mark.parametrize("layout", [official, below_images, roboflow, deep_names, elsewhere])
def test_layouts(layout, coco_set, things, pictures_of, tmp_path, contents):
    root = layout(coco_set, things, pictures_of, tmp_path)
    assert detect_format(root) == "coco"
    found = find(root)
    assert found.problems == []
    splits = open_splits(root)
    assert splits.train.class_names == ("dog", "cat", "bird")
    assert contents(splits.train) == same_as(things, "train") and contents(splits.val) == same_as(things, "val")
    assert any("animals" in note for note in splits.notes) == (layout is roboflow)
    assert contents(open_source(root, "val")) == contents(splits.val)


def test_one_file_by_its_name(coco_set, things, contents):
    root = coco_set.write()
    assert contents(open_splits(root / "train.json").val) == same_as(things, "val")  # its sibling
    assert contents(open_source(root / "train.json")) == same_as(things, "train")
    assert contents(open_source(root / "val.json")) == same_as(things, "val")
    (root / "val.json").rename(root / "other.json")
    alone = open_splits(root / "train.json", val_fraction=0.3)
    assert len(alone.train) + len(alone.val) == 4 and any("held out" in note for note in alone.notes)
    beside = open_splits(root / "train.json", val=root / "other.json")
    assert len(beside.train) == 4 and contents(beside.val) == same_as(things, "val")


def test_classes_are_united_by_name_and_keep_their_order(coco_set):
    coco_set.val["categories"] = [{"id": 1, "name": "cat"}, {"id": 3, "name": "eel"}, {"id": 4, "name": "bird"}]
    for one in coco_set.val["annotations"]:
        one["category_id"] = {2: 3, 5: 1, 90: 4}[one["category_id"]]
    splits = open_splits(coco_set.write())
    assert splits.val.class_names == ("dog", "eel", "cat", "bird")  # by train's numbers, then val's
    assert splits.val.counts().tolist() == [0, 1, 1, 1]
    assert any("no objects of eel to learn from" in note for note in splits.notes)
    assert any("no objects of dog to measure on" in note for note in splits.notes)


def test_one_class_and_classes_without_objects_are_fine(coco_set):
    for data in (coco_set.train, coco_set.val):
        data["annotations"] = [one for one in data["annotations"] if one["category_id"] == 5]
    splits = open_splits(coco_set.write())
    assert splits.train.class_names == ("dog", "cat", "bird") and splits.train.counts().tolist() == [0, 3, 0]
    for data in (coco_set.train, coco_set.val):
        data["categories"] = [{"id": 5, "name": "cat"}]
    splits = open_splits(coco_set.write())
    assert splits.train.class_names == ("cat",) and splits.notes == []


def test_entries_that_mean_one_picture_are_united(coco_set, things, contents):
    coco_set.train["images"].insert(0, {"id": 99, "file_name": "B.JPG", "height": 48, "width": 64})
    coco_set.annotation(113)["image_id"] = 99
    train = open_splits(coco_set.write()).train
    assert isinstance(train, BoxSource) and train.numbers == (99, 10, 24, 31)
    assert {name: sorted(inside) for name, inside in contents(train).items()} == {
        name: sorted(inside) for name, inside in same_as(things, "train").items()
    }


def test_a_class_of_its_own_name_is_no_group(coco_set):
    for data in (coco_set.train, coco_set.val):
        data["categories"].append({"id": 91, "name": "person", "supercategory": "person"})
    splits = open_splits(coco_set.write())
    assert splits.train.class_names == ("dog", "cat", "bird", "person")
    assert any("no objects of person to learn from" in note for note in splits.notes)


def test_ids_and_boxes_may_be_texts_and_lists_may_be_mixed(coco_set, things, contents):
    for image in coco_set.train["images"]:
        image["id"] = str(image["id"])
    for k, one in enumerate(coco_set.train["annotations"]):
        one["category_id"] = str(one["category_id"])
        one["bbox"] = [str(value) for value in one["bbox"]] if k % 2 else one["bbox"]
        one["segmentation"] = [[1, 2, 3, 4, 5, 6]]
        one.pop("area")
    coco_set.train["annotations"].reverse()
    train = open_splits(coco_set.write()).train
    assert {name: inside[::-1] for name, inside in contents(train).items()} == same_as(things, "train")
    assert isinstance(train, BoxSource) and train.numbers == ()
    side = train.boxes[:, 2:] - train.boxes[:, :2]
    assert train.area.tolist() == side.prod(axis=1).tolist()


def test_area_is_that_of_the_outline_and_shrinks_with_a_clipped_box(coco_set):
    coco_set.annotation(101).update(area=500)
    coco_set.annotation(113).update(bbox=[-10, 5, 20, 20], area=200)  # half of it is outside
    train = open_splits(coco_set.write()).train
    assert isinstance(train, BoxSource)
    at = {int(number): k for k, number in enumerate(train.ids)}
    assert train.area[at[101]] == 500 and train.area[at[113]] == 100
    assert train.boxes[at[113]].tolist() == [0, 5, 10, 25]


def test_a_pixel_of_rounding_is_clipped_without_a_word(coco_set):
    coco_set.annotation(110)["bbox"] = [70, 50, 10.9, 10.5]
    splits = open_splits(coco_set.write())
    assert splits.notes == [] and splits.train.target(0).boxes[3].tolist() == [70, 50, 80, 60]


def test_true_sizes_count(coco_set):
    """A picture that was resized after it was annotated, and one whose size is merely wrong."""
    picture = Image.open(coco_set.pictures / "b.jpg").resize((32, 24))
    picture.save(coco_set.pictures / "b.jpg")
    coco_set.train["images"][2].update(width=30, height=30)  # c.png is 54 x 72
    splits = open_splits(coco_set.write())
    sizes = measure_sizes(splits.train, DataConfig())
    fitted, notes = fit_to_pictures(splits.train, sizes)
    assert isinstance(fitted, BoxSource) and isinstance(splits.train, BoxSource)
    assert fitted.target(1).boxes.tolist() == (splits.train.target(1).boxes / 2).tolist()
    assert fitted.target(1).area.tolist() == (splits.train.target(1).area / 4).tolist()
    assert fitted.target(2).boxes.tolist() == [[2, 40, 50, 70], [10, 3, 30, 33], [40, 50, 52, 71]]
    assert len(notes) == 1 and "2 pictures are not of the size that is stated" in notes[0]
    again, more = fit_to_pictures(fitted, sizes)
    assert isinstance(again, BoxSource) and more == [] and (again.boxes == fitted.boxes).all()


@pytest.mark.parametrize("larger", [True, False])
def test_sizes_that_were_never_those_of_the_boxes(coco_set, larger):
    """All sizes are wrong in the same way: the boxes fit the pictures and stay."""
    for image in coco_set.train["images"]:
        for side in ("width", "height"):
            image[side] = image[side] * 2 if larger else image[side] // 2
    splits = open_splits(coco_set.write())
    fitted, notes = fit_to_pictures(splits.train, measure_sizes(splits.train, DataConfig()))
    assert isinstance(fitted, BoxSource) and isinstance(splits.train, BoxSource)
    assert len(fitted.boxes) == 11 and (fitted.boxes == splits.train.boxes).all() and "4 pictures" in notes[0]


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_boxes_of_the_stored_picture_are_turned_with_it(coco_set, turn):
    """A white box is annotated in the stored picture, and lies where it shows when EXIF has turned the picture."""
    left, top, right, bottom = 16, 8, 48, 24
    stored = Image.new("RGB", (80, 60))
    stored.paste((255, 255, 255), (left, top, right, bottom))
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(coco_set.pictures / "a.jpg", exif=exif, quality=95)
    boxes = [one for one in coco_set.train["annotations"] if one["image_id"] == 10]
    boxes[0]["bbox"] = [left, top, right - left, bottom - top]
    splits = open_splits(coco_set.write())
    fitted, notes = fit_to_pictures(splits.train, measure_sizes(splits.train, DataConfig()))
    assert "turned" in notes[0] and len(notes) == 1
    shown = np.asarray(Picture(fitted.read(0), "a", 10**6).whole())[..., 0] > 128
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    assert fitted.target(0).boxes[0].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    back = {5: 5, 6: 8, 7: 7, 8: 6}[turn]
    whole = splits.train.target(0).boxes
    assert (upright(upright(whole, np.array([60, 80]), turn), np.array([80, 60]), back) == whole).all()


def test_panoptic_is_another_task(tmp_path, coco_set):
    data = {**coco_set.train, "annotations": [{"image_id": 10, "file_name": "a.png", "segments_info": [{"id": 3}]}]}
    file = tmp_path / "set" / "panoptic_train.json"
    file.parent.mkdir()
    file.write_text(json.dumps(data))
    for place in (file, file.parent):
        with pytest.raises(UserError, match="panoptic_train.json: COCO's panoptic annotations"):
            open_splits(place)


def test_what_is_not_coco(folder, coco_set, tmp_path):
    root = folder({"train": {"a": 2, "b": 2}, "val": {"a": 2, "b": 2}})
    (root / "classes.json").write_text('{"images": 3}')
    (root / "train.json").write_text('[{"file_name": "a/000.jpg", "label": "a"}]')
    (root / "dataset_info.json").write_text('{"features": {"images": {}, "annotations": {}}}')
    assert detect_format(root) == "image_folder" and open_splits(root).task == "classify"
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"path": "set/train/a/000.jpg", "label": "a"}\n')
    assert detect_format(lines) == "table"
    with pytest.raises(UserError, match="train.json: no COCO file"):
        open_splits(root / "train.json")
    with pytest.raises(UserError, match="holds boxes around things, but .* a class for each picture"):
        open_splits(root, val=coco_set.write())


def test_real_data(shared):
    splits = open_splits(shared / "cells")
    assert splits.train.class_names == ("RBC", "WBC", "Platelets") and splits.train.counts().tolist() == [
        2381,
        214,
        209,
    ]
    assert sum("2 boxes without an area are left out" in note for note in splits.notes) == 1
    test = open_source(shared / "cells", "test")
    assert len(test) == 72 and test.counts().sum() == 945
    for name in ("nuclei", "coco_panoptic_sample"):
        with pytest.raises(UserError, match="panoptic"):
            open_splits(shared / name)


def test_crowds_are_no_objects_to_learn_from(coco_set):
    for one in coco_set.train["annotations"]:
        one["iscrowd"] = int(one["category_id"] == 5)
    splits = open_splits(coco_set.write())
    assert splits.train.counts()[splits.train.class_names.index("cat")] == 0
    assert any("no objects of cat to learn from" in note for note in splits.notes)


def test_a_category_of_too_many_digits(coco_set):
    coco_set.train["categories"].append({"id": "9" * 5000, "name": "elk"})
    assert "elk" in open_splits(coco_set.write()).train.class_names
