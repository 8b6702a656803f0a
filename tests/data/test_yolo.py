from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saccade.data.source import BoxSource
from saccade.data.sources import detect_format, find, open_source, open_splits
from saccade.errors import UserError


def same_as(things, split: str) -> dict[str, list]:
    return {name: [one for one in inside if not one[5]] for name, (_, inside) in things[split].items()}


def test_everything_of_a_healthy_set(yolo_set, things, contents):
    assert detect_format(yolo_set) == detect_format(yolo_set / "data.yaml") == "yolo"
    assert find(yolo_set).problems == [] and find(yolo_set).task == "detect"
    splits = open_splits(yolo_set)
    train = splits.train
    assert isinstance(train, BoxSource) and splits.notes == [] and train.class_names == ("dog", "cat", "bird")
    assert contents(train) == same_as(things, "train") and contents(splits.val) == same_as(things, "val")
    exact = [one[1:5] for inside in things["train"].values() for one in inside[1] if not one[5]]
    assert np.abs(train.boxes - np.array(exact)).max() < 1e-3
    assert train.place(1, 4) == f"{yolo_set / 'labels' / 'train' / 'b.txt'}:2"
    assert len(train.target(3)) == 0 and train.id(3).endswith("d.jpg")
    assert contents(open_source(yolo_set / "data.yaml", "val")) == contents(splits.val)


def split_first(root: Path, tmp_path: Path) -> Path:
    """train/images beside train/labels, with the paths of another machine's folder."""
    for split, name in (("train", "train"), ("val", "valid")):
        for folder in ("images", "labels"):
            (tmp_path / "made" / name).mkdir(parents=True, exist_ok=True)
            (root / folder / split).rename(tmp_path / "made" / name / folder)
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames:\n  0: dog\n  1: cat\n  2: bird\n"
    (tmp_path / "made" / "data.yaml").write_text(text)
    return tmp_path / "made"


def lists(root: Path, tmp_path: Path) -> Path:
    """Text files that name pictures, relative to themselves."""
    for split in ("train", "val"):
        names = sorted(file.name for file in (root / "images" / split).iterdir())
        (root / f"{split}.txt").write_text("".join(f"./images/{split}/{name}\n" for name in names))
    (root / "data.yaml").write_text("train: train.txt\nval: [val.txt]\nnames: [dog, cat, bird]\n")
    return root


def several_folders(root: Path, tmp_path: Path) -> Path:
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        (root / folder / "more").mkdir()
        (root / folder / "train" / f"c.{suffix}").rename(root / folder / "more" / f"c.{suffix}")
    (root / "data.yaml").write_text(
        f"path: {root}\ntrain: [images/train, images/more]\nval: images/val\nnames: [dog, cat, bird]"
    )
    return root


def beside(root: Path, tmp_path: Path) -> Path:
    """Text files beside the pictures, classes.txt among them, and a set that says where it lies on another machine."""
    for split in ("train", "val"):
        shutil.copytree(root / "labels" / split, tmp_path / "b" / split)
        shutil.copytree(root / "images" / split, tmp_path / "b" / split, dirs_exist_ok=True)
        (tmp_path / "b" / split / "classes.txt").write_text("dog\ncat\nbird\n")
    (tmp_path / "b" / "mine.yaml").write_text("path: /data/me/b\ntrain: train\nval: val\nnames: [dog, cat, bird]\n")
    return tmp_path / "b"


def without_yaml(root: Path, tmp_path: Path) -> Path:
    (root / "data.yaml").unlink()
    (root / "labels" / "classes.txt").write_text("dog\ncat\nbird\n")
    return root


def capitals(root: Path, tmp_path: Path) -> Path:
    """Text files as Windows may write them, without a YAML file that says what lies there."""
    for file in (root / "labels").glob("*/*.txt"):
        file.rename(file.with_name(file.name.upper()))
    return without_yaml(root, tmp_path)


@pytest.mark.parametrize("layout", [capitals, split_first, lists, several_folders, beside, without_yaml])
def test_layouts(layout, yolo_set, things, tmp_path, contents):
    root = layout(yolo_set, tmp_path)
    assert detect_format(root) == "yolo"
    assert [problem.kind for problem in find(root).problems] == (["missing_split"] if layout is split_first else [])
    splits = open_splits(root)
    both = {**same_as(things, "train"), **same_as(things, "val")}
    assert {**contents(splits.train), **contents(splits.val)} == both and len(splits.val) == 2


def test_without_splits_a_part_is_held_out(yolo_set, things, contents):
    for folder in ("images", "labels"):
        for split in ("train", "val"):
            for file in (yolo_set / folder / split).iterdir():
                file.rename(yolo_set / folder / file.name)
            (yolo_set / folder / split).rmdir()
    (yolo_set / "data.yaml").unlink()
    (yolo_set / "classes.txt").write_text("dog\ncat\nbird\n")
    splits = open_splits(yolo_set, val_fraction=0.3)
    both = {**same_as(things, "train"), **same_as(things, "val")}
    assert {**contents(splits.train), **contents(splits.val)} == both


