from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from saccade.config import AugmentConfig, DataConfig, PreprocessingConfig
from saccade.data.buckets import assign, bucket_shapes
from saccade.data.loader import batches_per_epoch, eval_batches, measure_sizes, plan_epoch, train_batches
from saccade.data.source import Source
from saccade.data.sources import open_source
from saccade.data.transforms import EvalTransform, TrainTransform, collate_eval, collate_train
from saccade.errors import UserError

PREPROCESSING = PreprocessingConfig(image_size=16, stride=4)
AUGMENT = AugmentConfig(policy="trivial", mixup=0.2, cutmix=1.0, erase=0.3)
DATA = DataConfig()


def stream(source: Source, data: DataConfig = DATA, batch_size: int = 8, seed: int = 3, **options):
    return train_batches(
        source,
        measure_sizes(source, data),
        TrainTransform(AUGMENT, PREPROCESSING),
        functools.partial(collate_train, num_classes=len(source.class_names)),
        preprocessing=PREPROCESSING,
        data=data,
        batch_size=batch_size,
        seed=seed,
        **options,
    )


def evaluation(source: Source, data: DataConfig = DATA, batch_size: int = 8, **options):
    return eval_batches(
        source,
        measure_sizes(source, data),
        EvalTransform(PREPROCESSING),
        collate_eval,
        preprocessing=PREPROCESSING,
        data=data,
        batch_size=batch_size,
        **options,
    )


def assert_same(one, two) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
        assert torch.equal(a.indices, b.indices) and a.unreadable == b.unreadable


@pytest.fixture
def source(folder) -> Source:
    return open_source(folder({"": {"a": 18, "b": 17}}))


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_same_batches_for_any_number_of_workers_and_from_any_start(source, cache):
    data = DataConfig(cache=cache)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = list(stream(source, data, stop=10))
    assert torch.equal(state, torch.get_rng_state())  # the model's randomness is not touched
    assert {tuple(batch.images.shape[2:]) for batch in whole} > {(16, 16)}
    for workers in (1, 2):
        torch.manual_seed(workers)
        assert_same(whole, list(stream(source, data, stop=10, workers=workers)))
    for start in (1, 4, 9):
        assert_same(whole[start:], list(stream(source, data, start=start, stop=10)))
    assert_same(whole[5:7], list(itertools.islice(stream(source, data, start=5, workers=2), 2)))
    other = next(stream(source, data, seed=4))
    assert not torch.equal(other.indices, whole[0].indices)


def test_spawned_workers(source, monkeypatch):
    """Everything that travels to a worker survives pickling."""
    want = list(stream(source, stop=2))
    original = torch.utils.data.DataLoader.__init__
    patched = functools.partialmethod(original, multiprocessing_context="forkserver")
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", patched)
    assert_same(want, list(stream(source, stop=2, workers=1)))


def test_workers_leave_interrupts_to_the_main_process(source):
    batches = stream(source, workers=1)
    next(batches)
    children = multiprocessing.active_children()
    assert children
    for child in children:
        os.kill(child.pid or 0, signal.SIGINT)
    assert len([next(batches) for _ in range(10)]) == 10
    batches.close()
    del batches
    assert not [child for child in children if child.is_alive()]


def test_an_epoch_sees_every_picture_at_most_once(source):
    sizes = measure_sizes(source, DATA)
    per_epoch = batches_per_epoch(len(sizes), 8)
    assert per_epoch == 35 // 8
    epochs = []
    for epoch in range(2):
        batches = list(stream(source, start=epoch * per_epoch, stop=(epoch + 1) * per_epoch))
        indices = torch.cat([batch.indices for batch in batches]).tolist()
        assert len(indices) == len(set(indices)) == per_epoch * 8
        epochs.append(indices)
    assert epochs[0] != epochs[1]


