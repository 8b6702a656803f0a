"""The demo runs, draws, and learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import saccade
from saccade.demo import demo, settings, write_digits


def test_the_demo_draws_what_it_says_and_overwrites_nothing(tmp_path: Path) -> None:
    facts = demo(str(tmp_path / "demo"), minutes=0.02)
    assert facts["count"] == 360
    for name in ("predictions", "positions"):
        with Image.open(facts[name]) as picture:
            assert min(picture.size) >= 200
    assert (tmp_path / "demo" / "evaluation" / "confusion.png").is_file()
    with pytest.raises(saccade.UserError, match="not empty"):
        demo(str(tmp_path / "demo"), minutes=0.02)


@pytest.mark.slow
def test_its_model_reads_held_out_digits(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits")
    run = str(tmp_path / "run")
    result = saccade.train(str(tmp_path / "digits"), steps=500, out=run, show=False, evaluations=1, **settings())
    assert result.metrics["top1"] >= 0.97
