"""What is in parallel text, and what is wrong with it: lengths, copies, pairs that occur twice or in two splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saccade.config import TextConfig
from saccade.data.findings import Findings
from saccade.data.source import Problem
from saccade.data.text.pairs import Pairs
from saccade.data.text.splits import find_pairs
from saccade.words import counted

SHARES = (0, 5, 50, 95, 100)  # percentiles of lengths that are told
ROOM = 4  # characters that each side is taken to have more, so that short texts do not have wild ratios
FAR = 3.0  # times longer or shorter than usual, from which on a pair may belong to no translation
MOST_COPIES = 0.9  # share of pairs with the same text on both sides, from which on nothing is translated
LONG = TextConfig().max_length  # words; a word has one token or more
SHOWN = 3  # places that a hint names; all are in to_dict()


@dataclass(frozen=True)
class Lengths:
    """Percentiles `SHARES` of one side's texts."""

    characters: tuple[int, ...]
    words: tuple[int, ...]


@dataclass(frozen=True)
class TextSplitReport:
    """One split: pairs with text on both sides. Places are `file:line`."""

    name: str
    where: str
    languages: tuple[str, str]
    pairs: int
    lengths: dict[str, Lengths]  # by language
    ratio: float  # characters of a translation for each of its text, the median
    outliers: list[str]  # whose ratio is far from that
    long: list[str]  # more words than the tokens that are learnt from
    copies: list[str]  # the same text on both sides
    repeated: list[list[str]]  # groups of the same pair

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TextReport(Findings[TextSplitReport]):
    """What `saccade inspect` says of parallel text."""

    @property
    def amount(self) -> str:
        return counted(sum(split.pairs for split in self.splits), "pair")

    def render_splits(self, console: Console) -> None:
        found = ", ".join(dict.fromkeys("-".join(split.languages) for split in self.splits))
        form = f"{self.format} ({found})" if found else self.format
        shares = ", ".join({0: "min", 50: "median", 100: "max"}.get(share, f"{share} %") for share in SHARES)
        console.print(f"[bold]{escape(self.path)}[/bold]: {escape(form)}; lengths: {shares}", soft_wrap=True)
        if not self.splits:
            return
        table = Table("", *(escape(split.name) for split in self.splits))
        for column in table.columns[1:]:
            column.justify = "right"
        table.add_row("pairs", *(str(split.pairs) for split in self.splits))
        table.add_section()
        for language in dict.fromkeys(language for split in self.splits for language in split.languages):
            for what in ("characters", "words"):
                cells = (_listed(split.lengths.get(language), what) for split in self.splits)
                table.add_row(f"{escape(language)} {what}", *cells)
        table.add_section()
        table.add_row("translation / text", *(f"{split.ratio:.2f}" for split in self.splits))
        table.add_row(f"{FAR:g} times from that", *(str(len(split.outliers)) for split in self.splits))
        table.add_row("same on both sides", *(str(len(split.copies)) for split in self.splits))
        table.add_row("occur again", *(str(_again(split)) for split in self.splits))
        console.print(table)


def _listed(lengths: Lengths | None, what: str) -> str:
    return "-" if lengths is None else ", ".join(map(str, getattr(lengths, what)))


def _again(split: TextSplitReport) -> int:
    return sum(len(group) - 1 for group in split.repeated)


def inspect_texts(
    path: Path, val: Path | None = None, source: str | None = None, target: str | None = None
) -> TextReport:
    """Look at every pair of every split. Only a path with nothing at all is an error; the rest is in the report."""
    found = find_pairs(path, source, target)
    problems, notes, splits = list(found.problems), list(found.notes), dict(found.splits)
    if val is not None:
        beside = find_pairs(val, source, target)
        problems += beside.problems
        notes += beside.notes
        splits = {"train": splits.get("train") or next(iter(splits.values()))} if splits else {}
        held_out = beside.splits.get("val") or next(iter(beside.splits.values()), None)
        splits |= {"val": held_out} if held_out is not None else {}
    order = sorted(splits, key=lambda name: {"train": 0, "all": 0, "val": 1}.get(name, 2))
    texts = {name: _Texts(splits[name]) for name in order}
    reports = [_summary(name, each) for name, each in texts.items()]
    return TextReport(
        path=str(path),
        format="parallel text",
        task="translate",
        splits=reports,
        problems=[*problems, *_leaks(texts), *(problem for report in reports for problem in _untranslated(report))],
        notes=notes,
        hints=[*(hint for report in reports for hint in _hints(report, texts[report.name])), *_retranslated(texts)],
    )


