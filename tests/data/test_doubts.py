"""Boxes that are of another form than their format's are refused, also where some of them hide it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from saccade.config import DataConfig
from saccade.data.inspect import inspect_data
from saccade.data.loader import measure_sizes
from saccade.data.sources import fit_to_pictures, open_splits
from saccade.data.sources.doubts import COCO_FORM, corners, fractions
from saccade.errors import UserError


def in_fractions(coco_set) -> None:
    sizes = {one["id"]: one for one in coco_set.train["images"]}
    for one in coco_set.train["annotations"]:
        w, h = sizes[one["image_id"]]["width"], sizes[one["image_id"]]["height"]
        one["bbox"] = [v / s for v, s in zip(one["bbox"], (w, h) * 2, strict=True)]
        one.pop("area")


def as_corners(coco_set) -> None:
    for one in coco_set.train["annotations"]:
        left, top, w, h = one["bbox"]
        one["bbox"] = [left, top, left + w, top + h]
        one.pop("area")


@pytest.mark.parametrize("box", [[0.1, 0.1, 1.0004, 0.5], [-0.0004, 0.1, 0.5, 0.5], [0, 0, 0, 0]])
def test_fractions_of_which_one_is_odd(coco_set, box):
    in_fractions(coco_set)
    coco_set.annotation(113)["bbox"] = box
    root = coco_set.write()
    with pytest.raises(UserError, match="within 0 and 1, but COCO's are in pixels"):
        open_splits(root)
    assert Counter(p.kind for p in inspect_data(root).problems)["fractions"] == 1


def test_corners_beside_a_box_without_an_area(coco_set):
    as_corners(coco_set)
    coco_set.annotation(113)["bbox"] = [10, 10, 0, 0]
    root = coco_set.write()
    with pytest.raises(UserError, match=r"none would as \(left, top, right, bottom\)"):
        open_splits(root)
    assert Counter(p.kind for p in inspect_data(root).problems) == {"corners": 1, "degenerate": 1}


def test_corners_without_sizes_show_in_the_pictures(coco_set):
    as_corners(coco_set)
    for image in coco_set.train["images"]:
        del image["width"], image["height"]
    root = coco_set.write()
    train = open_splits(root).train
    with pytest.raises(UserError, match="boxes leave their pictures"):
        fit_to_pictures(train, measure_sizes(train, DataConfig()))
    assert Counter(p.kind for p in inspect_data(root).problems) == {"corners": 1, "no_size": 1}


def test_corners_in_yolo(yolo_set, things):
    for name, ((h, w), inside) in things["train"].items():
        lines = [
            f"{['dog', 'cat', 'bird'].index(c)} {x / w} {y / h} {r / w} {b / h}\n" for c, x, y, r, b, crowd in inside
            if not crowd
        ]  # fmt: skip
        (yolo_set / "labels" / "train" / f"{Path(name).stem}.txt").write_text("".join(lines))
    with pytest.raises(UserError, match=r"YOLO's are \(centre x, centre y, width, height\)"):
        open_splits(yolo_set)
    assert Counter(p.kind for p in inspect_data(yolo_set).problems) == {"corners": 1}


def test_fractions_in_voc(voc_set, things):
    for name, ((h, w), _) in things["train"].items():
        file = voc_set / "Annotations" / f"{Path(name).stem}.xml"
        text = file.read_text()
        for side, whole in (("xmin", w), ("ymin", h), ("xmax", w), ("ymax", h)):
            text = re.sub(rf"<{side}>(\d+)", lambda m, s=side, n=whole: f"<{s}>{int(m[1]) / n:.5f}", text)
        file.write_text(text)
    with pytest.raises(UserError, match="within 0 and 1, but VOC's are in pixels"):
        open_splits(voc_set)
    assert Counter(p.kind for p in inspect_data(voc_set).problems) == {"fractions": 1}


def made(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes from corner to corner, each in a picture of a size."""
    sizes = rng.integers(200, 800, (count, 2))
    ends = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4)
    return ends * sizes[:, [1, 0, 1, 0]], sizes


def with_sides(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


@pytest.mark.parametrize("count", [20, 150, 2000])
def test_one_in_twenty_may_be_odd(count):
    boxes, sizes = made(np.random.default_rng(0), count)
    odd = np.arange(count // 20)
    boxes[odd, 2] = boxes[odd, 0] / 2  # with a width below its left edge
    read = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    (problem,) = corners(boxes, read, sizes, "here", COCO_FORM)
    assert problem.refuses and problem.kind == "corners"
    shares = boxes / sizes[:, [1, 0, 1, 0]]
    shares[odd] += 3
    assert [p.kind for p in fractions(shares, shares + [0, 0, 1, 1], "here", "COCO")] == ["fractions"]


def test_healthy_boxes_raise_no_alarm():
    rng = np.random.default_rng(1)
    for count in (1, 5, 30, 500):
        boxes, sizes = made(rng, count)
        numbers = with_sides(boxes)
        for limits in (sizes, sizes // 2, sizes * 2, sizes[:, ::-1], np.zeros_like(sizes)):
            assert corners(numbers, boxes, limits, "here", COCO_FORM) == []
        assert fractions(numbers, boxes, "here", "COCO") == fractions(boxes, boxes, "here", "VOC") == []
    large = np.tile([[5.0, 5.0, 195.0, 195.0]], (50, 1))  # whole pictures: their sides are corners, too
    assert corners(with_sides(large), large, np.full((50, 2), 200), "here", COCO_FORM) == []
