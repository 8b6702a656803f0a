"""What travels from the disk to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.data.decode import Box, Picture


@dataclass(frozen=True)
class Sample:
    """One augmented picture with its target."""

    image: Tensor  # uint8 (3, H, W)
    target: Any
    index: int  # position in the source
    mix: Any = None  # the sample's own draw for mixup or cutmix, applied when the batch is made
    region: Box | None = None  # of the picture, which `image` shows; None: not told


@dataclass(frozen=True)
class Around:
    """What a training transform may know beside its own picture: where the run is, and all other pictures."""

    progress: float  # share of the run that is done, 0 to 1; 0 where its length is not known
    count: int  # pictures in the source
    open: Callable[[int], tuple[Picture, Any]]  # picture and target at a position; PictureError where unreadable


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
        """The same batch there; targets may be a tensor, or a dict or dataclass of tensors and other things."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that the way to a CUDA device need not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        targets = self.targets
        if isinstance(targets, dict):
            targets = {k: changed(v) for k, v in targets.items()}
        elif is_dataclass(targets) and not isinstance(targets, type):
            targets = replace(targets, **{f.name: changed(getattr(targets, f.name)) for f in fields(targets)})
        else:
            targets = changed(targets)
        return replace(self, images=change(self.images), targets=targets, indices=change(self.indices))
