"""Tables of texts: with tabs between the columns, or lines of JSON."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saccade.data.source import Problem
from saccade.data.text.lines import read_lines
from saccade.data.text.pairs import (
    LANGUAGE,
    SUFFIXES,
    USUAL,
    Asked,
    FoundPairs,
    add_pairs,
    direction_of,
    split_name,
    stem_of,
)
from saccade.errors import UserError
from saccade.words import counted

# columns that say which is which
SIDES = (("source", "target"), ("src", "tgt"), ("src", "trg"), ("text", "translation"))
# columns of tables of another kind
OF_PICTURES = {"path", "file", "file_name", "filename", "filepath", "image", "image_path", "img", "label"}
LOOKED_AT = 10  # lines of a table that say whether it is one of texts
HALVES = re.compile("[\ud800-\udfff]")


def table_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and stem_of(path)[1] in SUFFIXES]


def text_tables(folder: Path) -> list[tuple[str, Path]]:
    """Splits and tables of text; tables of pictures have other columns.

    One that does not show what it is may be a faulty one: beside others, or where it is called as a split is.
    """
    files = {path: is_text_table(path) for path in table_files(folder)}
    beside = any(files.values())
    named = [(split_name(stem_of(path)[0]), path) for path, sure in files.items() if sure is not False]
    return [(name or stem_of(path)[0], path) for name, path in named if files[path] or beside or name]


def refuse_other_table(folder: Path, splits: list[str], found: FoundPairs) -> None:
    """What is called train and is none of texts: nobody would want the others to be learnt from in its place."""
    others = [path for path in table_files(folder) if split_name(stem_of(path)[0]) == "train"]
    if others and "train" not in splits:
        what = f"is no table of texts: it has one of the columns {', '.join(sorted(OF_PICTURES))}; rename that, or it"
        found.problems.append(Problem("columns", str(others[0]), what))


def is_text_table(path: Path) -> bool | None:
    """As its first lines say, some of which may be faulty; None where none of them says it."""
    lines = _first_lines(path)
    if stem_of(path)[1] == ".tsv":
        cells = [line.split("\t") for line in lines]
        if cells and {cell.strip().lower() for cell in cells[0]} & OF_PICTURES:
            return False
        return True if any(len(row) > 1 for row in cells) else None
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    rows = [row for row in rows if isinstance(row, dict)]
    if any({*row} & OF_PICTURES for row in rows):
        return False
    return True if any(len(_texts(row)) > 1 for row in rows) else None


def _first_lines(path: Path) -> list[str]:
    """Of those that are not blank; of what is no UTF-8, so much as can be read."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    head, count = b"", 0
    try:
        with opener(path, "rb") as file:
            while count < LOOKED_AT and len(head) < 2_000_000 and (line := file.readline(1_000_000)):
                head += line
                count += bool(line.strip())
    except (OSError, EOFError, zlib.error):
        pass
    text = head.decode("utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig", "replace")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """The columns of a row that may be one side, also from under `translation`, as the hub has it."""
    inner = row.get("translation")
    values = inner if isinstance(inner, dict) else row
    return {str(name): text for name, text in values.items() if isinstance(text, str)}


