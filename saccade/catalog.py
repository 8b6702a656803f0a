"""What there is: every model with its size and cost, counted from the model itself and kept in `facts.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.json")
GROUPS = {"classify": "classification"}


@dataclass(frozen=True)
class ModelFacts:
    """`gflops`: multiplications and additions, each counted, of one picture of `image_size`^2 pixels."""

    name: str
    family: str
    parameters: int
    gflops: float
    image_size: int
    stride: int
    about: str


def list_models() -> list[ModelFacts]:
    """Facts of every model with a head of 1000 classes, in the order of the tables."""
    return [ModelFacts(**values) for values in json.loads(FACTS.read_text(encoding="utf-8"))]


def count(name: str, classes: int = 1000) -> ModelFacts:
    """The facts of a model, counted, on the meta device where that can be, so that nothing is allocated."""
    try:
        return _count(name, classes, "meta")
    except NotImplementedError:  # orders of tokens by windows need indices with values
        return _count(name, classes, "cpu")


def _count(name: str, classes: int, device: str) -> ModelFacts:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from saccade.backbones import backbone_row, build_backbone
    from saccade.models.classifier import Classifier

    row = backbone_row(name)
    with torch.device(device):
        model = Classifier(build_backbone(name), classes).eval().requires_grad_(False)
        images = torch.zeros(1, 3, row.image_size, row.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
    parameters = sum(p.numel() for p in model.parameters())
    gflops = round(counter.get_total_flops() / 1e9, 3)
    return ModelFacts(name, row.family, parameters, gflops, row.image_size, row.stride, row.about)


def write_facts() -> None:
    """Count all models anew."""
    from saccade.backbones import BACKBONES

    lines = ",\n".join(json.dumps(asdict(count(name))) for name in BACKBONES)
    FACTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def describe_models() -> list[dict[str, Any]]:
    """The facts with the published weights that fit each model, for JSON."""
    from saccade.weights.published import PUBLISHED

    return [asdict(m) | {"weights": [asdict(w) for w in PUBLISHED.get(m.name, ())]} for m in list_models()]


def render_models(name: str | None = None) -> None:
    """The table of all models; with a name, one model and the weights that are published for it."""
    from rich.console import Console
    from rich.table import Table

    from saccade.weights.published import PUBLISHED

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a pipe has no width; in a narrow terminal the forms are cut
    table = Table(box=None, pad_edge=False)
    models = [m for m in list_models() if name in (None, m.name)]
    table.add_column("model", no_wrap=True, min_width=max(len(m.name) for m in models))
    for column in ("parameters", "GFLOPs", "pixels", "stride", "weights"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    table.add_column("form", no_wrap=True, overflow="ellipsis")
    for m in models:
        size = f"{m.parameters / 1e6:.1f} M"
        weights = str(len(PUBLISHED.get(m.name, ())) or "")
        table.add_row(m.name, size, f"{m.gflops:.2f}", f"{m.image_size}", f"{m.stride}", weights, m.about)
    console.print(table)
    if name is None:
        print(
            "\nWith a head of 1000 classes, at the resolution shown; other sizes and shapes work too (--image-size).\n"
            "weights: how many published ones are known to fit; `saccade models NAME` names them."
        )
        return
    for published in PUBLISHED.get(name, ()):
        print(f"\n{published.name}\n  {published.training_data}; licence: {published.licence}")
    if not PUBLISHED.get(name):
        print("\nNo published weights are known for it.")
