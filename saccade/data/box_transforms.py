"""Pictures with boxes to samples for detection. All that is random comes from the sample's rng.

Boxes are moved by the same few numbers that move the pixels (`framing.Frame`), so they stay on their things to a
fraction of a pixel. torchvision's transforms of both would not save code here, and draw from torch's global generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from saccade.config import AugmentConfig, PreprocessingConfig
from saccade.data.box_mixing import mix, paste_things
from saccade.data.colours import change_colours, jitter
from saccade.data.decode import RESAMPLE, Picture, PictureError
from saccade.data.framing import Frame, Shown, Things, fitted, whole_frame
from saccade.data.sample import Around, Sample
from saccade.data.source import Boxes
from saccade.data.transforms import to_tensor
from saccade.errors import UserError

OTHER_TRIES = 3  # for a second picture, where one cannot be read
MOSAIC_CENTER = (0.3, 0.7)  # shares of the sides between which the four meet


@dataclass(frozen=True)
class Truth:
    """What an evaluation compares with."""

    size: tuple[int, int]  # height and width of the picture
    boxes: Boxes  # in pixels of the picture; none where nothing is known of it


class BoxTrainTransform:
    """Zoom, shift, flips, mosaic, pasting, mixup, colours. Picture, Boxes -> Sample of `shape` (H, W) with Things."""

    def __init__(self, augment: AugmentConfig, preprocessing: PreprocessingConfig) -> None:
        unfit = [f"augment.{name}" for name in ("cutmix", "erase") if getattr(augment, name)]
        if unfit:
            raise UserError(f"{', '.join(unfit)}: would hide things whose boxes stay; leave it out for detection")
        self.augment = augment
        self.resample = RESAMPLE[preprocessing.interpolation]
        self.fill = padding_colour(preprocessing)

    def __call__(
        self,
        picture: Picture,
        target: Boxes,
        index: int,
        shape: tuple[int, int],
        rng: np.random.Generator,
        around: Around,
    ) -> Sample:
        augment = self.augment
        strong = around.progress < augment.strong_until
        things = Things.of(target, picture.size)
        if strong and happens(augment.mosaic, rng):
            shown = self._mosaic(picture, things, index, shape, rng, around)
        else:
            shown = self._view(picture, things, shape, rng)
        if strong and happens(augment.copy_paste, rng):
            other = open_other(index, rng, around)
            shown = shown if other is None else paste_things(shown, self._view(*other, shape, rng), rng)
        if strong and augment.mixup and happens(augment.mix_prob, rng):
            other = open_other(index, rng, around)
            shown = shown if other is None else mix(shown, self._view(*other, shape, rng), augment.mixup, rng)
        image = change_colours(shown.image, augment, rng) if strong else shown.image
        if augment.color_jitter:
            image = jitter(image, augment.color_jitter, rng)
        return Sample(to_tensor(image), shown.things, index)

    def _view(
        self,
        picture: Picture,
        things: Things,
        shape: tuple[int, int],
        rng: np.random.Generator,
        cell: tuple[int, int] | None = None,
    ) -> Shown:
        """A random part of the picture, or the picture with padding around; things as large as `zoom` says.

        A zoom of 1 is their size in evaluation, where the whole picture is brought to `shape`: large-scale jitter
        (https://arxiv.org/abs/2012.07177). In a `cell` (h, w) of a mosaic they have any size between that of a picture
        that just fills it and that of evaluation.
        """
        augment = self.augment
        (h, w), (H, W) = picture.size, cell or shape
        height, width = fitted(picture.size, shape)
        stretch = math.sqrt(log_uniform(augment.crop_aspect, rng))
        down, across = height / h / stretch, width / w * stretch
        limits = augment.zoom
        if cell is not None:
            filled = min(max(H / (h * down), W / (w * across)), max(1.0, *augment.zoom))
            limits = filled, max(filled, 1.0)
        zoom = log_uniform(limits, rng)
        seen = np.array([W / (across * zoom), H / (down * zoom)])  # sides of the part, in pixels of the picture
        free = [w, h] - seen  # negative: the way that the picture has within the padding
        corner = free * rng.random(2)
        anchor = rng.random()
        frame = Frame((*corner, *(corner + seen)), (H, W))
        if len(things) and not len(frame.place(things)):
            # around one of them, then: crops of SSD hold a thing, too, https://arxiv.org/abs/1512.02325
            box = things.boxes[int(anchor * len(things))]
            corner = np.clip((box[:2] + box[2:] - seen) / 2, np.minimum(free, 0), np.maximum(free, 0))
            frame = Frame((*corner, *(corner + seen)), (H, W))
        shown = Shown(frame.show(picture, self.resample, self.fill), frame.place(things))
        if happens(augment.hflip, rng):
            shown = shown.mirrored()
        return shown.upside_down() if happens(augment.vflip, rng) else shown

    def _mosaic(
        self,
        picture: Picture,
        things: Things,
        index: int,
        shape: tuple[int, int],
        rng: np.random.Generator,
        around: Around,
    ) -> Shown:
        """Four pictures that meet in one point, this one among them, so that there is more to learn from in each.

        YOLOv4 (https://arxiv.org/abs/2004.10934); DEIM (https://arxiv.org/abs/2412.04234) for one-to-one matching.
        """
        H, W = shape
        canvas = Image.new("RGB", (W, H), self.fill)
        y, x = (round(length * rng.uniform(*MOSAIC_CENTER)) for length in shape)
        own = int(rng.integers(4))
        found = []
        for k, (top, left, bottom, right) in enumerate(((0, 0, y, x), (0, x, y, W), (y, 0, H, x), (y, x, H, W))):
            opened = (picture, things) if k == own else open_other(index, rng, around)
            if opened is not None:
                shown = self._view(*opened, shape, rng, cell=(bottom - top, right - left))
                canvas.paste(shown.image, (left, top))
                found.append(shown.things.moved(left, top))
        return Shown(canvas, Things.joined(found))


class FitTransform:
    """The whole picture in the bucket's shape, stretched a little and else padded: no thing is lost. Nothing is random.

    `region` of the sample is what the tensor shows, in pixels of the picture; with padding it reaches beyond it.
    `preprocessing.crop` and `max_aspect` cut nothing away here.
    """

    def __init__(self, preprocessing: PreprocessingConfig) -> None:
        self.resample = RESAMPLE[preprocessing.interpolation]
        self.fill = padding_colour(preprocessing)

    def __call__(
        self,
        picture: Picture,
        target: Boxes | None,
        index: int,
        shape: tuple[int, int],
        rng: np.random.Generator | None = None,
        around: Around | None = None,
    ) -> Sample:
        frame = whole_frame(picture.size, shape)
        image = to_tensor(frame.show(picture, self.resample, self.fill))
        truth = Truth(picture.size, Boxes.none() if target is None else target)
        return Sample(image, truth, index, region=frame.region)


def open_other(index: int, rng: np.random.Generator, around: Around) -> tuple[Picture, Things] | None:
    """Another picture, and the things in it; None where there is none, or none that can be read."""
    for _ in range(OTHER_TRIES if around.count > 1 else 0):
        j = (index + 1 + int(rng.integers(around.count - 1))) % around.count
        try:
            picture, target = around.open(j)
        except PictureError:  # is told of when its own turn comes
            continue
        return picture, Things.of(target, picture.size)
    return None


def padding_colour(preprocessing: PreprocessingConfig) -> tuple[int, int, int]:
    """The mean, which is almost zero when it comes to the model."""
    red, green, blue = (round(255 * value) for value in preprocessing.mean)
    return red, green, blue


def happens(probability: float, rng: np.random.Generator) -> bool:
    return probability > 0 and rng.random() < probability


def log_uniform(limits: tuple[float, float], rng: np.random.Generator) -> float:
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))
