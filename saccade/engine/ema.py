"""A moving average of weights and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """average <- average + (1 - decay_t) (weights - average), with decay_t = min(decay, (1 + t) / (10 + t))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._live = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
        self.average = {name: value.clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model's present weights; `step` counts from 0."""
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        moving = [name for name, value in self._live.items() if value.is_floating_point()]
        averages, weights = ([local(values[name]) for name in moving] for values in (self.average, self._live))
        torch._foreach_lerp_(averages, weights, share)
        for name, value in self._live.items():
            if not value.is_floating_point():
                self.average[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the average; afterwards, its own weights again, bit for bit."""
        kept = {name: value.clone() for name, value in self._live.items()}
        self._copy(self.average, self._live)
        try:
            yield
        finally:
            self._copy(kept, self._live)

    def load(self, average: dict[str, Tensor]) -> None:
        """Take over a saved average."""
        self._copy(average, self.average)

    @staticmethod
    def _copy(values: dict[str, Tensor], into: dict[str, Tensor]) -> None:
        for name, value in into.items():
            local(value).copy_(local(values[name]))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