def test_outlines_and_keypoints(yolo_set):
    file = yolo_set / "labels" / "train" / "a.txt"
    file.write_text("0 0.1 0.2 0.5 0.2 0.3 0.6\n\n1.0 0.25 0.25 0.5 0.5 0.25 0.75 0.125 0.5\n")
    target = open_splits(yolo_set).train.target(0)
    assert target.boxes.round(3).tolist() == [[8, 12, 40, 36], [10, 15, 40, 45]] and target.labels.tolist() == [0, 1]
    file.write_text("0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 2\n")
    with (yolo_set / "data.yaml").open("a") as opened:
        opened.write("kpt_shape: [2, 3]\n")
    assert open_splits(yolo_set).train.target(0).boxes.tolist() == [[20, 15, 60, 45]]


def test_names_with_gaps(yolo_set):
    text = (yolo_set / "data.yaml").read_text().replace("[dog, cat, bird]", "{0: dog, 2: bird, 1: cat}")
    (yolo_set / "data.yaml").write_text(text)
    assert open_splits(yolo_set).train.class_names == ("dog", "cat", "bird")


def test_yaml_can_build_nothing(yolo_set, tmp_path):
    made = tmp_path / "made"
    (yolo_set / "data.yaml").write_text(f"train: images/train\nnames: !!python/object/apply:os.mkdir ['{made}']\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        open_splits(yolo_set)
    assert not made.exists()


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10))
BOMBS = {
    "a name": "names: [dog, *a9]\ntrain: images/train\n",
    "a mapping": "names: {0: {x: *a9}}\ntrain: images/train\n",
    "the number of classes": "names: [dog, cat, bird]\nnc: *a9\ntrain: images/train\n",
    "the place": "names: [dog, cat, bird]\npath: *a9\ntrain: images/train\n",
    "a split": "names: [dog, cat, bird]\ntrain: *a9\nval: {x: *a9}\n",
}


@pytest.mark.parametrize("inside", BOMBS)
def test_aliases_of_aliases_are_not_written_out(inside, yolo_set, tmp_path):
    """In another process, with a limit: nine to the ninth parts would take hours."""
    file = yolo_set / "data.yaml"
    file.write_text(ALIASES + BOMBS[inside])
    code = f"from saccade.data.sources import find; from pathlib import Path; print(find(Path({str(file)!r})).problems)"
    python = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert python.returncode == 0, python.stderr
    said = {"the number of classes": "nc is a list", "the place": "[]", "a mapping": "class 0 is a mapping"}
    assert said.get(inside, "a list is no folder" if inside == "a split" else "class 1 is a list") in python.stdout
    assert len(python.stdout) < 3000


def test_merged_mappings_are_not_copied(yolo_set):
    lines = [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}" for k in range(1, 8)]
    (yolo_set / "data.yaml").write_text("\n".join(["a0: &a0 {x: 1}", *lines, "names: [dog]", "train: images/train"]))
    with pytest.raises(UserError, match="not readable as YAML .*<<"):
        open_splits(yolo_set)


def test_what_is_not_yolo(folder):
    root = folder({"train": {"a": 2, "b": 2}, "val": {"a": 2, "b": 2}})
    (root / "data.yaml").write_text("licence: CC0\n")
    (root / "config.yaml").write_text("names: [a, b]\n")
    assert detect_format(root) == "image_folder"


@pytest.mark.parametrize("layout", [None, without_yaml])
def test_from_inside_its_own_folder(layout, yolo_set, things, tmp_path, contents, monkeypatch):
    root = layout(yolo_set, tmp_path) if layout else yolo_set
    monkeypatch.chdir(root)
    assert find(Path(".")).problems == [] and contents(open_splits(Path(".")).train) == same_as(things, "train")


@pytest.mark.parametrize("place", ["a" * 5000, "/" + "b/" * 3000])
def test_a_place_that_no_file_can_have(place, yolo_set, things, contents):
    text = (yolo_set / "data.yaml").read_text()
    (yolo_set / "data.yaml").write_text(f"path: {place}\n" + "\n".join(
        line for line in text.splitlines() if not line.startswith("path")
    ))  # fmt: skip
    assert contents(open_splits(yolo_set).train) == same_as(things, "train")


def test_a_class_of_too_many_digits(yolo_set):
    text = (yolo_set / "data.yaml").read_text().replace("[dog, cat, bird]", "{'" + "9" * 1000 + "': dog, 1: cat}")
    (yolo_set / "data.yaml").write_text(text)
    assert "bad_names" in {problem.kind for problem in find(yolo_set).problems}
