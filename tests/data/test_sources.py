from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from saccade.data.source import LabelledSource, Source
from saccade.data.sources import detect_format, find_pictures, open_pictures, open_source, open_splits
from saccade.errors import UserError


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labels_of(source: Source) -> list[int]:
    assert isinstance(source, LabelledSource)
    return source.labels.tolist()


def same_after_pickling(source) -> None:
    again = pickle.loads(pickle.dumps(source))
    assert [again.id(i) for i in range(len(source))] == [source.id(i) for i in range(len(source))]
    assert again.read(0) == source.read(0)


def test_image_folder_with_splits(folder):
    root = folder({"train": {"cat": 3, "dog": 2}, "Validation": {"cat": 1, "dog": 2}})
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "cat" / "._junk.jpg").write_bytes(b"")
    (root / "train" / "cat" / "readme.txt").write_text("hello")
    (root / "train" / "loose.jpg").write_bytes(b"x")
    assert detect_format(root) == "image_folder"
    splits = open_splits(root)
    assert splits.train.class_names == splits.val.class_names == ("cat", "dog")
    assert labels_of(splits.train) == [0, 0, 0, 1, 1] and labels_of(splits.val) == [0, 1, 1]
    assert splits.train.id(0).endswith("train/cat/000.jpg")
    assert any("loose.jpg" in note for note in splits.notes) and any("readme.txt" in note for note in splits.notes)
    same_after_pickling(splits.train)
    part = splits.train.subset([4, 0])
    assert labels_of(part) == [1, 0] and part.read(1) == splits.train.read(0)


def test_classes_of_train_and_val_are_united(folder):
    root = folder({"train": {"2": 2, "10": 2, "1": 2}, "val": {"1": 1, "10": 1}})
    splits = open_splits(root)
    assert splits.train.class_names == splits.val.class_names == ("1", "2", "10")
    assert labels_of(splits.val) == [0, 2]
    assert any("no pictures of 2" in note for note in splits.notes)
    with pytest.raises(UserError, match="'3' has no pictures to learn from, only 1 in val"):
        open_splits(folder({"train": {"1": 2, "2": 2}, "val": {"3": 1}}, "other"))


def test_automatic_split_is_seeded_and_stratified(folder):
    root = folder({"": {"a": 10, "b": 5, "c": 2, "d": 1}})
    one, same, other = open_splits(root), open_splits(root), open_splits(root, seed=1)
    names = lambda source: [source.id(i) for i in range(len(source))]  # noqa: E731
    assert names(one.val) == names(same.val) != names(other.val)
    assert one.val.counts().tolist() == [2, 1, 1, 0] and one.train.counts().tolist() == [8, 4, 1, 1]
    assert not set(names(one.val)) & set(names(one.train)) and len(one.val) + len(one.train) == 18
    assert open_splits(root, val_fraction=0.5).val.counts().tolist() == [5, 2, 1, 0]
    assert any("held out" in note for note in one.notes)


