from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saccade.data.source import Source


def smooth_picture(h: int, w: int, seed: int = 0) -> Image.Image:
    """RGB without symmetry, smooth enough to be compared after lossy coding."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return smooth_picture


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes `root/split/class/number.jpg`, all pictures different; an empty split name leaves that level out."""

    def make(splits: dict[str, dict[str, int]], name: str = "set") -> Path:
        root, seed = tmp_path / name, 0
        for split, classes in splits.items():
            for class_name, count in classes.items():
                inside = root / split / class_name
                inside.mkdir(parents=True)
                for k in range(count):
                    seed += 1
                    h, w = ((24, 24), (20, 32), (36, 18), (24, 30))[seed % 4]
                    (inside / f"{k:03d}.jpg").write_bytes(encoded(smooth_picture(h, w, seed)))
        return root

    return make


@pytest.fixture
def shared() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real data in ../shared/data is not on this machine")
    return path


# The small set with objects that the tests of all formats write: picture -> (height, width), then what is in it as
# (class, left, top, right, bottom, whether it is to be ignored).
THINGS: dict[str, dict[str, tuple[tuple[int, int], list[tuple[str, int, int, int, int, bool]]]]] = {
    "train": {
        "a.jpg": (
            (60, 80),
            [
                ("dog", 0, 0, 30, 40, False),
                ("cat", 25, 10, 79, 55, False),
                ("cat", 40, 20, 60, 50, True),
                ("bird", 70, 50, 80, 60, False),
            ],
        ),
        "b.jpg": (
            (48, 64),
            [
                ("dog", 5, 5, 20, 25, False),
                ("dog", 21, 5, 36, 25, False),
                ("cat", 30, 20, 64, 48, False),
                ("bird", 8, 30, 18, 44, False),
            ],
        ),
        "c.png": (
            (72, 54),
            [("cat", 2, 40, 50, 70, False), ("dog", 10, 3, 30, 33, False), ("bird", 40, 50, 52, 71, False)],
        ),
        "d.jpg": ((60, 60), []),
    },
    "val": {
        "e.jpg": ((50, 70), [("dog", 10, 10, 60, 45, False), ("cat", 1, 2, 30, 20, False)]),
        "f.jpg": ((64, 48), [("bird", 8, 16, 40, 60, False)]),
    },
}


@pytest.fixture
def things() -> dict[str, dict[str, tuple[tuple[int, int], list[tuple[str, int, int, int, int, bool]]]]]:
    return THINGS


@pytest.fixture
def contents() -> Callable[[Source], dict[str, list[tuple[str, int, int, int, int, bool]]]]:
    """What is in each picture of a source, as THINGS is written."""

    def of(source: Source) -> dict[str, list[tuple[str, int, int, int, int, bool]]]:
        inside = {}
        for i in range(len(source)):
            target = source.target(i)
            rows = zip(target.labels, target.boxes.round().astype(int).tolist(), target.crowd.tolist(), strict=True)
            things = [(source.class_names[label], *box, crowd) for label, box, crowd in rows]
            inside[Path(source.id(i)).name] = things
        return inside

    return of


@pytest.fixture
def pictures_of() -> Callable[..., None]:
    """Writes the pictures of a split of THINGS into a folder."""

    def write(split: str, into: Path) -> None:
        into.mkdir(parents=True, exist_ok=True)
        for name, ((h, w), _) in THINGS[split].items():
            kind = "PNG" if name.endswith("png") else "JPEG"
            (into / name).write_bytes(encoded(smooth_picture(h, w, 1000 + sum(map(ord, name))), kind))

    return write


class CocoSet:
    """COCO's objects of the small set, to be changed before they are written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures = root / "images"
        self.files: dict[str, str] = {}  # what to write instead of a split
        self.train, self.val = self._split("train", 10), self._split("val", 3)

    def _split(self, split: str, first: int) -> dict[str, list]:
        ids = {"cat": 5, "dog": 2, "bird": 90}
        data: dict[str, list] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }
        for k, (name, ((h, w), inside)) in enumerate(THINGS[split].items()):
            number = first + 7 * k
            data["images"].append({"id": number, "file_name": name, "width": w, "height": h})
            for class_name, left, top, right, bottom, crowd in inside:
                box = [left, top, right - left, bottom - top]
                one = {"id": 101 + 3 * len(data["annotations"]), "image_id": number, "category_id": ids[class_name]}
                data["annotations"].append({**one, "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)})
        return data

    def annotation(self, number: int) -> dict:
        return next(one for one in self.train["annotations"] if one["id"] == number)

    def write(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        for split, data in (("train", self.train), ("val", self.val)):
            (self.root / f"{split}.json").write_text(self.files.get(split, json.dumps(data)))
        return self.root


@pytest.fixture
def coco_set(tmp_path: Path, pictures_of: Callable[..., None]) -> CocoSet:
    """With its pictures in place and both splits still to be written."""
    made = CocoSet(tmp_path / "coco")
    for split in THINGS:
        pictures_of(split, made.pictures)
    return made


def voc_xml(name: str, size: tuple[int, int], inside: list[tuple[str, int, int, int, int, bool]]) -> str:
    objects = "".join(
        f"<object><name>{class_name}</name><difficult>{int(crowd)}</difficult><bndbox><xmin>{left + 1}</xmin>"
        f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>\n"
        for class_name, left, top, right, bottom, crowd in inside
    )
    h, w = size
    shape = f"<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{shape}\n{objects}</annotation>"


@pytest.fixture
def voc_set(tmp_path: Path, pictures_of: Callable[..., None]) -> Path:
    root = tmp_path / "voc"
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, pictures in THINGS.items():
        pictures_of(split, root / "JPEGImages")
        names = [Path(name).stem for name in pictures]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name, (size, inside) in pictures.items():
            (root / "Annotations" / f"{Path(name).stem}.xml").write_text(voc_xml(name, size, inside))
    return root


@pytest.fixture
def yolo_set(tmp_path: Path, pictures_of: Callable[..., None]) -> Path:
    """Without what is to be ignored, which YOLO has no word for."""
    root, names = tmp_path / "yolo", ["dog", "cat", "bird"]
    for split, pictures in THINGS.items():
        pictures_of(split, root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        for name, ((h, w), inside) in pictures.items():
            lines = [
                f"{names.index(c)} {(x + r) / 2 / w:.6f} {(y + b) / 2 / h:.6f} {(r - x) / w:.6f} {(b - y) / h:.6f}\n"
                for c, x, y, r, b, crowd in inside
                if not crowd
            ]
            if lines:
                (root / "labels" / split / f"{Path(name).stem}.txt").write_text("".join(lines))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnc: 3\nnames: [dog, cat, bird]\n")
    return root
