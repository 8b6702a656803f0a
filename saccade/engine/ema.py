"""A moving average of weights and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average <- average + (1 - decay_t) (weights - average), with decay_t = min(decay, (1 + t) / (10 + t))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        live = model.state_dict(keep_vars=True)
        self._moving = [name for name, value in live.items() if value.is_floating_point()]
        self._counters = [name for name, value in live.items() if not value.is_floating_point()]
        self._live = live

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model's present weights; `step` counts from 0."""
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        averages = [self.average[name] for name in self._moving]
        torch._foreach_lerp_(averages, [self._live[name].detach() for name in self._moving], share)
        for name in self._counters:
            self.average[name].copy_(self._live[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the average; afterwards, its own weights again, bit for bit."""
        with torch.no_grad():
            kept = {name: value.detach().clone() for name, value in self._live.items()}
            self._copy(self.average)
            try:
                yield
            finally:
                self._copy(kept)

    def load(self, average: dict[str, Tensor]) -> None:
        for name, value in average.items():
            self.average[name].copy_(value)

    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, value in self._live.items():
            value.detach().copy_(values[name])
