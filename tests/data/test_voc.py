from __future__ import annotations

import json
from pathlib import Path

import pytest

from saccade.data.source import BoxSource
from saccade.data.sources import detect_format, find, open_source, open_splits
from saccade.data.sources.voc import UnsafeXml, parse_xml


def same_as(things, split: str) -> dict[str, list]:
    return {name: inside for name, (_, inside) in things[split].items()}


def change(file: Path, old: str, new: str, count: int = 1) -> None:
    text = file.read_text()
    assert text.count(old) >= count
    file.write_text(text.replace(old, new, count))


def test_everything_of_a_healthy_set(voc_set, things, contents):
    assert detect_format(voc_set) == "voc"
    found = find(voc_set)
    assert found.problems == [] and found.task == "detect"
    splits = open_splits(voc_set)
    train = splits.train
    assert isinstance(train, BoxSource) and train.class_names == splits.val.class_names == ("bird", "cat", "dog")
    assert contents(train) == same_as(things, "train") and contents(splits.val) == same_as(things, "val")
    assert splits.notes == [f"{voc_set}: 1 object is marked difficult, so neither learnt nor counted as missed"]
    assert train.place(1, 5) == f"{voc_set / 'Annotations' / 'b.xml'}, object 2"
    assert train.declared.tolist() == [[60, 80], [48, 64], [72, 54], [60, 60]]
    assert contents(open_source(voc_set, "val")) == contents(splits.val)


def in_a_year(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "VOCdevkit").mkdir()
    root.rename(tmp_path / "VOCdevkit" / "VOC2007")
    return tmp_path


def trainval_and_test(root: Path, tmp_path: Path) -> Path:
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    return root


def list_of_one_class(root: Path, tmp_path: Path) -> Path:
    """VOC's lists of a class say in a second column whether it is there."""
    for file in (root / "ImageSets" / "Main").glob("*.txt"):
        file.write_text("".join(f"{line} -1\n" for line in file.read_text().splitlines()))
    return root


