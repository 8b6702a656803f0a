"""Where a picture and the things in it lie in a tensor, exactly: what moves the pixels moves the boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from saccade.data.decode import Box, Picture
from saccade.data.source import Boxes

MOST_STRETCH = 1.1  # of one side against the other; a picture of 4:3 needs 1.09 in the nearest bucket of stride 32
ALMOST = 1e-6  # pixels; rounding of floats must not cost a whole one
LEAST_LEFT = 0.25  # of a thing that is cut: with less of it in sight it is not learnt ...
LARGE = 0.25  # ... but for what still fills this share of the picture
LEAST_SIDE = 1.0  # pixels of the tensor


@dataclass(frozen=True)
class Frame:
    """`region` of a picture, which may reach beyond it, fills `shape` (H, W)."""

    region: Box
    shape: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the frame for one of the picture, across and down."""
        left, top, right, bottom = self.region
        return self.shape[1] / (right - left), self.shape[0] / (bottom - top)

    def show(self, picture: Picture, resample: Image.Resampling, fill: tuple[int, int, int]) -> Image.Image:
        """The picture in its frame, with `fill` where there is none of it. Only whole pixels of the frame are drawn."""
        (left, top, _, _), (across, down), (H, W) = self.region, self.scale, self.shape
        x = _drawn(-left * across, (picture.width - left) * across, W)
        y = _drawn(-top * down, (picture.height - top) * down, H)
        if x[0] >= x[1] or y[0] >= y[1]:
            return Image.new("RGB", (W, H), fill)
        inside = (
            max(left + x[0] / across, 0.0),
            max(top + y[0] / down, 0.0),
            min(left + x[1] / across, picture.width),
            min(top + y[1] / down, picture.height),
        )
        drawn = picture.crop(inside, (y[1] - y[0], x[1] - x[0]), resample)
        if drawn.size == (W, H):
            return drawn
        canvas = Image.new("RGB", (W, H), fill)
        canvas.paste(drawn, (x[0], y[0]))
        return canvas

    def place(self, things: Things) -> Things:
        """Things of the picture, where they are in the frame and as far as they are."""
        left, top, _, _ = self.region
        across, down = self.scale
        boxes = (things.boxes - [left, top, left, top]) * [across, down, across, down]
        return Things(boxes, things.labels).within(self.shape)


def _drawn(start: float, stop: float, length: int) -> tuple[int, int]:
    """The whole pixels within an interval and within 0 to `length`."""
    return max(0, math.ceil(start - ALMOST)), min(length, math.floor(stop + ALMOST))


def fitted(size: tuple[int, int], shape: tuple[int, int]) -> tuple[float, float]:
    """Height and width that a picture of `size` (h, w) has in `shape` (H, W) when all of it is shown.

    Where the aspects differ it is stretched to fill the shape, but by no more than MOST_STRETCH.
    """
    (h, w), (H, W) = size, shape
    stretch = min(max((W / H) / (w / h), 1 / MOST_STRETCH), MOST_STRETCH)
    scale = min(H / h, W / (w * stretch))
    return h * scale, w * scale * stretch


def whole_frame(size: tuple[int, int], shape: tuple[int, int]) -> Frame:
    """All of a picture of `size` (h, w) at the top left of `shape` (H, W), with padding at the right or below."""
    (h, w), (H, W) = size, shape
    height, width = (min(max(1, round(side)), most) for side, most in zip(fitted(size, shape), shape, strict=True))
    return Frame((0.0, 0.0, w * W / width, h * H / height), shape)


@dataclass(frozen=True)
class Things:
    """What is to be learnt of one picture."""

    boxes: np.ndarray  # float64 (n, 4): left, top, right, bottom in pixels of the picture they are with
    labels: np.ndarray  # int64 (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def moved(self, left: float, top: float) -> Things:
        return Things(self.boxes + [left, top, left, top], self.labels)

    @classmethod
    def none(cls) -> Things:
        return cls(np.zeros((0, 4)), np.zeros(0, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Things]) -> Things:
        return cls(np.concatenate([part.boxes for part in parts]), np.concatenate([part.labels for part in parts]))

    @classmethod
    def of(cls, target: Boxes, size: tuple[int, int]) -> Things:
        """Without crowds, and of the boxes what lies within the picture of `size` (h, w) and has an area."""
        h, w = size
        boxes = np.clip(target.boxes.astype(np.float64), 0, [w, h, w, h])
        good = ~target.crowd & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # false for NaN, too
        return cls(boxes[good], target.labels[good])

    def within(self, shape: tuple[int, int]) -> Things:
        """What is in sight of `shape` (H, W): things of which a quarter is left, or that still fill a quarter of it."""
        H, W = shape
        inside = np.clip(self.boxes, 0, [W, H, W, H])
        sides = inside[:, 2:] - inside[:, :2]
        left, whole = sides.prod(axis=1), (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1)
        keep = ((left >= LEAST_LEFT * whole) | (left >= LARGE * H * W)) & (sides >= LEAST_SIDE).all(axis=1)
        return Things(inside[keep], self.labels[keep])


@dataclass(frozen=True)
class Shown:
    """A picture of the tensor's size and what is in it."""

    image: Image.Image
    things: Things

    def mirrored(self) -> Shown:
        """Left and right exchanged."""
        boxes = self.things.boxes.copy()
        boxes[:, [0, 2]] = self.image.width - self.things.boxes[:, [2, 0]]
        return Shown(self.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Things(boxes, self.things.labels))

    def upside_down(self) -> Shown:
        """Top and bottom exchanged."""
        boxes = self.things.boxes.copy()
        boxes[:, [1, 3]] = self.image.height - self.things.boxes[:, [3, 1]]
        return Shown(self.image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), Things(boxes, self.things.labels))
