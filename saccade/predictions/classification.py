"""The class of a picture: text, JSON, and a picture that shows why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from saccade.drawing import BLUE, FAINT, GREEN, INK, RED, Region, heat_colours, heat_range, overlay, typeface
from saccade.errors import UserError
from saccade.predictions.cards import GAP, MARGIN, TRACK, percent, write, write_new

SHEET_LIMIT = 100


@dataclass(frozen=True, eq=False)
class Classification:
    """The class of one picture."""

    label: str
    score: float  # probability of the label
    top: tuple[tuple[str, float], ...]  # the five most probable classes, the first is the label
    probabilities: np.ndarray | None = field(default=None, repr=False)  # (K,) in the order of the model's class names
    source: str = "image 1"  # path, or the place among pictures that were given as arrays
    image: Image.Image | None = field(default=None, repr=False)
    attention: np.ndarray | None = field(default=None, repr=False)  # (h, w), largest is 1, over `region`
    region: Region | None = None  # what the model saw: left, top, right, bottom in pixels; none: all of it

    def __str__(self) -> str:
        others = ", ".join(f"{name} {percent(score)}" for name, score in self.top[1:3])
        return f"{self.source}: {self.label} {percent(self.score)}" + (f" ({others})" if others else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the answer without pixels and without the many small probabilities."""
        return {
            "source": self.source,
            "label": self.label,
            "score": float(self.score),
            "top": [{"label": name, "score": float(score)} for name, score in self.top],
        }

    def save(self, path: str | Path) -> Path:
        """Draw the picture, what the model looked at, and the five most probable classes. Returns where it is.

        A path without a suffix is a folder, in which the file is named after the source. No file is ever overwritten:
        the name becomes name-1.png, and so on. UserError where there is no picture or it cannot be written.
        """
        return write_new(_draw_card(self), path, self.source)


def contact_sheet(predictions: Sequence[Classification], path: str | Path, truths: Sequence[str] | None = None) -> Path:
    """Many predictions in one picture, each with what the model looked at; right and wrong ones are marked where the
    true labels are given. The first hundred are drawn. Never overwrites, as `Classification.save`."""
    if not predictions:
        raise UserError("there are no predictions to draw")
    if truths is not None and len(truths) != len(predictions):
        raise UserError(f"{len(predictions)} predictions cannot be compared with {len(truths)} true labels")
    return write_new(_draw_sheet(predictions, truths), path, "contact sheet")


def _draw_card(result: Classification) -> Image.Image:
    picture, seen = _pair(result, _card_scale)
    pictures = [picture] if seen is None else [picture, seen]
    width, height = picture.size
    stacked = width > 1.8 * height  # side by side, two wide pictures would be too small
    if stacked:
        block = width, len(pictures) * (height + GAP) - GAP
        panel = max(width, 420)
        size = panel + 2 * MARGIN, 2 * MARGIN + block[1] + GAP + _panel_height(result)
        corner = MARGIN, MARGIN + block[1] + GAP
    else:
        block = len(pictures) * (width + GAP) - GAP, height
        panel = 340
        inner = max(height, _panel_height(result))
        size = 2 * MARGIN + block[0] + MARGIN + panel, 2 * MARGIN + inner
        corner = MARGIN + block[0] + MARGIN, MARGIN + (inner - _panel_height(result)) // 2
    canvas = Image.new("RGB", size, "white")
    for i, one in enumerate(pictures):
        x = (canvas.width - width) // 2 if stacked else MARGIN + i * (width + GAP)
        y = MARGIN + i * (height + GAP) if stacked else (canvas.height - height) // 2
        canvas.paste(one, (x, y))
    _draw_panel(ImageDraw.Draw(canvas), result, corner, panel)
    return canvas


def _panel_height(result: Classification) -> int:
    return 88 + 44 * len(result.top) + (0 if result.attention is None else 48)


def _draw_panel(draw: ImageDraw.ImageDraw, result: Classification, corner: tuple[int, int], width: int) -> None:
    """Label and score, the source, and a bar for each of the first classes."""
    x, y = corner
    score = percent(result.score)
    write(draw, (x + width, y + 28), score, 26, INK, anchor="rs")
    room = width - typeface(score, 26).getlength(score) - 16
    label = " ".join(result.label.split())
    size = next((size for size in (28, 24, 20) if typeface(label, size, bold=True).getlength(label) <= room), 17)
    write(draw, (x, y + 28), label, size, INK, width=room, bold=True)
    write(draw, (x, y + 56), Path(result.source).name, 15, FAINT, width=width)
    y += 84
    for i, (name, value) in enumerate(result.top):
        number = percent(value)
        write(draw, (x + width, y + 16), number, 16, INK, anchor="rs")
        write(draw, (x, y + 16), name, 16, INK, width=width - typeface(number, 16).getlength(number) - 12)
        draw.rectangle((x, y + 24, x + width - 1, y + 30), fill=TRACK)
        filled = round(width * min(max(value, 0), 1))
        if filled:
            draw.rectangle((x, y + 24, x + filled - 1, y + 30), fill=BLUE if i == 0 else "#8fb3d9")
        y += 44
    if result.attention is not None:
        _draw_scale(draw, result.attention, (x, y + 8), width)


