"""From data and a few wishes to the settings of a run. A recipe is a function; every flag overrides what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saccade.backbones.base import Row
from saccade.config import RunConfig, build_config, closest, merge
from saccade.data.loader import measure_sizes
from saccade.data.sources import open_splits
from saccade.data.text.splits import holds_text
from saccade.engine.device import choose_device
from saccade.engine.optimizers import is_for_muon
from saccade.errors import UserError
from saccade.models import build_network, model_row, task_of
from saccade.models.classifier import Classifier
from saccade.models.detector import Detector, DetectorRow
from saccade.models.recurrent import RecurrentRow
from saccade.recipes.classify import fine_tune, large, linear_probe, small_from_scratch
from saccade.recipes.detect import detect, detect_fine_tune, of_family
from saccade.recipes.summary import DataSummary
from saccade.recipes.translate import refuse_settings, resolve_text, translate, translate_fine_tune
from saccade.weights.load import load_weights
from saccade.words import DOES, HOLDS

FEWEST_TOKENS = 8  # a side; with fewer there is little to attend to
LARGE_ENOUGH = 128  # pixels a side, whatever the stride
GPU_SPEED = 30  # of a GPU, in two cores of a processor; only to choose a size of pictures

RECIPES: dict[str, Callable[[DataSummary], dict[str, Any]]] = {
    "small_from_scratch": small_from_scratch,
    "fine_tune": fine_tune,
    "linear_probe": linear_probe,
    "large": large,
    "detect": detect,
    "detect_fine_tune": detect_fine_tune,
    "translate": translate,
    "translate_fine_tune": translate_fine_tune,
}
# by task: from scratch, from weights, from weights with a frozen backbone; then the others
USUAL = {
    "classify": ("small_from_scratch", "fine_tune", "linear_probe", "large"),
    "detect": ("detect", "detect_fine_tune", "detect_fine_tune"),
}


def resolve(changes: Mapping[str, Any]) -> RunConfig:
    """The settings of a run: the recipe for this data, with the given settings on top. Faults are found before work."""
    asked = build_config({**changes, "data": changes.get("data", "")})
    if not asked.data:
        raise UserError("no data: give a folder, a table, tar shards or a dataset, as in `saccade train photos/`")
    if asked.task == "translate" or (asked.task is None and holds_text(Path(asked.data))):
        config = resolve_text(changes, asked)
        if config.activation_checkpointing and isinstance(model_row(config.model), RecurrentRow):
            raise UserError(f"--activation-checkpointing: {config.model} has no blocks to compute twice; leave it out")
        return config if config.out else config.model_copy(update={"out": str(free_run_folder(asked.data))})
    named = model_row(asked.model) if "model" in changes else None
    start: dict[str, Any] = {}
    row: Row | None = None
    if asked.weights is not None:
        loaded = load_weights(asked.weights)
        row = loaded.row
        start = {"model": loaded.card.model, "preprocessing": loaded.card.preprocessing.model_dump(mode="json")}
    summary = summarise(asked)
    holds = f"{asked.data} holds {HOLDS[summary.task]}"
    refuse_settings(changes, ("text", "decoding"), "texts", holds)
    if summary.task == "detect":
        refuse_settings(changes, ("loss",), "classes and texts", holds)
        if "crop_scale" in changes.get("augment", {}):
            raise UserError(f"--augment.crop-scale: is for classes, and {holds}; use --augment.zoom, or leave it out")
    name = choose_recipe(asked, summary)
    if row is not None and task_of(row) != summary.task:
        start = {"preprocessing": {k: v for k, v in start["preprocessing"].items() if k in ("mean", "std")}}
        if isinstance(row, DetectorRow):
            raise UserError(
                f"--weights {asked.weights}: holds a detector, and {asked.data} holds {HOLDS[summary.task]}; "
                "give weights of a classifier or of a backbone"
            )
        row = None  # of a backbone: the detector around it is chosen by the recipe, or named
    recipe = merge(RECIPES[name](summary), start)
    if asked.weights is None:
        check_from_scratch(name, recipe, changes)
    if row is None:
        row = named or model_row(str(recipe.get("model")))
    if isinstance(row, DetectorRow):
        recipe = merge(recipe, of_family(row.family, asked.weights is not None))
    check_task(row, str(changes.get("model") or recipe.get("model")), summary, asked)
    parts = [row, row.backbone] if isinstance(row, DetectorRow) else [row]
    known = {field.name for part in parts for field in fields(part)}
    recipe["network"] = {name: value for name, value in recipe.get("network", {}).items() if name in known}
    settings = merge(recipe, changes)
    if any(changes.get(length) is not None for length in ("minutes", "steps")):
        settings["epochs"] = changes.get("epochs")  # the recipe's own length is only for those who name none
    settings["recipe"], settings["task"] = name, summary.task
    network = build_config({"data": asked.data, "network": settings.get("network", {})}).network
    if settings.get("optimizer", {}).get("name") == "muon" and not has_part_for_muon(row.changed(network), settings):
        if "name" in changes.get("optimizer", {}):
            head = settings.get("train_part") == "head"
            what = "the head alone learns" if head else f"{settings.get('model')} has no matrices inside its blocks"
            raise UserError(f"--optimizer.name muon: {what}, so that all would move by AdamW; leave it out")
        settings = merge(settings, {"optimizer": {"name": "adamw"}})
    preprocessing = dict(settings.get("preprocessing", {}))
    stride = preprocessing["stride"] = row.changed(network).stride
    wanted = int(preprocessing.get("image_size", row.image_size))
    given = asked.weights is not None or "image_size" in changes.get("preprocessing", {})
    preprocessing["image_size"] = max(wanted, stride if given else smallest_size(stride))
    settings["preprocessing"] = preprocessing
    if "out" not in settings:
        settings["out"] = str(free_run_folder(asked.data))
    return build_config(settings)


def has_part_for_muon(row: Row, settings: Mapping[str, Any]) -> bool:
    if settings.get("train_part") == "head":
        return False
    with torch.device("meta"):
        model = build_network(row, 2)
    assert isinstance(model, Classifier | Detector)
    return any(is_for_muon(model, name, parameter) for name, parameter in model.named_parameters())


def smallest_size(stride: int) -> int:
    """The least that the library chooses by itself, in pixels a side."""
    return min(FEWEST_TOKENS * stride, -(-LARGE_ENOUGH // stride) * stride)


def check_from_scratch(name: str, recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """What can only begin from weights is refused without them."""
    such = "--weights, such as a run's folder or timm/resnet18.a1_in1k"
    if {**recipe, **changes}.get("train_part") == "head":
        flag = "--train-part head" if "train_part" in changes else f"--recipe {name}"
        raise UserError(
            f"{flag}: only what follows the backbone learns, and without weights that sees nothing but chance; give "
            f"{such}, or leave {flag.split()[0]} out"
        )
    if "model" not in {**recipe, **changes}:
        raise UserError(f"--recipe {name}: begins from weights; give {such}, or leave --recipe out")


def check_task(row: Row, model: str, summary: DataSummary, asked: RunConfig) -> None:
    """Data, model and an explicit --task must be about the same."""
    if asked.task is not None and asked.task != summary.task:
        raise UserError(f"--task {asked.task}: {asked.data} holds {HOLDS[summary.task]}; leave --task out")
    if task_of(row) != summary.task:
        raise UserError(
            f"--model {model}: {DOES[task_of(row)]}, and {asked.data} holds {HOLDS[summary.task]}; "
            f"`saccade models --task {summary.task}` lists those that fit"
        )


def choose_recipe(asked: RunConfig, summary: DataSummary) -> str:
    if asked.recipe != "auto":
        if asked.recipe not in RECIPES:
            raise UserError(f"recipe: unknown {asked.recipe!r}{closest(asked.recipe, tuple(RECIPES))}")
        fitting = tuple(dict.fromkeys(USUAL[summary.task]))
        if asked.recipe not in fitting:
            raise UserError(
                f"--recipe {asked.recipe}: is not for data like {asked.data}, which holds {HOLDS[summary.task]}; use "
                f"{', '.join(fitting)}, or leave --recipe out"
            )
        return asked.recipe
    scratch, tune, probe = USUAL[summary.task][:3]
    if asked.weights is not None:
        return probe if asked.train_part == "head" else tune
    return "large" if summary.task == "classify" and summary.samples >= 100_000 else scratch


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
    return DataSummary(splits.task, len(splits.train), len(splits.train.class_names), int(height), int(width), seconds)


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
