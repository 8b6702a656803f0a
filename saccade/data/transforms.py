"""Pictures to samples for classification, and samples to batches. All that is random comes from the sample's rng."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.config import AugmentConfig, PreprocessingConfig
from saccade.data.colours import jitter
from saccade.data.decode import RESAMPLE, Box, Picture
from saccade.data.sample import Around, Batch, Sample

CROP_TRIES = 10
ERASE_AREA = (0.02, 0.33)  # share of the picture
ERASE_ASPECT = (0.3, 3.3)


@dataclass(frozen=True)
class Mix:
    """A sample's draw for mixup or cutmix: its own share, and where cutmix's box is centred, as shares of the sides."""

    kind: Literal["mixup", "cutmix"]
    share: float
    center: tuple[float, float]  # (y, x)


class TrainTransform:
    """Random crop, flips, colours, erasing and the draw for mixing. Picture, label -> Sample of `shape` (H, W)."""

    def __init__(self, augment: AugmentConfig, preprocessing: PreprocessingConfig) -> None:
        self.augment = augment
        self.resample = RESAMPLE[preprocessing.interpolation]
        self.policy = _policy(augment, preprocessing)

    def __call__(
        self,
        picture: Picture,
        target: Any,
        index: int,
        shape: tuple[int, int],
        rng: np.random.Generator,
        around: Around | None = None,
    ) -> Sample:
        augment = self.augment
        box = random_box(picture.size, shape, augment.crop_scale, augment.crop_aspect, rng)
        image = picture.crop(box, shape, self.resample)
        if augment.hflip and rng.random() < augment.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if augment.vflip and rng.random() < augment.vflip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self.policy is not None:
            image = _with_torch_seed(self.policy, image, int(rng.integers(2**63)))
        if augment.color_jitter:
            image = jitter(image, augment.color_jitter, rng)
        pixels = to_tensor(image)
        if augment.erase and rng.random() < augment.erase:
            _erase(pixels, rng)
        return Sample(pixels, target, index, _draw_mix(augment, rng))


class EvalTransform:
    """The largest central crop of the bucket's shape (times `crop`), resized: no squashing, nothing random."""

    def __init__(self, preprocessing: PreprocessingConfig) -> None:
        self.resample = RESAMPLE[preprocessing.interpolation]
        self.share = preprocessing.crop

    def __call__(
        self,
        picture: Picture,
        target: Any,
        index: int,
        shape: tuple[int, int],
        rng: np.random.Generator | None = None,
        around: Around | None = None,
    ) -> Sample:
        box = central_box(picture.size, shape, self.share)
        return Sample(to_tensor(picture.crop(box, shape, self.resample)), target, index, region=box)


def central_box(size: tuple[int, int], shape: tuple[int, int], share: float = 1.0) -> Box:
    """The largest central box of `shape`'s aspect in a picture of `size` (h, w), `share` of it a side."""
    h, w = _largest(size, shape[1] / shape[0])
    return _place(size, h * share, w * share, 0.5, 0.5)


def random_box(
    size: tuple[int, int],
    shape: tuple[int, int],
    scale: tuple[float, float],
    aspect: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A random crop of a picture of `size` (h, w): `scale` of the largest box of `shape`'s aspect, times `aspect`.

    Going Deeper with Convolutions (https://arxiv.org/abs/1409.4842). The area is a share of what fits, not of the
    whole, so a very wide picture in a square bucket is varied as much as any other.
    """
    H, W = shape
    most_h, most_w = _largest(size, W / H)
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(CROP_TRIES):
        area = most_h * most_w * rng.uniform(*scale)
        stretched = W / H * math.exp(rng.uniform(*log_aspect))
        h, w = math.sqrt(area / stretched), math.sqrt(area * stretched)
        if h <= size[0] and w <= size[1]:
            break
    else:
        h, w = most_h, most_w
    return _place(size, h, w, rng.random(), rng.random())


def _largest(size: tuple[int, int], aspect: float) -> tuple[float, float]:
    """Height and width of the largest box of this aspect within `size`."""
    return min(size[0], size[1] / aspect), min(size[1], size[0] * aspect)


def _place(size: tuple[int, int], h: float, w: float, y: float, x: float) -> Box:
    """A box of (h, w) at the shares (y, x) of its free way within `size`."""
    top, left = (size[0] - h) * y, (size[1] - w) * x
    # rounding must not push an edge out of the picture
    return max(left, 0.0), max(top, 0.0), min(left + w, size[1]), min(top + h, size[0])


def to_tensor(image: Image.Image) -> Tensor:
    """RGB to uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _policy(augment: AugmentConfig, preprocessing: PreprocessingConfig) -> Any:
    """TrivialAugment (https://arxiv.org/abs/2103.10158) or RandAugment (https://arxiv.org/abs/1909.13719)."""
    if augment.policy == "none":
        return None
    from torchvision.transforms import InterpolationMode, v2  # slow to import, so only for those who use it

    fill = [round(255 * value) for value in preprocessing.mean]
    if augment.policy == "trivial":
        return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=fill)
    return v2.RandAugment(magnitude=augment.magnitude, interpolation=InterpolationMode.BILINEAR, fill=fill)


def _with_torch_seed(transform: Any, image: Image.Image, seed: int) -> Image.Image:
    """torchvision draws from torch's global generator, which belongs to the model: it is lent and given back."""
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(seed)
        return transform(image)
    finally:
        generator.set_state(state)


def _erase(pixels: Tensor, rng: np.random.Generator) -> None:
    """A random rectangle becomes noise (https://arxiv.org/abs/1708.04896), in place."""
    _, H, W = pixels.shape
    area = H * W * rng.uniform(*ERASE_AREA)
    aspect = math.exp(rng.uniform(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])))
    h = min(H, max(1, round(math.sqrt(area / aspect))))
    w = min(W, max(1, round(math.sqrt(area * aspect))))
    top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
    noise = rng.integers(0, 256, (3, h, w), dtype=np.uint8)
    pixels[:, top : top + h, left : left + w] = torch.from_numpy(noise)


