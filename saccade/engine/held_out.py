"""What a run held out of its data, so that nobody takes what it learnt from for a measure of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from saccade.config import RunConfig, load_config
from saccade.data.source import Source
from saccade.data.sources import find
from saccade.data.text.pairs import Pairs
from saccade.data.text.splits import find_pairs
from saccade.engine.distributed import World
from saccade.engine.plan import hash_in_plan
from saccade.engine.run_data import open_data
from saccade.errors import UserError


def held_out(run: Path, data: Path, notes: list[str]) -> Source | Pairs | None:
    """The samples of `data` that the run in folder `run` was validated on and did not learn from.

    None where another rule decides: `run` is no folder of a run, `data` not what it learnt from, or `data` has a split
    to measure on. What is to be known is added to `notes`.
    """
    config = _config(run)
    if config is None or config.val is not None or not _same(Path(config.data), data) or _has_splits(config, data):
        return None
    began_with = hash_in_plan(run, data)
    try:
        now = open_data(config, World(), torch.device("cpu"), run)
    except UserError:
        now = None
    if now is None or now.hash() != began_with:
        notes.append(f"{data}: is not as it was when {run} learnt from it; all of it is measured, also what was learnt")
        return None
    val: Any = now.val
    notes.append(
        f"{data}: has no val or test split; measured on the {len(val)} {now.samples} that {run} held out of it "
        "(--split all: on all of them)"
    )
    return val


def _config(run: Path) -> RunConfig | None:
    if not (run / "config.json").is_file() or not (run / "plan.json").is_file():
        return None
    try:
        return load_config(run / "config.json")
    except UserError:
        return None  # the weights alone are asked for


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _has_splits(config: RunConfig, data: Path) -> bool:
    if config.task == "translate":
        names = find_pairs(data, config.text.source, config.text.target).splits
    else:
        names = find(data).splits
    return any(name.startswith(("val", "test")) for name in names)
