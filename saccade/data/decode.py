"""From the bytes of a picture to RGB: a few trusted formats, never more pixels than allowed, the right way up."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps

from saccade.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # MPO comes with JPEG
SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "JPEG",
    ".png": "PNG",
    ".apng": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
}
RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# A crop over this many times too large is first shrunk by a whole number, which is faster and hardly different.
REDUCING_GAP = 3.0

# EXIF's orientation -> what turns the stored picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)
ORIENTATION_TAG = 0x0112
MAY_HOLD_ORIENTATION = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")

Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels of the whole, upright picture
T = TypeVar("T")


class PictureError(UserError):
    """A picture that cannot be used: which one and why."""

    def __init__(self, name: str, reason: str, kind: Literal["unreadable", "truncated", "too_large"] = "unreadable"):
        super().__init__(name, reason, kind)
        self.name = name
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Picture:
    """A picture, of which no more is decoded than asked for. Sizes and boxes are those of the upright picture."""

    def __init__(self, data: bytes, name: str, max_pixels: int) -> None:
        self.name = name
        self._data = data
        self._max_pixels = max_pixels
        self._whole: Image.Image | None = None
        self._header: Image.Image | None = open_header(data, name, max_pixels)
        self.format = _FAMILY.get(self._header.format or "", self._header.format or "")
        self._orientation = orientation(self._header)
        self.width, self.height = _upright_size(self._header.size, self._orientation)

    @classmethod
    def from_image(cls, image: Image.Image, name: str = "picture") -> Picture:
        """Of pixels that are there already, in any of Pillow's modes."""
        return cls._from_rgb(_guard(name, lambda: to_rgb(ImageOps.exif_transpose(image))), name)

    @classmethod
    def _from_rgb(cls, image: Image.Image, name: str) -> Picture:
        self = cls.__new__(cls)
        self.name, self.format, self._data, self._max_pixels = name, "", b"", 0
        self._header, self._orientation, self._whole = None, 1, image
        self.width, self.height = image.size
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    def whole(self) -> Image.Image:
        """The whole picture in full resolution, RGB."""
        if self._whole is None:
            header = self._take_header()
            self._whole = _guard(self.name, lambda: _turn(to_rgb(header), self._orientation))
        return self._whole

    def at_least(self, size: tuple[int, int]) -> Image.Image:
        """The whole picture, RGB; a JPEG at 1/2, 1/4 or 1/8 where that is still not smaller than `size` (h, w)."""
        if self._whole is not None:
            return self._whole
        header = self._take_header()
        shrink = _shrink(header, _upright_size(size, self._orientation, swap_anyway=True), header.size)
        if shrink > 1:
            header.draft(None, (header.width // shrink, header.height // shrink))
        return _guard(self.name, lambda: _turn(to_rgb(header), self._orientation))

    def crop(self, box: Box, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """What lies in `box`, resized to `size` (h, w), RGB. A JPEG is decoded only as large as that needs."""
        h, w = size
        if self._whole is not None:
            return self._whole.resize((w, h), resample, box=box, reducing_gap=REDUCING_GAP)
        header = self._take_header()
        left, top, right, bottom = _stored_box(box, self.width, self.height, self._orientation)
        if self._orientation in SWAPS_SIDES:
            h, w = w, h
        shrink = _shrink(header, (w, h), (right - left, bottom - top))
        if shrink > 1:
            header.draft(None, (header.width // shrink, header.height // shrink))
            left, top, right, bottom = left / shrink, top / shrink, right / shrink, bottom / shrink

        def resized() -> Image.Image:
            # resizing one channel before it becomes three is the cheaper order
            image = _opaque_grey(header) or to_rgb(header)
            inside = (left, top, min(right, image.width), min(bottom, image.height))
            return _turn(to_rgb(image.resize((w, h), resample, inside, REDUCING_GAP)), self._orientation)

        return _guard(self.name, resized)

    def _take_header(self) -> Image.Image:
        """Decoding uses a header up; after the first time the picture is opened anew."""
        header, self._header = self._header, None
        return header or open_header(self._data, self.name, self._max_pixels)


def decode(data: bytes, name: str, *, max_pixels: int, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The upright RGB picture; a JPEG smaller than stored where `at_least` (h, w) allows. Alpha is laid over white."""
    picture = Picture(data, name, max_pixels)
    return picture.whole() if at_least is None else picture.at_least(at_least)


def load_crop(
    data: bytes, name: str, box: Box, size: tuple[int, int], resample: Image.Resampling, max_pixels: int
) -> Image.Image:
    """What lies in `box` of the upright picture, resized to `size` (h, w), RGB."""
    return Picture(data, name, max_pixels).crop(box, size, resample)


def read_size(data: bytes | os.PathLike[str] | BinaryIO, name: str, max_pixels: int) -> tuple[int, int]:
    """Height and width of the upright picture, from its header alone."""
    with open_header(data, name, max_pixels) as header:
        width, height = _upright_size(header.size, orientation(header))
    return height, width


def open_header(data: bytes | os.PathLike[str] | BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Pillow's lazy picture, after its format and number of pixels were found acceptable."""
    if isinstance(data, bytes):
        if not data:
            raise PictureError(name, "the file is empty (zero bytes); replace or remove it")
        file: BinaryIO | os.PathLike[str] = BytesIO(data)
    else:
        file = data
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = "more pixels than Pillow accepts, a decompression bomb; remove it"
        raise PictureError(name, reason, "too_large") from None
    except Image.UnidentifiedImageError:
        raise PictureError(name, _what_instead(file)) from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged headers
        raise PictureError(name, f"damaged header ({_one_line(error)}); replace or remove it") from None
    if image.width * image.height > max_pixels:
        raise PictureError(
            name,
            f"{image.width} x {image.height} pixels are over the limit of {max_pixels}; "
            "remove it, or raise --sources.max-pixels if it is to be trusted",
            "too_large",
        )
    if image.width < 1 or image.height < 1:
        raise PictureError(name, f"{image.width} x {image.height} pixels; replace or remove it")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF's orientation 1..8. Pillow turns TIFFs itself, sizes included, so they count as upright."""
    if image.format == "TIFF" or not any(key in image.info for key in MAY_HOLD_ORIENTATION):
        return 1
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF is common in healthy pictures
        return 1
    return value if value in UPRIGHT else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha is laid over white, 16 bits are scaled to 8 and not clipped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # RGBa knows no direct way to others than RGBA, La none but to LA
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """16 bits by their full range; 32 bits and floats by the range that their values suggest (0..1, 8 or 16 bits)."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        limit = next((value for value in usual if low >= 0 and high <= value), 0.0)
        if not limit:
            values = values - low
            limit = max(high - low, 1e-12)
    else:
        limit = 65535.0
    return np.clip(np.rint(values * (255.0 / limit)), 0, 255).astype(np.uint8)


def _opaque_grey(image: Image.Image) -> Image.Image | None:
    return image if image.mode == "L" and "transparency" not in image.info else None


def _shrink(image: Image.Image, wanted: tuple[float, float], have: tuple[float, float]) -> int:
    """The largest of JPEG's cheap reductions after which `have` is not smaller than `wanted`, both (w, h)."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    return next((s for s in (8, 4, 2) if wanted[0] * s <= have[0] and wanted[1] * s <= have[1]), 1)


def _upright_size(size: tuple[int, int], orientation: int, swap_anyway: bool = False) -> tuple[int, int]:
    """Swapped where the orientation swaps sides; `swap_anyway` also turns (h, w) into (w, h)."""
    a, b = size
    return (b, a) if (orientation in SWAPS_SIDES) != swap_anyway else (a, b)


def _stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """A box of the upright picture (of `width` x `height`) in the coordinates of the stored one."""
    left, top, right, bottom = box
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation in SWAPS_SIDES else (left, top, right, bottom)


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _guard(name: str, decode: Callable[[], T]) -> T:
    """Whatever Pillow says about damaged pixels, as one kind of error."""
    try:
        return decode()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        text = _one_line(error)
        if "truncated" in text or "not enough image data" in text or "unexpected end" in text.lower():
            raise PictureError(name, f"the file is cut off ({text}); replace or remove it", "truncated") from None
        raise PictureError(name, f"cannot be decoded ({text}); replace or remove it") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_FAMILY = {"MPO": "JPEG"}
_SIGNATURES = (
    (b"<?xml", "XML or SVG"),
    (b"<svg", "SVG"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"8BPS", "Photoshop"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
)


_OURS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\x00", b"MM\x00*", b"BM")


def _what_instead(file: BinaryIO | os.PathLike[str]) -> str:
    """Why no reader wanted this file, as far as its first bytes tell."""
    if isinstance(file, os.PathLike):
        with open(file, "rb") as opened:
            start = opened.read(64)
    else:
        file.seek(0)
        start = file.read(64)
    known = f"not a picture of a format that is read ({', '.join(FORMATS)})"
    if not start:
        return "the file is empty (zero bytes); replace or remove it"
    if start.startswith(_OURS) or start[8:12] == b"WEBP":
        return "damaged or cut off within its header; replace or remove it"
    what = next((what for signature, what in _SIGNATURES if start.startswith(signature)), None)
    if start[4:12] in (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1"):
        what = start[8:12].decode().upper()
    if what is None and all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        what = "text"
    return f"{known}{f' but {what}' if what else ''}; convert, replace or remove it"
