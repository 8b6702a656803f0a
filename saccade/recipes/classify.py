"""Recipes for classification: a function per regime, from the data to settings."""

from __future__ import annotations

import math
from typing import Any

from saccade.recipes.summary import DataSummary


def small_from_scratch(data: DataSummary) -> dict[str, Any]:
    """A few hundred to some tens of thousands of pictures, nothing pre-trained.

    Command: `saccade train flowers --minutes 5` (1,000 pictures of 5 classes, 128 px short side).
    Cost: 5 minutes on two cores of a processor, about 90 passes at 64 px (80 px in evaluation).
    Result: 77 % top-1 on 400 held-out pictures; a ResNet-18 of timm reaches 71.5 % in the same time. On 4,000 pictures
    of 32 px in 10 classes, 62 % (ResNet-18: 55 %, ViT-Tiny: 30 %); see benchmarks/README.md.
    Stronger augmentation (TrivialAugment, more mixing, smaller crops) was worse at this length: 70 to 72 %.
    """
    tiny = data.short_side <= 48
    size = min(data.short_side, 32) if tiny else affordable_size(data)
    return {
        "model": "cct_nano" if tiny else "cct_small",
        "batch_size": 64,
        "lr": 1e-3,
        "optimizer": {"name": "muon", "weight_decay": 0.05},
        "preprocessing": {"image_size": max(8, size)},
        "augment": {
            "train_share": 1.0 if tiny else 0.8,
            "crop_scale": [0.5 if tiny else 0.35, 1.0],
            "policy": "none",
            "cutmix": 1.0,
            "mixup": 0.2,
            "mix_prob": 0.5,
        },
        "loss": {"label_smoothing": 0.1},
        "epochs": max(10.0, min(300.0, round(300_000 / data.samples))),
    }


def affordable_size(data: DataSummary) -> int:
    """The image size at which the budget lasts for about a hundred passes: on two cores 80 px need 0.3 s a picture."""
    largest = max(80, min(data.short_side, 160))
    if data.seconds is None:
        return largest
    return max(80, min(largest, round(80 * math.sqrt(data.seconds / data.samples / 0.6))))


def fine_tune(data: DataSummary) -> dict[str, Any]:
    """All weights of a pre-trained model, gently: small steps for early layers, https://arxiv.org/abs/2106.08254.

    Command: `saccade train flowers --weights runs/objects32` (a `cct_nano` that saw 4,000 other pictures of 32 px).
    Cost: 30 passes at 32 px, two and a half minutes on one core.
    Result: 71 % top-1 on 400 held-out pictures.
    """
    return {
        "batch_size": 32,
        "lr": 5e-4,
        "optimizer": {"weight_decay": 0.05, "layer_decay": 0.75},
        "network": {"drop_path": 0.1},
        "augment": {"crop_scale": [0.5, 1.0], "mixup": 0.2, "cutmix": 1.0, "mix_prob": 0.5, "erase": 0.1},
        "epochs": 30,
    }


def linear_probe(data: DataSummary) -> dict[str, Any]:
    """Only a new head on frozen features: the fastest look at what pre-trained weights know of this data.

    Command: `saccade train flowers --weights runs/objects32 --train-part head`.
    Cost: 20 passes at 32 px, half a minute on one core.
    Result: 56 % top-1 on 400 held-out pictures.
    """
    return {
        "train_part": "head",
        "batch_size": 64,
        "lr": 3e-3,
        "optimizer": {"weight_decay": 0.0},
        "augment": {"crop_scale": [0.6, 1.0], "policy": "none"},
        "loss": {"label_smoothing": 0.0},
        "epochs": 20,
    }


def large(data: DataSummary) -> dict[str, Any]:
    """A hundred thousand pictures or more from scratch: plain ViT-S after https://arxiv.org/abs/2205.01580.

    Command: `torchrun --nproc-per-node 8 -m saccade train DATA --out runs/large`, on GPUs.
    Cost and result: not measured with saccade yet; the paper reports 76.5 % top-1 on ImageNet-1k after 90 passes.
    """
    return {
        "model": "vit_small",
        "batch_size": 1024,
        "lr": 1e-3,
        "optimizer": {"weight_decay": 0.1},
        "network": {"position": "sinusoidal", "pool": "mean"},
        "augment": {"crop_scale": [0.05, 1.0], "policy": "rand", "magnitude": 10, "mixup": 0.2},
        "loss": {"label_smoothing": 0.0},
        "ema": {"decay": 0.9999},
        "schedule": {"warmup": 0.1},
        "epochs": 90,
    }