def _draw_scale(draw: ImageDraw.ImageDraw, heat: np.ndarray, corner: tuple[int, int], width: int) -> None:
    """The colours of the map, and how much less the least place got than the most: an almost even map says little."""
    x, y = corner
    low, high = heat_range(heat)
    values = np.linspace(heat.min(), heat.max(), width)
    for i, colour in enumerate(heat_colours((values - low) / (high - low))):
        draw.line((x + i, y, x + i, y + 8), fill=tuple(round(255 * float(part)) for part in colour))
    share = percent(float(heat.min() / heat.max())) if heat.max() > 0 else "0 %"
    write(draw, (x, y + 26), f"looked at: {share} of the most", 13, FAINT)
    write(draw, (x + width, y + 26), "most", 13, FAINT, anchor="rs")


def _draw_sheet(predictions: Sequence[Classification], truths: Sequence[str] | None) -> Image.Image:
    shown = predictions[:SHEET_LIMIT]
    for result in shown:
        _picture_of(result)
    # All boxes have the shape of the middle picture; the few that differ much are drawn smaller in theirs.
    aspect = float(np.median([result.image.width / result.image.height for result in shown if result.image]))
    aspect = min(max(aspect, 0.6), 2.2)
    box = round(176 * math.sqrt(aspect)), round(176 / math.sqrt(aspect))
    explained = any(result.attention is not None for result in shown)
    stacked = explained and aspect > 1.45
    inner = 6
    block = (
        box[0] * (1 if stacked or not explained else 2) + (inner if explained and not stacked else 0),
        box[1] * (2 if stacked else 1) + (inner if stacked else 0),
    )
    caption = 54 if truths is not None else 32
    cell = block[0] + GAP, block[1] + caption + GAP
    columns = min(len(shown), max(1, round(math.sqrt(len(shown) * cell[1] / cell[0] * 4 / 3))))
    lines = math.ceil(len(shown) / columns)
    head = 44 if truths is not None or len(shown) < len(predictions) else 0
    width, height = columns * cell[0] - GAP + 2 * MARGIN, lines * cell[1] - GAP + 2 * MARGIN + head
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    if head:
        right = sum(p.label == t for p, t in zip(predictions, truths, strict=True)) if truths is not None else 0
        title = f"{right} of {len(predictions)} right" if truths is not None else f"{len(predictions)} predictions"
        if len(shown) < len(predictions):
            title += f" (the first {len(shown)} are shown)"
        write(draw, (MARGIN, MARGIN + 20), title, 22, INK, bold=True, width=width - 2 * MARGIN)

    for i, result in enumerate(shown):
        x, y = MARGIN + i % columns * cell[0], MARGIN + head + i // columns * cell[1]
        picture, seen = _pair(result, lambda size: min(box[0] / size[0], box[1] / size[1]))
        for j, one in enumerate([picture, seen]):
            if one is None:
                continue
            place = x + (0 if stacked else j * (box[0] + inner)), y + (j * (box[1] + inner) if stacked else 0)
            draw.rectangle((*place, place[0] + box[0] - 1, place[1] + box[1] - 1), fill="#f3f5f7")
            canvas.paste(one, (place[0] + (box[0] - one.width) // 2, place[1] + (box[1] - one.height) // 2))
        _draw_caption(draw, result, None if truths is None else truths[i], (x, y + block[1]), block[0])
    return canvas


def _draw_caption(
    draw: ImageDraw.ImageDraw, result: Classification, truth: str | None, corner: tuple[int, int], width: int
) -> None:
    """Label and score; with the truth known, a coloured line and a mark, for those who do not tell red from green."""
    x, y = corner
    right = truth is None or truth == result.label
    colour = INK if truth is None else GREEN if right else RED
    indent = 0
    if truth is not None:
        draw.rectangle((x, y + 3, x + width - 1, y + 6), fill=colour)
        y += 6
        write(draw, (x, y + 20), "✓" if right else "✗", 16, colour, bold=True)
        indent = 20
    score = percent(result.score)
    write(draw, (x + width, y + 20), score, 14, INK, anchor="rs")
    room = width - indent - typeface(score, 14).getlength(score) - 8
    write(draw, (x + indent, y + 20), result.label, 15, colour, bold=True, width=room)
    if truth is not None and not right:
        write(draw, (x + indent, y + 40), f"is {truth}", 13, FAINT, width=width - indent)


def _picture_of(result: Classification) -> Image.Image:
    if result.image is None:
        raise UserError(f"{result.source}: this prediction holds no picture, so there is nothing to draw")
    return result.image


def _card_scale(size: tuple[int, int]) -> float:
    """About 400 x 400 pixels, whatever the shape; no side beyond 1200."""
    width, height = size
    return min(400 / math.sqrt(width * height), 1200 / width, 800 / height)


def _pair(
    result: Classification, scale_of: Callable[[tuple[int, int]], float]
) -> tuple[Image.Image, Image.Image | None]:
    """The picture and the picture under its attention, scaled for drawing."""
    picture = _picture_of(result).convert("RGB")
    scale = scale_of(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    # A handful of pixels is shown as such: smoothed, a digit of 8 x 8 is a blur.
    kind = Image.Resampling.NEAREST if max(picture.size) <= 16 else Image.Resampling.LANCZOS
    drawn = picture.resize(size, kind)
    if result.attention is None:
        return drawn, None
    left, top, right, bottom = result.region or (0, 0, *picture.size)
    x, y = size[0] / picture.width, size[1] / picture.height
    # Outwards, so that a narrow region of a long panorama keeps at least a pixel.
    begin = math.floor(left * x), math.floor(top * y)
    end = min(math.ceil(right * x), size[0]), min(math.ceil(bottom * y), size[1])
    region = *begin, *end
    return drawn, overlay(drawn, result.attention, region)