def test_val_from_elsewhere_and_test_as_val(folder):
    root = folder({"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    elsewhere = folder({"": {"a": 3, "b": 3}}, "elsewhere")
    assert len(open_splits(root).val) == 2
    assert len(open_splits(root, val=elsewhere).val) == 6


def test_open_source(folder):
    root = folder({"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}, "test": {"a": 2, "b": 2}})
    assert [len(open_source(root, split)) for split in (None, "test", "training")] == [2, 4, 6]
    assert len(open_source(root / "test")) == 4
    with pytest.raises(UserError, match="no split 'extra'; there is"):
        open_source(root, "extra")


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    root = folder({"": {"a": 2, "b": 2}})
    more = folder({"": {"inner": 3}}, "more")
    os.symlink(more / "inner", root / "a" / "linked")
    os.symlink(root / "b", root / "b" / "round")
    assert open_source(root).counts().tolist() == [5, 2]


def test_faults_of_folders(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist; did you mean flowers?"):
        (tmp_path / "flowers").mkdir()
        open_splits(tmp_path / "flower")
    with pytest.raises(UserError, match=r"does not exist; .* does, but it holds no absent"):
        open_splits(tmp_path / "absent" / "deeper")
    with pytest.raises(UserError, match="no pictures; a folder of classes"):
        open_splits(tmp_path / "flowers")
    with pytest.raises(UserError, match="only one class, 'a'"):
        open_splits(folder({"": {"a": 3}}, "one"))
    with pytest.raises(UserError, match="did you mean .*wrapped/set"):
        open_splits(folder({"set": {"a": 3, "b": 3}}, "wrapped"))
    with pytest.raises(UserError, match="'empty' has no pictures to learn from"):
        open_splits(folder({"": {"a": 3, "b": 3, "empty": 0}}, "gap"))
    with pytest.raises(UserError, match=r"2 things are wrong(.|\n)*'e'(.|\n)*only one class"):
        open_splits(folder({"": {"a": 3, "e": 0}}, "both"))
    flat = folder({"": {"a": 3}}, "flat") / "a"
    with pytest.raises(UserError, match="no class folders; put"):
        open_splits(flat)
    table = tmp_path / "tables"
    table.mkdir()
    (table / "labels.csv").write_text("path,label\n")
    with pytest.raises(UserError, match="labels.csv lists them, give that file"):
        open_splits(table)
    with pytest.raises(UserError, match="not data to learn from"):
        (tmp_path / "notes.md").write_text("x")
        open_splits(tmp_path / "notes.md")
    with pytest.raises(UserError, match="one picture a class is too few"):
        open_splits(folder({"": {"a": 1, "b": 1}}, "tiny"))


def test_tables(folder):
    root = folder({"": {"a": 3, "b": 3}})
    rows = [(f"{name}/{k:03d}.jpg", name) for name in "ab" for k in range(3)]
    csv = root / "all.csv"
    csv.write_text("\ufeffFile_Name;Label\n" + "".join(f"{file};{name}\n" for file, name in rows), encoding="utf-8")
    lines = root / "all.jsonl"
    lines.write_text("".join(json.dumps({"img": file, "class": int(name == "b")}) + "\n" for file, name in rows))
    for path, names in ((csv, ("a", "b")), (lines, ("0", "1"))):
        assert detect_format(path) == "table"
        source = open_source(path)
        assert source.class_names == names and labels_of(source) == [0, 0, 0, 1, 1, 1]
        assert source.id(3) == str(root / "b" / "000.jpg")
        same_after_pickling(source)
    split = root / "split.csv"
    split.write_text("path,label,split\n" + "".join(f"{f},{n},{'valid' if '2' in f else 'train'}\n" for f, n in rows))
    splits = open_splits(split)
    assert labels_of(splits.train) == [0, 0, 1, 1] and labels_of(splits.val) == [0, 1]
    (root / "train.csv").write_text("path,label\n" + "".join(f"{f},{n}\n" for f, n in rows[1:]))
    (root / "val.csv").write_text("path,label\n" + "".join(f"{f},{n}\n" for f, n in rows[:1]))
    splits = open_splits(root / "train.csv")
    assert (len(splits.train), len(splits.val)) == (5, 1)


def test_faults_of_tables_come_together(folder):
    root = folder({"": {"a": 3, "b": 3}})
    table = root / "all.csv"
    table.write_text("path,label\na/000.jpg,a\nb/000.jpg,b\nb/001.jpg,\n,a\na/absent.jpg,a\na/001.jpg,a,x,y\n")
    with pytest.raises(UserError) as caught:
        open_splits(table)
    for place, words in ((4, "no label"), (5, "no path"), (6, "does not exist"), (7, "more fields")):
        assert f"{table}:{place}: " in str(caught.value) and words in str(caught.value)
    lines = root / "all.jsonl"
    lines.write_text('{"path": "a/000.jpg", "label": "a"}\n{"path": \n[1]\n{"path": "a/001.jpg", "label": null}\n')
    with pytest.raises(UserError, match=r":2: not valid JSON(.|\n)*:3: not an object(.|\n)*:4: no label"):
        open_splits(lines)
    table.write_text("a/000.jpg,a\nb/000.jpg,b\n")
    with pytest.raises(UserError, match="no column for the path among a/000.jpg, a"):
        open_splits(table)
    table.write_text("path,label\n")
    with pytest.raises(UserError, match="no rows"):
        open_splits(table)
    table.write_bytes(b"path,label\n\xff\xfe\x00")
    with pytest.raises(UserError, match="save it as CSV in UTF-8"):
        open_splits(table)


def test_shards(tmp_path, picture, encode):
    jpeg = [encode(picture(20, 24, k)) for k in range(6)]
    train = [(f"{k}.jpg", jpeg[k]) for k in range(4)] + [("x/readme.txt", b"?")]
    train[1:1] = [("0.cls", b"1\n")]
    train[3:3] = [("1.json", b'{"label": "beta"}')]
    train += [("2.cls", b"0"), ("3.cls", b"1")]
    write_shard(tmp_path / "d" / "train-0.tar", sorted(train))
    write_shard(
        tmp_path / "d" / "val-0.tar", [("4.JPG", jpeg[4]), ("4.cls", b"0"), ("5.jpg", jpeg[5]), ("5.cls", b"1")]
    )
    (tmp_path / "d" / "classes.json").write_text('["alpha", "beta"]')
    assert detect_format(tmp_path / "d") == "webdataset"
    splits = open_splits(tmp_path / "d")
    assert splits.train.class_names == ("alpha", "beta") and labels_of(splits.train) == [1, 1, 0, 1]
    assert [splits.train.read(i) for i in range(4)] == jpeg[:4]
    assert splits.train.id(2) == f"{tmp_path / 'd' / 'train-0.tar'}!2.jpg"
    same_after_pickling(splits.train)
    assert splits.val.subset([1]).read(0) == jpeg[5]
    assert len(open_source(tmp_path / "d" / "val-0.tar")) == 2
    assert len(open_source(str(tmp_path / "d" / "*-0.tar"), "train")) == 4
    assert len(open_source([tmp_path / "d" / "val-0.tar"])) == 2


def test_faults_of_shards_come_together(tmp_path, picture, encode):
    jpeg = encode(picture(20, 24))
    shard = write_shard(
        tmp_path / "a.tar",
        [
            ("0.jpg", jpeg), ("0.cls", b"0"), ("1.jpg", jpeg), ("2.cls", b"1"), ("3.jpg", jpeg), ("3.json", b"{"),
            ("4.jpg", jpeg), ("4.cls", b"9"), ("5.jpg", jpeg), ("5.cls", b""), ("6.jpg", jpeg), ("6.cls", b"1"),
        ],
    )  # fmt: skip
    (tmp_path / "classes.json").write_text('{"alpha": 0, "beta": 1}')
    with pytest.raises(UserError) as caught:
        open_splits(shard)
    for text in (
        "a.tar!1.jpg: a picture without a label", "a.tar!2: a label without a picture", "a.tar!3.json: not valid JSON",
        "a.tar!4.jpg: class 9, but classes.json names 2", "a.tar!5.cls: the label is empty",
    ):  # fmt: skip
        assert text in str(caught.value)
    whole = shard.read_bytes()
    pairs = [((f"{k}.cls", b"%d" % (k % 2)), (f"{k}.jpg", jpeg)) for k in range(4)]
    good = write_shard(tmp_path / "b.tar", [member for pair in pairs for member in pair])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[: 512 * 3 + len(jpeg) // 2])
    with pytest.raises(UserError, match="the shard ends within this member"):
        open_splits(cut)
    cut.write_bytes(b"not a tar file at all" * 100)
    with pytest.raises(UserError, match="not a readable tar file"):
        open_splits(cut)
    source = open_source(good)
    good.write_bytes(whole[:700])
    with pytest.raises(UserError, match="cut off"):
        source.read(3)
    with pytest.raises(UserError, match="classes.json: must be a list"):
        (tmp_path / "classes.json").write_text("[1, 2]")
        open_splits(shard)


def save_hf(
    path: Path, images: list[bytes], labels: list, names: list[str] | None = None, splits: bool = False
) -> Path:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    features = datasets.Features({"img": datasets.Image(), "label": label})
    data = {"img": [{"bytes": image, "path": None} for image in images], "label": labels}
    one = datasets.Dataset.from_dict(data, features=features)
    (datasets.DatasetDict({"train": one, "validation": one.select([1, 2])}) if splits else one).save_to_disk(str(path))
    return path


def test_hugging_face(tmp_path, picture, encode):
    images = [encode(picture(20, 24, k), "PNG") for k in range(4)]
    path = save_hf(tmp_path / "dict", images, [0, 1, 1, 0], ["zebra", "ant"], splits=True)
    assert detect_format(path) == "hf_dataset"
    splits = open_splits(path)
    assert splits.train.class_names == ("zebra", "ant") and labels_of(splits.train) == [0, 1, 1, 0]
    assert labels_of(splits.val) == [1, 1] and splits.val.read(1) == images[2]
    assert splits.train.id(3) == f"{path / 'train'}[3]"
    same_after_pickling(splits.train)
    one = open_source(save_hf(tmp_path / "one", images, ["b", "a", "b", "a"]))
    assert one.class_names == ("a", "b") and labels_of(one) == [1, 0, 1, 0]
    assert one.subset([2, 3]).read(1) == images[3]
    with pytest.raises(UserError, match=r"one more\[1\]: no label"):
        open_splits(save_hf(tmp_path / "one more", images, [0, None, 1, 0], ["x", "y"]))


def test_hugging_face_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'saccade\[datasets\]'"):
        open_splits(tmp_path)


def test_find_pictures(folder, tmp_path):
    root = folder({"": {"b": 2, "a": 1}})
    odd = tmp_path / "odd.name"
    odd.write_bytes(b"x")
    (root / "b" / "text.txt").write_text("x")
    found = find_pictures([odd, str(root)])
    assert [path.name for path in found] == ["odd.name", "000.jpg", "000.jpg", "001.jpg"]
    source = open_pictures([root])
    assert labels_of(source) == [-1, -1, -1] and source.target(0) == -1 and source.class_names == ()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"nothing: no pictures(.|\n)*odd.nam: does not exist; did you mean odd.name"):
        find_pictures([tmp_path / "nothing", tmp_path / "odd.nam"])
    with pytest.raises(UserError, match="no pictures were given"):
        find_pictures([])


def test_real_data(shared):
    flowers = open_splits(shared / "flowers")
    assert (len(flowers.train), len(flowers.val), len(flowers.train.class_names)) == (1000, 400, 5)
    objects = open_splits(shared / "objects32")
    assert (len(objects.train), len(objects.val)) == (4000, 1000) and objects.train.class_names[9] == "truck"
    assert np.array_equal(objects.train.counts(), np.full(10, 400))
