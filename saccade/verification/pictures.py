"""What both sides look at: real photographs, cut to one shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saccade.config import DataConfig, PreprocessingConfig
from saccade.data.decode import RESAMPLE, Picture, PictureError
from saccade.data.sources import find_pictures
from saccade.data.transforms import central_box, to_tensor
from saccade.errors import UserError
from saccade.weights.fingerprint import hash_tensors

MOST = 4  # pictures of a folder that are compared
SAMPLES = ("china.jpg", "flower.jpg")  # photographs that scikit-learn brings along


@dataclass(frozen=True)
class Pictures:
    pixels: Tensor  # uint8 (B, 3, H, W)
    origin: str

    @property
    def sha256(self) -> str:
        return hash_tensors({"pixels": self.pixels})

    @property
    def shape(self) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def facts(self) -> dict[str, Any]:
        height, width = self.shape
        count = len(self.pixels)
        return {"sha256": self.sha256, "count": count, "height": height, "width": width, "origin": self.origin}

    def normalised(self, preprocessing: PreprocessingConfig, dtype: torch.dtype) -> Tensor:
        mean, std = (
            torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )
        return (self.pixels.to(dtype) / 255 - mean) / std


def read_shape(text: str, stride: int) -> tuple[int, int]:
    """`224` or `224x160`, height first, in multiples of the stride."""
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and 0 < int(side) <= 8192 for side in sides):
        raise UserError(f"--image-size {text}: give one number, or height x width such as 224x160")
    shape = int(sides[0]), int(sides[-1])
    if any(side % stride for side in shape):
        near = "x".join(str(max(1, round(side / stride)) * stride) for side in shape)
        raise UserError(f"--image-size {text}: this model takes multiples of {stride} pixels, such as {near}")
    return shape


def choose_pictures(data: str | Path | None, shape: tuple[int, int], preprocessing: PreprocessingConfig) -> Pictures:
    """A few of a folder, spread evenly over it, or the photographs that are always at hand."""
    resample = RESAMPLE[preprocessing.interpolation]
    if data is None:
        from sklearn.datasets import load_sample_image

        opened = [Picture.from_image(Image.fromarray(load_sample_image(name)), name) for name in SAMPLES]
        origin = f"{' and '.join(SAMPLES)} of scikit-learn"
    else:
        opened, origin = _open_some(data), str(data)
    pixels = [to_tensor(picture.crop(central_box(picture.size, shape), shape, resample)) for picture in opened]
    return Pictures(torch.stack(pixels), origin)


def _open_some(data: str | Path) -> list[Picture]:
    found = find_pictures([data])
    step = max(1, len(found) // MOST)
    limit = DataConfig().max_pixels
    try:
        return [Picture(path.read_bytes(), str(path), limit) for path in found[::step][:MOST]]
    except OSError as error:
        raise PictureError(str(error.filename), f"cannot be read ({error.strerror})") from None
