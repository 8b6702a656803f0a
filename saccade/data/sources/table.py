"""A table of paths and labels: CSV with a header, or JSON lines. Paths are relative to the table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saccade.data.source import SPLIT_NAMES, FileSource, Found, Problem, printable, sort_names
from saccade.data.text.tables import names_texts
from saccade.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
PATH_COLUMNS = ("path", "file", "filename", "image", "file_name", "img", "filepath", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "category", "class_name")
TEXTS = "texts and their translations go into .tsv (a tab between them) or .jsonl"
SPLIT_COLUMNS = ("split", "subset")


def find(path: Path) -> Found:
    """Read a table. With a split column it holds several splits; `train.csv` also finds a `val.csv` beside it."""
    found = Found("table")
    _read(path, found)
    if set(found.splits) == {"all"} and SPLIT_NAMES.get(path.stem.lower()) == "train":
        for beside in sorted(path.parent.glob(f"*{path.suffix}")):
            split = SPLIT_NAMES.get(beside.stem.lower(), "train")
            if split != "train" and split not in found.splits:
                other = Found("table")
                _read(beside, other)
                found.splits[split] = other.splits.get("all") or next(iter(other.splits.values()))
                found.problems += other.problems
                found.notes.append(f"{beside}: taken as the {split} split")
        if len(found.splits) > 1:
            found.splits = {"train": found.splits.pop("all"), **found.splits}
    return found


def _read(path: Path, found: Found) -> None:
    rows = _read_json_lines(path, found) if path.suffix.lower() in (".jsonl", ".ndjson") else _read_csv(path, found)
    files: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    columns: dict[str, str | None] | None = None
    for line, row in rows:
        where = f"{path}:{line}"
        if columns is None:
            columns = {
                "path": _column(row, PATH_COLUMNS),
                "label": _column(row, LABEL_COLUMNS),
                "split": _column(row, SPLIT_COLUMNS),
            }
            if columns["path"] is None or columns["label"] is None:
                lacks = "the path" if columns["path"] is None else "the label"
                remedy = TEXTS if names_texts([str(column) for column in row]) else "name them path and label"
                what = f"no column for {lacks} among {', '.join(map(str, row)) or 'none'}; {remedy}"
                found.problems.append(Problem("no_column", where, what))
                break
        file = _text(row.get(columns["path"] or ""))
        label = printable(_text(row.get(columns["label"] or "")))
        split = _text(row.get(columns["split"])) if columns["split"] else "all"
        if not file or not label:
            lacking = "label" if file else "path"
            found.problems.append(Problem(f"missing_{lacking}", where, f"no {lacking}; add one"))
            continue
        if split != "all":
            if split.lower() not in SPLIT_NAMES:
                found.problems.append(Problem("bad_split", where, f"the split is {split!r}; write train, val or test"))
                continue
            split = SPLIT_NAMES[split.lower()]
        full = path.parent / file
        if not full.is_file():
            found.problems.append(
                Problem("missing_file", where, f"{full} does not exist; paths are relative to the table's folder")
            )
            continue
        files.setdefault(split, []).append(str(full))
        labels.setdefault(split, []).append(label)
    if not files and not found.problems:
        found.problems.append(Problem("no_pictures", str(path), "no rows; a table has a line for each picture"))
    for split in sorted(files) or ["all"]:
        class_names = sort_names(labels.get(split, []))
        position = {name: k for k, name in enumerate(class_names)}
        found.splits[split] = FileSource(
            name=path.stem,
            path=path,
            class_names=class_names,
            labels=np.array([position[label] for label in labels.get(split, [])], dtype=np.int64),
            files=tuple(files.get(split, [])),
        )


def _read_csv(path: Path, found: Found) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the line they begin at; the separator is what the header holds most of."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            separator = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator, skipinitialspace=True)
            for row in reader:
                if None in row:
                    columns = len(reader.fieldnames or ())
                    what = f"more fields than the header's {columns}; quote those that hold a {separator!r}"
                    found.problems.append(Problem("bad_row", f"{path}:{reader.line_num}", what))
                    continue
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); save it as CSV in UTF-8") from None


def _read_json_lines(path: Path, found: Found) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    what = f"not valid JSON ({error}); mend the line"
                    found.problems.append(Problem("bad_row", f"{path}:{number}", what))
                    continue
                if not isinstance(row, dict):
                    what = 'not an object; write {"path": ..., "label": ...}'
                    found.problems.append(Problem("bad_row", f"{path}:{number}", what))
                    continue
                yield number, row
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); save it as JSON lines in UTF-8") from None


def lists_texts(path: Path) -> bool:
    """A CSV whose header names languages: texts have a form of their own."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline(10_000)
    except (OSError, UnicodeDecodeError):
        return False
    cells = [cell.strip(' "') for cell in re.split("[,;\t]", header.strip())]
    return path.suffix.lower() == ".csv" and names_texts(cells)


def _column(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the usual names that the row has, whatever its case."""
    lower = {str(column).strip().lower(): column for column in row}
    return next((lower[name] for name in names if name in lower), None)


def _text(value: Any) -> str:
    """A field as a name; nothing for what cannot be one."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""
