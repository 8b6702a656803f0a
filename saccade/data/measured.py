"""Data to learn from and to measure on, with the size of every picture; boxes are checked against these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from saccade.config import DataConfig
from saccade.data.loader import measure_sizes
from saccade.data.source import Source
from saccade.data.sources import Splits, fit_to_pictures, open_splits


def open_measured(path: Path, val: str | None, data: DataConfig) -> tuple[Splits, np.ndarray, np.ndarray]:
    """The splits, and height and width of each of their pictures, int64 (N, 2)."""
    splits = open_splits(path, val=val, val_fraction=data.val_fraction, seed=data.split_seed)
    train, train_sizes, notes = measured(splits.train, data)
    held_out, val_sizes, more = measured(splits.val, data)
    return replace(splits, train=train, val=held_out, notes=[*splits.notes, *notes, *more]), train_sizes, val_sizes


def measured(source: Source, data: DataConfig) -> tuple[Source, np.ndarray, list[str]]:
    """A source that fits its pictures, their sizes, and what had to be changed."""
    sizes = measure_sizes(source, data)
    fitted, notes = fit_to_pictures(source, sizes)
    return fitted, sizes, notes
