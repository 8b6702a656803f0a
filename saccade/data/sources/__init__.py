"""Formats on disk. A format is a module with a `find`; here they are told apart, split and checked."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from saccade.data.source import SPLIT_NAMES, BoxSource, Found, Problem, Source, raise_problems, sort_names
from saccade.data.sources import boxes, coco, hf_dataset, image_folder, table, voc, webdataset, yolo
from saccade.data.sources.image_folder import find_pictures, near_names, open_pictures
from saccade.errors import UserError
from saccade.words import HOLDS, counted

__all__ = [
    "Splits",
    "detect_format",
    "find",
    "find_pictures",
    "fit_to_pictures",
    "open_pictures",
    "open_source",
    "open_splits",
]

Format = Literal["image_folder", "table", "webdataset", "hf_dataset", "coco", "voc", "yolo"]
Place = str | Path | Sequence[str | Path]  # several only for tar shards
# How folders inside a data set of boxes are called, in lower case and without the year
INNER = {*coco.ANNOTATION_FOLDERS, *voc.ANNOTATION_FOLDERS, *SPLIT_NAMES, "imagesets", "main", "layout"} | {
    name.lower() for name in (*coco.PICTURE_FOLDERS, *voc.PICTURE_FOLDERS)
}


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
        suffix = path.suffix.lower()
        if suffix in table.SUFFIXES:
            return "table"
        if suffix == ".json":
            return "coco"
        if suffix in yolo.YAML_SUFFIXES:
            return "yolo"
        known = ", ".join([*table.SUFFIXES, ".json", *yolo.YAML_SUFFIXES])
        raise UserError(
            f"{path}: not data to learn from; give a folder, a table or annotations ({known}), or a .tar shard"
        )
    if hf_dataset.is_dataset(path):
        return "hf_dataset"
    if webdataset.list_shards(path):
        return "webdataset"
    return _detection_format(path) or "image_folder"


def _detection_format(path: Path) -> Literal["coco", "voc", "yolo"] | None:
    """A file that names classes and splits says more than how folders are called."""
    if coco.list_files(path):
        return "coco"
    if yolo.list_yaml(path) is not None:
        return "yolo"
    if voc.find_units(path):
        return "voc"
    return "yolo" if yolo.has_labels(path) else None


def find(path: Place) -> Found:
    """Everything that lies there and everything wrong with it; a UserError only where there is nothing at all."""
    found = _find(path)
    nothing = not any(len(source) for source in found.splits.values())
    if nothing and found.format != "coco" and (above := _set_above(path)) is not None:
        folder, form = above
        what = f"is a part of the {form} data set in {folder}, without what else belongs to it; give {folder} instead"
        found.problems[:] = [Problem("part_of_set", str(path), what)]  # of which all else is a consequence
    if not any(problem.refuses for problem in found.problems):
        for split, source in found.splits.items():
            if not len(source):
                what = f"no picture of the {split} split is left after what is left out; mend it, or remove the split"
                found.problems.append(Problem("no_pictures", str(source.path), what))
    return found


def choose_split(splits: Mapping[str, Source], *names: str) -> Source | None:
    """The first of these that is there, also where it is empty: that is a fault, and no other split's matter."""
    return next((splits[name] for name in names if name in splits), None)


def _set_above(path: Place) -> tuple[Path, str] | None:
    """The data set of boxes whose inner folder this is, and its format."""
    if not isinstance(path, str | Path) or not Path(path).is_dir():
        return None
    path = Path(path) if Path(path).name not in ("", "..") else Path(os.path.abspath(path))
    for folder in path.parents[:2]:
        if any(part.lower().rstrip("0123456789") not in INNER for part in path.relative_to(folder).parts):
            break
        try:
            form = _detection_format(folder)
        except UserError:  # annotations of another kind
            continue
        if form is not None:
            return folder, {"coco": "COCO", "voc": "Pascal VOC", "yolo": "YOLO"}[form]
    return None


def _find(path: Place) -> Found:
    match detect_format(path):
        case "webdataset":
            return webdataset.find(_shards(path) or webdataset.list_shards(Path(str(path))))
        case "table":
            return table.find(Path(str(path)))
        case "hf_dataset":
            return hf_dataset.find(Path(str(path)))
        case "image_folder":
            return image_folder.find(Path(str(path)))
        case "coco":
            return coco.find(Path(str(path)), coco.list_files(Path(str(path))))
        case "voc":
            return voc.find(Path(str(path)), voc.find_units(Path(str(path))))
        case "yolo":
            return yolo.find(Path(str(path)))


