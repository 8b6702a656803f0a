"""What travels from the disk to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One augmented picture with its target."""

    image: Tensor  # uint8 (3, H, W)
    target: Any
    index: int  # position in the source
    mix: Any = None  # the sample's own draw for mixup or cutmix, applied when the batch is made


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape. `targets` is whatever the task's collate makes."""

    images: Tensor  # uint8 (B, 3, H, W)
    targets: Any
    indices: Tensor  # int64 (B,), positions in the source
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # (position, what is wrong with the file)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The same batch there; targets may be a tensor or a dict of them."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that the way to a CUDA device need not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        targets = self.targets
        targets = {k: changed(v) for k, v in targets.items()} if isinstance(targets, dict) else changed(targets)
        return replace(self, images=change(self.images), targets=targets, indices=change(self.indices))
