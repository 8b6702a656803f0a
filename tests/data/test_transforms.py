from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.config import AugmentConfig, PreprocessingConfig
from saccade.data.decode import Picture
from saccade.data.sample import Sample
from saccade.data.transforms import (
    EvalTransform,
    Mix,
    TrainTransform,
    central_box,
    collate_eval,
    collate_train,
    cut_box,
    random_box,
)

PREPROCESSING = PreprocessingConfig(image_size=32, stride=4)
FULL = AugmentConfig(hflip=0.5, vflip=0.5, color_jitter=0.4, erase=0.5, mixup=0.2, cutmix=1.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("policy", ["none", "trivial", "rand"])
def test_train_transform_depends_on_its_rng_alone(picture, policy):
    transform = TrainTransform(FULL.model_copy(update={"policy": policy}), PREPROCESSING)
    again = pickle.loads(pickle.dumps(transform))
    image = Picture.from_image(picture(50, 60))
    different = set()
    for seed in range(6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        one = transform(image, 3, 7, (28, 36), rng(seed))
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(99)
        two = again(image, 3, 7, (28, 36), rng(seed))
        assert torch.equal(one.image, two.image) and one.mix == two.mix
        assert one.image.shape == (3, 28, 36) and one.image.dtype == torch.uint8 and one.image.is_contiguous()
        assert (one.target, one.index) == (3, 7)
        different.add(one.image.numpy().tobytes())
    assert len(different) == 6


def test_flips_and_erasing(picture):
    off = AugmentConfig(crop_scale=(1, 1), crop_aspect=(1, 1), hflip=0, policy="none")
    image = Picture.from_image(picture(32, 32))
    plain = TrainTransform(off, PREPROCESSING)(image, 0, 0, (32, 32), rng())
    assert np.array_equal(plain.image.permute(1, 2, 0).numpy(), np.asarray(image.whole())) and plain.mix is None
    for name, dim in (("hflip", 2), ("vflip", 1)):
        flipped = TrainTransform(off.model_copy(update={name: 1.0}), PREPROCESSING)(image, 0, 0, (32, 32), rng())
        assert torch.equal(flipped.image, plain.image.flip(dim))
    for seed in range(20):
        erased = TrainTransform(off.model_copy(update={"erase": 1.0}), PREPROCESSING)(image, 0, 0, (32, 32), rng(seed))
        share = (erased.image != plain.image).any(0).float().mean()
        assert 0.005 < share < 0.4


def test_random_boxes():
    for size in ((100, 100), (100, 150), (30, 300), (7, 5)):
        for shape in ((32, 32), (24, 44)):
            shares = []
            for seed in range(200):
                left, top, right, bottom = random_box(size, shape, (0.35, 1.0), (0.75, 1.3333), rng(seed))
                assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
                relative = (right - left) / (bottom - top) / (shape[1] / shape[0])
                assert 0.74 < relative < 1.34
                most_w, most_h = largest(size, shape)
                shares.append((right - left) * (bottom - top) / (most_w * most_h))
            assert min(shares) < 0.45 and 0.9 < max(shares) < 1.34
    assert random_box((50, 50), (8, 8), (1, 1), (1, 1), rng()) == (0, 0, 50, 50)


def largest(size, shape):
    left, top, right, bottom = central_box(size, shape)
    return right - left, bottom - top


def test_eval_keeps_the_aspect_and_the_center(encode):
    image = Image.new("RGB", (400, 100), (255, 0, 0))
    image.paste((0, 255, 0), (150, 0, 250, 100))  # exactly the central square
    for source in (Picture.from_image(image), Picture(encode(image, "PNG"), "it", 10**6)):
        got = EvalTransform(PREPROCESSING)(source, 2, 5, (32, 32)).image
        green = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None]
        assert (got[:, 4:-4, 4:-4] == green).all()
    assert central_box((100, 400), (32, 32), 0.5) == (175, 25, 225, 75)
    assert central_box((90, 180), (32, 64)) == (0, 0, 180, 90)


def samples(mixes: list[Mix | None]) -> list[Sample]:
    return [Sample(torch.full((3, 8, 10), 100 * b, dtype=torch.uint8), b, b + 10, mix) for b, mix in enumerate(mixes)]


def test_mix_targets_are_the_true_shares():
    mixes = [Mix("mixup", 0.25, (0, 0)), None, Mix("cutmix", 0.7, (0.0, 1.0))]
    batch = collate_train(samples(mixes), [(4, "bad")], (8, 10), num_classes=4)
    assert batch.images[0].unique().tolist() == [75] and batch.targets[0].tolist() == [0.25, 0.75, 0, 0]
    assert batch.images[1].unique().tolist() == [100] and batch.targets[1].tolist() == [0, 1, 0, 0]
    own = (batch.images[2] == 200).float().mean().item()
    assert 0.5 < own < 1 and batch.targets[2].tolist() == pytest.approx([1 - own, 0, own, 0])
    assert batch.indices.tolist() == [10, 11, 12] and batch.unreadable == [(4, "bad")]
    assert batch.targets.dtype == torch.float32


def test_cut_boxes_share_the_area():
    for share in (0.0, 0.3, 1.0):
        top, left, bottom, right = cut_box((100, 200), Mix("cutmix", share, (0.5, 0.5)))
        assert (bottom - top) * (right - left) / 20000 == pytest.approx(1 - share, abs=0.02)
    one = samples([Mix("mixup", 0.4, (0, 0))])
    assert collate_train(one, [], (8, 10), num_classes=2).targets.tolist() == [[1, 0]]


def test_mix_is_drawn_as_often_as_asked(picture):
    image = Picture.from_image(picture(8, 8))
    for both, probability in ((True, 1.0), (True, 0.5), (False, 1.0)):
        augment = AugmentConfig(policy="none", mixup=0.2 if both else 0, cutmix=1.0, mix_prob=probability)
        transform = TrainTransform(augment, PREPROCESSING)
        drawn = [transform(image, 0, 0, (8, 8), rng(seed)).mix for seed in range(300)]
        kinds = [mix.kind for mix in drawn if mix]
        assert abs(len(kinds) / 300 - probability) < 0.1
        assert abs(kinds.count("cutmix") / len(kinds) - (0.5 if both else 1)) < 0.1


def test_nothing_readable():
    train = collate_train([], [(1, "x")], (8, 12), num_classes=3)
    assert train.images.shape == (1, 3, 8, 12) and not train.images.any()
    assert train.targets.tolist() == [[0, 0, 0]] and len(train.indices) == 0 and train.unreadable == [(1, "x")]
    assert collate_eval([], [], (8, 12)).targets.tolist() == [-1]
    batch = collate_eval(samples([None, None]), [], (8, 10))
    assert batch.targets.tolist() == [0, 1] and batch.targets.dtype == torch.int64
