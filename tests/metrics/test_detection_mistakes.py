"""Which pictures a detector is wrong about, and the sheet that shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saccade.errors import UserError
from saccade.metrics.detection import DetectionMetric
from saccade.predictions.mistakes_sheet import MISSED, RIGHT, WRONG, Compared, mistakes_sheet

A, B, C = [10, 10, 50, 50], [60, 10, 100, 50], [10, 60, 50, 100]


def metric() -> DetectionMetric:
    made = DetectionMetric(["cat", "dog"])
    made.update(4, [A, B], [0.9, 0.8], [0, 1], [A, B], [0, 1], [False, False])  # all right
    made.update(2, [A, B], [0.9375, 0.875], [0, 1], [A, C], [0, 1], [False, False])  # one wrong, one missed
    made.update(7, [A, B, C], [0.95, 0.9, 0.1], [1, 0, 0], [A, B, C], [0, 0, 0], [False, False, True])  # a class
    made.update(9, [], [], [], [], [], [])
    return made


def test_the_worst_come_first_and_those_without_mistakes_not_at_all():
    report = metric().compute()
    assert [one.index for one in report.worst] == [2, 7]
    first, second = report.worst
    assert first.kinds == ("", "background") and first.wrong == 1 and first.missed.tolist() == [False, True]
    assert first.boxes.tolist() == [A, B] and first.labels.tolist() == [0, 1]
    assert first.scores.tolist() == [0.9375, 0.875]
    assert first.truth_boxes.tolist() == [A, C] and first.truth_labels.tolist() == [0, 1]
    assert second.kinds == ("class", "") and len(second.truth_boxes) == 2  # without the crowd, nor what found it
    assert not second.missed.any() and report.threshold is not None and (second.scores >= report.threshold).all()
    joined = DetectionMetric(["cat", "dog"])
    joined.merge(metric().state())
    assert [one.index for one in joined.compute().worst] == [2, 7]


def test_where_nothing_is_right_all_is_missed():
    made = DetectionMetric(["cat"])
    made.update(0, [A], [0.9], [0], [C, B], [0, 0], [False, False])
    (only,) = made.compute().worst
    assert len(only.boxes) == 0 and only.missed.all()


def compared(size: tuple[int, int] = (120, 110)) -> Compared:
    return Compared(
        lambda: Image.new("RGB", size, (128, 128, 128)), "a/b.png", np.array([A, B], float), ("cat", "dog"),
        ("", "background"), np.array([A, C], float), ("cat", "dog"), np.array([False, True]),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [[(120, 110)], [(120, 110)] * 12, [(2000, 120), (120, 2000), (110, 110)]], ids=len)
def test_the_sheet(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    path = mistakes_sheet([compared(size) for size in sizes], tmp_path / "new" / "mistakes.png")
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.shape[0] < 3000 and pixels.shape[1] < 2500
    tiles = pixels[100:]  # below the key
    for colour in (RIGHT, WRONG, MISSED):
        assert (tiles == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2).sum() > 50
    edge = pixels.min(axis=2)
    assert all(part.min() == 255 for part in (edge[:10], edge[-10:], edge[:, :10], edge[:, -10:]))
    assert mistakes_sheet([compared()], path) == path  # as the other files of a report


def test_a_sheet_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        mistakes_sheet([compared()], tmp_path / "file" / "mistakes.png")
