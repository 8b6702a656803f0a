"""A detector that is killed and resumed ends as one that was never stopped: mosaic, denoising and average included."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saccade.data.sources import open_splits
from saccade.engine.plan import data_hash

FLAGS = [
    "--model=glance_nano", "--image-size=64", "--steps=6", "--batch-size=4", "--checkpoint-seconds=0",
    "--evaluations=2", "--device=cpu", "--precision=float32", "--augment.mosaic=0.6", "--augment.copy-paste=0.5",
    "--augment.mixup=0.5", "--augment.strong-until=0.7",
]  # fmt: skip


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of up to three bright squares, some of none, in COCO's form."""
    root = tmp_path_factory.mktemp("squares")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        images, annotations = [], []
        for i in range(count):
            pixels = rng.integers(0, 90, (48, 64, 3), dtype=np.uint8)
            for _ in range(i % 4):
                x, y, side = int(rng.integers(0, 40)), int(rng.integers(0, 28)), int(rng.integers(8, 20))
                pixels[y : y + side, x : x + side] += 120
                box = [x, y, side, side]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + side % 2, "bbox": box}
                )
            name = f"{split}{i}.png"
            Image.fromarray(pixels).save(root / "images" / name)
            images.append({"id": i, "file_name": name, "width": 64, "height": 48})
        categories = [{"id": 1, "name": "even"}, {"id": 2, "name": "odd"}]
        values = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(values))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_killed_with_other_workers(
    world: int, strategy: str, squares: Path, runner: Any, killing: Any, tmp_path: Path
) -> None:
    """Of two processes one often has pictures without a thing."""
    flags = [*FLAGS, f"--distributed.strategy={strategy}"]

    def run(*arguments: Any, **how: Any) -> Any:
        return runner.run(["train", *arguments], scratch=tmp_path / "scratch", world=world, **how)

    whole, stopped = tmp_path / "whole", tmp_path / "run"
    ended = run(squares, *flags, "--out", whole)
    assert ended.code == 0, ended.output
    killed = run(squares, *flags, "--out", stopped, kill_at="after step 2", rank=world - 1)
    assert killed.code == -signal.SIGKILL
    ended = run("--resume", stopped, "--workers=2")
    assert ended.code == 0, ended.output
    assert killing.differences(stopped, whole) == []


def test_other_annotations_are_other_data(squares: Path, tmp_path: Path) -> None:
    """A class of another name, and things that are ignored now."""
    began = data_hash(open_splits(squares))
    for spoil in (
        lambda values: values["categories"][0].update(name="equal"),
        lambda values: values["annotations"][0].update(iscrowd=1),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(squares, folder)
        values = json.loads((folder / "train.json").read_text())
        spoil(values)
        (folder / "train.json").write_text(json.dumps(values))
        assert data_hash(open_splits(folder)) != began
    assert data_hash(open_splits(squares)) == began
