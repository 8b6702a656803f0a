"""Texts and their translations, and what every form of them on disk has in common."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from saccade.data.source import SPLIT_NAMES, Problem
from saccade.data.text.lines import quoted
from saccade.errors import UserError
from saccade.words import counted

SUFFIXES = (".tsv", ".jsonl")
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z]{2,4})?")
# suffixes that are taken for languages where no other side is there to show it
USUAL = {"ar", "cs", "de", "en", "es", "fi", "fr", "hi", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "tr", "zh"}
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


def split_name(stem: str) -> str | None:
    """train, val and test under their usual spellings; any other name is its own."""
    return SPLIT_NAMES.get(stem.lower())


def stem_of(path: Path) -> tuple[str, str]:
    """Name and suffix without a `.gz` behind them."""
    name = path.name.removesuffix(".gz")
    return Path(name).stem, Path(name).suffix


def direction_of(where: str, languages: list[str], asked: Asked, usual: tuple[str, str] | None) -> tuple[str, str, str]:
    """Which language is translated into which: as asked, as usual, as the name of the table or folder says (`en-de`),
    else from English."""
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
    for name in _names(Path(where)):
        for of, into in ((first, second), (second, first)):
            if re.search(rf"(^|[^a-z]){of}[-_.]{into}([^a-z]|$)", name.lower()):
                return of, into, ""
    if "en" in languages:
        return "en", first if second == "en" else second, "from English"
    return first, second, "the first of both"


def _names(path: Path) -> list[str]:
    """That may say a direction: a table's own, then its folder's."""
    path = path.absolute()
    return [path.name, path.parent.name] if stem_of(path)[1] in SUFFIXES else [path.name]


def add_pairs(
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
