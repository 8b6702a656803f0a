"""What a run learns from, whatever it is made of: the loop knows pictures and texts only by this."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saccade.config import RunConfig
from saccade.engine.distributed import World
from saccade.engine.picture_data import PictureData
from saccade.engine.text_data import TextData
from saccade.tasks import Task
from saccade.tokenizer import Tokenizer


class AnyBatch(Protocol):
    """What the loop needs to know of a batch."""

    @property
    def targets(self) -> Any: ...

    @property
    def indices(self) -> Tensor: ...

    @property
    def unreadable(self) -> list[tuple[int, str]]: ...

    def to(self, device: torch.device) -> Any: ...


class RunData(Protocol):
    """Samples to learn from and to measure on, in batches that depend on (seed, number) alone."""

    path: Path
    task: str  # what can be learnt from it
    class_names: tuple[str, ...]  # none for texts
    notes: list[str]
    val: Any  # samples to measure on
    samples: str  # what they are called, in the plural
    counted: str  # in what speed is counted
    smaller: str  # the setting by which a step becomes shorter

    def __len__(self) -> int:
        """Samples to learn from."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for pictures."""
        ...

    @property
    def languages(self) -> tuple[str, str] | None:
        """From and into; none for pictures."""
        ...

    @property
    def about(self) -> str:
        """How much of what, for the first line of a run."""
        ...

    @property
    def about_steps(self) -> str:
        """What one step sees."""
        ...

    @property
    def batches_per_epoch(self) -> int: ...

    def name(self, i: int) -> str:
        """What messages call sample `i`."""
        ...

    def hash(self) -> str:
        """Of all that the run depends on, by which a run that is continued knows its data again."""
        ...

    def keep(self, folder: Path) -> None:
        """Write what a continued run must not make anew into the run's folder."""

    def serve(self, task: Task) -> None:
        """From now on batches are made for this task."""

    def train_batches(self, start: int, stop: int | None) -> Generator[Any, None, None]: ...

    def eval_batches(self) -> Generator[Any, None, None]: ...

    def inputs(self, batch: Any) -> Any:
        """What the network is called with, from a batch on the device."""

    def amount(self, batch: Any) -> int:
        """Of `counted` in a batch of one process."""
        ...


DATA: dict[str, Callable[[RunConfig, World, torch.device, Path | None], RunData]] = {"translate": TextData}


def open_data(config: RunConfig, world: World, device: torch.device, folder: Path | None) -> RunData:
    """`folder`: that of a run that is continued."""
    return DATA.get(config.task or "", PictureData)(config, world, device, folder)
