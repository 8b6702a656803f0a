"""A picture with its boxes, what they are, and what the surest of them were taken from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from saccade.drawing import FAINT, INK, class_colour, heat_colours, overlay, shorten, typeface
from saccade.predictions.cards import GAP, MARGIN, cut, write

if TYPE_CHECKING:
    from saccade.predictions.detection import Detections

MANY = 25  # boxes, from which on they are drawn thinner
PANEL = 250
WIDE = 1.9  # aspect, from which on the list stands below the picture
LABEL = 13  # size of text
LISTED = 14  # classes
TILE = 265  # about, of a side
HEADING, CAPTION = 34, 28
MOST_HIDDEN = 0.3  # of any box by a label
ELSEWHERE = 0.06  # of a box, that may be hidden more before a label moves to its next place
WHOLE_TILE = 0.1  # the share of a tile's side that a box has at least; for smaller ones a part of the picture is shown


def draw_card(found: Detections, picture: Image.Image) -> Image.Image:
    """The picture with all boxes, a list of the classes, and below a tile for each of the surest boxes."""
    width, height = picture.size
    scale = min(math.sqrt(560_000 / (width * height)), 1500 / width, 1000 / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # A handful of pixels is shown as such: smoothed, they are a blur.
    kind = Image.Resampling.NEAREST if max(picture.size) <= 16 else Image.Resampling.LANCZOS
    drawn = picture.resize(size, kind, reducing_gap=3.0)
    colours = class_colours(found)
    draw_boxes(drawn, found, np.array(size) / picture.size, colours)

    rows = _rows(found)
    listed = 62 + 30 * min(len(rows), LISTED + 1)
    # (left, top, width) of the list and of the tiles: beside the picture or below it, as its shape leaves room
    if drawn.width > WIDE * drawn.height:
        width = max(drawn.width, 2 * PANEL)
        panel = MARGIN, MARGIN + drawn.height + GAP, width
        tiled = MARGIN, panel[1] + listed + GAP, width
    elif drawn.height > WIDE * drawn.width:
        panel = MARGIN + drawn.width + MARGIN, MARGIN, 2 * PANEL
        tiled = panel[0], panel[1] + listed + GAP, 2 * PANEL
    else:
        panel = MARGIN + drawn.width + MARGIN, MARGIN, PANEL
        tiled = MARGIN, MARGIN + max(drawn.height, listed) + GAP, drawn.width + MARGIN + PANEL
    tiles = None if found.maps is None or not len(found) else draw_tiles(found, picture, colours, tiled[2])
    right = max(MARGIN + drawn.width, panel[0] + panel[2])
    bottom = max(MARGIN + drawn.height, panel[1] + listed, 0 if tiles is None else tiled[1] + tiles.height)
    canvas = Image.new("RGB", (right + MARGIN, bottom + MARGIN), "white")
    canvas.paste(drawn, (MARGIN, MARGIN))
    _draw_list(ImageDraw.Draw(canvas), found, rows, colours, panel)
    if tiles is not None:
        canvas.paste(tiles, tiled[:2])
    return canvas


def class_colours(found: Detections) -> dict[int, str]:
    return {k: class_colour(k) for k in sorted(set(found.classes.tolist()))}


def _rows(found: Detections) -> list[tuple[str, int]]:
    """The classes with their counts, in the order of the model's classes; where there are many, those with most come
    first, in that order, too."""
    position = dict(zip(found.labels, found.classes.tolist(), strict=True))
    rows = Counter(found.labels).most_common()
    return sorted(rows[:LISTED], key=lambda row: position[row[0]]) + rows[LISTED:]


def draw_boxes(image: Image.Image, found: Detections, scale: np.ndarray, colours: dict[int, str]) -> None:
    """All boxes, those that are sure over the others, and as many of their labels as there is room for."""
    draw = ImageDraw.Draw(image)
    boxes = found.boxes.reshape(-1, 4) * np.tile(scale, 2)
    line = 2 if len(boxes) > MANY else 3
    for i in reversed(range(len(boxes))):
        outline(draw, boxes[i], colours[int(found.classes[i])], line, image.size)
    texts = [
        f"{shorten(label, 28)} {100 * score:.0f}" for label, score in zip(found.labels, found.scores, strict=True)
    ]
    write_labels(image, boxes, texts, [colours[int(k)] for k in found.classes])


def write_labels(
    image: Image.Image, boxes: np.ndarray, texts: Sequence[str], colours: Sequence[str], pixels: int = LABEL
) -> None:
    """A text at each of the boxes, the first ones first, as far as there is room; "" is none."""
    draw, placed = ImageDraw.Draw(image), []
    for i, (box, text, colour) in enumerate(zip(boxes, texts, colours, strict=True)):
        font = typeface(text, pixels, bold=True)
        text = cut(text, font, image.width - 8)
        size = np.array([math.ceil(font.getlength(text)) + 8, pixels + 6])
        place = _place(box, size, np.array(image.size), placed, np.delete(boxes, i, axis=0)) if text else None
        if place is None:
            continue
        placed.append(place)
        left, top, right, bottom = place.tolist()
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        draw.text((left + 4, bottom - 5), text, font=font, fill=_on(colour), anchor="ls")


def outline(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: str, line: int, size: tuple[int, int]) -> None:
    """A coloured line with a white rim, so that it is seen on any ground; never a box too thin to be seen."""
    left, top = (int(np.clip(round(edge), 0, most - 1)) for edge, most in zip(box[:2], size, strict=True))
    right, bottom = (int(np.clip(round(edge) - 1, 0, most - 1)) for edge, most in zip(box[2:], size, strict=True))
    right, bottom = max(right, left), max(bottom, top)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=line + 2)
    draw.rectangle((left, top, right, bottom), outline=colour, width=line)


def _place(
    box: np.ndarray, size: np.ndarray, most: np.ndarray, placed: list[np.ndarray], others: np.ndarray
) -> np.ndarray | None:
    """Where a label fits: in the picture, over no other label, and hiding little of other boxes. None: nowhere.

    At the left end above its box, where labels are looked for, unless that would hide more than another place.
    """
    left, top, right, bottom = np.round(box)
    w, h = size
    if (size > most).any():
        return None
    corners = [
        (left, top - h), (left, top), (right - w, top - h), (right - w, top),
        (left, bottom), (right - w, bottom), (left, bottom - h), (right - w, bottom - h),
    ]  # fmt: skip
    best, least = None, math.inf
    areas = np.maximum((others[:, 2:] - others[:, :2]).prod(axis=1), 1.0)
    for order, corner in enumerate(corners):
        start = np.clip(corner, 0, most - size)
        place = np.concatenate([start, start + size])
        if abs(start[0] - corner[0]) > w or abs(start[1] - corner[1]) > 0.5 * h:
            continue  # it would hang in the air
        if placed and _common(place, np.array(placed)).max() > 0:
            continue
        common = _common(place, others)
        hidden = float((common / areas).max(initial=0.0))
        if start[1] > top - h and start[1] < bottom:  # a label within its own box hides of that
            hidden = max(hidden, float(_common(place, box[None])[0] / max((box[2:] - box[:2]).prod(), 1.0)))
        # on another box it would be taken for that one's
        cost = hidden + 0.1 * float(common.max(initial=0.0)) / (w * h) + ELSEWHERE * order
        if hidden < MOST_HIDDEN and cost < least:
            best, least = place, cost
    return best


def _common(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    return (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(axis=1)


def _on(colour: str) -> str:
    """Text that is seen on this colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 150 else "black"


