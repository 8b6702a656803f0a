"""The things in a picture: text, JSON, and a picture that shows where they are and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class Detections:
    """The n things found in one picture, the surest first."""

    boxes: np.ndarray  # float32 (n, 4): left, top, right, bottom in pixels of the picture
    scores: np.ndarray  # float32 (n,)
    labels: tuple[str, ...]
    classes: np.ndarray  # int64 (n,), positions in the model's class names
    size: tuple[int, int]  # height and width of the picture
    source: str = "image 1"  # path, or the place among pictures that were given as arrays
    picture: Callable[[], Image.Image] | None = field(default=None, repr=False)  # gives the picture, for drawing
    maps: np.ndarray | None = field(default=None, repr=False)  # (n, h, w) over the picture, largest is 1: why each box
