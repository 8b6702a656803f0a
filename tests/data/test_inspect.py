from __future__ import annotations

import io
import json
from collections import Counter

import pytest
from PIL import Image
from rich.console import Console

from saccade.config import DataConfig
from saccade.data.inspect import inspect_data
from saccade.errors import UserError


def rendered(report) -> str:
    file = io.StringIO()
    report.render(Console(file=file, width=100))
    return file.getvalue()


def test_a_clean_set_raises_no_alarm(folder):
    root = folder({"train": {"cat": 22, "dog": 21}, "val": {"cat": 4, "dog": 4}})
    report = inspect_data(root)
    assert report.ok and report.problems == [] and report.notes == [] and report.hints == []
    found = report.to_dict()
    json.dumps(found)
    assert found["format"] == "image_folder" and [split["pictures"] for split in found["splits"]] == [43, 8]
    assert found["splits"][0]["classes"] == {"cat": 22, "dog": 21}
    assert found["splits"][0]["height"] == (20, 24, 36) and found["splits"][0]["width"][::2] == (18, 32)
    assert sum(found["splits"][0]["aspects"].values()) == 43
    text = rendered(report)
    assert "nothing is wrong" in text and "cat" in text and "\x1b" not in text


def test_every_planted_fault_is_found_once(folder, encode, picture):
    root = folder({"train": {"cat": 25, "dog": 25, "empty": 0}, "val": {"cat": 4, "dog": 4}})
    train, val = root / "train", root / "val"
    (train / "cat" / "000.jpg").write_bytes(b"")
    (train / "cat" / "001.jpg").write_bytes(b"only text")
    (train / "cat" / "002.jpg").write_bytes((train / "cat" / "003.jpg").read_bytes()[:-120])
    (train / "cat" / "bomb.png").write_bytes(encode(Image.new("1", (5000, 5000)), "PNG"))
    (train / "cat" / "wrong.png").write_bytes(encode(picture(20, 20, 900)))
    (train / "cat" / "twin.jpg").write_bytes((train / "cat" / "005.jpg").read_bytes())
    (train / "dog" / "two.jpg").write_bytes((train / "cat" / "006.jpg").read_bytes())
    (val / "dog" / "leak.jpg").write_bytes((train / "dog" / "007.jpg").read_bytes())
    report = inspect_data(root, config=DataConfig(max_pixels=1_000_000))
    assert not report.ok
    where = {problem.kind: problem.where for problem in report.problems}
    assert Counter(problem.kind for problem in report.problems) == {
        "unreadable": 2,
        "truncated": 1,
        "too_large": 1,
        "wrong_extension": 1,
        "duplicate": 2,  # two.jpg is one too
        "two_labels": 1,
        "leak": 1,
        "empty_class": 1,
    }
    assert where["truncated"].endswith("002.jpg") and where["wrong_extension"].endswith("wrong.png")
    assert where["too_large"].endswith("bomb.png")
    leak = next(problem for problem in report.problems if problem.kind == "leak")
    assert "leak.jpg" in leak.what and "007.jpg" in leak.where
    text = rendered(report)
    for problem in report.problems:
        assert str(problem) in text
    assert f"{len(report.problems)} problems" in text


def test_structure_faults_are_reported_not_raised(folder, tmp_path):
    assert [p.kind for p in inspect_data(folder({"": {"only": 3}}, "one")).problems] == ["one_class"]
    (tmp_path / "void").mkdir()
    report = inspect_data(tmp_path / "void")
    assert [p.kind for p in report.problems] == ["no_pictures"] and "0" in rendered(report)
    with pytest.raises(UserError, match="does not exist"):
        inspect_data(tmp_path / "absent")


def test_val_from_elsewhere_and_hints(folder):
    train = folder({"": {"a": 40, "b": 3}}, "train_set")
    val = folder({"": {"a": 2, "b": 2}}, "val_set")
    report = inspect_data(train, val)
    assert [split.name for split in report.splits] == ["train", "val"]
    # both sets begin with the same made pictures
    assert {problem.kind for problem in report.problems} == {"leak", "two_labels"}
    assert len(report.hints) == 2 and "very unequal classes: 40" in report.hints[0] and "b" in report.hints[1]


def test_other_formats(folder, encode, picture, tmp_path):
    root = folder({"": {"a": 3, "b": 3}})
    rows = [f"{name}/{k:03d}.jpg,{name}\n" for name in "ab" for k in range(3)]
    (root / "t.csv").write_text("path,label\n" + "".join(rows) + "a/absent.jpg,a\na/000.jpg,a\n")
    assert Counter(p.kind for p in inspect_data(root / "t.csv").problems) == {"missing_file": 1, "duplicate": 1}
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": data, "path": None} for data in (encode(picture(9, 9)), encode(picture(9, 9, 1)), b"text")]
    one = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    one.save_to_disk(str(tmp_path / "hf"))
    report = inspect_data(tmp_path / "hf")
    assert [(p.kind, p.where) for p in report.problems] == [("unreadable", f"{tmp_path / 'hf'}[2]")]


def test_real_data(shared):
    report = inspect_data(shared / "objects32" / "val-0000.tar")
    assert report.ok and report.format == "webdataset" and report.splits[0].pictures == 1000  # pyright: ignore[reportAttributeAccessIssue]