def _draw_list(
    draw: ImageDraw.ImageDraw,
    found: Detections,
    rows: list[tuple[str, int]],
    colours: dict[int, str],
    place: tuple[int, int, int],
) -> None:
    """How many of which class, and how sure the surest of them is."""
    x, y, width = place
    title = f"{len(found)} found" if len(found) else "nothing found"
    write(draw, (x, y + 22), title, 24, INK, width=width, bold=True)
    write(draw, (x, y + 46), Path(found.source).name, 14, FAINT, width=width)
    y += 62
    class_of = dict(zip(reversed(found.labels), reversed(found.classes.tolist()), strict=True))
    surest_of = {label: float(score) for label, score in zip(reversed(found.labels), found.scores[::-1], strict=True)}
    width = min(width, 2 * PANEL)
    for i, (label, count) in enumerate(rows):
        if i == LISTED:
            more = sum(count for _, count in rows[LISTED:])
            write(draw, (x, y + 20), f"and {more} of {len(rows) - LISTED} other classes", 14, FAINT, width=width)
            break
        score = f"{100 * surest_of[label]:.0f} %"
        draw.rectangle((x, y + 6, x + 15, y + 21), fill=colours[class_of[label]])
        score = f"best {score}" if count > 1 else score
        write(draw, (x + width, y + 20), score, 13, FAINT, anchor="rs")
        number = str(count)
        write(draw, (x + 26, y + 20), number, 16, INK, bold=True)
        begin = 26 + typeface(number, 16, bold=True).getlength(number) + 8
        write(draw, (x + begin, y + 20), label, 16, INK, width=width - begin - 84)
        y += 30


