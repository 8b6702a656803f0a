"""Rules that convolutional families share."""

from __future__ import annotations

from dataclasses import replace

import torch

from saccade.weights.formats.table import Rule, module, same


def batch_norm(ours: str, theirs: str) -> list[Rule]:
    """The count of batches, which nothing reads, is not in files from before PyTorch kept it, such as torchvision's."""
    count = replace(
        same(f"{ours}.num_batches_tracked", f"{theirs}.num_batches_tracked"),
        default=lambda: torch.zeros((), dtype=torch.long),
    )
    return [*module(ours, theirs, "weight", "bias", "running_mean", "running_var"), count]


def conv_norm(ours: str, conv: str, norm: str, *, bias: bool = False) -> list[Rule]:
    """A `ConvNorm` of ours, and their convolution and normalisation."""
    return [
        *module(f"{ours}.conv", conv, *(("weight", "bias") if bias else ("weight",))),
        *batch_norm(f"{ours}.norm", norm),
    ]