def open_splits(path: Place, *, val: Place | None = None, val_fraction: float = 0.2, seed: int = 0) -> Splits:
    """Data to learn from: its own splits, `val` from elsewhere, or a seeded, stratified part held out.

    What is wrong with the data, as far as it shows without decoding, is one UserError; what a run can do without is a
    note for each kind.
    """
    found = find(path)
    problems, notes = list(found.problems), list(found.notes)
    train = choose_split(found.splits, "train", "all")
    if train is None:
        raise_problems([problem for problem in problems if problem.refuses], str(path))
        raise UserError(f"{path}: no train split among {', '.join(found.splits)}; rename one, or give one by --val")
    if val is not None:
        beside = find(val)
        if beside.task != found.task:
            raise UserError(f"{val}: holds {HOLDS[beside.task]}, but {path} {HOLDS[found.task]}; give both of one kind")
        problems += beside.problems
        notes += beside.notes
        held_out = _only_split(beside, str(val))
    else:
        held_out = choose_split(found.splits, "val", "test")
        if "val" in found.splits and "test" in found.splits:
            notes.append(f"{path}: val is used to choose the best weights; test is left for `saccade evaluate`")
        elif "test" in found.splits:
            notes.append(f"{path}: no val split, test is used as such")
    if held_out is not None:
        notes += _in_both(train, held_out, str(path))
    class_names = unite_classes([train] if held_out is None else [train, held_out])
    train = train.with_classes(class_names)
    held_out = held_out.with_classes(class_names) if held_out is not None else None
    problems += class_problems(train, held_out, str(path), problems)
    raise_problems([problem for problem in problems if problem.refuses], str(path))
    notes += boxes.drop_notes(problems, str(path))
    if held_out is None:
        train, held_out = split_off(train, val_fraction, seed)
        if not len(held_out):
            few = "one picture" if found.task == "detect" else "one picture a class"
            raise UserError(f"{path}: {few} is too few to hold any out; add some, or use --val")
        out, all_of_them = len(held_out), len(train) + len(held_out)
        notes.append(f"{path}: no val split, {out} of {all_of_them} pictures {'is' if out == 1 else 'are'} held out")
    what = "objects" if isinstance(train, BoxSource) else "pictures"
    for source, use in ((train, "learn from"), (held_out, "measure on")):
        empty = [name for name, count in zip(class_names, source.counts(), strict=True) if count == 0]
        if empty:
            notes.append(f"{source.path}: no {what} of {', '.join(empty)} to {use}")
    return Splits(train, held_out, found.format, notes, found.task)


def _in_both(train: Source, held_out: Source, where: str) -> list[str]:
    """A note where pictures are learnt from and measured on; of copies under other names, `inspect` knows."""
    learnt = {os.path.abspath(train.id(i)) for i in range(len(train))}
    same = [name for name in map(held_out.id, range(len(held_out))) if os.path.abspath(name) in learnt]
    if not same:
        return []
    which = f"{counted(len(same), 'picture')} {'is' if len(same) == 1 else 'are'}"
    such = f"such as {same[0]}" if len(same) > 1 else same[0]
    return [f"{where}: {which} both learnt from and measured on, which flatters the measure, {such}"]


def open_source(path: Place, split: str | None = None, notes: list[str] | None = None) -> Source:
    """One split to measure on: a split's own path, or a data set's with the split's name (else its val, else test).

    What is left out of it is added to `notes`.
    """
    found = find(path)
    source = _one_split(found, path, split)
    if notes is not None:
        others = tuple(f"{other.path}, " for other in found.splits.values() if other.path != source.path)
        notes += boxes.drop_notes([each for each in found.problems if not each.where.startswith(others)], str(path))
    return source


def _one_split(found: Found, path: Place, split: str | None) -> Source:
    raise_problems([problem for problem in found.problems if problem.refuses], str(path))
    if split is None and found.task == "detect" and isinstance(path, str | Path) and Path(path).is_file():
        split = "train" if "train" in found.splits and Path(path).suffix == ".json" else None  # its siblings came along
    if split is None:
        return _only_split(found, str(path))
    name = SPLIT_NAMES.get(split.lower(), split)
    if name not in found.splits:
        raise UserError(f"{path}: no split {split!r}; there is {', '.join(found.splits)}")
    class_names = unite_classes(list(found.splits.values()))
    return found.splits[name].with_classes(class_names)


def fit_to_pictures(source: Source, sizes: np.ndarray) -> tuple[Source, list[str]]:
    """Boxes against the pictures as they are, of `sizes` int64 (N, 2); and a note for each kind of fault.

    Pictures stay in their places. Only boxes are changed, see `boxes.fit`; a UserError where none is left, or where
    they are of another form.
    """
    if not isinstance(source, BoxSource):
        return source, []
    fitted, problems = boxes.fit(source, sizes)
    raise_problems([problem for problem in problems if problem.refuses], str(source.path))
    if len(source.boxes) and not len(fitted.boxes):
        raise_problems(problems, str(source.path))
    return fitted, boxes.drop_notes(problems, str(source.path))


def unite_classes(sources: list[Source]) -> tuple[str, ...]:
    """The classes of all sources: in their given order where they agree on it, else sorted.

    Those of boxes keep the first one's order, which their files state; what only others have comes after.
    """
    if all(source.class_names == sources[0].class_names for source in sources):
        return sources[0].class_names
    names = [name for source in sources for name in source.class_names]
    return tuple(dict.fromkeys(names)) if isinstance(sources[0], BoxSource) else sort_names(names)


def class_problems(train: Source, val: Source | None, where: str, known: Sequence[Problem] = ()) -> list[Problem]:
    """What is wrong with the classes of a training split, beside what is `known`; both sources have the same ones."""
    if not len(train):
        return []  # the format's reader has said so
    if isinstance(train, BoxSource):
        return _box_problems(train, val, known)
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


def _box_problems(train: BoxSource, val: Source | None, known: Sequence[Problem]) -> list[Problem]:
    """One class is enough, and pictures without objects are; but something must be there to find."""
    if any(problem.refuses for problem in known):
        return []  # of which this may be a consequence
    problems = []
    roots = {problem.root for problem in known}
    root = roots.pop() if len(roots) == 1 else ""  # of which this is a consequence
    for source, use in ((train, "to learn from"), (val, "to measure on")):
        if isinstance(source, BoxSource) and source.crowd.all():  # also where there is nothing
            what = f"no objects {use}{_left_out(known)}annotate some"
            problems.append(Problem("no_objects", str(source.path), what, root=root))
    return problems


def _left_out(known: Sequence[Problem]) -> str:
    """How much, and the first of the commonest kind, which may be the cause."""
    if not known:
        return "; "
    ((kind, _),) = Counter(problem.kind for problem in known).most_common(1)
    first = next(problem for problem in known if problem.kind == kind)
    return f" after what is left out ({counted(len(known), 'fault')}), most often as in {first}; mend that, or "


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