def surest(found: Detections) -> list[int]:
    """The best of each class first, then the second best, and so on: some of every kind."""
    turn: Counter[int] = Counter()
    order = []
    for i, k in enumerate(found.classes.tolist()):
        order.append((turn[k], i))
        turn[k] += 1
    return [i for _, i in sorted(order)]


def draw_tiles(found: Detections, picture: Image.Image, colours: dict[int, str], width: int) -> Image.Image:
    """Up to two rows of tiles under a heading: of some of every kind, in the order of the classes."""
    columns = max(2, round(width / (TILE + GAP)))
    side = (width + GAP) // columns - GAP
    shown = sorted(surest(found)[: 2 * columns], key=lambda i: (found.classes[i], i))
    parts = [draw_part(found, picture, i, colours[int(found.classes[i])], side) for i in shown]
    tall = max(part.height for part in parts)
    lines = math.ceil(len(shown) / columns)
    canvas = Image.new("RGB", (width, HEADING + lines * (tall + CAPTION + GAP) - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    _draw_heading(draw, width)
    for n, (i, part) in enumerate(zip(shown, parts, strict=True)):
        x, y = n % columns * (side + GAP), HEADING + n // columns * (tall + CAPTION + GAP)
        draw.rectangle((x, y, x + side - 1, y + tall - 1), fill="#f3f5f7")
        canvas.paste(part, (x + (side - part.width) // 2, y + (tall - part.height) // 2))
        y += tall
        draw.rectangle((x, y + 8, x + 11, y + 19), fill=colours[int(found.classes[i])])
        score = f"{100 * found.scores[i]:.0f} %"
        write(draw, (x + side, y + 20), score, 14, INK, anchor="rs")
        room = side - 18 - typeface(score, 14).getlength(score) - 8
        write(draw, (x + 18, y + 20), found.labels[i], 14, INK, width=room)
    return canvas


def draw_part(found: Detections, picture: Image.Image, i: int, colour: str, side: int) -> Image.Image:
    """The picture, or the part of it around a little box, under the map of one box; at most `side` pixels a side."""
    assert found.maps is not None
    window = _window(found.boxes[i].astype(float), picture.size)
    left, top, right, bottom = window
    scale = min(side / (right - left), side / (bottom - top))
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    kind = Image.Resampling.NEAREST if max(picture.size) <= 16 else Image.Resampling.BICUBIC
    part = picture.resize(size, kind, window, reducing_gap=3.0)
    heat = found.maps[i].astype(np.float32)
    h, w = heat.shape
    inside = left / picture.width * w, top / picture.height * h, right / picture.width * w, bottom / picture.height * h
    seen = Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR, inside)
    part = overlay(part, np.asarray(seen))
    box = (found.boxes[i] - [left, top, left, top]) * scale
    outline(ImageDraw.Draw(part), box, colour, 2, part.size)
    return part


def _window(box: np.ndarray, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of the picture that a tile shows: all of it, but no more than twice as long as wide, nor so much of it
    that the box would hardly be seen."""
    most = max(float((box[2:] - box[:2]).max()) / WHOLE_TILE, 16.0)
    short = min(size)
    sides = [min(length, max(2 * short, most), most if most < short else 2 * short) for length in size]
    starts = [
        min(max((box[a] + box[a + 2] - side) / 2, 0.0), length - side)
        for a, (side, length) in enumerate(zip(sides, size, strict=True))
    ]
    return starts[0], starts[1], starts[0] + sides[0], starts[1] + sides[1]


def _draw_heading(draw: ImageDraw.ImageDraw, width: int) -> None:
    """What the tiles are, and their colours from little to much."""
    text = "What these boxes were taken from"
    write(draw, (0, 18), text, 16, INK, width=width, bold=True)
    begin = math.ceil(typeface(text, 16, bold=True).getlength(text)) + 24
    write(draw, (begin, 17), "little", 13, FAINT)
    begin += math.ceil(typeface("little", 13).getlength("little")) + 8
    for i, colour in enumerate(heat_colours(np.linspace(0, 1, 70))):
        draw.line((begin + i, 8, begin + i, 16), fill=tuple(round(255 * float(part)) for part in colour))
    write(draw, (begin + 78, 17), "most", 13, FAINT)
