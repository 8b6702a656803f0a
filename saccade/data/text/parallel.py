"""Parallel files: NAME.en and NAME.de, whose lines are each other's translations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saccade.data.source import Problem
from saccade.data.text.lines import different_lengths, read_lines
from saccade.data.text.pairs import LANGUAGE, USUAL, Asked, FoundPairs, add_pairs, direction_of, split_name, stem_of

# suffixes of the same form that name no language; pictures with annotations beside them are no parallel text
FILE_TYPES = {
    "avi", "bat", "bin", "bmp", "cc", "cfg", "csv", "dat", "db", "doc", "gif", "gz", "ini", "jpe", "jpg", "js", "log",
    "md", "mov", "mpg", "npy", "npz", "pdf", "png", "py", "rst", "sh", "svg", "tar", "tex", "tif", "tsv", "txt", "wav",
    "xml", "xz", "yml", "zip",
}  # fmt: skip


def parallel_files(folder: Path) -> dict[str, dict[str, Path]]:
    """NAME -> language -> file, where any NAME has two languages, or a language stands alone beside such ones."""
    by_stem: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = stem_of(path)
        spoken = LANGUAGE.fullmatch(suffix[1:]) and suffix[1:] not in FILE_TYPES
        if spoken and path.is_file() and not path.name.startswith("."):
            by_stem.setdefault(stem, {}).setdefault(suffix[1:], path)
    languages = {language for files in by_stem.values() if len(files) > 1 for language in files}
    if not languages:
        known = [files for stem, files in by_stem.items() if split_name(stem) and {*files} <= USUAL]
        return by_stem if known and len(known) == len(by_stem) else {}
    return {stem: files for stem, files in by_stem.items() if {*files} & languages}


def find_parallel(
    folder: Path, stems: dict[str, dict[str, Path]], asked: Asked, usual: tuple[str, str] | None, found: FoundPairs
) -> None:
    languages = sorted({language for files in stems.values() for language in files})
    if len(languages) == 1:
        file = next(iter(next(iter(stems.values())).values()))
        what = f"only one side ({languages[0]}) is there; its translation belongs beside it, as {_beside(file)}"
        found.problems.append(Problem("one_sided", str(file), what))
        return
    of, into, why = direction_of(str(folder), languages, asked, usual)
    if why:
        found.notes.append(f"{folder}: {of} is translated into {into} ({why}; --text.source says otherwise)")
    for stem, files in stems.items():
        missing = [language for language in (of, into) if language not in files]
        if missing:
            there = next(iter(files.values()))
            what = f"its {missing[0]} side is missing; add {stem}.{missing[0]} or remove it"
            found.problems.append(Problem("one_sided", str(there), what))
            continue
        name = split_name(stem) or stem
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
        add_pairs(name, folder, (of, into), sides[0], sides[1], places, lines, found)


def _refuse_other_twin(file: Path, lines: list[str], found: FoundPairs) -> None:
    """The same file, packed: one of both is an older state where they differ, and nobody knows which."""
    packed = file.with_name(f"{file.name}.gz")
    if packed.is_file() and read_lines(packed, found.problems) not in (None, lines):
        what = f"is another text than {packed.name} beside it; rename or remove one of them"
        found.problems.append(Problem("split_twice", str(file), what))


def _beside(file: Path) -> str:
    stem, suffix = stem_of(file)
    return f"{stem}.{'en' if suffix != '.en' else 'de'}"


