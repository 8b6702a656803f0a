"""Two pictures with boxes become one: laid over each other, or things of one pasted into the other."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from saccade.data.framing import Shown, Things

MIXUP_LEAST = 0.25  # a picture that shows through less than this adds no things
PASTED = (1, 6)  # things
PASTE_TRIES = 10
PASTE_MARGIN = 0.15  # of its longer side around a pasted thing, in which it fades out
MOST_COVERED = 0.2  # of a thing by what is pasted, margin and all, and the other way round


def mix(one: Shown, other: Shown, alpha: float, rng: np.random.Generator) -> Shown:
    """Two pictures through each other, with the things of both: https://arxiv.org/abs/1902.04103.

    There the loss of a thing is weighted by the share of its picture; here a picture that is hardly seen adds none.
    """
    share = float(rng.beta(alpha, alpha))
    seen = [shown.things for shown, part in ((one, share), (other, 1 - share)) if part >= MIXUP_LEAST]
    return Shown(Image.blend(other.image, one.image, share), Things.joined(seen))


def paste_things(onto: Shown, other: Shown, rng: np.random.Generator) -> Shown:
    """A few things of `other`, each class as likely as any, with soft edges, where they hide little.

    Cut, Paste and Learn (https://arxiv.org/abs/1708.01642), Simple Copy-Paste (https://arxiv.org/abs/2012.07177); by
    box instead of by outline, so that a thing brings its near surroundings along.
    """
    image, things = onto.image.copy(), onto.things
    W, H = image.size
    classes = np.unique(other.things.labels)
    for _ in range(int(rng.integers(PASTED[0], PASTED[1] + 1)) if len(classes) else 0):
        k = int(rng.choice(np.flatnonzero(other.things.labels == rng.choice(classes))))
        box = other.things.boxes[k]
        margin = PASTE_MARGIN * float((box[2:] - box[:2]).max())
        left, top = (max(0, math.floor(edge - margin)) for edge in box[:2])
        right, bottom = (min(most, math.ceil(edge + margin)) for edge, most in zip(box[2:], (W, H), strict=True))
        w, h = right - left, bottom - top
        inside = box - [left, top, left, top]
        for x, y in rng.integers(0, [W - w + 1, H - h + 1], (PASTE_TRIES, 2)).tolist():
            if most_covered(np.array([x, y, x + w, y + h]), things.boxes) <= MOST_COVERED:
                moved = Things((inside + [x, y, x, y])[None], other.things.labels[[k]])
                mask = np.outer(_fade(h, inside[1], inside[3]), _fade(w, inside[0], inside[2]))
                image.paste(
                    other.image.crop((left, top, right, bottom)), (x, y), Image.fromarray((255 * mask).astype(np.uint8))
                )
                things = Things.joined([things, moved])
                break
    return Shown(image, things)


def most_covered(box: np.ndarray, boxes: np.ndarray) -> float:
    """What `box` and any of `boxes` (n, 4) have in common at most, as a share of the smaller of the two."""
    if not len(boxes):
        return 0.0
    common = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(axis=1)
    smaller = np.minimum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), (box[2:] - box[:2]).prod())
    return float((common / smaller).max())


def _fade(length: int, start: float, stop: float) -> np.ndarray:
    """1 between `start` and `stop`, falling towards 0 at the ends: a value for each of `length` pixels."""
    centers = np.arange(length) + 0.5
    rise, fall = centers / max(start, 1e-9), (length - centers) / max(length - stop, 1e-9)
    return np.minimum(rise, fall).clip(0, 1)
