"""A first look: a small Vision Transformer learns the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saccade.api import evaluate, train
from saccade.backbones.vit import ViT
from saccade.drawing import position_similarity
from saccade.engine.predict import Model
from saccade.errors import UserError
from saccade.predictions import contact_sheet

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def demo(out: str, *, minutes: float = 1.5, seed: int = 0) -> dict[str, Any]:
    """Write the digits as pictures, train, evaluate on held-out ones, draw. Returns the figures."""
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; choose another folder with --out")
    data = folder / "digits"
    write_digits(data)
    run = folder / "run"
    train(str(data), resume=None, settings={**settings(), "minutes": minutes, "seed": seed, "out": str(run)})
    report = evaluate(str(run), str(data / "val"))
    report.save(folder / "evaluation")
    model = Model.load(str(run))
    files = sorted((data / "val").glob("*/*.png"))
    chosen = [files[i] for i in np.random.default_rng(seed).permutation(len(files))[:24]]
    predictions = model.predict(chosen, attention=True)
    sheet = contact_sheet(predictions, folder / "predictions.png", [file.parent.name for file in chosen])
    assert isinstance(model.network.backbone, ViT)
    positions = model.network.backbone.positions
    assert positions is not None
    drawn = position_similarity(
        positions.table.detach().float().cpu().numpy(), positions.grid, folder / "positions.png"
    )
    print(f"{100 * report.top1:.1f} % of {report.count} held-out digits are named rightly.", file=sys.stderr)
    print(f"pictures: {sheet} (what was seen), {drawn} (which positions the model holds to be alike)", file=sys.stderr)
    print(
        "\nNow your own: put pictures in a folder per class, then\n"
        "  saccade inspect my_pictures/\n  saccade train my_pictures/ --minutes 10",
        file=sys.stderr,
    )
    return {
        "top1": report.top1,
        "count": report.count,
        "predictions": str(sheet),
        "positions": str(drawn),
        "run": str(run),
    }


def settings() -> dict[str, Any]:
    """A ViT on pictures of 8 x 8 pixels, a token for every 2 x 2. They are centred, so crops are gentle."""
    return {
        "model": "vit_micro",
        "network": {"patch_size": 2, "drop_path": 0.05},
        "preprocessing": {"image_size": 8, "max_aspect": 1.0},
        "augment": {
            "crop_scale": [0.8, 1.0],
            "crop_aspect": [0.85, 1.18],
            "hflip": 0.0,
            "policy": "none",
            "cutmix": 0.0,
            "mixup": 0.0,
        },
        "optimizer": {"name": "muon"},
        "loss": {"label_smoothing": 0.05},
        "lr": 4e-3,
        "batch_size": 64,
        "precision": "float32",
    }


def write_digits(folder: Path) -> None:
    """1,797 digits of 8 x 8 pixels (scikit-learn, after UCI's optical digits, CC BY 4.0); every fifth is held out."""
    from sklearn.datasets import load_digits

    pixels_of_all, labels = load_digits(return_X_y=True)
    for i, (pixels, label) in enumerate(zip(pixels_of_all.reshape(-1, 8, 8), labels, strict=True)):
        place = folder / ("val" if i % 5 == 0 else "train") / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.round(255 * pixels / 16).astype(np.uint8))
        picture.save(place / f"{i:04d}.png")
