"""Run a model over a source and count."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from saccade.config import PreprocessingConfig
from saccade.data.sample import Batch
from saccade.engine import distributed
from saccade.engine.device import autocast
from saccade.engine.distributed import World
from saccade.errors import UserError
from saccade.words import counted


class Normalise:
    """uint8 pictures -> the floats a model was trained on; on the device, once."""

    def __init__(self, preprocessing: PreprocessingConfig, device: torch.device):
        self.mean = 255 * torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) * self.scale


class PictureInputs:
    """The pictures of a batch as the network takes them."""

    def __init__(self, normalise: Normalise):
        self.normalise = normalise

    def __call__(self, batch: Batch) -> Tensor:
        return self.normalise(batch.images)


def evaluate_batches(
    network: nn.Module,
    batches: Generator[Any, None, None],
    task: Any,
    inputs: Callable[[Any], Any],
    device: torch.device,
    precision: torch.dtype,
    world: World,
    progress: Callable[[int], None] | None = None,
    unreadable: list[str] | None = None,
    metric: Any = None,
) -> Any:
    """The task's report over all batches of all processes. Leaves the network in the mode in which it found it.

    `metric` collects it, where that is not the one that the task makes.

    What is wrong with pictures that cannot be read is added to `unreadable`; they do not count in the report.
    UserError where none can be.
    """
    was_training = network.training
    network.eval()
    metric, failed, seen = task.metric() if metric is None else metric, [], 0
    with torch.inference_mode(), closing(batches):
        for batch in batches:
            batch = batch.to(device)
            with autocast(device, precision):
                # also of an empty batch: sharded processes must keep step
                outputs = task.answer(network, inputs(batch), batch.targets)
            failed += [what for _, what in batch.unreadable]
            seen += len(batch.indices)
            if len(batch.indices):
                task.update(metric, outputs, batch.targets)
            if progress is not None:
                progress(len(batch.indices) + len(batch.unreadable))
    network.train(was_training)
    parts = distributed.gather((metric.state(), failed, seen), world)
    for rank, (state, _, _) in enumerate(parts):
        if rank != world.rank:
            metric.merge(state)
    failed = [what for _, part, _ in parts for what in part]
    if failed and not any(count for _, _, count in parts):
        what = counted(len(failed), "picture")
        raise UserError(f"there is nothing to evaluate: none of {what} can be read ({failed[0]})")
    if unreadable is not None:
        unreadable += failed
    return metric.compute()
