"""Reports are written once, into a folder of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saccade.errors import UserError
from saccade.metrics.classification import ClassificationMetric
from saccade.metrics.detection import DetectionMetric
from saccade.metrics.translation import Example, TranslationMetric


def classified() -> Any:
    metric = ClassificationMetric(["cat", "dog"])
    metric.update(torch.eye(2), torch.arange(2))
    return metric.compute()


def detected() -> Any:
    metric = DetectionMetric(["cell"])
    metric.update(0, [[0, 0, 9, 9]], [0.5], [0], [[0, 0, 9, 9]], [0], [False])
    return metric.compute()


def translated() -> Any:
    metric = TranslationMetric("greedy")
    metric.update([Example(0, "a dog", "ein Hund", "ein Hund")], [1.0], 4, 5, 0.5, 0)
    return metric.compute()


REPORTS = {"classes": classified, "boxes": detected, "texts": translated}


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS)
def test_a_report_is_written_once(make, tmp_path: Path) -> None:
    report, folder = make(), tmp_path / "new" / "folder"
    assert report.save(folder) == folder
    assert {path.name for path in folder.iterdir()} == {*report.files}
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    of = {"model": "runs/a", "data": "photos", "split": None}
    named = json.loads((report.save(tmp_path / "named", of) / "metrics.json").read_text())
    assert named == {"of": of, **json.loads(json.dumps(report.to_dict()))}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"holds the report of before \(metrics.json\); choose another"):
        report.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS)
def test_a_folder_that_cannot_be_written(make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match=f"{tmp_path / 'file'} is a file; choose another folder"):
            make().save(folder)