def find_table(name: str, path: Path, asked: Asked, usual: tuple[str, str] | None, found: FoundPairs) -> None:
    lines = read_lines(path, found.problems)
    if lines is None:
        return
    if not lines:
        found.problems.append(Problem("empty", str(path), "is empty; a line for each pair of texts belongs there"))
        return
    rows: list[tuple[int, dict[str, str]]] = []
    faulty: list[Problem] = []
    if stem_of(path)[1] == ".tsv":
        first = next((i for i, line in enumerate(lines) if line.strip()), 0)
        header = [cell.strip() for cell in lines[first].split("\t")]
        named = names_texts(header)
        names = header if named else ["source", "target"]
        start = first + 1 if named else 0
        for number, line in enumerate(lines[start:], start + 1):
            cells = line.split("\t")
            if not line.strip():
                rows.append((number, dict.fromkeys(names, "")))
            elif len(cells) != len(names):
                what = f"{counted(len(cells), 'column')} where {len(names)} are expected"
                if len(cells) < len(names):
                    what += "; there is to be a tab between a text and its translation"
                elif not named:
                    what += "; of several columns a first line has to say which is which, such as en and de"
                faulty.append(Problem("columns", f"{path}:{number}", what))
            else:
                rows.append((number, dict(zip(names, cells, strict=True))))
    else:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                faulty.append(Problem("json", f"{path}:{number}", f"not valid JSON ({error})"))
                continue
            if not isinstance(row, dict):
                faulty.append(Problem("json", f"{path}:{number}", "not a table of two texts"))
                continue
            texts = _texts(row)
            if broken := [name for name, text in texts.items() if HALVES.search(text)]:
                what = f"half of a character in {broken[0]!r}, as its escapes say it; write the whole one"
                faulty.append(Problem("json", f"{path}:{number}", what))
                continue
            rows.append((number, texts))
    counts = Counter(column for _, row in rows for column in row)
    usual_columns = [column for column, count in counts.items() if 2 * count > len(rows) or column in asked]
    columns = usual_columns if len(usual_columns) > 1 else list(counts)  # what few rows have may be a slip
    if len(columns) < 2:
        found.problems += faulty or [Problem("one_sided", str(path), "only one side; two columns of text are needed")]
        return
    sides, wanted = _sides(columns), {*asked} - {None}
    if sides is not None and not wanted & {*columns}:  # which say themselves which is which, but not the languages
        of, into, why = *sides, ""
        languages = _told(path, sides, asked, usual, found)
    else:
        named = [column for column in columns if LANGUAGE.fullmatch(column) or column in asked]
        pool = named if len(named) > 1 else columns  # beside them there may be numbers, notes, sources
        of, into, why = direction_of(str(path), pool, asked, usual)
        languages = of, into
    if why and not any(str(path.parent) in note for note in found.notes):
        found.notes.append(f"{path.parent}: {of} is translated into {into} ({why}; --text.source says otherwise)")
    kept = []
    for number, row in rows:
        if of in row and into in row:
            kept.append((number, row[of], row[into]))
        else:
            lacks = of if of not in row else into
            faulty.append(Problem("one_sided", f"{path}:{number}", f"has no text in {lacks!r}"))
    found.problems += faulty
    if not faulty:
        numbers = np.array([number for number, _, _ in kept], dtype=np.int64)
        a, b = [one for _, one, _ in kept], [other for _, _, other in kept]
        add_pairs(name, path, languages, a, b, (str(path), str(path)), numbers, found)


def _told(
    path: Path, sides: tuple[str, str], asked: Asked, usual: tuple[str, str] | None, found: FoundPairs
) -> tuple[str, str]:
    """The languages of columns whose names do not say them."""
    source, target = asked
    if source is not None and target is not None:
        told = source, target
    elif usual is not None and source in (None, usual[0]) and target in (None, usual[1]):
        told = usual
    elif source is None and target is None:
        named = "--text.source and --text.target name them, or a first line such as en and de"
        what = "its columns name no languages, and the first is translated into the second"
        found.notes.append(f"{path}: {what}; {named}")
        return sides
    else:
        raise UserError(
            f"{path}: no text in {source or target!r}; there is {' and '.join(sides)}, which name no languages; give "
            "--text.source and --text.target, of the first and the second, or a first line such as en and de"
        )
    if told != sides:
        what = f"its columns name no languages; {told[0]} is taken for the first, {told[1]} for the second"
        found.notes.append(f"{path}: {what}")
    return told


def names_texts(cells: Sequence[str]) -> bool:
    """Is a table's first line its header? Of more than two columns, two with languages that many have are enough."""
    languages = all(LANGUAGE.fullmatch(cell) for cell in cells) or len({*cells} & USUAL) > 1
    return len({*cells}) == len(cells) > 1 and (languages or _sides(cells) is not None)


def _sides(columns: Sequence[str]) -> tuple[str, str] | None:
    """The columns that say themselves which is which, as they are spelt."""
    spelt = {name.lower(): name for name in columns}
    return next(((spelt[of], spelt[into]) for of, into in SIDES if of in spelt and into in spelt), None)