def _draw_mix(augment: AugmentConfig, rng: np.random.Generator) -> Mix | None:
    if not (augment.mixup or augment.cutmix) or rng.random() >= augment.mix_prob:
        return None
    cut = augment.cutmix > 0 and (not augment.mixup or rng.random() < 0.5)
    alpha = augment.cutmix if cut else augment.mixup
    share = float(rng.beta(alpha, alpha))
    return Mix("cutmix" if cut else "mixup", share, (float(rng.random()), float(rng.random())))


def collate_train(
    samples: list[Sample], unreadable: list[tuple[int, str]], shape: tuple[int, int], *, num_classes: int
) -> Batch:
    """Targets are shares of classes, float32 (B, K). Each sample is mixed with the batch's next one, if it drew so.

    mixup (https://arxiv.org/abs/1710.09412), cutmix (https://arxiv.org/abs/1905.04899), with a draw per sample.
    """
    if not samples:
        return _black(shape, torch.zeros(1, num_classes), unreadable)
    images = torch.stack([sample.image for sample in samples])  # (B, 3, H, W)
    B, _, H, W = images.shape
    targets = torch.zeros(B, num_classes)
    targets[torch.arange(B), torch.tensor([sample.target for sample in samples])] = 1.0
    if any(sample.mix for sample in samples):
        pure = targets.clone()
        for b, sample in enumerate(samples):
            mix: Mix | None = sample.mix
            if mix is None:
                continue
            partner = samples[(b + 1) % B].image
            share = mix.share
            if mix.kind == "mixup":
                images[b] = torch.lerp(partner.float(), sample.image.float(), share).round_().to(torch.uint8)
            else:
                top, left, bottom, right = cut_box((H, W), mix)
                images[b, :, top:bottom, left:right] = partner[:, top:bottom, left:right]
                share = 1 - (bottom - top) * (right - left) / (H * W)
            targets[b] = share * pure[b] + (1 - share) * pure[(b + 1) % B]
    return Batch(images, targets, torch.tensor([sample.index for sample in samples]), unreadable)


def collate_eval(samples: list[Sample], unreadable: list[tuple[int, str]], shape: tuple[int, int]) -> Batch:
    """Targets are class numbers, int64 (B,)."""
    if not samples:
        return _black(shape, torch.full((1,), -1), unreadable)
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.target for sample in samples]),
        torch.tensor([sample.index for sample in samples]),
        unreadable,
    )


def cut_box(shape: tuple[int, int], mix: Mix) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the partner's part; it may be cut by the picture's edges."""
    side = math.sqrt(1 - mix.share) / 2
    edges = []
    for length, center in zip(shape, mix.center, strict=True):
        edges.append((max(0, round((center - side) * length)), min(length, round((center + side) * length))))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def _black(shape: tuple[int, int], targets: Tensor, unreadable: list[tuple[int, str]]) -> Batch:
    """In place of a batch of which nothing could be read: processes must take the same number of steps."""
    return Batch(torch.zeros(1, 3, *shape, dtype=torch.uint8), targets, torch.zeros(0, dtype=torch.int64), unreadable)
