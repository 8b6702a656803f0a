"""Boxes stay on their things: rectangles of one colour each are drawn, moved, and found again by their colour."""

from __future__ import annotations

import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from saccade.config import AugmentConfig, PreprocessingConfig
from saccade.data.box_mixing import mix, paste_things
from saccade.data.box_transforms import BoxTrainTransform, FitTransform
from saccade.data.decode import RESAMPLE, Picture, PictureError
from saccade.data.framing import MOST_STRETCH, Frame, Shown, Things, whole_frame
from saccade.data.sample import Around, Sample
from saccade.data.source import Boxes
from saccade.errors import UserError

PREPROCESSING = PreprocessingConfig(image_size=160, stride=16)
STILL = AugmentConfig(policy="none", hflip=0, zoom=(1, 1), crop_aspect=(1, 1))
COLOURS = [c for c in itertools.product((0, 85, 170, 255), repeat=3) if max(c) - min(c) > 80]
GREY = (128, 128, 128)
NEAR = 1.5  # pixels: where resizing blurs an edge


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def scene(size: tuple[int, int], first: int, seed: int, count: int = 5) -> tuple[Image.Image, Boxes]:
    """Rectangles that do not touch; thing k of all scenes has the colour and the label `first` + k."""
    h, w = size
    image, draws = Image.new("RGB", (w, h), GREY), rng(seed)
    boxes: list[list[int]] = []
    while len(boxes) < count:
        left, top = int(draws.integers(0, w * 3 // 4)), int(draws.integers(0, h * 3 // 4))
        right, bottom = left + int(draws.integers(w // 8, w // 3)), top + int(draws.integers(h // 8, h // 3))
        box = [left, top, min(right, w), min(bottom, h)]
        apart = all(box[0] > b[2] + 9 or box[2] < b[0] - 9 or box[1] > b[3] + 9 or box[3] < b[1] - 9 for b in boxes)
        if apart:
            boxes.append(box)
            colour = COLOURS[first + len(boxes) - 1]
            ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
    return image, target(boxes, range(first, first + count))


def target(boxes, labels, crowd=None) -> Boxes:
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    crowds = np.zeros(len(corners), np.bool_) if crowd is None else np.array(crowd)
    return Boxes(corners, np.array(labels, np.int64), crowds, np.ones(len(corners), np.float32))


def around(*scenes: tuple[Image.Image, Boxes], progress: float = 0.0) -> Around:
    opened = [(Picture.from_image(image), boxes) for image, boxes in scenes]
    return Around(progress, len(opened), lambda j: opened[j])


def assert_on_their_things(sample: Sample, hidden: float = 0.05, cut: bool = False) -> None:
    """Each box's colour fills it; and the colour's pixels are nowhere beside the box (unless pasted several times)."""
    pixels = sample.image.permute(1, 2, 0).numpy().astype(int)
    H, W, _ = pixels.shape
    things: Things = sample.target
    for box, label in zip(things.boxes, things.labels, strict=True):
        alike = np.abs(pixels - COLOURS[label]).max(axis=2) < 40
        left, top, right, bottom = box
        assert 0 <= left < right <= W and 0 <= top < bottom <= H
        inner = alike[int(np.ceil(top + NEAR)) : int(bottom - NEAR), int(np.ceil(left + NEAR)) : int(right - NEAR)]
        assert inner.size == 0 or inner.mean() > 1 - hidden, (box, label)
        if not cut:
            y, x = np.nonzero(alike)
            found = x.min(), y.min(), x.max() + 1, y.max() + 1
            assert np.abs(np.array(found) - box).max() < NEAR + 0.5, (box, found)


@pytest.mark.parametrize("size", [(120, 160), (300, 200), (97, 331), (640, 480)], ids=str)
@pytest.mark.parametrize("changes", [
    {}, {"hflip": 1.0}, {"vflip": 1.0}, {"hflip": 1.0, "vflip": 1.0}, {"zoom": (0.3, 1.0)}, {"zoom": (1.0, 2.5)},
    {"crop_aspect": (0.6, 1.7)}, {"zoom": (0.5, 2.0), "crop_aspect": (0.7, 1.4), "hflip": 0.5, "vflip": 0.5},
], ids=str)  # fmt: skip
def test_boxes_move_with_their_pixels(size, changes):
    transform = BoxTrainTransform(STILL.model_copy(update=changes), PREPROCESSING)
    for seed in range(4):
        image, boxes = scene(size, 0, seed)
        sample = transform(Picture.from_image(image), boxes, 0, (128, 192), rng(seed), around((image, boxes)))
        assert sample.image.shape == (3, 128, 192) and sample.image.dtype == torch.uint8
        assert len(sample.target) or not len(boxes)
        if max(changes.get("zoom", (1, 1))) == 1 and "crop_aspect" not in changes:
            assert sorted(sample.target.labels) == [0, 1, 2, 3, 4]  # the whole picture is seen
        assert_on_their_things(sample)


def test_mosaic():
    scenes = [scene(size, 5 * k, k) for k, size in enumerate([(120, 160), (200, 140), (90, 300), (240, 240), (64, 64)])]
    transform = BoxTrainTransform(STILL.model_copy(update={"mosaic": 1.0, "hflip": 0.5, "vflip": 0.5}), PREPROCESSING)
    counts = []
    for seed in range(30):
        image, boxes = scenes[seed % 5]
        sample = transform(Picture.from_image(image), boxes, seed % 5, (160, 160), rng(seed), around(*scenes))
        assert set(sample.target.labels // 5) & {seed % 5}, "its own things are in it"
        # a picture may be there several times, then its colours are as well
        assert_on_their_things(sample, cut=True)
        once = [k for k in range(25) if (sample.target.labels == k).sum() == 1]
        assert once
        counts.append(len(sample.target))
    assert np.mean(counts) > 7.5  # of 5 in a picture alone


def test_copy_paste():
    # little things, so that there is room
    scenes = [scene((160, 160), 0, 0, count=2), scene((160, 160), 5, 1, count=5)]
    transform = BoxTrainTransform(STILL.model_copy(update={"copy_paste": 1.0}), PREPROCESSING)
    pasted = 0
    for seed in range(20):
        image, boxes = scenes[0]
        sample = transform(Picture.from_image(image), boxes, 0, (160, 160), rng(seed), around(*scenes))
        assert_on_their_things(sample, hidden=0.45, cut=True)
        assert {0, 1} <= set(sample.target.labels)
        pasted += int((sample.target.labels >= 5).sum())
    assert pasted > 20


def test_pasted_things_hide_little_and_every_class_comes():
    """Of a picture with many things of a class and one of another, both are taken about as often."""
    blank = Shown(Image.new("RGB", (200, 200), GREY), Things.none())
    boxes = np.array([[10.0 * k, 10, 10 * k + 8, 18] for k in range(12)] + [[50.0, 100, 70, 120]])
    other = Shown(Image.new("RGB", (200, 200), COLOURS[0]), Things(boxes, np.array([0] * 12 + [1])))
    labels = []
    for seed in range(60):
        shown = paste_things(blank, other, rng(seed))
        labels += shown.things.labels.tolist()
        for k, box in enumerate(shown.things.boxes):
            x, y = ((box[:2] + box[2:]) // 2).astype(int)
            assert tuple(np.asarray(shown.image)[y, x]) == COLOURS[0]
            for other_box in shown.things.boxes[:k]:
                sides = np.minimum(box[2:], other_box[2:]) - np.maximum(box[:2], other_box[:2])
                smaller = min((box[2:] - box[:2]).prod(), (other_box[2:] - other_box[:2]).prod())
                assert np.maximum(sides, 0).prod() <= 0.2 * smaller + 1e-9
    assert 0.35 < np.mean(labels) < 0.65
    assert blank.image.getpixel((100, 100)) == GREY and len(blank.things) == 0  # what was given is as it was


def test_mixup_shows_both_and_learns_what_is_seen():
    one = Shown(Image.new("RGB", (60, 40), (255, 0, 0)), Things(np.array([[1.0, 2, 30, 30]]), np.array([3])))
    other = Shown(Image.new("RGB", (60, 40), (0, 0, 255)), Things(np.array([[5.0, 6, 20, 20]]), np.array([4])))
    seen = set()
    for seed in range(60):
        mixed = mix(one, other, 0.8, rng(seed))
        red, _, blue = np.asarray(mixed.image)[7, 7].astype(int)
        assert abs(red + blue - 255) <= 2
        expected = {3} if red >= 192 else {4} if blue >= 192 else {3, 4}
        if 190 < max(red, blue) < 193:
            continue
        assert set(mixed.things.labels) == expected
        seen.add(tuple(sorted(expected)))
    assert seen == {(3,), (4,), (3, 4)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(600, 800), (90, 130)], ids=["draft", "small"])
def test_jpegs_that_are_stored_turned(orientation, size):
    """Boxes are those of the upright picture, whatever way round and however large it is decoded."""
    upright, boxes = scene(size, 0, orientation, count=4)
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    picture = Picture(file.getvalue(), "it", 10**7)
    fit = FitTransform(PREPROCESSING)(picture, boxes, 0, (96, 128))
    region = fit.region
    assert region is not None
    things = Frame(region, (96, 128)).place(Things.of(boxes, picture.size))
    assert len(things) == 4
    assert_on_their_things(Sample(fit.image, things, 0), hidden=0.1)
    zoomed = STILL.model_copy(update={"zoom": (0.6, 1.6), "hflip": 0.5})
    for seed in range(3):
        sample = BoxTrainTransform(zoomed, PREPROCESSING)(picture, boxes, 0, (96, 128), rng(seed), around())
        assert_on_their_things(sample, hidden=0.1)


SIZES = [(480, 640), (640, 480), (100, 101), (33, 500), (1, 1), (5, 4000), (4000, 3), (1080, 1920), (57, 13)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(160, 160), (128, 192), (224, 112)], ids=str)
def test_the_whole_picture_is_seen_and_found_again(size, shape):
    """There and back to less than half a pixel; nothing is cut; stretched by no more than is said, but for rounding."""
    h, w = size
    frame = whole_frame(size, shape)
    left, top, right, bottom = frame.region
    assert (left, top) == (0, 0) and right >= w - 1e-6 and bottom >= h - 1e-6
    assert right <= w + 1e-6 or bottom <= h + 1e-6, "padded on one side at most"
    across, down = frame.scale
    if min(w * across, h * down) > 20:
        assert 1 / MOST_STRETCH - 0.03 < across / down < MOST_STRETCH + 0.03
        if right > w + 1e-6 or bottom > h + 1e-6:  # padded: then all of the stretch was used
            assert abs(abs(np.log(across / down)) - np.log(MOST_STRETCH)) < 0.03
    corners = rng().uniform(0, 1, (50, 2, 2)) * [w, h]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    shares = ((boxes - [left, top, left, top]) * [across, down, across, down] / np.array([*shape[::-1]] * 2)).astype(
        np.float32
    )
    region = torch.tensor(frame.region, dtype=torch.float32)
    back = region[:2].repeat(2) + torch.from_numpy(shares) * (region[2:] - region[:2]).repeat(2)
    assert np.abs(back.numpy() - boxes).max() < 0.01
    image = Image.new("RGB", (w, h), (255, 0, 0))
    sample = FitTransform(PREPROCESSING)(Picture.from_image(image), None, 3, shape)
    pixels = sample.image.permute(1, 2, 0).numpy()
    y, x = np.nonzero((pixels == (255, 0, 0)).all(axis=2))
    assert (y.min(), x.min()) == (0, 0)
    assert abs(y.max() + 1 - h * down) < 0.01 and abs(x.max() + 1 - w * across) < 0.01
    rest = pixels[(pixels != (255, 0, 0)).any(axis=2)]
    assert not len(rest) or (rest == [124, 116, 104]).all()
    assert sample.target.size == size and len(sample.target.boxes) == 0 and sample.index == 3


EVERYTHING = AugmentConfig(
    hflip=0.5, vflip=0.5, zoom=(0.3, 3), policy="trivial", color_jitter=0.3, mosaic=0.5, copy_paste=0.5, mixup=1.0,
    mix_prob=0.5,
)  # fmt: skip


def test_never_a_box_that_is_none():
    """Whatever is annotated and drawn: finite, in the picture, and at least a pixel a side."""
    odd = target(
        [[10, 10, 10, 30], [20, 20, 5, 5], [-50, -50, 500, 500], [90, 60, 300, 300], [np.nan, 1, 5, 5], [3, 3, 4, 4],
         [200, 200, 300, 300], [np.inf, 0, np.inf, 9], [40, 40, 60, 60]],
        range(9),
        [False] * 8 + [True],
    )  # fmt: skip
    sizes = [(80, 100), (30, 400), (400, 9), (1, 1), (123, 77)]
    scenes = [(Image.new("RGB", (w, h)), Boxes.none() if k == 2 else odd) for k, (h, w) in enumerate(sizes)]
    seen = set()
    for policy in ("none", "trivial", "rand"):
        transform = BoxTrainTransform(EVERYTHING.model_copy(update={"policy": policy}), PREPROCESSING)
        for seed in range(120):
            k = seed % len(scenes)
            shape = [(160, 160), (112, 224), (16, 16)][seed % 3]
            image, boxes = scenes[k]
            sample = transform(Picture.from_image(image), boxes, k, shape, rng(seed), around(*scenes))
            things = sample.target
            assert sample.image.shape == (3, *shape) and things.boxes.shape == (len(things.labels), 4)
            assert np.isfinite(things.boxes).all()
            sides = things.boxes[:, 2:] - things.boxes[:, :2]
            assert (sides >= 1).all() and (things.boxes >= 0).all()
            assert (things.boxes <= [shape[1], shape[0], shape[1], shape[0]]).all()
            seen |= set(things.labels.tolist())
    assert seen == {2, 3, 5}, "neither crowds nor what has no area or lies outside"


def test_depends_on_the_samples_rng_alone():
    scenes = [scene((90, 120), 5 * k, k) for k in range(4)]
    transform = BoxTrainTransform(EVERYTHING, PREPROCESSING)
    again = pickle.loads(pickle.dumps(transform))
    different = set()
    for seed in range(12):
        before = torch.get_rng_state()
        image, boxes = scenes[1]
        one = transform(Picture.from_image(image), boxes, 1, (112, 160), rng(seed), around(*scenes))
        np.random.seed(seed)
        two = again(Picture.from_image(image), boxes, 1, (112, 160), rng(seed), around(*scenes))
        assert torch.equal(one.image, two.image) and np.array_equal(one.target.boxes, two.target.boxes)
        assert np.array_equal(one.target.labels, two.target.labels)
        assert torch.equal(before, torch.get_rng_state())
        different.add(one.image.numpy().tobytes())
    assert len(different) == 12


def test_the_strong_ones_stop():
    scenes = [scene((90, 120), 5 * k, k) for k in range(4)]
    augment = STILL.model_copy(
        update={"mosaic": 1.0, "copy_paste": 1.0, "mixup": 8.0, "policy": "trivial", "strong_until": 0.6}
    )
    transform = BoxTrainTransform(augment, PREPROCESSING)
    plain = BoxTrainTransform(STILL, PREPROCESSING)
    image, boxes = scenes[0]
    for seed in range(5):
        strong = transform(Picture.from_image(image), boxes, 0, (96, 128), rng(seed), around(*scenes, progress=0.59))
        late = transform(Picture.from_image(image), boxes, 0, (96, 128), rng(seed), around(*scenes, progress=0.6))
        still = plain(Picture.from_image(image), boxes, 0, (96, 128), rng(seed), around(*scenes))
        assert torch.equal(late.image, still.image) and np.array_equal(late.target.boxes, still.target.boxes)
        assert not torch.equal(strong.image, still.image)


def test_other_pictures_that_cannot_be_read_or_are_not_there():
    image, boxes = scene((90, 120), 0, 0)

    def broken(_: int) -> tuple[Picture, Boxes]:
        raise PictureError("it", "is cut off")

    for others in (Around(0.0, 5, broken), around((image, boxes))):
        for changes in ({"mosaic": 1.0}, {"copy_paste": 1.0}, {"mixup": 1.0}):
            transform = BoxTrainTransform(STILL.model_copy(update=changes), PREPROCESSING)
            sample = transform(Picture.from_image(image), boxes, 0, (96, 128), rng(), others)
            assert len(sample.target)
            assert_on_their_things(sample)


def test_a_crop_shows_something_where_there_is_something():
    """One small thing in a large picture: no crop is without it, and none need be where there is nothing."""
    image = Image.new("RGB", (1000, 1000), GREY)
    ImageDraw.Draw(image).rectangle((900, 40, 919, 59), fill=COLOURS[7])
    transform = BoxTrainTransform(STILL.model_copy(update={"zoom": (3, 6)}), PREPROCESSING)
    places = []
    for seed in range(20):
        sample = transform(
            Picture.from_image(image), target([[900, 40, 920, 60]], [7]), 0, (160, 160), rng(seed), around()
        )
        assert sample.target.labels.tolist() == [7]
        assert_on_their_things(sample)
        places.append(tuple(sample.target.boxes[0]))
    assert len(set(places)) > 5
    empty = transform(Picture.from_image(image), Boxes.none(), 0, (160, 160), rng(), around())
    assert len(empty.target) == 0


def test_what_is_left_of_a_cut_thing():
    things = Things(
        np.array([[-70.0, 0, 30, 10], [-76, 0, 24, 10], [-1000, -1000, 60, 60], [10, 10, 10.9, 50]]), np.arange(4)
    )
    seen = things.within((100, 100))
    assert seen.labels.tolist() == [0, 2]  # 30 % is left, 24 % is not enough; little of much; too thin
    assert seen.boxes.tolist() == [[0, 0, 30, 10], [0, 0, 60, 60]]


def test_what_would_hide_things_is_refused():
    with pytest.raises(UserError, match=r"augment\.cutmix, augment\.erase: .*leave"):
        BoxTrainTransform(AugmentConfig(cutmix=1.0, erase=0.1), PREPROCESSING)


def test_frames_show_exactly_what_they_say():
    """Against a computation for each pixel: a frame's pixel shows the picture where its region says."""
    h, w = 60, 80
    ramp = np.stack(np.broadcast_arrays(np.arange(w)[None], np.arange(h)[:, None], 0), axis=-1).astype(np.uint8)
    picture = Picture.from_image(Image.fromarray(ramp))
    frames = ((10, 5, 50, 45), (80, 80)), ((-20.5, -7.25, 70, 52), (131, 97)), ((60, 30, 140, 90), (40, 64))
    for region, shape in frames:
        frame = Frame(region, shape)
        pixels = np.asarray(frame.show(picture, RESAMPLE["bilinear"], (0, 0, 255))).astype(float)
        across, down = frame.scale
        x = region[0] + (np.arange(shape[1]) + 0.5) / across - 0.5
        y = region[1] + (np.arange(shape[0]) + 0.5) / down - 0.5
        shown = pixels[..., 2] == 0
        inside = ((x > 1) & (x < w - 2))[None] & ((y > 1) & (y < h - 2))[:, None]
        assert shown[inside].all()
        assert np.abs(pixels[..., 0] - x[None])[inside].max() < 1
        assert np.abs(pixels[..., 1] - y[:, None])[inside].max() < 1
        outside = ((x < -1) | (x > w))[None] | ((y < -1) | (y > h))[:, None]
        assert not shown[outside].any()
