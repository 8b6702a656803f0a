"""Boxes that mean something else than their format says: fractions for pixels, or corners for places and sides.

Nearly all boxes decide, not all of them: one that is wrong in its own way must not hide what the others are.
"""

from __future__ import annotations

import numpy as np

from saccade.data.source import Problem

ROUNDING = 1.0  # pixels by which a box may leave its picture without a word: tools round
MANY = 10  # boxes from which on a pattern in nearly all of them is no chance
NEARLY_ALL = 0.95  # share of the boxes with an area
NEAR = 0.05  # by which a fraction may lie beside 0 or 1
COCO_FORM = "COCO's are (left, top, width, height)"
YOLO_FORM = "YOLO's are (centre x, centre y, width, height)"
LEAVE = 0.2  # share of boxes that leave their pictures, from which on they may be corners


def fractions(numbers: np.ndarray, boxes: np.ndarray, where: str, format: str) -> list[Problem]:
    """Whether a format's `numbers` (M, 4), which are to be pixels, are fractions; `boxes` (M, 4) are its corners."""
    numbers = numbers[_with_area(boxes)]
    within = ((numbers >= -NEAR) & (numbers <= 1 + NEAR)).all(axis=1)
    if not len(numbers) or within.mean() < NEARLY_ALL or not (numbers[within] % 1 > 0).any():
        return []
    which = "all boxes lie" if within.all() else f"{within.sum()} of {len(numbers)} boxes lie"
    what = f"{which} within 0 and 1, but {format}'s are in pixels; multiply them by width and height"
    return [Problem("fractions", where, what)]


def corners(numbers: np.ndarray, boxes: np.ndarray, limits: np.ndarray, where: str, form: str) -> list[Problem]:
    """Whether `numbers` (M, 4), which are to be of a `form` that gives `boxes` (M, 4), are corners themselves.

    `limits` (M, 2): height and width of their pictures, 0 where unknown. All are in pixels.
    """
    usable = _with_area(boxes) & (limits.min(axis=1) > 0)
    numbers, boxes, limits = numbers[usable], boxes[usable], limits[usable]
    if len(boxes) < MANY:
        return []
    leaves: np.ndarray = np.greater(overhang(boxes, limits), ROUNDING)
    fits: np.ndarray = np.all(numbers[:, 2:] > numbers[:, :2], axis=1) & (overhang(numbers, limits) <= ROUNDING)
    if leaves.mean() < LEAVE or fits.mean() < NEARLY_ALL:
        return []
    none = "none" if fits.all() else f"only {(~fits).sum()}"
    what = (
        f"{leaves.sum()} of {len(boxes)} boxes leave their pictures, and {none} would as (left, top, right, bottom); "
        f"{form}: convert them"
    )
    return [Problem("corners", where, what)]


def as_corners(numbers: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The `numbers` (M, 4) where they can be corners, else `boxes`."""
    with np.errstate(invalid="ignore"):
        ordered: np.ndarray = np.all(numbers[:, 2:] > numbers[:, :2], axis=1)
    return np.where(ordered[:, None], numbers, boxes)


def overhang(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """By how many pixels each box (M, 4) leaves the size (M, 2) of its picture; at most 0 where it does not."""
    out = np.concatenate([-boxes[:, :2], boxes[:, 2:] - sizes[:, ::-1]], axis=1)
    return out.max(axis=1)


def _with_area(boxes: np.ndarray) -> np.ndarray:
    """Boxes (M, 4) that are finite and have an area: a click tells nothing of what the numbers mean."""
    with np.errstate(invalid="ignore"):
        ordered: np.ndarray = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
        return np.all(np.isfinite(boxes), axis=1) & ordered
