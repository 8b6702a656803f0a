"""A run is measured on what it held out of data without splits, not on what it learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import saccade
from saccade.api import evaluate
from saccade.cli import main

TINY: dict[str, Any] = {"device": "cpu", "precision": "float32", "show": False, "evaluations": 1, "steps": 2}


@pytest.fixture
def run(pictures: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run, and its 24 pictures of three classes without splits."""
    data, folder = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(pictures / "train", data)
    settings = {"model": "vit_micro", "batch_size": 8, "preprocessing": {"image_size": 16}, "workers": 0}
    saccade.train(str(data), out=str(folder), **settings, **TINY)
    return folder, data


def test_pictures(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = run
    printed = (folder / "metrics.csv").read_text().splitlines()
    last = dict(zip(printed[0].split(","), printed[-1].split(","), strict=True))
    notes: list[str] = []
    report = evaluate(str(folder), str(data), device="cpu", notes=notes)
    assert report.count < 24 and report.top1 == pytest.approx(float(last["val_top1"]))
    assert report.loss == pytest.approx(float(last["val_loss"]), rel=1e-5)
    assert f"measured on the {report.count} pictures that {folder} held out" in notes[0]
    with pytest.warns(UserWarning, match="held out of it"):
        assert saccade.evaluate(str(folder), str(data), device="cpu").count == report.count
    assert saccade.evaluate(str(folder), str(data), split="all", device="cpu").count == 24
    assert saccade.evaluate(str(folder / "model.safetensors"), str(data), device="cpu").count == 24
    out = folder.parent / "report"
    assert main(["evaluate", str(folder), str(data), "--device=cpu", "--json", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["count"] == report.count and "--split all" in shown.err


def test_other_data_and_splits(run: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    folder, data = run
    other = tmp_path / "other"
    shutil.copytree(data, other)
    assert saccade.evaluate(str(folder), str(other), device="cpu").count == 24
    assert saccade.evaluate(str(folder), str(pictures), device="cpu").count == 9
    shutil.copy(data / "red" / "0.png", data / "red" / "more.png")
    notes: list[str] = []
    assert evaluate(str(folder), str(data), device="cpu", notes=notes).count == 25
    assert "is not as it was when" in notes[0]


def test_texts(tmp_path: Path) -> None:
    data, folder = tmp_path / "texts", tmp_path / "run"
    data.mkdir()
    for language, words in (("en", ("one", "two", "three")), ("de", ("eins", "zwei", "drei"))):
        lines = [f"{words[i % 3]} {words[i % 2]} {words[i // 13]} {i}\n" for i in range(38)]
        (data / f"train.{language}").write_text("".join(lines))
    saccade.train(str(data), out=str(folder), model="gru", text={"vocabulary": 120, "batch_tokens": 128}, **TINY)
    notes: list[str] = []
    report = evaluate(str(folder), str(data), device="cpu", beams=1, notes=notes)
    assert report.texts == 8 and f"measured on the 8 pairs that {folder} held out" in "".join(notes)
    assert saccade.evaluate(str(folder), str(data), device="cpu", beams=1, split="train").texts == 38


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_plan(run: tuple[Path, Path], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = run
    (folder / "plan.json").write_text(text)
    assert main(["evaluate", str(folder), str(data), "--device=cpu"]) == 2
    error = capsys.readouterr().err
    assert "plan.json: damaged" in error and "--split all" in error and "Traceback" not in error
    assert saccade.evaluate(str(folder), str(data), split="all", device="cpu").count == 24
