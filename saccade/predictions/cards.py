"""What all pictures of predictions share: margins, text that is cut to its room, files that never overwrite others."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from saccade.drawing import typeface
from saccade.errors import UserError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
TRACK = "#e4e7eb"
MARGIN, GAP = 28, 20


def percent(score: float) -> str:
    return f"{100 * score:.1f} %"


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: str,
    width: float = math.inf,
    bold: bool = False,
    anchor: str = "ls",
) -> None:
    """One line on the base line `place`, cut to `width` pixels."""
    text = " ".join(text.split())
    font = typeface(text, size, bold)
    draw.text(place, cut(text, font, width), font=font, fill=colour, anchor=anchor)


def cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def names_apart(sources: Sequence[str]) -> dict[str, str]:
    """For each path the name of a file without suffix: its own, with what tells it from others of that name.

    `a/x.jpg` and `b/x.jpg` are `a-x` and `b-x`, `x.jpg` and `x.png` in one folder are `x-jpg` and `x-png`.
    """
    alike: dict[str, list[str]] = {}
    for source in dict.fromkeys(sources):
        alike.setdefault(Path(source).stem.casefold(), []).append(source)  # for disks that do not tell A from a
    names: dict[str, str] = {}
    for same in alike.values():
        paths = [Path(os.path.abspath(source)) for source in same]
        one_folder = len({path.parent for path in paths}) < len(set(paths))
        ends = [path.name.replace(".", "-") if one_folder else path.stem for path in paths]
        found, depth = ends, 0
        while len({name.casefold() for name in found}) < len(set(paths)) and depth < max(len(p.parts) for p in paths):
            depth += 1
            found = ["-".join([*path.parts[1:-1][-depth:], end]) for path, end in zip(paths, ends, strict=True)]
        names |= dict(zip(same, found, strict=True))
    return names


def write_new(picture: Image.Image, path: str | Path, source: str) -> Path:
    """Write to `path`, or to the next free name beside it. Another process may be writing to the same folder."""
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / f"{Path(source).stem.replace(' ', '-')}.png"
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: pictures are written as {', '.join(FORMATS)}, not {path.suffix}")
    data = io.BytesIO()
    picture.save(data, FORMATS[path.suffix.lower()], **({} if path.suffix.lower() == ".png" else {"quality": 92}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            target = path.with_stem(f"{path.stem}-{number}") if number else path
            try:
                file = target.open("xb")
            except FileExistsError:
                continue
            try:
                with file:
                    file.write(data.getvalue())
            except OSError:
                target.unlink(missing_ok=True)  # half a picture would keep its name for ever
                raise
            return target
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror or error})") from None
    raise AssertionError("there is always a next name")
