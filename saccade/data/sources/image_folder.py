"""A folder per class, with or without folders for the splits above them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from saccade.config import closest
from saccade.data.decode import SUFFIXES
from saccade.data.source import SPLIT_NAMES, FileSource, Found, Problem, sort_names
from saccade.data.sources.table import TEXTS, lists_texts
from saccade.errors import UserError
from saccade.words import counted


def find(path: Path) -> Found:
    """Read `path/class/**/picture` or `path/split/class/**/picture`."""
    found = Found("image_folder")
    folders = visible_folders(path)
    by_split: dict[str, list[Path]] = {}
    for folder in folders:
        if folder.name.lower() in SPLIT_NAMES:
            by_split.setdefault(SPLIT_NAMES[folder.name.lower()], []).append(folder)
    if "train" not in by_split:
        found.splits["all"] = _read_classes(path, found)
        return found
    for split, same in by_split.items():
        if len(same) > 1:
            names = ", ".join(folder.name for folder in same)
            found.problems.append(
                Problem("two_splits", str(path), f"the folders {names} are all the {split} split; keep one of them")
            )
        found.splits[split] = _read_classes(same[0], found)
    others = [folder.name for folder in folders if folder.name.lower() not in SPLIT_NAMES]
    if others:
        found.notes.append(f"{path}: beside the splits, these folders are left out: {', '.join(others)}")
    return found


def _read_classes(path: Path, found: Found) -> FileSource:
    folders = visible_folders(path)
    files: list[str] = []
    labels: list[str] = []
    for folder in folders:
        inside, others = walk_pictures(folder)
        files += inside
        labels += [folder.name] * len(inside)
        if others:
            found.notes.append(f"{folder}: left out what is not a picture by its name: {_some(others)}")
    loose, others = walk_pictures(path, deep=False)
    if loose and folders:
        lie = f"{counted(len(loose), 'picture')} that {'lies' if len(loose) == 1 else 'lie'} in no class folder"
        found.notes.append(f"{path}: left out {lie}: {_some(loose)}")
    if not files:
        found.problems.append(Problem("no_pictures", str(path), _why_empty(folders, loose, others)))
    class_names = sort_names(folder.name for folder in folders)
    position = {name: k for k, name in enumerate(class_names)}
    return FileSource(
        name=path.name,
        path=path,
        class_names=class_names,
        labels=np.array([position[label] for label in labels], dtype=np.int64),
        files=tuple(files),
    )


def _why_empty(folders: list[Path], loose: list[str], others: list[str]) -> str:
    if loose:
        return "pictures, but no class folders; put the pictures of each class into a folder of the class's name"
    tables = [name for name in others if Path(name).suffix.lower() in (".csv", ".jsonl")]
    if texts := [name for name in tables if lists_texts(Path(name))]:
        return f"no pictures in class folders, and {texts[0]} has columns of languages; {TEXTS}"
    if tables:
        return f"no pictures in class folders; if the table {tables[0]} lists them, give that file instead"
    if folders:
        return f"no pictures in any of its folders; pictures end in {', '.join(SUFFIXES)}"
    return "no pictures; a folder of classes holds a folder of pictures for each class"


def visible_folders(path: Path) -> list[Path]:
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return [entry for entry in entries if entry.is_dir() and entry.name != "__MACOSX"]


def walk_pictures(path: Path, deep: bool = True) -> tuple[list[str], list[str]]:
    """Sorted files below `path`: pictures by their suffix, and all others. Links are followed, hidden names are not."""
    pictures: list[str] = []
    others: list[str] = []
    seen = set()
    for root, folders, files in os.walk(path, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where we came from
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if deep else []
        for name in sorted(files):
            if not name.startswith("."):
                kind = pictures if os.path.splitext(name)[1].lower() in SUFFIXES else others
                kind.append(os.path.join(root, name))
    return pictures, others


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are given, folders searched by suffix. Faults of all paths are one UserError."""
    found: list[Path] = []
    faults: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside, _ = walk_pictures(path)
            found += map(Path, inside)
            if not inside:
                faults.append(f"{path}: no pictures in this folder; pictures end in {', '.join(SUFFIXES)}")
        elif path.exists():
            found.append(path)
        else:
            faults.append(f"{path}: does not exist{near_names(path)}")
    if not found and not faults:
        faults.append("no pictures were given; name files or folders")
    if faults:
        raise UserError("\n".join(faults))
    return found


def open_pictures(paths: Iterable[str | Path]) -> FileSource:
    """Unlabelled pictures as a source: every label is -1."""
    files = tuple(str(path) for path in find_pictures(paths))
    path = Path(os.path.commonpath([os.path.abspath(file) for file in files]))
    return FileSource(
        name="pictures", path=path, class_names=(), labels=np.full(len(files), -1, dtype=np.int64), files=files
    )


def near_names(path: Path) -> str:
    """`; did you mean ...?` from what lies where `path` does not; or how far the path exists."""
    parent = path.parent
    if not parent.exists():
        while not parent.exists():
            path, parent = parent, parent.parent
        return f"; {parent} does, but it holds no {path.name}{_in_folder(path, parent)}"
    return _in_folder(path, parent)


def _in_folder(path: Path, parent: Path) -> str:
    try:
        siblings = [entry.name for entry in parent.iterdir()]
    except OSError:
        return ""
    hint = closest(path.name, siblings)
    return hint or ("; check the spelling" if siblings else "; its folder is empty")


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(Path(name).name for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
