"""What all pictures of predictions share: margins, text that is cut to its room, files that never overwrite others."""

from __future__ import annotations

import io
import itertools
import math
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
