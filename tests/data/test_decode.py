from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from saccade.data.decode import RESAMPLE, Picture, PictureError, decode, load_crop, read_size

LIMIT = 10_000_000


def pixels(data: bytes, **options) -> np.ndarray:
    return np.asarray(decode(data, "it", max_pixels=LIMIT, **options)).astype(int)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_lossless_formats(picture, encode, format, options):
    image = picture(20, 30)
    assert np.array_equal(pixels(encode(image, format, **options)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF"])
def test_grey_binary_and_palette(picture, encode, mode, format):
    image = picture(20, 30).convert(mode)
    assert np.array_equal(pixels(encode(image, format)), np.asarray(image.convert("RGB")))


def test_cmyk_and_grey_jpeg(picture, encode):
    image = picture(40, 60)
    assert np.abs(pixels(encode(image.convert("CMYK"), quality=95)) - np.asarray(image)).mean() < 4
    grey = np.asarray(image.convert("L").convert("RGB"))
    assert np.abs(pixels(encode(image.convert("L"), quality=95)) - grey).mean() < 2
    # what lies between black and white must not be turned into its negative
    assert pixels(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0))))[0, 0].min() > 250


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 256 * 4).reshape(4, 256).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, format)
    got = pixels(file.getvalue())
    assert np.array_equal(got[..., 0], np.rint(ramp / 257).astype(int))
    assert (got[..., 0] == got[..., 2]).all()


def test_float_and_32_bit_tiff():
    ramp = np.linspace(0, 1, 256).reshape(1, 256)
    for values in (ramp, ramp * 255, ramp * 1e6 - 3e5):
        file = io.BytesIO()
        Image.fromarray(values.astype(np.float32)).save(file, "TIFF")
        assert np.abs(pixels(file.getvalue())[0, :, 0] - np.arange(256)).max() <= 1


def test_alpha_is_laid_over_white(encode):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    for format in ("PNG", "WEBP"):
        got = pixels(encode(half, format, **({"lossless": True} if format == "WEBP" else {})))
        assert got[0, 0].tolist() == [0, 0, 255] and got[0, 3].tolist() == [255, 255, 255]
    grey = Image.new("LA", (4, 4), (10, 0))
    assert pixels(encode(grey, "PNG"))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for format in ("PNG", "GIF"):
        assert pixels(encode(palette, format, transparency=1))[0, 0].tolist() == [255, 255, 255]
    keyed = encode(Image.new("RGB", (4, 4), (7, 8, 9)), "PNG", transparency=(7, 8, 9))
    assert pixels(keyed)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(encode, format):
    frames = [Image.new("RGB", (9, 5), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data)[2, 4] - [250, 0, 0]).max() < 8
    assert read_size(data, "it", LIMIT) == (5, 9)


def test_mpo_counts_as_jpeg(picture, encode):
    image = picture(40, 60)
    data = encode(image, "MPO", save_all=True, append_images=[picture(40, 60, 1)])
    opened = Picture(data, "it", LIMIT)
    assert opened.format == "JPEG" and opened.size == (40, 60)
    assert np.abs(np.asarray(opened.whole()).astype(int) - np.asarray(image)).mean() < 4


def oriented(image: Image.Image, orientation: int, encode, format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 97} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    return encode(image, format, exif=exif, **options)