def beside(root: Path, tmp_path: Path) -> Path:
    """Folders for the splits, XML files beside the pictures."""
    for split in ("train", "val"):
        folder = tmp_path / "beside" / split
        folder.mkdir(parents=True)
        for stem in (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            (root / "Annotations" / f"{stem}.xml").rename(folder / f"{stem}.xml")
            picture = next((root / "JPEGImages").glob(f"{stem}.*"))
            picture.rename(folder / picture.name)
    return tmp_path / "beside"


def splits_within(root: Path, tmp_path: Path) -> Path:
    """annotations/train beside images/train."""
    made = tmp_path / "within"
    for split in ("train", "val"):
        for folder in ("annotations", "images"):
            (made / folder / split).mkdir(parents=True)
        for stem in (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            (root / "Annotations" / f"{stem}.xml").rename(made / "annotations" / split / f"{stem}.xml")
            picture = next((root / "JPEGImages").glob(f"{stem}.*"))
            picture.rename(made / "images" / split / picture.name)
    return made


def splits_within_shared_pictures(root: Path, tmp_path: Path) -> Path:
    made = splits_within(root, tmp_path)
    for split in ("train", "val"):
        for picture in (made / "images" / split).iterdir():
            picture.rename(made / "images" / picture.name)
        (made / "images" / split).rmdir()
    return made


@pytest.mark.parametrize(
    "layout",
    [in_a_year, trainval_and_test, list_of_one_class, beside, splits_within, splits_within_shared_pictures],
)
def test_layouts(layout, voc_set, things, tmp_path, contents):
    root = layout(voc_set, tmp_path)
    assert detect_format(root) == "voc" and find(root).problems == []
    splits = open_splits(root)
    assert contents(splits.train) == same_as(things, "train") and contents(splits.val) == same_as(things, "val")


def test_without_lists_a_part_is_held_out(voc_set, things, contents):
    for file in (voc_set / "ImageSets" / "Main").iterdir():
        file.unlink()
    splits = open_splits(voc_set, val_fraction=0.3)
    assert len(splits.train) + len(splits.val) == 6 and any("held out" in note for note in splits.notes)
    assert contents(open_source(voc_set)) == {**same_as(things, "train"), **same_as(things, "val")}


def test_several_years_are_one_set(voc_set, things, tmp_path):
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / "all" / year).mkdir(parents=True)
    for folder in ("Annotations", "ImageSets", "JPEGImages"):
        (tmp_path / "all" / "VOC2012" / folder).symlink_to(voc_set / folder)
        (tmp_path / "all" / "VOC2007" / folder).symlink_to(voc_set / folder)
    splits = open_splits(tmp_path / "all")
    assert len(splits.train) == 8 and len(splits.val) == 4


def test_coordinates_that_are_edges_counted_from_zero(voc_set, things, contents):
    for name, ((h, w), inside) in [pair for split in things.values() for pair in split.items()]:
        objects = "".join(
            f"<object><name>{c}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{r}.0</xmax><ymax>{b}</ymax></bndbox>"
            "</object>"
            for c, x, y, r, b, _ in inside
        )
        size = f"<size><width>{w}</width><height>{h}</height></size>"
        (voc_set / "Annotations" / f"{Path(name).stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    splits = open_splits(voc_set)
    plain = {name: [(*one[:5], False) for one in inside] for name, inside in same_as(things, "train").items()}
    assert contents(splits.train) == plain and len(splits.notes) == 1 and "counted from 0" in splits.notes[0]


def test_the_name_inside_finds_a_picture_that_is_called_otherwise(voc_set):
    (voc_set / "JPEGImages" / "b.jpg").rename(voc_set / "JPEGImages" / "renamed.jpg")
    change(voc_set / "Annotations" / "b.xml", "b.jpg", "C:\\mine\\renamed.jpg")
    train = open_splits(voc_set).train
    assert train.id(1).endswith("renamed.jpg") and len(train.target(1)) == 4


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_name_inside_tells_which_of_two_pictures_of_a_name(voc_set, suffix, picture):
    picture(48, 64).save(voc_set / "JPEGImages" / "b.png")
    change(voc_set / "Annotations" / "b.xml", "b.jpg", f"b.{suffix}")
    assert find(voc_set).problems == [] and open_splits(voc_set).train.id(1).endswith(f"b.{suffix}")


def test_parts_of_a_thing_are_no_things(voc_set, things, contents):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>"
    change(voc_set / "Annotations" / "b.xml", "<name>dog</name>", f"<name>dog</name>{part}")
    assert contents(open_splits(voc_set).train) == same_as(things, "train")


LAUGHS = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY lol "lol"><!ENTITY lol2 "&lol;&lol;&lol;&lol;&lol;&lol;">
<!ENTITY lol3 "&lol2;&lol2;&lol2;&lol2;&lol2;&lol2;">]><annotation>&lol3;</annotation>"""
OUTSIDE = f"""<?xml version="1.0"?><!DOCTYPE a SYSTEM "file:{"//"}/etc/hostname"><annotation>&a;</annotation>"""


@pytest.mark.parametrize("text", [LAUGHS, OUTSIDE, LAUGHS.encode("utf-16"), "<a>" * 100 + "</a>" * 100])
def test_xml_that_grows_is_not_read(text):
    with pytest.raises(UnsafeXml):
        parse_xml(text if isinstance(text, bytes) else text.encode())


def test_coco_in_the_same_folder_is_preferred(voc_set, coco_set):
    (voc_set / "annotations.json").write_text(json.dumps(coco_set.train))
    assert detect_format(voc_set) == "coco"


def test_real_data(shared):
    splits = open_splits(shared / "cells_voc")
    assert splits.train.class_names == ("Platelets", "RBC", "WBC") and (len(splits.train), len(splits.val)) == (20, 8)
    coco = open_splits(shared / "cells")
    both = {Path(coco.train.id(i)).stem: coco.train.target(i) for i in range(len(coco.train))}
    checked = 0
    for i in range(len(splits.train)):
        other, mine = both[Path(splits.train.id(i)).stem], splits.train.target(i)
        # the same numbers, which COCO's file of this set takes as edges and VOC counts from 1
        assert (other.boxes - mine.boxes == [1, 1, 0, 0]).all()
        checked += len(mine)
    assert checked == 382


def test_a_path_with_dots_inside(voc_set, things, contents):
    for file in (voc_set / "ImageSets" / "Main").iterdir():
        file.unlink()
    found = find(voc_set / ".." / voc_set.name)
    assert found.problems == [] and contents(found.splits["all"]) == {
        **same_as(things, "train"), **same_as(things, "val")
    }  # fmt: skip


def test_an_encoding_that_does_not_exist(voc_set):
    file = voc_set / "Annotations" / "b.xml"
    file.write_text('<?xml version="1.0" encoding="xxx"?>' + file.read_text())
    (problem,) = find(voc_set).problems
    assert problem.kind == "bad_xml" and "b.xml" in problem.where and not problem.refuses


def test_a_list_with_names_that_no_file_can_have(voc_set):
    with (voc_set / "ImageSets" / "Main" / "train.txt").open("a") as file:
        file.write("c\0d/e\n")
    assert [problem.kind for problem in find(voc_set).problems] == ["no_annotation"]


def test_a_year_without_lists_is_said_to_be_left_out(voc_set, tmp_path):
    for year, folders in (("VOC2007", ("Annotations", "ImageSets", "JPEGImages")),
                          ("VOC2012", ("Annotations", "JPEGImages"))):  # fmt: skip
        (tmp_path / "both" / year).mkdir(parents=True)
        for folder in folders:
            (tmp_path / "both" / year / folder).symlink_to(voc_set / folder)
    splits = open_splits(tmp_path / "both")
    assert len(splits.train) == 4
    assert any("VOC2012" in note and "VOC2007" not in note and "--split all" in note for note in splits.notes)
    assert len(open_source(tmp_path / "both", "all")) == 6
