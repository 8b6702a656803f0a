from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.config import RunConfig, merge
from saccade.recipes import resolve

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((32, 32), (24, 40), (40, 24))

# of every run here; small enough for a step to take some milliseconds
SETTINGS = {
    "model": "vit_micro",
    "batch_size": 8,
    "lr": 1e-3,
    "optimizer": {"name": "adamw"},
    "workers": 0,
    "device": "cpu",
    "precision": "float32",
    "preprocessing": {"image_size": 16},
}


def draw(seed: int, k: int) -> Image.Image:
    """Noise with more of the class's colour."""
    values = np.random.default_rng(seed).integers(0, 120, (*SHAPES[seed % 3], 3), dtype=np.uint8)
    values[..., k] += 100
    return Image.fromarray(values)


def make_pictures(
    root: Path, classes: tuple[str, ...] = ("blue", "green", "red"), train: int = 8, val: int = 3
) -> Path:
    seed = 0
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                seed += 1
                draw(seed, k).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 24 pictures to learn from in three aspect ratios, 9 for validation."""
    return make_pictures(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture
def fresh_pictures(tmp_path: Path) -> Callable[..., Path]:
    """The same, for a test that changes them."""
    return lambda name="mine", **options: make_pictures(tmp_path / name, **options)


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """The settings of a tiny run, with the given ones on top."""

    def build(**changes: Any) -> RunConfig:
        values = {"data": str(pictures), "out": str(tmp_path / "run"), "steps": 12, "evaluations": 2, **SETTINGS}
        return resolve(merge(values, changes))

    return build


@pytest.fixture(scope="session")
def killing() -> Any:
    """The module that runs commands and kills them, which the benchmark of the whole matrix shares."""
    path = ROOT / "benchmarks" / "killing.py"
    if not path.exists():
        pytest.skip("the benchmarks are not here")
    specification = importlib.util.spec_from_file_location("saccade_killing", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["saccade_killing"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runner(killing: Any) -> Iterator[Any]:
    with killing.Runner() as runner:
        yield runner


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower with more threads, and the machine may be shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