def by_hand(stored: np.ndarray, orientation: int) -> np.ndarray:
    """The meaning of EXIF's eight orientations, written with numpy."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation](stored)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(picture, encode, orientation, format):
    image = picture(48, 80)
    data = oriented(image, orientation, encode, format)
    right = by_hand(np.asarray(image), orientation).astype(int)
    assert read_size(data, "it", LIMIT) == right.shape[:2]
    opened = Picture(data, "it", LIMIT)
    assert opened.size == right.shape[:2]
    assert np.abs(np.asarray(opened.whole()) - right).mean() < 2
    box = (5.0, 7.5, 37.0, 40.25)
    got = load_crop(data, "it", box, (16, 12), RESAMPLE["bilinear"], LIMIT)
    want = Image.fromarray(right.astype(np.uint8)).resize((12, 16), RESAMPLE["bilinear"], box)
    assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_draft_mode_is_close_to_a_full_decode(picture, encode, orientation):
    data = oriented(picture(600, 801), orientation, encode, "JPEG")
    whole = decode(data, "it", max_pixels=LIMIT)
    for box in ((0.0, 0.0, *whole.size), (31.0, 57.5, 533.0, 571.0), (200.0, 10.0, 290.0, 100.0)):
        got = load_crop(data, "it", box, (64, 60), RESAMPLE["bicubic"], LIMIT)
        want = whole.resize((60, 64), RESAMPLE["bicubic"], box)
        difference = np.abs(np.asarray(got).astype(int) - np.asarray(want))
        assert difference.mean() < 1.0 and difference.max() <= 12  # measured: 0.45 and 3


def test_at_least(picture, encode):
    for orientation in (1, 6):
        data = oriented(picture(600, 800), orientation, encode, "JPEG")
        h, w = decode(data, "it", max_pixels=LIMIT, at_least=(130, 140)).size[::-1]
        assert (h, w) == ((150, 200) if orientation == 1 else (200, 150))
    assert decode(data, "it", max_pixels=LIMIT, at_least=(599, 599)).size == (600, 800)


def test_a_picture_can_be_cropped_twice(picture, encode):
    opened = Picture(encode(picture(600, 800)), "it", LIMIT)
    first = opened.crop((0, 0, 800, 600), (60, 80), RESAMPLE["bilinear"])
    fine = opened.crop((0, 0, 80, 60), (60, 80), RESAMPLE["bilinear"])
    again = opened.crop((0, 0, 800, 600), (60, 80), RESAMPLE["bilinear"])
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert np.array_equal(np.asarray(fine), np.asarray(opened.whole())[:60, :80])


def test_bad_files(picture, encode):
    good = encode(picture(64, 64, 3), quality=95)
    png = encode(picture(64, 64, 3), "PNG")
    cases = {
        b"": "zero bytes",
        b"not a picture, only some text\n" * 9: "but text",
        b"<html><body></body></html>": "a web page",
        b"%PDF-1.7 ...": "PDF",
        good[: len(good) // 2]: "cut off",
        png[: len(png) // 2]: "cut off",
        good[:12]: "header",
        png[:20]: "header",
        bytes(range(128, 256)) * 4: "not a picture",
    }
    for data, words in cases.items():
        with pytest.raises(PictureError, match=words) as caught:
            decode(data, "folder/it.jpg", max_pixels=LIMIT)
        assert str(caught.value).startswith("folder/it.jpg: ")
    with pytest.raises(PictureError) as caught:
        load_crop(good[: len(good) // 2], "it", (0, 0, 64, 64), (8, 8), RESAMPLE["bilinear"], LIMIT)
    assert pickle.loads(pickle.dumps(caught.value)).kind == caught.value.kind == "truncated"


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_every_truncation_is_a_picture_error(picture, encode):
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encode(picture(24, 24, 5), format)
        for length in range(0, len(data) - 1, max(1, len(data) // 40)):
            with contextlib.suppress(PictureError):
                decode(data[:length], "it", max_pixels=LIMIT)


def test_formats_outside_the_list_are_refused(picture, encode):
    for format in ("TGA", "PCX", "JPEG2000"):
        with pytest.raises(PictureError, match="not a picture of a format that is read"):
            decode(encode(picture(8, 8), format), "it", max_pixels=LIMIT)


def test_bombs_are_refused_by_their_header(encode):
    data = encode(Image.new("1", (9000, 9000)), "PNG")
    assert len(data) < 20_000
    for call in (
        lambda: decode(data, "it", max_pixels=LIMIT),
        lambda: read_size(data, "it", LIMIT),
        lambda: Picture(data, "it", LIMIT),
    ):
        with pytest.raises(PictureError, match=r"9000 x 9000.*--sources.max-pixels") as caught:
            call()
        assert caught.value.kind == "too_large"
    with pytest.raises(PictureError) as caught:  # over Pillow's own limit, which is seen first
        header = b"IHDR" + struct.pack(">IIBBBBB", 65536, 65536, 1, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        read_size(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + b"\0" * 8, "it", LIMIT)
    assert caught.value.kind == "too_large"


def test_from_image_turns_and_converts(picture):
    image = picture(20, 30)
    image.getexif()[0x0112] = 6
    assert Picture.from_image(image).size == (30, 20)
    assert Picture.from_image(picture(20, 30).convert("CMYK")).whole().mode == "RGB"
