"""Each fault alone in a healthy set: `inspect` finds it and nothing else; training drops it and says so, or refuses."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from saccade.config import DataConfig
from saccade.data.inspect import inspect_data
from saccade.data.inspect_boxes import box_hints
from saccade.data.loader import measure_sizes
from saccade.data.source import BoxSource, faults
from saccade.data.sources import find, fit_to_pictures, open_splits
from saccade.data.sources.boxes import DROPPED
from saccade.errors import UserError

PICTURES, OBJECTS = 4, 11  # of the healthy training split; YOLO's has one object less


def rendered(report) -> str:
    file = io.StringIO()
    report.render(Console(file=file, width=100))
    return file.getvalue()


@dataclass(frozen=True)
class Fault:
    name: str
    plant: Callable[[Any], object]
    kind: str
    where: str  # what its place must hold
    refuses: bool = False
    lost: int = 0  # objects that training does without
    lost_pictures: int = 0
    count: int = 1
    beside: tuple[str, ...] = ()  # kinds that follow from it


def check(fault: Fault, root: Path, objects: int) -> None:
    report = inspect_data(root)
    expected = Counter({fault.kind: fault.count}) + Counter(fault.beside)
    assert Counter(problem.kind for problem in report.problems) == expected, "\n".join(map(str, report.problems))
    problem = next(problem for problem in report.problems if problem.kind == fault.kind)
    assert fault.where in problem.where and str(root) in problem.where
    assert not report.ok and str(problem) in rendered(report)
    json.dumps(report.to_dict())
    assert (problem.refuses, any(p.refuses for p in report.problems)) == (fault.refuses, fault.refuses)
    if fault.refuses:
        with pytest.raises(UserError) as raised:
            open_splits(root)
        assert str(problem) in str(raised.value)
        return
    splits = open_splits(root)
    train, notes = fit_to_pictures(splits.train, measure_sizes(splits.train, DataConfig()))
    assert isinstance(train, BoxSource)
    assert (len(train), len(train.boxes)) == (PICTURES - fault.lost_pictures, objects - fault.lost)
    same = [note for note in [*splits.notes, *notes] if f"{fault.count} {DROPPED[fault.kind][fault.count > 1]}" in note]
    assert len(same) == 1 and problem.where in same[0] and "saccade inspect" in same[0]
    for i in range(len(train)):
        target, (h, w) = train.target(i), train.declared[i].tolist()
        assert (target.boxes[:, :2] >= 0).all() and (target.boxes[:, 2:] <= [w, h]).all()
        assert (target.boxes[:, 2:] > target.boxes[:, :2]).all() and (target.area > 0).all()


def boxed(number: int, *box: Any) -> Callable[[Any], object]:
    return lambda coco: coco.annotation(number).update(bbox=list(box))


def categorised(number: int | None) -> Callable[[Any], object]:
    return lambda coco: coco.annotation(128).update(category_id=number)


def image(k: int, **values: Any) -> Callable[[Any], object]:
    return lambda coco: coco.train["images"][k].update(values)


def more(key: str, value: Any) -> Callable[[Any], object]:
    return lambda coco: coco.train[key].append(value)


def again(number: int, **values: Any) -> Callable[[Any], object]:
    return lambda coco: coco.train["annotations"].append({**coco.annotation(number), **values})


def twice(number: Any) -> Callable[[Any], object]:
    return lambda coco: [coco.annotation(k).update(id=number) for k in (110, 113)]


def text_of(text: str) -> Callable[[Any], object]:
    return lambda coco: coco.files.update(train=text)


def lose(*names: str) -> Callable[[Any], object]:
    return lambda coco: [(coco.pictures / name).unlink() for name in names]


def resize(name: str, size: tuple[int, int]) -> Callable[[Any], object]:
    return lambda coco: Image.open(coco.pictures / name).resize(size).save(coco.pictures / name)


def turned(coco: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(coco.pictures / "a.jpg").save(coco.pictures / "a.jpg", exif=exif)


def cut_off(coco: Any) -> None:
    text = json.dumps(coco.train)
    coco.files["train"] = text[: len(text) // 2]


def all_boxes(change: Callable[[list[int], dict], list[float]]) -> Callable[[Any], object]:
    def plant(coco: Any) -> None:
        sizes = {one["id"]: one for one in coco.train["images"]}
        for one in coco.train["annotations"]:
            one["bbox"] = change(one["bbox"], sizes[one["image_id"]])

    return plant


def crowds_only(coco: Any) -> None:
    for one in coco.train["annotations"]:
        one["iscrowd"] = 1 if one["image_id"] == 24 else one["iscrowd"]


def without(key: str, value: Any = None) -> Callable[[Any], object]:
    return lambda coco: coco.train.update({key: value}) if value is not None else coco.train.pop(key)


def split_twice(coco: Any) -> None:
    coco.root.mkdir(parents=True, exist_ok=True)
    (coco.root / "training.json").write_text(json.dumps(coco.train))


def two_of_a_name(coco: Any) -> None:
    coco.train["categories"].append({"id": 7, "name": "cat"})
    coco.annotation(125)["category_id"] = 7


COCO = [
    Fault("picture is missing", lose("b.jpg"), "missing_file", "train.json, image 17", lost=4, lost_pictures=1),
    Fault("all pictures are missing", lose("a.jpg", "b.jpg", "c.png", "d.jpg"), "no_pictures", "train.json", True),
    Fault("an image id twice", image(1, id=10), "duplicate_image_id", "image 10", True, beside=("unknown_image",) * 4),
    Fault("an image twice", more("images", {"id": 10, "file_name": "a.jpg"}), "duplicate_image", "image 10"),
    Fault("a picture twice", more("images", {"id": 99, "file_name": "./a.jpg"}), "duplicate_image", "image 99"),
    Fault("a picture in capitals, too", more("images", {"id": 99, "file_name": "A.JPG", "height": 60, "width": 80}),
          "duplicate_image", "image 99"),
    Fault("image without a name", more("images", {"id": 99, "width": 3}), "bad_image", "images[4]"),
    Fault("image without an id", more("images", {"file_name": "a.jpg"}), "bad_image", "images[4]"),
    Fault("image that is none", more("images", None), "bad_image", "images[4]"),
    Fault("an annotation id twice", lambda c: c.annotation(104).update(id=101), "duplicate_annotation_id", "tion 101"),
    Fault("unknown category", categorised(3), "unknown_category", "annotation 128", lost=1),
    Fault("category null", categorised(None), "unknown_category", "annotation 128", lost=1),
    Fault("unknown image", again(101, id=7, image_id=11), "unknown_image", "annotation 7"),
    Fault("negative width", boxed(113, 20, 5, -15, 20), "negative", "annotation 113", lost=1),
    Fault("no width", boxed(113, 5, 5, 0, 20), "degenerate", "annotation 113", lost=1),
    Fault("hardly a height", boxed(113, 5, 5, 15, 0.01), "degenerate", "annotation 113", lost=1),
    Fault("a third of a pixel", boxed(113, 5, 5, 0.34, 0.34), "too_small", "annotation 113", lost=1),
    Fault("all but a pixel", boxed(113, 5, 5, 0.9, 0.9), "too_small", "annotation 113", lost=1),
    Fault("not a number", boxed(113, float("nan"), 5, 15, 20), "not_finite", "annotation 113", lost=1),
    Fault("infinite", boxed(113, 5, 5, float("inf"), 20), "not_finite", "annotation 113", lost=1),
    Fault("far too large", boxed(113, 5, 5, 1e300, 20), "not_finite", "annotation 113", lost=1),
    Fault("null within", boxed(113, 5, None, 15, 20), "not_finite", "annotation 113", lost=1),
    Fault("outside", boxed(113, 65, 5, 15, 20), "outside", "annotation 113", lost=1),
    Fault("left of it", boxed(113, -30, 5, 15, 20), "outside", "annotation 113", lost=1),
    Fault("all but outside", boxed(113, 63.5, 5, 15, 20), "outside", "annotation 113", lost=1),
    Fault("partly outside", boxed(113, 50, 30, 20, 20), "partly_outside", "annotation 113"),
    Fault("box three times as long", boxed(113, 5, 5, 15), "bad_box", "annotation 113", lost=1),
    Fault("text", boxed(113, 5, 5, "wide", 20), "bad_box", "annotation 113", lost=1),
    Fault("box as an object", lambda c: c.annotation(113).update(bbox={"x": 1}), "bad_box", "tion 113", lost=1),
    Fault("no box", lambda c: c.annotation(113).pop("bbox"), "no_box", "annotation 113", lost=1),
    Fault("empty box", boxed(113), "no_box", "annotation 113", lost=1),
    Fault("box twice", again(113, id=7), "duplicate_box", "annotation 7"),
    Fault("box twice without an id", again(113, id=None), "duplicate_box", "annotations[11]", beside=("no_id",)),
    Fault("no id", lambda c: c.annotation(113).pop("id"), "no_id", "annotations[4]"),
    Fault("id that is none", lambda c: c.annotation(113).update(id=[113]), "no_id", "annotations[4]"),
    *(
        Fault(f"the id {number!r} twice", twice(number), "duplicate_annotation_id", "annotations[4]")
        for number in ("x", -7, 1 << 62, 10**30)
    ),
    Fault("the id 7.0 twice", twice(7.0), "duplicate_annotation_id", "annotation 7"),
    Fault("the id '7' twice", twice("7"), "duplicate_annotation_id", "annotation 7"),
    Fault("area of another box", lambda c: c.annotation(113).update(area=3000), "impossible_area", "tion 113"),
    Fault("area of nothing", lambda c: c.annotation(113).update(area=0), "impossible_area", "annotation 113"),
    *(
        Fault(f"crowd {value!r}", lambda c, v=value: c.annotation(113).update(iscrowd=v), "bad_flag", "tion 113")
        for value in (2, -1, "maybe", [1], 0.5, 10**400)
    ),
    Fault("a box of two classes", again(113, id=7, category_id=5), "two_classes", "annotation 7", lost=-1),
    Fault("annotation that is none", more("annotations", "text"), "bad_annotation", "annotations[11]"),
    Fault("negative area", lambda c: c.annotation(113).update(area=-1), "bad_area", "annotation 113"),
    Fault("area not a number", lambda c: c.annotation(113).update(area=float("nan")), "bad_area", "annotation 113"),
    Fault("crowds only", crowds_only, "crowd_only", "annotation 125"),
    Fault("size of another shape", image(1, width=500, height=90), "wrong_size", "train.json, b.jpg"),
    Fault("size too small for the boxes", image(1, width=40, height=20), "wrong_size", "train.json, b.jpg"),
    Fault("picture made smaller", resize("b.jpg", (32, 24)), "wrong_size", "train.json, b.jpg"),
    Fault("picture made larger", resize("b.jpg", (128, 96)), "wrong_size", "train.json, b.jpg"),
    Fault("width and height exchanged", image(1, width=48, height=64), "wrong_size", "train.json, b.jpg"),
    Fault("turned by EXIF", turned, "turned", "train.json, a.jpg"),
    Fault("no size", lambda c: c.train["images"][1].pop("width"), "no_size", "train.json, b.jpg"),
    Fault("size of zero", image(1, height=0), "no_size", "train.json, b.jpg"),
    Fault("no sizes", lambda c: [one.pop("width") for one in c.train["images"]], "no_size", "train.json"),
    Fault("no bytes", text_of(""), "bad_json", "train.json", True),
    Fault("empty object", text_of("{}"), "not_coco", "train.json", True),
    Fault("empty list", text_of("[]"), "not_coco", "train.json", True),
    Fault("cut off", cut_off, "bad_json", "train.json", True),
    Fault("cut off at its first word", text_of('{"im'), "bad_json", "train.json", True),
    Fault("a page of a web server", text_of("<html>404</html>"), "bad_json", "train.json", True),
    Fault("not JSON", text_of('{"images": [}, "annotations": [], "categories": []}'), "bad_json", "train.json", True),
    Fault("empty lists", lambda c: c.train.update(images=[], annotations=[]), "no_pictures", "train.json", True),
    Fault("no annotations", lambda c: c.train.update(annotations=[]), "no_objects", "train.json", True),
    Fault("no list of annotations", without("annotations"), "no_annotations", "train.json", True),
    Fault("no list of images", without("images"), "not_coco", "train.json", True),
    Fault("no categories", lambda c: [d.pop("categories") for d in (c.train, c.val)], "no_categories", "train.json",
          True, count=2),
    Fault("category without a name", more("categories", {"id": 4}), "bad_category", "categories[3]", True),
    Fault("category without an id", more("categories", {"name": "x"}), "bad_category", "categories[3]", True),
    Fault("a category id twice", more("categories", {"id": 5, "name": "cow"}), "duplicate_category_id", "gory 5", True),
    Fault("a category twice", more("categories", {"id": 5, "name": "cat"}), "duplicate_category", "category 5"),
    Fault("two of a name", two_of_a_name, "same_name", "category 7"),
    Fault("fractions", all_boxes(lambda box, size: [v / size[s] for v, s in zip(box, ("width", "height") * 2,
          strict=True)]), "fractions", "train.json", True),
    Fault("corners", all_boxes(lambda box, _: [box[0], box[1], box[0] + box[2], box[1] + box[3]]), "corners",
          "train.json", True),
    Fault("nothing usable", all_boxes(lambda box, _: [*box[:2], 0, 0]), "degenerate", "annotation 101", count=11,
          beside=("no_objects",)),
    Fault("two files of a split", split_twice, "two_splits", "coco", True),
]  # fmt: skip


@pytest.mark.parametrize("fault", COCO, ids=lambda fault: fault.name)
def test_coco(fault, coco_set):
    fault.plant(coco_set)
    root = coco_set.write()
    if fault.name == "nothing usable":
        assert Counter(p.kind for p in inspect_data(root).problems) == {"degenerate": 11, "no_objects": 1}
        with pytest.raises(UserError, match=r"left out \(11 faults\), most often as in .*tion 101: 0 x 0 pixels"):
            open_splits(root)
        return
    check(fault, root, OBJECTS)


@pytest.mark.parametrize("text", ['{"im', "<html>404</html>", "version 1 of a pointer to a large file"])
def test_one_broken_file_beside_pictures_is_named(coco_set, text):
    """And not taken for a folder with a class called `images`."""
    coco_set.files = {"train": text}
    root = coco_set.write()
    (root / "val.json").unlink()
    with pytest.raises(UserError, match=r"train\.json: .*(cut off|not valid JSON)"):
        open_splits(root)
    assert [(p.kind, Path(p.where).name) for p in inspect_data(root).problems] == [("bad_json", "train.json")]


def category_is_gone(c: Any) -> None:
    c.train["categories"] = [one for one in c.train["categories"] if one["name"] != "cat"]


ROOTS: list[tuple[str, Callable[[Any], object], str, int, str]] = [
    # what, how, the kind it is said as, problems, what is said of the others
    ("a category that is gone", category_is_gone, "unknown_category", 4, "the same 3 times more: annotation"),
    ("a picture that is gone", lambda c: c.train["images"].pop(0), "unknown_image", 4, "the same 3 times more"),
    ("one id for all", lambda c: [one.update(id=1) for one in c.train["annotations"]], "duplicate_annotation_id", 10,
     "the same 9 times more: annotation 1 ..."),
    ("no ids", lambda c: [one.pop("id") for one in c.train["annotations"]], "no_id", 11, "the same 10 times more"),
    ("no areas", lambda c: [one.update(area=0) for one in c.train["annotations"]], "impossible_area", 11,
     "the same 10 times more"),
    ("no box at all", lambda c: [one.pop("bbox") for one in c.train["annotations"]], "no_box", 12, "and so "),
    ("pictures by other numbers", lambda c: [one.update(image_id=9000 + one["image_id"])
     for one in c.train["annotations"]], "unknown_image", 12, "and so "),
    ("no area anywhere", all_boxes(lambda box, _: [*box[:2], 0, 0]), "degenerate", 12, "and so "),
    ("a folder that is gone", lambda c: [one.update(file_name="gone/y" + one["file_name"])
     for one in c.train["images"][:2]], "missing_file", 2, "the same once more: image"),
    ("boxes of another size", lambda c: c.train["images"][1].update(width=640, height=470) or
     boxed(113, 5, 5, 600, 400)(c), "wrong_size", 2, "and so "),
    ("pictures that are none", lambda c: [(c.pictures / n).write_bytes(b"text") for n in ("e.jpg", "f.jpg")],
     "unreadable", 2, "the same once more"),
    ("a split twice", lambda c: c.files.update(val=json.dumps(c.train)), "leak", 4, "the same 3 times more"),
]  # fmt: skip


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root[0])
def test_one_root_is_one_fault(root, coco_set):
    _, plant, kind, problems, said = root
    plant(coco_set)
    report = inspect_data(coco_set.write())
    text = rendered(report)
    assert len(report.problems) == problems and report.problems[0].kind == kind, "\n".join(map(str, report.problems))
    assert len(faults(report.problems)) == report.to_dict()["faults"] == 1
    assert f"{kind.replace('_', ' ')}: 1\n" in text and "\n1 problem\n" in text and said in text


def test_an_empty_split_is_refused_and_no_other_takes_its_place(coco_set):
    root, healthy = coco_set.write(), json.dumps(coco_set.val)
    (root / "test.json").write_text(healthy)
    for split in ("val", "train"):
        empty = {**json.loads(healthy), "images": [None] * 3, "annotations": []}
        (root / f"{split}.json").write_text(json.dumps(empty))
        with pytest.raises(UserError, match=rf"{split}\.json: no picture of the {split} split is left"):
            open_splits(root)
        assert Counter(p.kind for p in inspect_data(root).problems) >= Counter(bad_image=3, no_pictures=1)
        (root / f"{split}.json").write_text(healthy)


def test_a_val_of_its_own_that_cannot_be_read_is_reported(coco_set):
    root = coco_set.write()
    (root / "other.json").write_text('{"im')
    report = inspect_data(root, root / "other.json")
    assert [split.name for split in report.splits] == ["train"]
    assert [(p.kind, Path(p.where).name) for p in report.problems] == [("bad_json", "other.json")]


def test_broken_files_that_are_no_split_do_not_matter(coco_set):
    root = coco_set.write()
    (root / "train_settings.json").write_text("{")
    (root / "notes.json").write_text("{")
    assert inspect_data(root).ok and len(open_splits(root).train) == 4


def test_a_folder_inside_a_set_names_the_set(coco_set, voc_set, yolo_set, tmp_path, monkeypatch):
    coco_set.write()
    inner = [
        (voc_set, "Annotations"), (voc_set, "JPEGImages"), (voc_set, "ImageSets"), (voc_set, "ImageSets/Main"),
        (coco_set.root, "images"), (yolo_set, "images"), (yolo_set, "images/train"), (yolo_set, "labels"),
        (yolo_set, "labels/val"),
    ]  # fmt: skip
    for root, name in inner:
        with pytest.raises(UserError, match=f"is a part of the .* data set in {root}, .*; give {root} instead"):
            open_splits(root / name)
        assert [p.kind for p in inspect_data(root / name).problems] == ["part_of_set"], name
    monkeypatch.chdir(voc_set / "Annotations")
    with pytest.raises(UserError, match=f"give {voc_set} instead"):
        open_splits(".")
    (tmp_path / "other").mkdir()  # beside sets, but inside none
    with pytest.raises(UserError, match="no pictures"):
        open_splits(tmp_path / "other")


def test_boxes_that_only_the_picture_itself_refutes(coco_set):
    """Without stated sizes nothing shows before the pictures are looked at."""
    for one in coco_set.train["images"]:
        del one["height"]
    coco_set.annotation(113)["bbox"] = [65, 5, 15, 20]
    coco_set.annotation(116)["bbox"] = [50, 30, 20, 20]
    root = coco_set.write()
    where = {problem.kind: problem.where for problem in inspect_data(root).problems}
    file = root / "train.json"
    assert where.pop("no_size") == str(file)
    assert where == {"outside": f"{file}, annotation 113", "partly_outside": f"{file}, annotation 116"}
    splits = open_splits(root)
    assert isinstance(splits.train, BoxSource) and len(splits.train.boxes) == OBJECTS
    train, notes = fit_to_pictures(splits.train, measure_sizes(splits.train, DataConfig()))
    assert isinstance(train, BoxSource) and len(train.boxes) == OBJECTS - 1 and len(notes) == 2
    assert train.target(1).boxes[0].tolist() == [50, 30, 64, 48]


def test_a_split_that_is_only_for_tests_may_lack_annotations(coco_set):
    root = coco_set.write()
    (root / "test.json").write_text(json.dumps({"images": coco_set.val["images"], "categories": []}))
    splits = open_splits(root)
    assert len(splits.val) == 2 and any("1 split without annotations is left out" in note for note in splits.notes)


JUNK = (None, True, [], {}, "", -1, 0, 1e308, 10**400, float("nan"), "\0", "/", [[1, 2], [3, 4]], [None] * 4, 3.5, "12")


def test_whatever_lies_in_a_file_is_said_and_never_a_crash(coco_set):
    rng = np.random.default_rng(0)
    healthy = json.dumps(coco_set.train)
    for k in range(120):
        coco_set.train = json.loads(healthy)
        inside: Any = coco_set.train
        key = str(rng.choice(list(inside)))
        for depth in range(1 + k % 4):  # a list, one of its entries, one of that one's values, a part of that value
            if depth and isinstance(inside[key], list | dict) and inside[key]:
                inside = inside[key]
                key = list(inside)[rng.integers(len(inside))] if isinstance(inside, dict) else rng.integers(len(inside))
        inside[key] = JUNK[rng.integers(len(JUNK))]
        root = coco_set.write()
        find(root)
        with contextlib.suppress(UserError):
            open_splits(root)


def change(name: str, old: str, new: str) -> Callable[[Any], object]:
    def plant(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return plant


def write(name: str, data: str | bytes) -> Callable[[Any], object]:
    return lambda root: (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def append(name: str, text: str) -> Callable[[Any], object]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes() + text.encode())


def remove(name: str) -> Callable[[Any], object]:
    return lambda root: (root / name).unlink()


def difficult_only(root: Path) -> None:
    file = root / "Annotations" / "c.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult>1"))


def another(old: str, new: str) -> Callable[[Any], object]:
    """A second picture with the name of b, whose XML file is changed."""

    def plant(root: Path) -> None:
        Image.new("RGB", (64, 48)).save(root / "JPEGImages" / "b.png")
        change(B, old, new)(root)

    return plant


B, B_SIZE = "Annotations/b.xml", "<size><width>64</width><height>48</height><depth>3</depth></size>"
BOX = "<bndbox><xmin>6</xmin><ymin>6</ymin><xmax>20</xmax><ymax>25</ymax></bndbox>"
DOG = f"<object><name>dog</name><difficult>0</difficult>{BOX}</object>"
BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;&b;">]><annotation>&c;</annotation>'
TRAIN = "ImageSets/Main/train.txt"

VOC = [
    Fault("picture is missing", remove("JPEGImages/b.jpg"), "missing_file", f"{TRAIN}:2", lost=4, lost_pictures=1),
    Fault("XML is missing", remove(B), "no_annotation", f"{TRAIN}:2", lost=4, lost_pictures=1),
    Fault("both are missing", append(TRAIN, "x\n"), "no_annotation", f"{TRAIN}:5"),
    Fault("listed in capitals, too", append(TRAIN, "A\n"), "duplicate_image", f"{TRAIN}:5"),
    Fault("listed twice", append(TRAIN, "a\n"), "duplicate_image", f"{TRAIN}:5"),
    Fault("cut off", write(B, "<annotation><object>"), "bad_xml", B, lost=4, lost_pictures=1),
    Fault("empty XML", write(B, ""), "bad_xml", B, lost=4, lost_pictures=1),
    Fault("not UTF-8", write(B, b"<annotation>\xff\xfe</annotation>"), "bad_xml", B, lost=4, lost_pictures=1),
    Fault("other XML", write(B, "<html></html>"), "bad_xml", B, lost=4, lost_pictures=1),
    Fault("entities", write(B, BOMB), "unsafe_xml", B, lost=4, lost_pictures=1),
    Fault("depth", write(B, "<annotation>" * 99 + "</annotation>" * 99), "unsafe_xml", B, lost=4, lost_pictures=1),
    Fault("no size", change(B, B_SIZE, ""), "no_size", B),
    Fault("size of zero", change(B, "<width>64", "<width>0"), "no_size", B),
    Fault("wrong size", change(B, "<width>64", "<width>200"), "wrong_size", B),
    Fault("size too small", change(B, "<width>64", "<width>30"), "wrong_size", B),
    Fault("no name", change(B, "<name>dog</name>", ""), "no_name", f"{B}, object 1", lost=1),
    Fault("no box", change(B, BOX, "<robndbox/>"), "no_box", f"{B}, object 1", lost=1),
    Fault("no edge", change(B, "<xmin>6</xmin>", ""), "bad_box", f"{B}, object 1", lost=1),
    Fault("text", change(B, "<xmin>6", "<xmin>left"), "bad_box", f"{B}, object 1", lost=1),
    Fault("not a number", change(B, "<xmin>6", "<xmin>nan"), "not_finite", f"{B}, object 1", lost=1),
    Fault("a click", change(B, "<xmax>20", "<xmax>6"), "degenerate", f"{B}, object 1", lost=1),
    Fault("edges exchanged", change(B, "<xmax>20", "<xmax>2"), "negative", f"{B}, object 1", lost=1),
    Fault("outside", change(B, BOX, BOX.replace("xmin>6", "xmin>66").replace("20", "80")), "outside", f"{B}, object 1",
          lost=1),
    Fault("partly outside", change(B, "<xmax>20", "<xmax>80"), "partly_outside", f"{B}, object 1"),
    Fault("twice", change(B, DOG, DOG * 2), "duplicate_box", f"{B}, object 2"),
    Fault("two boxes", change(B, BOX, BOX + BOX.replace("25", "30")), "two_boxes", f"{B}, object 1"),
    Fault("perhaps difficult", change(B, "<difficult>0", "<difficult>maybe"), "bad_flag", f"{B}, object 1"),
    Fault("difficult only", difficult_only, "crowd_only", "Annotations/c.xml, object 1"),
    Fault("another picture of its name", another("<filename>b.jpg</filename>", ""), "several_pictures", B),
    Fault("no pictures", write(TRAIN, ""), "no_pictures", "voc", True),
    Fault("in two splits", append("ImageSets/Main/val.txt", "b\n"), "leak", "JPEGImages/b.jpg"),
]  # fmt: skip


@pytest.mark.parametrize("fault", VOC, ids=lambda fault: fault.name)
def test_voc(fault, voc_set):
    fault.plant(voc_set)
    if fault.kind == "leak":  # which only bytes show
        report = inspect_data(voc_set)
        assert [(problem.kind, problem.where) for problem in report.problems] == [("leak", str(voc_set / fault.where))]
        return
    check(fault, voc_set, OBJECTS)


def test_voc_without_lists(voc_set):
    for file in (voc_set / "ImageSets" / "Main").iterdir():
        file.unlink()
    (voc_set / B).unlink()
    (voc_set / "JPEGImages" / "c.png").unlink()
    where = {problem.kind: problem.where for problem in inspect_data(voc_set).problems}
    assert where == {
        "no_annotation": str(voc_set / "JPEGImages" / "b.jpg"),
        "missing_file": str(voc_set / "Annotations" / "c.xml"),
    }


def no_labels(root: Path) -> None:
    for file in (root / "labels").rglob("*.txt"):
        file.unlink()


T = "labels/train/b.txt"
NEXT = f"{T}:5"  # after the four that it has
YOLO = [
    Fault("class beyond the names", append(T, "3 0.5 0.5 0.1 0.1\n"), "unknown_category", NEXT),
    Fault("negative class", append(T, "-1 0.5 0.5 0.1 0.1\n"), "unknown_category", NEXT),
    Fault("half a class", append(T, "0.5 0.5 0.5 0.1 0.1\n"), "unknown_category", NEXT),
    Fault("class not a number", append(T, "nan 0.5 0.5 0.1 0.1\n"), "unknown_category", NEXT),
    Fault("class by its name", append(T, "dog 0.5 0.5 0.1 0.1\n"), "bad_line", NEXT),
    Fault("four numbers", append(T, "0 0.5 0.5 0.1\n"), "bad_line", NEXT),
    Fault("six numbers", append(T, "0 0.5 0.5 0.1 0.1 0.9\n"), "bad_line", NEXT),
    Fault("commas", append(T, "0,0.5,0.5,0.1,0.1\n"), "bad_line", NEXT),
    Fault("pixels", append(T, "0 30 20 10 10\n"), "not_fractions", NEXT),
    Fault("not a number", append(T, "0 0.5 nan 0.1 0.1\n"), "not_finite", NEXT),
    Fault("outline not a number", append(T, "0 0.5 nan 0.1 0.1 0.2 0.2\n"), "not_finite", NEXT),
    Fault("no width", append(T, "0 0.5 0.5 0 0.1\n"), "degenerate", NEXT),
    Fault("a third of a pixel", append(T, "0 0.5 0.5 0.005 0.006\n"), "too_small", NEXT),
    Fault("negative height", append(T, "0 0.5 0.5 0.1 -0.1\n"), "negative", NEXT),
    Fault("outside", append(T, "0 1.5 0.5 0.1 0.1\n"), "outside", NEXT),
    Fault("partly outside", append(T, "0 1.0 0.5 0.5 0.1\n"), "partly_outside", NEXT, lost=-1),
    Fault("twice", lambda root: append(T, (root / T).read_text().splitlines()[0])(root), "duplicate_box", NEXT),
    Fault("not UTF-8", write(T, b"0 0.5 0.5 0.1 0.1 \xff\n"), "bad_label_file", T, lost=4, lost_pictures=1),
    Fault("labels of no picture", write("labels/train/x.txt", "0 0.5 0.5 0.1 0.1\n"), "missing_file", "train/x.txt"),
    Fault("no names", change("data.yaml", "names: [dog, cat, bird]", ""), "no_names", "data.yaml", True),
    Fault("names empty", change("data.yaml", "[dog, cat, bird]", "[]"), "no_names", "data.yaml", True),
    Fault("names without numbers", change("data.yaml", "[dog, cat, bird]", "{dog: 0}"), "bad_names", "data.yaml", True),
    Fault("two of a name", change("data.yaml", "[dog, cat, bird]", "[dog, cat, dog]"), "same_name", "yaml, class 2"),
    Fault("a number twice", change("data.yaml", "[dog, cat, bird]", "{0: dog, 1: eel, 1: cat, 2: bird}"),
          "duplicate_category_id", "yaml, class 1", True),
    Fault("a number and name twice", change("data.yaml", "[dog, cat, bird]", "{0: dog, 1: cat, '1': cat, 2: bird}"),
          "duplicate_category", "yaml, class 1"),
    Fault("another number of names", change("data.yaml", "nc: 3", "nc: 4"), "class_count", "data.yaml"),
    Fault("a place twice", change("data.yaml", "train: images/train", "train: [images/train, images/train]"),
          "duplicate_image", "images/train/a.jpg", count=4),
    Fault("not YAML", append("data.yaml", "names: [dog\n"), "bad_yaml", "data.yaml", True),
    Fault("no train folder", change("data.yaml", "images/train", "images/other"), "missing_split", "data.yaml", True),
    Fault("no val folder", change("data.yaml", "images/val", "images/other"), "missing_split", "data.yaml", True),
    Fault("no test folder", append("data.yaml", "test: images/test\n"), "missing_split", "data.yaml"),
    Fault("no labels", no_labels, "no_labels", "yolo", True),
]  # fmt: skip


def test_halves_of_a_character_can_be_printed(coco_set, yolo_set):
    """JSON's and YAML's escapes can make them, and no output can hold them."""
    for data in (coco_set.train, coco_set.val):
        data["categories"][0]["name"] = "cat\udfff"
    coco_set.train["images"].append({"id": "\ud800", "file_name": "\udc00.jpg"})
    coco_set.train["images"].append({"id": "\ud800", "file_name": "x.jpg"})
    change("data.yaml", "[dog, cat, bird]", '[dog, "cat\\udfff", "\\ud83d\\udc08"]')(yolo_set)
    for root, last in ((coco_set.write(), "bird"), (yolo_set, "\U0001f408")):
        report = inspect_data(root)
        assert list(report.to_dict()["splits"][0]["classes"]) == ["dog", "cat\ufffd", last]
        assert "cat\ufffd" in rendered(report).encode().decode()
        json.dumps(report.to_dict(), ensure_ascii=False).encode()


@pytest.mark.parametrize("change_line, words", [
    (lambda fields: [fields[0], *(str(100 * float(value)) for value in fields[1:])], "numbers are in pixels"),
    (lambda fields: [*fields, "0.9"], "6 numbers, not a class and four"),
])  # fmt: skip
def test_what_leaves_no_object_is_named(yolo_set, change_line, words):
    for file in (yolo_set / "labels").rglob("*.txt"):
        file.write_text("".join(" ".join(change_line(line.split())) + "\n" for line in file.read_text().splitlines()))
    with pytest.raises(UserError, match=rf"no objects to learn from after .*, most often as in .*\.txt:1: {words}"):
        open_splits(yolo_set)


def test_two_pictures_with_one_file_of_labels(yolo_set):
    Image.new("RGB", (64, 48)).save(yolo_set / "images" / "train" / "b.png")
    (problem,) = inspect_data(yolo_set).problems
    assert (problem.kind, problem.where, problem.refuses) == ("shared_labels", str(yolo_set / T), False)
    assert "b.jpg and b.png" in problem.what
    assert any("1 label file is that of two pictures" in note for note in open_splits(yolo_set).notes)


@pytest.mark.parametrize("fault", YOLO, ids=lambda fault: fault.name)
def test_yolo(fault, yolo_set):
    fault.plant(yolo_set)
    check(fault, yolo_set, OBJECTS - 1)


def test_a_list_that_names_what_is_not_there(yolo_set):
    (yolo_set / "train.txt").write_text("images/train/a.jpg\nimages/train/x.jpg\nimages/train/a.jpg\n")
    change("data.yaml", "images/train", "train.txt")(yolo_set)
    where = {problem.kind: problem.where for problem in inspect_data(yolo_set).problems}
    assert where == {"missing_file": f"{yolo_set}/train.txt:2", "duplicate_image": f"{yolo_set}/train.txt:3"}
    assert len(open_splits(yolo_set).train) == 1


def test_every_kind_that_is_dropped_has_its_words():
    planted = {fault.kind for fault in [*COCO, *VOC, *YOLO] if not fault.refuses} - {"leak"}
    assert planted | {"no_annotations", "shared_labels"} == set(DROPPED)


def test_a_healthy_set_raises_no_alarm(coco_set, voc_set, yolo_set):
    for root in (coco_set.write(), voc_set, yolo_set):
        report = inspect_data(root)
        assert report.ok and report.task == "detect" and "nothing is wrong" in rendered(report)
    found = report.to_dict()  # YOLO's
    assert [split["pictures"] for split in found["splits"]] == [4, 2]
    assert found["splits"][0]["classes"] == {"dog": 4, "cat": 3, "bird": 3}
    boxes = found["splits"][0]["boxes"]
    assert boxes["objects"] == 10 and boxes["crowds"] == 0 and boxes["per_picture"] == (0, 3, 4)
    assert boxes["empty_pictures"] == 1 and boxes["areas"] == {"small": 7, "medium": 3, "large": 0}
    json.dumps(found)


def test_crowds_are_counted_apart(coco_set):
    report = inspect_data(coco_set.write())
    boxes = report.splits[0].boxes  # pyright: ignore[reportAttributeAccessIssue]
    assert boxes is not None and (boxes.objects, boxes.crowds) == (10, 1) and "regions to ignore" in rendered(report)


def test_faults_of_pictures_and_leaks_are_found_here_too(coco_set):
    (coco_set.pictures / "a.jpg").write_bytes(b"no picture")
    (coco_set.pictures / "e.jpg").write_bytes((coco_set.pictures / "b.jpg").read_bytes())
    coco_set.val["images"][0].update(width=64, height=48)
    kinds = Counter(problem.kind for problem in inspect_data(coco_set.write()).problems)
    assert kinds == {"unreadable": 1, "leak": 1}
    assert not any(p.refuses for p in inspect_data(coco_set.root).problems) and len(open_splits(coco_set.root).val) == 2
    for name in ("a.jpg", "b.jpg", "c.png", "d.jpg"):
        (coco_set.pictures / name).write_bytes(b"no picture")
    assert all(p.refuses for p in inspect_data(coco_set.root).problems)


def test_what_only_inspect_sees_does_not_keep_training_from_starting(coco_set):
    train = coco_set.pictures
    (train / "a.jpg").write_bytes((train / "a.jpg").read_bytes()[:-200])
    (train / "b.jpg").rename(train / "b.png")
    (train / "d.jpg").write_bytes((train / "b.png").read_bytes())
    coco_set.train["images"][1]["file_name"] = "b.png"
    coco_set.train["images"][3].update(width=64, height=48)
    kinds = {problem.kind: problem.refuses for problem in inspect_data(coco_set.write()).problems}
    assert kinds == dict.fromkeys(("truncated", "wrong_extension", "duplicate"), False)


def test_a_picture_in_train_and_val_is_noted(coco_set):
    coco_set.val["images"][1].update(file_name="./images/../images/b.jpg", width=64, height=48)
    notes = open_splits(coco_set.write()).notes
    assert sum("1 picture is both learnt from and measured on" in note and "b.jpg" in note for note in notes) == 1


def test_hints(coco_set):
    """Twelve of one class and one of another, nearly all of them tiny, in pictures of which most are empty."""
    train = open_splits(coco_set.write()).train
    assert isinstance(train, BoxSource)
    labels, boxes = np.array([0] * 12 + [1]), np.tile(np.array([0, 0, 20, 20], np.float32), (13, 1))
    made = replace(train, labels=labels, boxes=boxes, area=boxes[:, 2] ** 2, crowd=np.zeros(13, np.bool_))
    made = replace(made, starts=np.array([0, 13, 13, 13, 13]))
    hints = box_hints(made, np.array([[3000, 4000]] * 4))
    begins = ("very unequal classes: 12", "fewer than 50 objects", "no objects to learn from: bird")
    for words in (*begins, "100% of the objects are", "75% of the pictures have no"):
        assert sum(words in hint for hint in hints) == 1
    assert len(hints) == 5 and len(box_hints(made, np.array([[60, 80]] * 4))) == 4


def test_real_data(shared):
    report = inspect_data(shared / "cells")
    assert [(problem.kind, problem.where, problem.refuses) for problem in report.problems] == [
        ("degenerate", f"{shared / 'cells' / 'train.json'}, annotation 2288", False),
        ("degenerate", f"{shared / 'cells' / 'val.json'}, annotation 887", False),
    ]
    assert inspect_data(shared / "cells_voc").problems == []
