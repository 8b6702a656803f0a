"""What a detector found in some pictures beside what is there: the picture that says what to mend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from saccade.drawing import FAINT, INK, typeface
from saccade.errors import UserError
from saccade.predictions.cards import GAP, MARGIN, write
from saccade.predictions.detection_card import outline, write_labels

RIGHT, WRONG, MISSED = "#0072b2", "#d55e00", "#f0e442"  # told apart by nearly everybody; missed ones are dashed, too
AREA = 400 * 300  # of a picture
DASH = 7
CAPTION = 48


@dataclass(frozen=True)
class Compared:
    """A picture with n detections and the m things that are there; boxes as left, top, right, bottom in its pixels."""

    picture: Callable[[], Image.Image]
    source: str
    boxes: np.ndarray  # (n, 4)
    labels: tuple[str, ...]
    mistakes: tuple[str, ...]  # (n,) what is wrong with each; "" where it is right
    truth_boxes: np.ndarray  # (m, 4)
    truth_labels: tuple[str, ...]
    missed: np.ndarray  # (m,) bool


def mistakes_sheet(compared: Sequence[Compared], path: str | Path) -> Path:
    """All of them in one picture, as PNG. UserError where it cannot be written."""
    tiles = [_draw(one) for one in compared]
    width = max(tile.width for tile in tiles)
    columns = max(1, min(len(tiles), round(1500 / (width + GAP))))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    size = columns * (width + GAP) - GAP + 2 * MARGIN, sum(heights) + len(rows) * GAP + 2 * MARGIN + 70
    canvas = Image.new("RGB", (max(size[0], 640), size[1]), "white")
    _draw_key(ImageDraw.Draw(canvas), "The pictures with the most mistakes")
    y = MARGIN + 70
    for row, height in zip(rows, heights, strict=True):
        for i, tile in enumerate(row):
            canvas.paste(tile, (MARGIN + i * (width + GAP), y))
        y += height + GAP
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror or error})") from None
    return path


def _draw_key(draw: ImageDraw.ImageDraw, title: str) -> None:
    write(draw, (MARGIN, MARGIN + 20), title, 22, INK, bold=True)
    x, y = MARGIN, MARGIN + 50
    for text, colour, dashed in (("right", RIGHT, False), ("wrong", WRONG, False), ("missed", MISSED, True)):
        box = np.array([x, y - 15, x + 26, y + 3])
        (_dashed if dashed else outline)(draw, box, colour, 3, (x + 40, y + 10))
        write(draw, (x + 36, y), text, 15, INK)
        x += 36 + math.ceil(typeface(text, 15).getlength(text)) + 28


def _draw(one: Compared) -> Image.Image:
    """A picture with its boxes, and a caption that counts."""
    picture = one.picture().convert("RGB")
    width, height = picture.size
    scale = min(math.sqrt(AREA / (width * height)), 700 / width, 600 / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    drawn = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    draw = ImageDraw.Draw(drawn)
    stretch = np.tile(np.array(size) / picture.size, 2)
    found, truth = one.boxes.reshape(-1, 4) * stretch, one.truth_boxes.reshape(-1, 4) * stretch
    wrong = [i for i, mistake in enumerate(one.mistakes) if mistake]
    for i in range(len(found)):
        if i not in wrong:
            outline(draw, found[i], RIGHT, 2, size)
    missed = np.flatnonzero(one.missed)
    for i in missed:
        _dashed(draw, truth[i], MISSED, 3, size)
    for i in wrong:
        outline(draw, found[i], WRONG, 3, size)
    texts = [f"{one.mistakes[i]}: {one.labels[i]}" for i in wrong] + [one.truth_labels[i] for i in missed]
    colours = [WRONG] * len(wrong) + [MISSED] * len(missed)
    write_labels(drawn, np.concatenate([found[wrong], truth[missed]]), texts, colours, pixels=11)
    tile = Image.new("RGB", (max(size[0], 220), size[1] + CAPTION), "white")
    tile.paste(drawn, (0, 0))
    draw = ImageDraw.Draw(tile)
    write(draw, (0, size[1] + 20), Path(one.source).name, 14, INK, width=tile.width, bold=True)
    counts = f"{len(found) - len(wrong)} right, {len(wrong)} wrong, {len(missed)} of {len(truth)} missed"
    write(draw, (0, size[1] + 39), counts, 13, FAINT, width=tile.width)
    return tile


def _dashed(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: str, line: int, size: tuple[int, int]) -> None:
    """As `outline`, of dashes on black, so that it is seen on any ground."""
    left, top = (int(np.clip(round(edge), 0, most - 1)) for edge, most in zip(box[:2], size, strict=True))
    right, bottom = (int(np.clip(round(edge) - 1, 0, most - 1)) for edge, most in zip(box[2:], size, strict=True))
    right, bottom = max(right, left), max(bottom, top)
    draw.rectangle((left, top, right, bottom), outline="black", width=line + 1)
    for x in range(left, right + 1, 2 * DASH):
        end = min(x + DASH, right)
        draw.rectangle((x, top, end, top + line - 1), fill=colour)
        draw.rectangle((x, bottom - line + 1, end, bottom), fill=colour)
    for y in range(top, bottom + 1, 2 * DASH):
        end = min(y + DASH, bottom)
        draw.rectangle((left, y, left + line - 1, end), fill=colour)
        draw.rectangle((right - line + 1, y, right, end), fill=colour)
