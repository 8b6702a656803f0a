"""Batches of one shape each, the same ones however many workers read them and wherever the stream is entered."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from saccade.config import DataConfig, PreprocessingConfig
from saccade.data.buckets import assign, bucket_shapes
from saccade.data.decode import Picture, PictureError, read_size
from saccade.data.sample import Around, Batch, Sample
from saccade.data.source import Source
from saccade.errors import UserError

# (picture, target, index, shape (H, W), rng, around) -> Sample
Transform = Callable[[Picture, Any, int, tuple[int, int], np.random.Generator, Around], Sample]
# (samples, unreadable, shape) -> Batch; of no samples: one black picture, empty `indices`
Collate = Callable[[list[Sample], list[tuple[int, str]], tuple[int, int]], Batch]

BYTES_PER_PIXEL = 4  # of a decoded picture in Pillow's memory
PREFETCH = 4  # batches per worker


@dataclass(frozen=True)
class Plan:
    """A batch before it is read."""

    seed: int
    epoch: int
    shape: tuple[int, int]
    indices: np.ndarray  # int64 (B,)
    progress: float = 0.0  # share of the run that is done before it


def measure_sizes(source: Source, data: DataConfig, threads: int = 4) -> np.ndarray:
    """Height and width of every picture, int64 (N, 2), from the headers alone; (0, 0) where that fails."""

    def size(i: int) -> tuple[int, int]:
        try:
            with source.open(i) as file:
                return read_size(file, source.id(i), data.max_pixels)
        except PictureError:
            return 0, 0

    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(size, range(len(source))))
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Full batches in a pass over the data, as many in every epoch; 1 where there are fewer pictures than in one."""
    return max(1, samples // batch_size)


def plan_epoch(
    sizes: np.ndarray, shapes: list[tuple[int, int]], batch_size: int, seed: int, epoch: int
) -> list[tuple[tuple[int, int], np.ndarray]]:
    """All batches of an epoch as (shape, indices): pictures of one bucket together, what is left over by near aspect.

    What does not fill a last batch is dropped first and at random: a rare aspect is seen as often as any other.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch, 0]))
    count = batches_per_epoch(len(sizes), batch_size)
    order = rng.permutation(len(sizes))[: count * batch_size]
    buckets = assign(sizes, shapes)[order]
    if len(order) < batch_size:
        return [(shapes[int(np.median(buckets))], order)]
    batches: list[tuple[tuple[int, int], np.ndarray]] = []
    left_over = []
    for k, shape in enumerate(shapes):
        same = order[buckets == k]
        full = len(same) // batch_size * batch_size
        batches += [(shape, chunk) for chunk in same[:full].reshape(-1, batch_size)]
        left_over.append(same[full:])
    pool = np.concatenate(left_over)  # a whole number of batches, because `order` is one
    height, width = np.maximum(sizes[pool], 1).T
    pool = pool[np.argsort(width / height, kind="stable")]
    for chunk in pool.reshape(-1, batch_size):
        middle = chunk[batch_size // 2]
        batches.append((shapes[int(assign(sizes[middle], shapes)[0])], chunk))
    return [batches[k] for k in rng.permutation(len(batches))]


def train_batches(
    source: Source,
    sizes: np.ndarray,
    transform: Transform,
    collate: Collate,
    *,
    preprocessing: PreprocessingConfig,
    data: DataConfig,
    batch_size: int,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Batches number `start`, `start` + 1, ... before `stop`; without it, for ever.

    Batch s depends on (seed, s) alone, but for what a transform makes of the share of the run that is done.

    Under several processes each gets every `world`-th picture of a batch. A batch of which nothing could be read is one
    black picture with empty `indices`.
    """
    if batch_size < world or batch_size % world:
        raise UserError(f"--batch-size {batch_size} cannot be shared by {world} processes; use a multiple of {world}")
    if len(source) < world:
        raise UserError(f"{source.path}: {len(source)} pictures are too few for {world} processes; use fewer processes")
    plans = _TrainPlans(sizes, preprocessing, batch_size, seed, start, stop, rank, world)
    return _read(_Reader(source, sizes, transform, collate, data), plans, workers, pin_memory)


def eval_batches(
    source: Source,
    sizes: np.ndarray,
    transform: Transform,
    collate: Collate,
    *,
    preprocessing: PreprocessingConfig,
    data: DataConfig,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Every picture once, in its own bucket, in an order that never changes. Use the first len(indices) of a batch.

    All processes get as many batches; one without a picture of its own gets a black one with empty `indices`.
    """
    shapes = bucket_shapes(preprocessing)
    buckets = assign(sizes, shapes)
    plans = []
    for k, shape in enumerate(shapes):
        same = np.flatnonzero(buckets == k)
        for first in range(0, len(same), batch_size):
            plans.append(Plan(0, 0, shape, same[first : first + batch_size][rank::world]))
    return _read(_Reader(source, sizes, transform, collate, data), plans, min(workers, len(plans)), pin_memory)


class _TrainPlans:
    """The endless order of batches, an epoch at a time."""

    def __init__(
        self,
        sizes: np.ndarray,
        preprocessing: PreprocessingConfig,
        batch_size: int,
        seed: int,
        start: int,
        stop: int | None,
        rank: int,
        world: int,
    ) -> None:
        self.sizes = sizes
        self.shapes = bucket_shapes(preprocessing)
        self.per_epoch = batches_per_epoch(len(sizes), batch_size)
        self.batch_size, self.seed, self.start, self.stop = batch_size, seed, start, stop
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Plan]:
        number = self.start
        while self.stop is None or number < self.stop:
            epoch, first = divmod(number, self.per_epoch)
            batches = plan_epoch(self.sizes, self.shapes, self.batch_size, self.seed, epoch)
            assert len(batches) == self.per_epoch
            for shape, indices in batches[first:]:
                if self.stop is not None and number >= self.stop:
                    return
                # a smaller-than-full batch is cut so that every process gets as many
                shared = indices[: len(indices) // self.world * self.world]
                progress = 0.0 if self.stop is None else number / self.stop
                yield Plan(self.seed, epoch, shape, shared[self.rank :: self.world], progress)
                number += 1


class _Reader(Dataset[Batch]):
    """From plan to batch: read, decode, transform, collate. In each worker, its own with its own cache."""

    def __init__(
        self, source: Source, sizes: np.ndarray, transform: Transform, collate: Collate, data: DataConfig
    ) -> None:
        self.source, self.transform, self.collate, self.max_pixels = source, transform, collate, data.max_pixels
        # From configuration and data alone, never from what a process has seen: a crop of a picture that is decoded in
        # full differs in its last bits from one that JPEG's draft mode made.
        pixels = int(sizes.astype(np.int64).prod(axis=1).sum())
        self.keep = data.cache == "auto" and pixels * BYTES_PER_PIXEL <= data.cache_bytes
        self.cache: dict[int, Picture] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}

    def __getitem__(self, plan: Plan) -> Batch:
        samples: list[Sample] = []
        unreadable: list[tuple[int, str]] = []
        around = Around(plan.progress, len(self.source), self.open)
        for i in plan.indices.tolist():
            rng = np.random.Generator(np.random.PCG64([plan.seed, plan.epoch, i + 1]))
            try:
                picture, target = self.open(i)
                samples.append(self.transform(picture, target, i, plan.shape, rng, around))
            except PictureError as error:
                unreadable.append((i, str(error)))
        return self.collate(samples, unreadable, plan.shape)

    def open(self, i: int) -> tuple[Picture, Any]:
        return self.picture(i), self.source.target(i)

    def picture(self, i: int) -> Picture:
        picture = self.cache.get(i)
        if picture is None:
            picture = Picture(self.source.read(i), self.source.id(i), self.max_pixels)
            if self.keep:
                picture = self.cache[i] = Picture.from_image(picture.whole(), picture.name)
        return picture


def _read(reader: _Reader, plans: Iterable[Plan], workers: int, pin_memory: bool) -> Generator[Batch, None, None]:
    """One loader for the whole run: plans are drawn lazily, so workers are never started anew."""
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=plans,  # pyright: ignore[reportArgumentType]  (it yields plans where torch expects numbers)
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]  (nor does it expect a whole batch)
        # seeds of workers are not used; without this, torch's global generator would be drawn from here
        generator=torch.Generator(),
    )
    yield from loader


def _start_worker(_: int) -> None:
    """The main process decides what a signal to the whole group means; a worker must not die of it in its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _as_it_is(batch: Batch) -> Batch:
    return batch