class _Texts:
    """The pairs of a split, as they are compared: runs of spaces are one."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs
        self.sides = tuple([" ".join(text.split()) for text in side] for side in (pairs.sources, pairs.targets))
        self.both = list(zip(*self.sides, strict=True))

    def places(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        return [self.pairs.id(int(i)) for i in indices]


def _summary(name: str, texts: _Texts) -> TextSplitReport:
    pairs = texts.pairs
    characters = [np.array([len(text) for text in side]) for side in texts.sides]
    words = [np.array([text.count(" ") + 1 for text in side]) for side in texts.sides]
    logarithms = np.log(characters[1] + ROOM) - np.log(characters[0] + ROOM)
    usual = float(np.median(logarithms))
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, both in enumerate(texts.both):
        groups[both].append(i)
    return TextSplitReport(
        name=name,
        where=str(pairs.path),
        languages=pairs.languages,
        pairs=len(pairs),
        lengths={
            language: Lengths(_percentiles(characters[k]), _percentiles(words[k]))
            for k, language in enumerate(pairs.languages)
        },
        ratio=float(np.median(characters[1] / characters[0])),
        outliers=texts.places(np.flatnonzero(np.abs(logarithms - usual) > np.log(FAR))),
        long=texts.places(np.flatnonzero(np.maximum(*words) > LONG)),
        copies=texts.places([i for i, (one, other) in enumerate(texts.both) if one == other]),
        repeated=[texts.places(group) for group in groups.values() if len(group) > 1],
    )


def _percentiles(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.percentile(values, SHARES, method="lower"))


def _shared(texts: dict[str, _Texts], key: Callable[[_Texts], Sequence[Any]]) -> list[dict[str, list[int]]]:
    """What is in several splits: for each, the positions by split."""
    groups: dict[Any, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, each in texts.items():
        for i, value in enumerate(key(each)):
            groups[value][name].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _leaks(texts: dict[str, _Texts]) -> list[Problem]:
    """Pairs that are learnt from and measured on."""
    by_splits: dict[tuple[str, ...], list[Problem]] = defaultdict(list)
    for group in _shared(texts, lambda each: each.both):
        first, *others = [place for name, indices in group.items() for place in texts[name].places(indices)]
        what = f"in {' and '.join(group)}: the same pair as {', '.join(others)}; keep it in one split only"
        by_splits[tuple(group)].append(Problem("leak", first, what, refuses=False))
    problems = []
    for names, same in by_splits.items():  # a whole split that is a copy of another's part is one fault
        whole = len(same) > 1 and len(same) == min(len({*texts[name].both}) for name in names)
        root = f"{' and '.join(names)} are the same" if whole else ""
        problems += [Problem(each.kind, each.where, each.what, each.refuses, root) for each in same]
    return problems


def _untranslated(report: TextSplitReport) -> list[Problem]:
    if len(report.copies) < MOST_COPIES * report.pairs:
        return []
    share = f"{len(report.copies)} of {counted(report.pairs, 'pair')}"
    what = f"{share} have the same text on both sides; translate one side"
    return [Problem("untranslated", report.where, what, refuses=False)]


def _hints(report: TextSplitReport, texts: _Texts) -> list[str]:
    hints = []
    if report.outliers:
        pairs = counted(len(report.outliers), "pair")
        first = texts.places(range(len(texts.pairs))).index(report.outliers[0])
        one, other = (_short(side[first]) for side in texts.sides)
        hints.append(
            f"{report.name}: the lengths of {pairs} are over {FAR:g} times from their usual ratio "
            f"({_some(report.outliers)}), such as {one} beside {other}; look whether these are translations"
        )
    if report.long:
        pairs = "pair has" if len(report.long) == 1 else "pairs have"
        hints.append(
            f"{report.name}: {len(report.long)} {pairs} more than {LONG} words on a side ({_some(report.long)}); they "
            "are not learnt from without a higher --text.max-length; split them into sentences"
        )
    if report.copies:
        pairs = "pair has" if len(report.copies) == 1 else "pairs have"
        hints.append(
            f"{report.name}: {len(report.copies)} {pairs} the same text on both sides ({_some(report.copies)}); "
            "a model learns to copy from them, so keep only names, numbers and such"
        )
    if report.repeated:
        again = _again(report)
        hints.append(
            f"{report.name}: {counted(again, 'pair')} {'occurs' if again == 1 else 'occur'} again "
            f"({_some([group[1] for group in report.repeated])}); each counts as often as it is there"
        )
    return hints


def _retranslated(texts: dict[str, _Texts]) -> list[str]:
    """Texts of several splits whose pairs differ: half of a leak."""
    hints = []
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group in _shared(texts, lambda each: each.sides[0]):
        pairs = [{texts[name].both[i] for i in indices} for name, indices in group.items()]
        if not set.intersection(*pairs):
            *_, last = group
            names[tuple(group)].append(texts[last].pairs.id(group[last][0]))
    for splits, places in names.items():
        text = "text is" if len(places) == 1 else "texts are"
        hints.append(f"{len(places)} {text} in {' and '.join(splits)} with different translations ({_some(places)})")
    return hints


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:SHOWN]) + (" ..." if len(places) > SHOWN else "")


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")
