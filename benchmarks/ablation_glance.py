"""What each part of the house detector is worth: the same short run without it.

    python -m benchmarks.ablation_glance --json benchmarks/results/ablation_glance.json

Every run has the same steps, seed, pictures and settings; only the named part is left out. One seed: differences of
two points of AP are noise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import saccade
from benchmarks.report import Load, Row, merge, table, versions
from saccade.models import DETECTORS, glance
from saccade.models.glance import GlanceConfig
from saccade.tasks import detection
from saccade.tasks.glance_loss import DECODER, GlanceLoss
from saccade.tasks.set_loss import focal_loss

DATA = "../shared/data/cells"
Change = Callable[[ExitStack, dict[str, Any]], None]


def without_nothing(stack: ExitStack, settings: dict[str, Any]) -> None:
    pass


def without_denoising(stack: ExitStack, settings: dict[str, Any]) -> None:
    row = DETECTORS["glance_nano"]
    assert isinstance(row, GlanceConfig)
    stack.enter_context(patch.dict(DETECTORS, glance_nano=replace(row, denoising=0)))


def with_loss(loss: GlanceLoss) -> Change:
    def change(stack: ExitStack, settings: dict[str, Any]) -> None:
        stack.enter_context(patch.dict(detection.LOSSES, glance=lambda row, config: loss))

    return change


def with_settings(**changes: Any) -> Change:
    def change(stack: ExitStack, settings: dict[str, Any]) -> None:
        for name, value in changes.items():
            old = settings.get(name)
            settings[name] = {**old, **value} if isinstance(old, dict) else value

    return change


def without_hint(stack: ExitStack, settings: dict[str, Any]) -> None:
    real = glance.rivalry
    stack.enter_context(patch.object(glance, "rivalry", lambda boxes, logits: torch.zeros_like(real(boxes, logits))))


PARTS: dict[str, Change] = {
    "everything": without_nothing,
    "no several places an object": with_loss(GlanceLoss(several=1)),
    "focal loss in the decoder, not matchability": with_loss(
        GlanceLoss(decoder=replace(DECODER, class_loss=focal_loss))
    ),
    "no hint of rivals": without_hint,
    "no denoising": without_denoising,
    "no mosaic": with_settings(augment={"mosaic": 0.0}),
    "no average of the weights": with_settings(ema={"decay": None}),
    "all in float32": with_settings(precision="float32"),  # differs on devices that multiply in bfloat16
}


def measure(name: str, steps: int, image_size: int) -> Row:
    load = Load()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings: dict[str, Any] = {"augment": {}, "ema": {}}
        PARTS[name](stack, settings)
        run = str(Path(folder) / "run")
        start = time.monotonic()
        saccade.train(
            DATA,
            out=run,
            model="glance_nano",
            steps=steps,
            evaluations=2,
            preprocessing={"image_size": image_size},
            **settings,
        )
        report = saccade.evaluate(run, DATA, split="test")
        seconds = time.monotonic() - start
        figures = {figure: round(value, 4) for figure, value in report.scalars().items()}
    return {
        "name": name,
        "steps": steps,
        "image_size": image_size,
        **figures,
        "seconds": round(seconds),
        "others_cores": round(load.others(), 2),
        "versions": versions(("torch",)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="these parts alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.only or PARTS:
        rows.append(measure(name, options.steps, options.image_size))
        if options.json:
            merge(options.json, rows)
    print(table(rows, {"name": "", "ap": ".3f", "ap50": ".3f", "ap75": ".3f", "seconds": ""}))


if __name__ == "__main__":
    main()
