"""What travels from the disk to the model."""

from __future__ import annotations

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
        move = lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value  # noqa: E731
        targets = {k: move(v) for k, v in self.targets.items()} if isinstance(self.targets, dict) else move(self.targets)
        return replace(self, images=move(self.images), targets=targets, indices=move(self.indices))
