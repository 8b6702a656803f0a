"""What every backbone gives, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """`maps` (B, C, h, w) with their strides in pixels, finest first; `summary` (B, C): the picture as one vector."""

    maps: tuple[Tensor, ...]
    strides: tuple[int, ...]
    summary: Tensor


@dataclass(frozen=True)
class AttentionTrace:
    """The attention of every block, for explanations."""

    weights: tuple[Tensor, ...]  # per block (B, H, N, N), rows sum to one
    pooling: Tensor  # (B, N): the share of each token in the summary
    prefix: int  # tokens without a patch, at the front
    grid: tuple[int, int]  # of the patch tokens
