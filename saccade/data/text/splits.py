"""Which splits of texts lie in a folder or a file, and which of them are learnt from and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saccade.config import closest
from saccade.data.source import SPLIT_NAMES, Problem, raise_problems
from saccade.data.text.lines import read_lines
from saccade.data.text.pairs import SUFFIXES, FoundPairs, Pairs, split_name, stem_of
from saccade.data.text.parallel import find_parallel, parallel_files
from saccade.data.text.tables import find_table, is_text_table, refuse_other_table, table_files, text_tables
from saccade.errors import UserError


@dataclass(frozen=True)
class TextSplits:
    train: Pairs
    val: Pairs
    notes: list[str]


def holds_text(path: Path) -> bool:
    """Is this parallel text, by its names alone?"""
    if path.is_file():
        of_texts = stem_of(path)[1] in SUFFIXES and is_text_table(path)
        return bool(of_texts) or (of_texts is None and stem_of(path)[1] == ".tsv")
    return path.is_dir() and bool(parallel_files(path) or any(is_text_table(file) for file in table_files(path)))


def find_pairs(
    path: Path, source: str | None = None, target: str | None = None, usual: tuple[str, str] | None = None
) -> FoundPairs:
    """Every split that lies there, with every fault; a UserError only where there is nothing to look at.

    `source` and `target`: which language is translated into which, as asked; else it is `usual`, where both are there.
    """
    found = FoundPairs()
    if not path.exists():
        raise UserError(f"{path}: does not exist; check the spelling")
    if path.is_file():
        if stem_of(path)[1] not in SUFFIXES:
            raise UserError(f"{path}: not parallel text; give a folder with NAME.en and NAME.de, a .tsv or a .jsonl")
        tables, parallel = [(split_name(stem_of(path)[0]) or "all", path)], {}
    else:
        parallel, tables = parallel_files(path), text_tables(path)
    if parallel:
        find_parallel(path, parallel, (source, target), usual, found)
        usual = next((pairs.languages for pairs in found.splits.values()), usual)
        others = [file for name, file in tables if name != "val" and not name.startswith(("train", "test"))]
        if others:
            what = "beside parallel files, tables are read where they are called train, val or test"
            found.notes.append(f"{', '.join(map(str, others))}: left out; {what}")
        tables = [(name, file) for name, file in tables if file not in others]
    if tables:
        for name, file in tables:
            find_table(name, file, (source, target), usual, found)
        if path.is_dir():
            refuse_other_table(path, [*found.splits, *(name for name, _ in tables)], found)
    elif not parallel:
        kinds = "NAME.en and NAME.de (also .gz), .tsv or .jsonl"
        raise UserError(f"{path}: holds no parallel text ({kinds})")
    languages = {pairs.languages for pairs in found.splits.values()}
    if len(languages) > 1:
        listed = ", ".join(f"{name}: {'-'.join(pairs.languages)}" for name, pairs in found.splits.items())
        what = f"its splits are of several languages ({listed}); use --text.source and --text.target"
        found.problems.append(Problem("languages", str(path), what))
    return found


def open_text_splits(
    path: Path,
    *,
    val: Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    source: str | None = None,
    target: str | None = None,
    usual: tuple[str, str] | None = None,
) -> TextSplits:
    """What to learn from and what to measure on: the data's own splits, `val` from elsewhere, or a part held out."""
    found = find_pairs(path, source, target, usual)
    beside = find_pairs(val, source, target, usual) if val is not None else FoundPairs()
    raise_problems([problem for problem in (*found.problems, *beside.problems) if problem.refuses], str(path))
    notes = [*_notes(found), *_notes(beside)]
    train = found.splits.get("train") or found.splits.get("all")
    if train is None and len(found.splits) == 1:
        train = next(iter(found.splits.values()))
        if path.is_dir() and (train.name.startswith("test") or train.name == "val"):
            itself = f", or give {train.path} itself" if train.path.is_file() else ""
            raise UserError(f"{path}: its only split is {train.name}; to learn from it, rename it to train.*{itself}")
        notes.append(f"{path}: its only split, {train.name}, is learnt from")
    if train is None:
        raise UserError(f"{path}: no train split among {', '.join(found.splits)}; rename one to train.*")
    held_out = found.splits.get("val") if val is None else _to_measure(beside, val, None)
    held_out = None if held_out is train else held_out
    if held_out is None:
        order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(len(train))
        size = min(max(1, round(val_fraction * len(train))), len(train) - 1, 2000)
        if size < 1:
            raise UserError(f"{path}: one pair is too few to hold any out; add some, or use --val")
        held_out = train.subset(np.sort(order[:size]))
        train = train.subset(np.sort(order[size:]))
        notes.append(f"{path}: no val split, {size} of {size + len(train)} pairs are held out")
    if held_out.languages != train.languages:
        of, into = held_out.languages
        raise UserError(f"{held_out.path}: is {of}-{into}, the training text {'-'.join(train.languages)}")
    return TextSplits(train, held_out, notes)


def open_pairs(
    path: Path,
    split: str | None,
    source: str | None = None,
    target: str | None = None,
    usual: tuple[str, str] | None = None,
    notes: list[str] | None = None,
) -> Pairs:
    """One split to measure on: by name (`test` also stands for the only one that begins so), else val, else test.

    What is to be known of it is added to `notes`.
    """
    found = find_pairs(path, source, target, usual)
    raise_problems([problem for problem in found.problems if problem.refuses], str(path))
    if notes is not None:
        notes += _notes(found)
    return _to_measure(found, path, split)


def read_texts(path: str | Path) -> list[str]:
    """The lines of a file, plain or .gz."""
    problems: list[Problem] = []
    lines = read_lines(Path(path), problems)
    raise_problems([problem for problem in problems if problem.refuses], str(path))
    return lines or []


def _notes(found: FoundPairs) -> list[str]:
    """Also of what does not keep anyone from learning, but may not be meant."""
    nul = [problem.where for problem in found.problems if problem.kind == "nul_byte"]
    shown = ", ".join(nul[:3]) + (" ..." if len(nul) > 3 else "")
    hold = "line holds a NUL byte" if len(nul) == 1 else "lines hold NUL bytes"
    return [*found.notes, *([f"{len(nul)} {hold} ({shown}); saccade inspect says which"] if nul else [])]


def _to_measure(found: FoundPairs, path: Path, split: str | None) -> Pairs:
    names = list(found.splits)
    if split is None:
        tests = [name for name in names if name.startswith("test")]
        order = [name for name in ("val", *tests, "all", "train") if name in names] or names
        return found.splits[order[0]]
    name = SPLIT_NAMES.get(split.lower(), split)
    if name in found.splits:
        return found.splits[name]
    begun = [each for each in names if each.startswith(f"{name}_") or each.startswith(f"{name}.")]
    if len(begun) == 1:
        return found.splits[begun[0]]
    raise UserError(f"{path}: no split {split!r}{closest(split, names)}; there is {', '.join(names)}")


