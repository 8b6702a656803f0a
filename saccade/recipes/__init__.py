"""From data and a few wishes to the settings of a run. A recipe is a function; every flag overrides what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saccade.backbones import backbone_row
from saccade.config import RunConfig, build_config, closest, merge
from saccade.data.loader import measure_sizes
from saccade.data.sources import open_splits
from saccade.engine.device import choose_device
from saccade.errors import UserError
from saccade.recipes.classify import fine_tune, large, linear_probe, small_from_scratch
from saccade.recipes.summary import DataSummary
from saccade.weights.load import find_weights
from saccade.weights.model_file import load_model_file

FEWEST_TOKENS = 8  # a side; with fewer there is little to attend to
GPU_SPEED = 30  # of a GPU, in two cores of a processor; only to choose a size of pictures

RECIPES: dict[str, Callable[[DataSummary], dict[str, Any]]] = {
    "small_from_scratch": small_from_scratch,
    "fine_tune": fine_tune,
    "linear_probe": linear_probe,
    "large": large,
}


def resolve(changes: Mapping[str, Any]) -> RunConfig:
    """The settings of a run: the recipe for this data, with the given settings on top. Faults are found before work."""
    asked = build_config({**changes, "data": changes.get("data", "")})
    if not asked.data:
        raise UserError("no data: give a folder, a table, tar shards or a dataset, as in `saccade train photos/`")
    if "model" in changes:
        backbone_row(asked.model)
    name = choose_recipe(asked)
    start: dict[str, Any] = {}
    if asked.weights is not None:
        _, card = load_model_file(find_weights(asked.weights))
        start = {
            "model": card.model,
            "network": card.network.model_dump(exclude_none=True),
            "preprocessing": card.preprocessing.model_dump(mode="json"),
        }
    summary = summarise(asked)
    if name == "auto":
        name = "large" if summary.samples >= 100_000 else "small_from_scratch"
    settings = merge(merge(RECIPES[name](summary), start), changes)
    if any(changes.get(length) is not None for length in ("minutes", "steps")):
        settings["epochs"] = changes.get("epochs")  # the recipe's own length is only for those who name none
    settings["recipe"] = name
    row = backbone_row(str(settings.get("model", RunConfig.model_fields["model"].default)))
    network = build_config({"data": asked.data, "network": settings.get("network", {})}).network
    preprocessing = dict(settings.get("preprocessing", {}))
    stride = preprocessing["stride"] = row.changed(network).stride
    wanted = int(preprocessing.get("image_size", row.image_size))
    given = asked.weights is not None or "image_size" in changes.get("preprocessing", {})
    preprocessing["image_size"] = max(wanted, stride if given else FEWEST_TOKENS * stride)
    settings["preprocessing"] = preprocessing
    if "out" not in settings:
        settings["out"] = str(free_run_folder(asked.data))
    return build_config(settings)


def choose_recipe(asked: RunConfig) -> str:
    if asked.recipe != "auto":
        if asked.recipe not in RECIPES:
            raise UserError(f"recipe: unknown {asked.recipe!r}{closest(asked.recipe, tuple(RECIPES))}")
        return asked.recipe
    if asked.weights is not None:
        return "linear_probe" if asked.train_part == "head" else "fine_tune"
    return "auto"


def summarise(config: RunConfig, probe: int = 512) -> DataSummary:
    """Count the samples, and look at the sizes of up to `probe` of them."""
    sources = config.sources
    splits = open_splits(Path(config.data), val=config.val, val_fraction=sources.val_fraction, seed=sources.split_seed)
    chosen = np.random.default_rng(0).permutation(len(splits.train))[:probe]
    sizes = measure_sizes(splits.train.subset(np.sort(chosen)), sources)
    readable = sizes[sizes.min(axis=1) > 0]
    height, width = np.median(readable, axis=0) if len(readable) else (224, 224)
    faster = GPU_SPEED if choose_device(config.device).type == "cuda" else 1
    seconds = None if config.minutes is None else 60 * config.minutes * faster
    return DataSummary(len(splits.train), len(splits.train.class_names), int(height), int(width), seconds)


def free_run_folder(data: str) -> Path:
    """`runs/NAME`, or `runs/NAME-2`, ... where that holds a run already."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("under torchrun, name the run's folder with --out, so that all processes use the same one")
    name = Path(data).resolve().stem or "run"
    candidates = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10_000))
    return next(folder for folder in candidates if not folder.exists())


@dataclass(frozen=True)
class Described:
    """A recipe's name and the first line of its docstring, for listings."""

    name: str
    summary: str


def list_recipes() -> list[Described]:
    return [Described(name, (recipe.__doc__ or "").strip().splitlines()[0]) for name, recipe in RECIPES.items()]
