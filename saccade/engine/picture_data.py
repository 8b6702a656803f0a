"""Pictures for a run: read, augmented and put together by the loader."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import torch

from saccade.config import RunConfig
from saccade.data.loader import batches_per_epoch, eval_batches, train_batches
from saccade.data.measured import open_measured, unreadable
from saccade.data.sample import Batch
from saccade.engine import distributed
from saccade.engine.distributed import World
from saccade.engine.evaluate import Normalise, PictureInputs
from saccade.engine.plan import data_hash
from saccade.tasks import PictureTask, Task
from saccade.tokenizer import Tokenizer
from saccade.words import counted


def unmeasured(what: str) -> str:
    """The note on a picture of the validation split that cannot be read."""
    return f"not measured on: {what}"


class PictureData:
    """See RunData."""

    tokenizer: Tokenizer | None = None
    languages: tuple[str, str] | None = None
    samples = counted = "pictures"
    smaller = "--image-size"

    def __init__(self, config: RunConfig, world: World, device: torch.device, folder: Path | None):
        distributed.check_batch_size(config.batch_size, world)
        self.config, self.world, self.device = config, world, device
        self.splits, self.train_sizes, self.val_sizes = open_measured(Path(config.data), config.val, config.sources)
        self.path, self.task = self.splits.train.path, self.splits.task
        self.class_names, self.notes, self.val = self.splits.train.class_names, self.splits.notes, self.splits.val
        unreadable(self.splits.train, self.train_sizes, config.sources, "training")
        failed = unreadable(self.splits.val, self.val_sizes, config.sources, "validation")
        self.notes += [unmeasured(what) for what in failed]
        self.inputs = PictureInputs(Normalise(config.preprocessing, device))

    def __len__(self) -> int:
        return len(self.splits.train)

    @property
    def about(self) -> str:
        classes = counted(len(self.class_names), "class", "classes")
        return f"{counted(len(self), 'picture')} of {classes}, {len(self.splits.val)} for validation"

    @property
    def about_steps(self) -> str:
        return f"{counted(self.config.batch_size, 'picture')}, about {self.config.preprocessing.image_size} px"

    @property
    def batches_per_epoch(self) -> int:
        return batches_per_epoch(len(self.train_sizes), self.config.batch_size)

    @property
    def workers(self) -> int:
        """As asked; else none beside a processor, which has the same work to do, and several beside another device."""
        if self.config.workers is not None:
            return self.config.workers
        return 0 if self.device.type == "cpu" else min(8, max(1, (os.cpu_count() or 2) // self.world.size - 1))

    def name(self, i: int) -> str:
        return self.splits.train.id(i)

    def hash(self) -> str:
        return data_hash(self.splits)

    def keep(self, folder: Path) -> None:
        """Nothing: the pictures are where they were."""

    def serve(self, task: Task) -> None:
        self.transforms: PictureTask = task  # pyright: ignore[reportAttributeAccessIssue]

    def train_batches(self, start: int, stop: int | None) -> Generator[Batch, None, None]:
        config = self.config
        return train_batches(
            self.splits.train,
            self.train_sizes,
            self.transforms.train_transform,
            self.transforms.train_collate,
            preprocessing=config.train_preprocessing,
            data=config.sources,
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            stop=stop,
            workers=self.workers,
            rank=self.world.rank,
            world=self.world.size,
            pin_memory=self.device.type == "cuda",
        )

    def eval_batches(self) -> Generator[Batch, None, None]:
        config = self.config
        return eval_batches(
            self.splits.val,
            self.val_sizes,
            self.transforms.eval_transform,
            self.transforms.eval_collate,
            preprocessing=config.preprocessing,
            data=config.sources,
            batch_size=config.batch_size,
            workers=self.workers,
            rank=self.world.rank,
            world=self.world.size,
        )

    def amount(self, batch: Batch) -> int:
        return len(batch.indices)