def test_plan_groups_by_aspect_and_counts_exactly():
    rng = np.random.default_rng(0)
    sizes = np.stack([np.full(317, 100), rng.integers(55, 180, 317)], axis=1)
    shapes = bucket_shapes(PREPROCESSING)
    for batch_size in (1, 7, 32, 317, 400):
        for epoch in range(3):
            batches = plan_epoch(sizes, shapes, batch_size, 0, epoch)
            assert len(batches) == batches_per_epoch(len(sizes), batch_size) == max(1, 317 // batch_size)
            assert all(len(indices) == min(batch_size, 317) for _, indices in batches)
            every = np.concatenate([indices for _, indices in batches])
            assert len(np.unique(every)) == len(every)
    batches = plan_epoch(sizes, shapes, 7, 0, 0)
    full = [len(set(assign(sizes[indices], shapes))) == 1 for _, indices in batches]
    assert np.mean(full) > 0.9
    assert all(shape in {shapes[k] for k in assign(sizes[indices], shapes)} for shape, indices in batches)


def test_what_is_left_out_changes_with_the_epoch():
    sizes = np.array([[100, 100]] * 20 + [[100, 190]] * 3)
    shapes = bucket_shapes(PREPROCESSING)
    seen = np.zeros(23, dtype=int)
    for epoch in range(60):
        for _, indices in plan_epoch(sizes, shapes, 8, 1, epoch):
            seen[indices] += 1
    assert seen.min() > 20


def test_fewer_pictures_than_a_batch(source):
    few = source.subset(range(5))
    batches = list(stream(few, batch_size=64, stop=3))
    assert [sorted(batch.indices.tolist()) for batch in batches] == [[0, 1, 2, 3, 4]] * 3


def test_processes_share_batches(source):
    whole = list(stream(source, stop=5))
    halves = [list(stream(source, stop=5, rank=rank, world=2)) for rank in range(2)]
    for b, batch in enumerate(whole):
        for rank in range(2):
            assert torch.equal(halves[rank][b].indices, batch.indices[rank::2])
    few = source.subset(range(5))
    assert [len(next(stream(few, batch_size=64, rank=rank, world=2))) for rank in range(2)] == [2, 2]
    with pytest.raises(UserError, match="--batch-size 8 cannot be shared by 3"):
        stream(source, world=3)
    with pytest.raises(UserError, match="too few for 8 processes"):
        stream(few, world=8)
    parts = [list(evaluation(source, rank=rank, world=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert sorted(torch.cat([batch.indices for part in parts for batch in part]).tolist()) == list(range(35))


def test_evaluation_sees_every_picture_once_in_its_own_shape(source):
    batches = list(evaluation(source))
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert sorted(indices) == list(range(35))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.from_numpy(source.labels)[indices])
    assert_same(batches, list(evaluation(source, workers=2)))
    alone = list(evaluation(source, batch_size=1))
    images = {int(batch.indices[0]): batch.images[0] for batch in alone}
    for batch in batches:
        assert all(torch.equal(image, images[int(i)]) for image, i in zip(batch.images, batch.indices, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_are_left_out_and_named(folder, workers):
    root = folder({"": {"a": 6, "b": 6}})
    cut_off = (root / "b/004.jpg").read_bytes()[:-90]
    for name, data in (("a/001.jpg", b""), ("b/002.jpg", b"text"), ("b/003.jpg", cut_off)):
        (root / name).write_bytes(data)
    source = open_source(root)
    sizes = measure_sizes(source, DATA)
    assert (sizes == 0).all(axis=1).tolist() == [i in (1, 8) for i in range(12)]
    batches = list(stream(source, batch_size=12, stop=2, workers=workers))
    for batch in batches:
        assert sorted(i for i, _ in batch.unreadable) == [1, 8, 9] and len(batch) == 9
        assert set(batch.indices.tolist()) == set(range(12)) - {1, 8, 9}
    assert any("002.jpg: not a picture" in reason for _, reason in batches[0].unreadable)
    found = list(evaluation(source, workers=workers))
    assert sorted(i for batch in found for i, _ in batch.unreadable) == [1, 8, 9]
    broken = source.subset([1, 8])
    batch = next(stream(broken, batch_size=2))
    assert batch.images.shape == (1, 3, 16, 16) and len(batch.indices) == 0 and not batch.targets.any()
    assert len(batch.unreadable) == 2


def test_vanished_files_are_unreadable(source):
    files = source.subset([0, 1])
    sizes = measure_sizes(files, DATA)
    Path(files.id(0)).unlink()
    batches = eval_batches(
        files, sizes, EvalTransform(PREPROCESSING), collate_eval, preprocessing=PREPROCESSING, data=DATA, batch_size=8
    )
    assert [reason for batch in batches for _, reason in batch.unreadable] == [
        f"{files.id(0)}: cannot be read (No such file or directory)"
    ]


def test_pixel_limit_is_the_configs(source):
    tight = DataConfig(max_pixels=600)
    assert (measure_sizes(source, tight) == 0).all(axis=1).sum() > 5
    assert sum(len(batch.unreadable) for batch in evaluation(source, tight)) > 5


def test_real_data(shared):
    source = open_source(shared / "objects32", "val").subset(range(0, 1000, 20))
    assert (measure_sizes(source, DATA) == 32).all()
    assert_same(list(stream(source, stop=3)), list(stream(source, stop=3, workers=2)))
