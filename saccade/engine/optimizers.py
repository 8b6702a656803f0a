"""Which parameter moves by which rule, and how far at which step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from saccade.config import OptimizerConfig, ScheduleConfig
from saccade.engine.muon import Muon
from saccade.models.classifier import Classifier
from saccade.models.detector import Detector
from saccade.models.translator import Translator


def build_optimizers(model: Classifier | Detector | Translator, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside the blocks and AdamW for the rest.

    Muon's steps are as large as AdamW's, so that one learning rate serves both. Layer-wise decay is
    https://arxiv.org/abs/2106.08254.
    """
    adam: dict[tuple[float, float], list[nn.Parameter]] = {}
    muon: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = model.depth_of(name)
        lr_scale = config.layer_decay ** (model.depth - depth)
        if isinstance(model, Detector) and model.in_backbone(name):
            lr_scale *= config.backbone_lr
        decay = config.weight_decay if decays(name, parameter) else 0.0
        groups = muon if config.name == "muon" and is_for_muon(model, name, parameter) else adam
        groups.setdefault((lr_scale, decay), []).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if adam:
        betas = (config.beta1, config.beta2)
        optimizers.append(torch.optim.AdamW(_groups(adam), lr=0.0, betas=betas, fused=_can_fuse(model)))
    if muon:
        optimizers.append(Muon(_groups(muon), lr=0.0, momentum=config.momentum))
    return optimizers


def is_for_muon(model: Classifier | Detector | Translator, name: str, parameter: Tensor) -> bool:
    """Matrices inside the blocks: not kernels of convolutions, nor what comes before or after the blocks."""
    return parameter.ndim == 2 and 0 < model.depth_of(name) < model.depth and decays(name, parameter)


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices and kernels: not for biases, norms, scales, tokens and tables of positions."""
    return parameter.ndim > 1 and not name.endswith(("class_token", "registers", "table", "logit_scale"))


def _groups(by_setting: dict[tuple[float, float], list[nn.Parameter]]) -> list[dict[str, Any]]:
    return [
        {"params": parameters, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay), parameters in by_setting.items()
    ]


def _can_fuse(model: nn.Module) -> bool:
    return next(model.parameters()).device.type in ("cpu", "cuda")


def lr_share(step: int, total: int, config: ScheduleConfig) -> float:
    """The share of the highest learning rate at a step (from 0): linear warm-up, then down to the end of the run.

    By the root of the steps is https://arxiv.org/abs/1706.03762, whose constant is the highest learning rate here.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.shape == "inverse_sqrt":
        return math.sqrt((warmup + 1) / (step + 1))
    progress = (step - warmup) / max(1, total - warmup)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
