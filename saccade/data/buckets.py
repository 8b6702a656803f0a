"""Shapes for batches: pictures of about the same aspect ratio are batched together, so none is squashed or padded."""

from __future__ import annotations

import math

import numpy as np

from saccade.config import PreprocessingConfig

AREA_TOLERANCE = 0.125  # share by which a shape's area may differ from the square's
SPACING = math.log(1.12)  # of neighbouring aspect ratios; closer ones would only make more half-filled batches


def square(preprocessing: PreprocessingConfig) -> tuple[int, int]:
    """(H, W) of the square shape: image_size rounded to the stride, one stride at least."""
    side = max(1, round(preprocessing.image_size / preprocessing.stride)) * preprocessing.stride
    return side, side


def bucket_shapes(preprocessing: PreprocessingConfig) -> list[tuple[int, int]]:
    """All (H, W) that batches may have, from the tallest to the widest: multiples of the stride of about equal area."""
    stride = preprocessing.stride
    side = square(preprocessing)[0] // stride
    longest = math.log(preprocessing.max_aspect) + 1e-9
    wide = []  # (h, w) in strides, w > h, from near square to long
    for h in range(side, 0, -1):
        w = round(side * side / h)
        aspect = math.log(w / h)
        if aspect <= longest and abs(h * w / side**2 - 1) <= AREA_TOLERANCE:
            if wide and aspect - math.log(wide[-1][1] / wide[-1][0]) < SPACING:
                continue
            if aspect >= SPACING:
                wide.append((h, w))
    shapes = [(w, h) for h, w in reversed(wide)] + [(side, side)] + wide
    return [(h * stride, w * stride) for h, w in shapes]


def assign(sizes: np.ndarray, shapes: list[tuple[int, int]]) -> np.ndarray:
    """The nearest shape by aspect ratio for each (height, width) of (N, 2), int64 (N,). (0, 0) is square."""
    sizes = np.maximum(np.asarray(sizes, dtype=np.float64).reshape(-1, 2), 1e-9)
    aspects = np.log(sizes[:, 1]) - np.log(sizes[:, 0])  # (N,)
    of_shapes = np.log([w / h for h, w in shapes])  # (S,)
    return np.abs(aspects[:, None] - of_shapes[None]).argmin(axis=1)
