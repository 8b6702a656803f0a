"""What there is: every model with its size and cost, counted from the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from saccade.backbones import BACKBONES, build_backbone
from saccade.models.classifier import Classifier


@dataclass(frozen=True)
class ModelFacts:
    """`gflops`: multiplications and additions, each counted, of one picture of `image_size`^2 pixels."""

    name: str
    parameters: int
    gflops: float
    image_size: int
    stride: int
    about: str


def list_models(classes: int = 1000) -> list[ModelFacts]:
    """Facts of every model with a head of `classes`. Nothing is allocated: the models are built on the meta device."""
    facts = []
    for name, row in BACKBONES.items():
        with torch.device("meta"):
            model = Classifier(build_backbone(name), classes).eval()
            images = torch.empty(1, 3, row.image_size, row.image_size)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(images)
        parameters = sum(p.numel() for p in model.parameters())
        gflops = counter.get_total_flops() / 1e9
        facts.append(ModelFacts(name, parameters, gflops, row.image_size, row.stride, row.about))
    return facts


def render_models() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in ("parameters", "GFLOPs", "pixels", "stride"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("blocks x width", no_wrap=True)
    for model in list_models():
        size = f"{model.parameters / 1e6:.1f} M"
        table.add_row(model.name, size, f"{model.gflops:.2f}", f"{model.image_size}", f"{model.stride}", model.about)
    Console(highlight=False).print(table)
    print("\nWith a head of 1000 classes, at the resolution shown; any other size and shape works too (--image-size).")
