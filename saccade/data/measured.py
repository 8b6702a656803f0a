"""Data to learn from and to measure on, with the size of every picture; boxes are checked against these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from saccade.config import DataConfig
from saccade.data.decode import Picture, PictureError
from saccade.data.loader import measure_sizes
from saccade.data.source import Source
from saccade.data.sources import Splits, fit_to_pictures, open_splits
from saccade.errors import UserError

FEW, FEW_PIXELS = 64, 1 << 26  # pictures that are decoded before a run, which takes about a second


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


def unreadable(source: Source, sizes: np.ndarray, data: DataConfig, use: str) -> list[str]:
    """What is wrong with each picture that cannot be decoded, as far as a look is cheap: where there are few.

    UserError where none can be read, of `sizes` int64 (N, 2) with (0, 0) where a header is damaged; `use` is said.
    """
    N = len(source)
    cheap = N <= FEW and sizes.prod(axis=1).sum() <= FEW_PIXELS
    looked = N if cheap else 1 if not sizes.any() else 0
    failed = []
    for i in range(looked):
        try:
            Picture(source.read(i), source.id(i), data.max_pixels).whole()
        except PictureError as error:
            failed.append(str(error))
    if failed and len(failed) == looked:
        raise UserError(f"{source.path}: no {use} picture can be read; `saccade inspect` lists them all ({failed[0]})")
    return failed
