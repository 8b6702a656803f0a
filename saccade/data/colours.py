"""Random changes of colours alone, which leave everything where it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from saccade.config import AugmentConfig

RAND_CHANGES = 2  # of RandAugment, in a row
RAND_SCALE = 30  # magnitudes of RandAugment go from 0 to this


def _balanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: enhancer(image).enhance(1 + 0.95 * strength)


# strength from -1 to 1, where 0 changes little or nothing
CHANGES: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, strength: image,
    _balanced(ImageEnhance.Brightness),
    _balanced(ImageEnhance.Contrast),
    _balanced(ImageEnhance.Color),
    _balanced(ImageEnhance.Sharpness),
    lambda image, strength: ImageOps.posterize(image, 8 - round(6 * abs(strength))),
    lambda image, strength: ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
)


def change_colours(image: Image.Image, augment: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """The policy without what moves pixels.

    TrivialAugment (https://arxiv.org/abs/2103.10158): one change of any strength. RandAugment
    (https://arxiv.org/abs/1909.13719): two of the given one.
    """
    if augment.policy == "trivial":
        return CHANGES[rng.integers(len(CHANGES))](image, rng.uniform(-1, 1))
    if augment.policy == "rand":
        for _ in range(RAND_CHANGES):
            strength = augment.magnitude / RAND_SCALE * rng.choice((-1, 1))
            image = CHANGES[rng.integers(len(CHANGES))](image, strength)
    return image


def jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation by factors of 1 +- strength, in a random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for k in rng.permutation(len(enhancers)):
        image = enhancers[k](image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image
