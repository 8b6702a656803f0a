from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
