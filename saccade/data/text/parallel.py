"""Sentences and their translations on disk: parallel files, tables with tabs, lines of JSON."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from saccade.config import closest
from saccade.data.source import SPLIT_NAMES, Problem, raise_problems
from saccade.data.text.lines import different_lengths, quoted, read_lines
from saccade.errors import UserError
from saccade.words import counted

SUFFIXES = (".tsv", ".jsonl")
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z]{2,4})?")
# suffixes of the same form that name no language; pictures with annotations beside them are no parallel text
FILE_TYPES = {
    "avi", "bat", "bin", "bmp", "cc", "cfg", "csv", "dat", "db", "doc", "gif", "gz", "ini", "jpe", "jpg", "js", "log",
    "md", "mov", "mpg", "npy", "npz", "pdf", "png", "py", "rst", "sh", "svg", "tar", "tex", "tif", "tsv", "txt", "wav",
    "xml", "xz", "yml", "zip",
}  # fmt: skip
# columns that say which is which
SIDES = (("source", "target"), ("src", "tgt"), ("src", "trg"), ("text", "translation"))
# columns of tables of another kind
OF_PICTURES = {"path", "file", "file_name", "filename", "filepath", "image", "image_path", "img", "label"}
LOOKED_AT = 10  # lines of a table that say whether it is one of texts
HALVES = re.compile("[\ud800-\udfff]")
Asked = tuple[str | None, str | None]  # languages: from, into


@dataclass(frozen=True, eq=False)
class Pairs:
    """Texts and their translations, in the order of the file."""

    name: str  # of the split
    path: Path
    languages: tuple[str, str]  # from, into
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    places: tuple[str, str]  # the files that hold either side
    lines: np.ndarray  # int64 (N,), from 1

    def __len__(self) -> int:
        return len(self.sources)

    def id(self, i: int) -> str:
        """What messages call pair `i`."""
        return f"{self.places[0]}:{self.lines[i]}"

    def some(self, indices: Sequence[int] | np.ndarray, most: int = 3) -> str:
        """The first of these pairs, for messages."""
        return ", ".join(self.id(int(i)) for i in indices[:most]) + (" ..." if len(indices) > most else "")

    def subset(self, indices: Sequence[int] | np.ndarray) -> Pairs:
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            sources=tuple(self.sources[i] for i in chosen),
            targets=tuple(self.targets[i] for i in chosen),
            lines=self.lines[chosen],
        )

    def digest(self) -> bytes:
        """By which a run that is continued knows its data again."""
        digest = hashlib.sha256()
        for text in (*self.sources, *self.targets):
            digest.update(text.encode() + b"\n")
        return digest.digest()


@dataclass
class FoundPairs:
    """All that lies there and all that is wrong with it."""

    splits: dict[str, Pairs] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TextSplits:
    train: Pairs
    val: Pairs
    notes: list[str]


def holds_text(path: Path) -> bool:
    """Is this parallel text, by its names alone?"""
    if path.is_file():
        of_texts = _stem(path)[1] in SUFFIXES and _is_text_table(path)
        return bool(of_texts) or (of_texts is None and _stem(path)[1] == ".tsv")
    return path.is_dir() and bool(_parallel(path) or any(_is_text_table(file) for file in _table_files(path)))


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
        if _stem(path)[1] not in SUFFIXES:
            raise UserError(f"{path}: not parallel text; give a folder with NAME.en and NAME.de, a .tsv or a .jsonl")
        tables, parallel = [(_split_name(_stem(path)[0]) or "all", path)], {}
    else:
        parallel, tables = _parallel(path), _tables(path)
    if parallel:
        _find_parallel(path, parallel, (source, target), usual, found)
        usual = next((pairs.languages for pairs in found.splits.values()), usual)
        others = [file for name, file in tables if name != "val" and not name.startswith(("train", "test"))]
        if others:
            what = "beside parallel files, tables are read where they are called train, val or test"
            found.notes.append(f"{', '.join(map(str, others))}: left out; {what}")
        tables = [(name, file) for name, file in tables if file not in others]
    if tables:
        for name, file in tables:
            _find_table(name, file, (source, target), usual, found)
        if path.is_dir():
            _refuse_other_table(path, [*found.splits, *(name for name, _ in tables)], found)
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
    notes = [*found.notes, *beside.notes]
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
        notes += found.notes
    return _to_measure(found, path, split)


def read_texts(path: str | Path) -> list[str]:
    """The lines of a file, plain or .gz."""
    problems: list[Problem] = []
    lines = read_lines(Path(path), problems)
    raise_problems([problem for problem in problems if problem.refuses], str(path))
    return lines or []


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


def _split_name(stem: str) -> str | None:
    """train, val and test under their usual spellings; any other name is its own."""
    return SPLIT_NAMES.get(stem.lower())


def _stem(path: Path) -> tuple[str, str]:
    """Name and suffix without a `.gz` behind them."""
    name = path.name.removesuffix(".gz")
    return Path(name).stem, Path(name).suffix


# --- parallel files --------------------------------------------------------------------------------------------------


def _parallel(folder: Path) -> dict[str, dict[str, Path]]:
    """NAME -> language -> file, where any NAME has two languages, or a language stands alone beside such ones."""
    by_stem: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = _stem(path)
        spoken = LANGUAGE.fullmatch(suffix[1:]) and suffix[1:] not in FILE_TYPES
        if spoken and path.is_file() and not path.name.startswith("."):
            by_stem.setdefault(stem, {}).setdefault(suffix[1:], path)
    languages = {language for files in by_stem.values() if len(files) > 1 for language in files}
    if not languages:
        known = [files for stem, files in by_stem.items() if _split_name(stem) and {*files} <= USUAL]
        return by_stem if known and len(known) == len(by_stem) else {}
    return {stem: files for stem, files in by_stem.items() if {*files} & languages}


# suffixes that are taken for languages where no other side is there to show it
USUAL = {"ar", "cs", "de", "en", "es", "fi", "fr", "hi", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "tr", "zh"}


def _find_parallel(
    folder: Path, stems: dict[str, dict[str, Path]], asked: Asked, usual: tuple[str, str] | None, found: FoundPairs
) -> None:
    languages = sorted({language for files in stems.values() for language in files})
    if len(languages) == 1:
        file = next(iter(next(iter(stems.values())).values()))
        what = f"only one side ({languages[0]}) is there; its translation belongs beside it, as {_beside(file)}"
        found.problems.append(Problem("one_sided", str(file), what))
        return
    of, into, why = _direction(str(folder), languages, asked, usual)
    if why:
        found.notes.append(f"{folder}: {of} is translated into {into} ({why}; --text.source says otherwise)")
    for stem, files in stems.items():
        missing = [language for language in (of, into) if language not in files]
        if missing:
            there = next(iter(files.values()))
            what = f"its {missing[0]} side is missing; add {stem}.{missing[0]} or remove it"
            found.problems.append(Problem("one_sided", str(there), what))
            continue
        name = _split_name(stem) or stem
        sides = [read_lines(files[language], found.problems) for language in (of, into)]
        if sides[0] is None or sides[1] is None:
            continue
        _refuse_other_twin(files[of], sides[0], found)
        _refuse_other_twin(files[into], sides[1], found)
        if len(sides[0]) != len(sides[1]):
            found.problems.append(different_lengths(files[of], files[into], sides[0], sides[1]))
            continue
        places = str(files[of]), str(files[into])
        lines = np.arange(1, len(sides[0]) + 1)
        _add(name, folder, (of, into), sides[0], sides[1], places, lines, found)


def _refuse_other_twin(file: Path, lines: list[str], found: FoundPairs) -> None:
    """The same file, packed: one of both is an older state where they differ, and nobody knows which."""
    packed = file.with_name(f"{file.name}.gz")
    if packed.is_file() and read_lines(packed, found.problems) not in (None, lines):
        what = f"is another text than {packed.name} beside it; rename or remove one of them"
        found.problems.append(Problem("split_twice", str(file), what))


def _beside(file: Path) -> str:
    stem, suffix = _stem(file)
    return f"{stem}.{'en' if suffix != '.en' else 'de'}"


def _direction(where: str, languages: list[str], asked: Asked, usual: tuple[str, str] | None) -> tuple[str, str, str]:
    """Which language is translated into which: as asked, as usual, as the folder's name says (`en-de`), else from
    English."""
    source, target = asked
    for name in (source, target):
        if name is not None and name not in languages:
            raise UserError(f"{where}: no text in {name!r}; there is {', '.join(languages)}")
    if source is None and target is None and usual is not None and {*usual} <= {*languages}:
        return *usual, ""
    if source is not None and source == target:
        raise UserError(f"{where}: --text.source and --text.target are both {source}; name two languages")
    rest = [language for language in languages if language not in (source, target)]
    if source is not None and target is not None:
        return source, target, ""
    if len(languages) > 2:
        given = source or target
        raise UserError(
            f"{where}: text in {', '.join(languages)}{f', beside {given}' if given else ''}; say which by "
            "--text.source and --text.target"
        )
    if source is not None:
        return source, rest[0], ""
    if target is not None:
        return rest[0], target, ""
    first, second = languages
    for of, into in ((first, second), (second, first)):
        if re.search(rf"(^|[^a-z]){of}[-_.]{into}([^a-z]|$)", Path(where).name.lower()):
            return of, into, ""
    return (second, first, "from English") if second == "en" else (first, second, "the first of both")


# --- tables ----------------------------------------------------------------------------------------------------------


def _table_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and _stem(path)[1] in SUFFIXES]


def _tables(folder: Path) -> list[tuple[str, Path]]:
    """Splits and tables of text; tables of pictures have other columns.

    One that does not show what it is may be a faulty one: beside others, or where it is called as a split is.
    """
    files = {path: _is_text_table(path) for path in _table_files(folder)}
    beside = any(files.values())
    named = [(_split_name(_stem(path)[0]), path) for path, sure in files.items() if sure is not False]
    return [(name or _stem(path)[0], path) for name, path in named if files[path] or beside or name]


def _refuse_other_table(folder: Path, splits: list[str], found: FoundPairs) -> None:
    """What is called train and is none of texts: nobody would want the others to be learnt from in its place."""
    others = [path for path in _table_files(folder) if _split_name(_stem(path)[0]) == "train"]
    if others and "train" not in splits:
        what = f"is no table of texts: it has one of the columns {', '.join(sorted(OF_PICTURES))}; rename that, or it"
        found.problems.append(Problem("columns", str(others[0]), what))


def _is_text_table(path: Path) -> bool | None:
    """As its first lines say, some of which may be faulty; None where none of them says it."""
    lines = _first_lines(path)
    if _stem(path)[1] == ".tsv":
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


def _find_table(name: str, path: Path, asked: Asked, usual: tuple[str, str] | None, found: FoundPairs) -> None:
    lines = read_lines(path, found.problems)
    if lines is None:
        return
    if not lines:
        found.problems.append(Problem("empty", str(path), "is empty; a line for each pair of texts belongs there"))
        return
    rows: list[tuple[int, dict[str, str]]] = []
    faulty: list[Problem] = []
    if _stem(path)[1] == ".tsv":
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
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
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
        of, into, why = _direction(str(path), pool, asked, usual)
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
        _add(name, path, languages, a, b, (str(path), str(path)), numbers, found)


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


# --- what both have --------------------------------------------------------------------------------------------------


def _add(
    name: str,
    path: Path,
    languages: tuple[str, str],
    sources: list[str],
    targets: list[str],
    places: tuple[str, str],
    lines: np.ndarray,
    found: FoundPairs,
) -> None:
    """Leave out pairs with an empty side, and say so."""
    of, into = languages
    if name in found.splits:
        what = f"is the split {name!r}, as {found.splits[name].places[0]} is; rename or remove one of them"
        found.problems.append(Problem("split_twice", places[0], what))
        return
    full = [bool(one.strip()) and bool(other.strip()) for one, other in zip(sources, targets, strict=True)]
    if not any(full):
        what = "holds no pair with text on both sides; a text and its translation belong on the same line"
        found.problems.append(Problem("empty", places[0], what))
        return
    halves = [
        (f"{places[1] if one.strip() else places[0]}:{number}", into if one.strip() else of, one.strip() or other)
        for one, other, number in zip(sources, targets, lines, strict=True)
        if bool(one.strip()) != bool(other.strip())
    ]
    blank = len(full) - sum(full) - len(halves)
    if halves:
        shown = ", ".join(place for place, *_ in halves[:3]) + (" ..." if len(halves) > 3 else "")
        are = "is" if len(halves) == 1 else "are"
        found.notes.append(f"{counted(len(halves), 'pair')} with an empty side {are} left out ({shown})")
    for place, lacks, there in halves:
        what = f"no text in {lacks} beside {quoted(there)}; translate it, or remove both"
        found.problems.append(Problem("empty_side", place, what, refuses=False))
    if blank:
        are = "is" if blank == 1 else "are"
        found.notes.append(f"{places[0]}: {counted(blank, 'empty line')} on both sides {are} left out")
    same = sum(one == other for one, other in zip(sources, targets, strict=True))
    if same > 0.5 * len(sources):
        share = f"{same} of {len(sources)} pairs"
        found.notes.append(f"{places[0]}: {share} have the same text on both sides; is that meant?")
    kept = np.flatnonzero(full)
    found.splits[name] = Pairs(
        name, path, languages, tuple(sources[i] for i in kept), tuple(targets[i] for i in kept), places, lines[kept]
    )
