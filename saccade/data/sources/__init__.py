"""Formats on disk. A format is a module with a `find`; here they are told apart, split and checked."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from saccade.data.source import SPLIT_NAMES, Found, Problem, Source, raise_problems, sort_names
from saccade.data.sources import hf_dataset, image_folder, table, webdataset
from saccade.data.sources.image_folder import find_pictures, near_names, open_pictures
from saccade.errors import UserError

__all__ = ["Splits", "detect_format", "find", "find_pictures", "open_pictures", "open_source", "open_splits"]

Format = Literal["image_folder", "table", "webdataset", "hf_dataset"]
Place = str | Path | Sequence[str | Path]  # several only for tar shards


@dataclass(frozen=True)
class Splits:
    """What a run learns from and what it is measured on; both with the same classes."""

    train: Source
    val: Source
    format: str
    notes: list[str]
    task: str = "classify"  # what can be learnt from their targets


def detect_format(path: Place) -> Format:
    """What kind of data lies there. UserError where nothing does."""
    if _shards(path):
        return "webdataset"
    path = Path(str(path))
    if not path.exists():
        raise UserError(f"{path}: does not exist{near_names(path)}")
    if path.is_file():
        if path.suffix.lower() in table.SUFFIXES:
            return "table"
        known = ", ".join(table.SUFFIXES)
        raise UserError(f"{path}: not data to learn from; give a folder, a table ({known}) or a .tar shard")
    if hf_dataset.is_dataset(path):
        return "hf_dataset"
    return "webdataset" if webdataset.list_shards(path) else "image_folder"


def find(path: Place) -> Found:
    """Everything that lies there and everything wrong with it; a UserError only where there is nothing at all."""
    match detect_format(path):
        case "webdataset":
            return webdataset.find(_shards(path) or webdataset.list_shards(Path(str(path))))
        case "table":
            return table.find(Path(str(path)))
        case "hf_dataset":
            return hf_dataset.find(Path(str(path)))
        case "image_folder":
            return image_folder.find(Path(str(path)))


def open_splits(path: Place, *, val: Place | None = None, val_fraction: float = 0.2, seed: int = 0) -> Splits:
    """Data to learn from: its own splits, `val` from elsewhere, or a seeded, stratified part held out.

    Everything that is wrong with the data, as far as it shows without decoding, is one UserError.
    """
    found = find(path)
    problems, notes = list(found.problems), list(found.notes)
    train = found.splits.get("train") or found.splits.get("all")
    if train is None:
        raise_problems(problems, str(path))
        raise UserError(f"{path}: no train split among {', '.join(found.splits)}; rename one, or give one by --val")
    if val is not None:
        beside = find(val)
        problems += beside.problems
        notes += beside.notes
        held_out = _only_split(beside, str(val))
    else:
        held_out = found.splits.get("val") or found.splits.get("test")
        if "val" in found.splits and "test" in found.splits:
            notes.append(f"{path}: val is used to choose the best weights; test is left for `saccade evaluate`")
        elif "test" in found.splits:
            notes.append(f"{path}: no val split, test is used as such")
    class_names = unite_classes([train] if held_out is None else [train, held_out])
    train = train.with_classes(class_names)
    held_out = held_out.with_classes(class_names) if held_out is not None else None
    problems += class_problems(train, held_out, str(path))
    raise_problems(problems, str(path))
    if held_out is None:
        train, held_out = split_off(train, val_fraction, seed)
        if not len(held_out):
            raise UserError(f"{path}: one picture a class is too few to hold any out; add some, or use --val")
        notes.append(f"{path}: no val split, {len(held_out)} of {len(train) + len(held_out)} pictures are held out")
    empty = [name for name, count in zip(class_names, held_out.counts(), strict=True) if count == 0]
    if empty:
        notes.append(f"{held_out.path}: no pictures of {', '.join(empty)} to measure on")
    return Splits(train, held_out, found.format, notes, found.task)


def open_source(path: Place, split: str | None = None) -> Source:
    """One split to measure on: a split's own path, or a data set's with the split's name (else its val, else test)."""
    found = find(path)
    raise_problems(found.problems, str(path))
    if split is None:
        return _only_split(found, str(path))
    name = SPLIT_NAMES.get(split.lower(), split)
    if name not in found.splits:
        raise UserError(f"{path}: no split {split!r}; there is {', '.join(found.splits)}")
    class_names = unite_classes(list(found.splits.values()))
    return found.splits[name].with_classes(class_names)


def unite_classes(sources: list[Source]) -> tuple[str, ...]:
    """The classes of all sources: in their given order where they agree on it, else sorted."""
    if all(source.class_names == sources[0].class_names for source in sources):
        return sources[0].class_names
    return sort_names(name for source in sources for name in source.class_names)


def class_problems(train: Source, val: Source | None, where: str) -> list[Problem]:
    """What is wrong with the classes of a training split; both sources have the same class names."""
    if not len(train):
        return []  # the format's reader has said so
    problems = []
    in_train = train.counts()
    for k, name in enumerate(train.class_names):
        if in_train[k]:
            continue
        in_val = f", only {val.counts()[k]} in val" if val is not None and val.counts()[k] else ""
        what = f"the class {name!r} has no pictures to learn from{in_val}; add pictures or remove the class"
        problems.append(Problem("empty_class", str(train.path), what))
    if np.count_nonzero(in_train) < 2:
        name = train.class_names[int(in_train.argmax())]
        what = f"only one class, {name!r}; at least two are needed"
        inner = train.path / name
        if train.path.is_dir() and inner.is_dir() and len(image_folder.visible_folders(inner)) > 1:
            what += f"; did you mean {inner}?"
        problems.append(Problem("one_class", where, what))
    return problems


def split_off(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """The rest and the held-out `fraction`, stratified: a class with two pictures has one on each side."""
    order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(len(source))
    held_out = []
    strata = source.strata()[order]
    for k in np.unique(strata):
        same = order[strata == k]
        count = round(len(same) * fraction)
        held_out.append(same[: min(max(count, 1), len(same) - 1)])
    chosen = np.sort(np.concatenate(held_out))
    return source.subset(np.setdiff1d(np.arange(len(source)), chosen)), source.subset(chosen)


def _only_split(found: Found, where: str) -> Source:
    """The split to measure on."""
    for name in ("val", "test", "all", "train"):
        if name in found.splits:
            return found.splits[name].with_classes(unite_classes(list(found.splits.values())))
    raise UserError(f"{where}: nothing to measure on; it has no val or test split")


def _shards(path: Place) -> list[Path]:
    """Tar files that are named one by one or by a pattern; none where `path` is something else."""
    if not isinstance(path, str | Path):
        shards = [Path(part) for part in path]
        missing = [f"{shard}: does not exist{near_names(shard)}" for shard in shards if not shard.is_file()]
        if missing:
            raise UserError("\n".join(missing))
        return shards
    if Path(path).is_file():
        return [Path(path)] if Path(path).suffix.lower() == ".tar" else []
    return sorted(Path(name) for name in glob.glob(str(path)) if name.endswith(".tar") and Path(name).is_file())
