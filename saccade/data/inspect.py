"""What is in a data set, and everything that is wrong with it: every picture is read and decoded in full."""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from os import cpu_count
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from saccade.config import DataConfig
from saccade.data.decode import SUFFIXES, Picture, PictureError
from saccade.data.findings import Findings
from saccade.data.inspect_boxes import BoxReport, box_hints, box_report, box_rows, share
from saccade.data.source import BoxSource, LabelledSource, Problem, Source
from saccade.data.sources import Place, choose_split, class_problems, find, unite_classes
from saccade.data.sources.boxes import fit
from saccade.data.text.inspect import TextReport, inspect_texts
from saccade.data.text.splits import holds_text
from saccade.errors import UserError
from saccade.words import HOLDS, counted

ASPECT_EDGES = (0.5, 0.8, 1.25, 2.0)  # width / height; between them the picture's share is counted
UNBALANCED = 10  # the largest class over the smallest, from which it is worth a hint
FEW = 20  # training pictures of a class, below which it is worth a hint


@dataclass
class SplitReport:
    """Counts and sizes of one split."""

    name: str
    where: str
    pictures: int
    classes: dict[str, int]  # pictures of each, or objects
    height: tuple[int, int, int] | None = None  # min, median, max of those that can be read
    width: tuple[int, int, int] | None = None
    aspects: dict[str, int] = field(default_factory=dict)  # pictures by range of width / height
    boxes: BoxReport | None = None  # where there are objects in pictures

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.boxes is None:
            del values["boxes"]
        return values


class Report(Findings[SplitReport]):
    """What `saccade inspect` says of pictures."""

    @property
    def amount(self) -> str:
        return counted(sum(split.pictures for split in self.splits), "picture")

    def render_splits(self, console: Console) -> None:
        boxes = [split.boxes for split in self.splits]
        form = f"objects in pictures, {self.format.upper()}" if any(boxes) else self.format.replace("_", " ")
        console.print(f"[bold]{escape(self.path)}[/bold]: {form}", soft_wrap=True)
        names = list(dict.fromkeys(name for split in self.splits for name in split.classes))
        table = Table("class", *(split.name for split in self.splits))
        for column in table.columns[1:]:
            column.justify = "right"
        for name in names:
            table.add_row(escape(name), *(str(split.classes.get(name, 0)) for split in self.splits))
        table.add_section()
        if any(boxes):
            table.add_row("all objects", *(str(sum(split.classes.values())) for split in self.splits))
            table.add_section()
            table.add_row("pictures", *(str(split.pictures) for split in self.splits))
            for label, row in box_rows(boxes, [split.pictures for split in self.splits]):
                table.add_row(label, *row)
        else:
            table.add_row("all", *(str(split.pictures) for split in self.splits))
        table.add_section()
        for what in ("width", "height"):
            table.add_row(f"{what} (min, median, max)", *(_three(getattr(split, what)) for split in self.splits))
        for label in dict.fromkeys(label for split in self.splits for label in split.aspects):
            row = (share(split.aspects.get(label, 0), split.pictures) for split in self.splits)
            table.add_row(f"width / height {label}", *row)
        console.print(table)


@dataclass(frozen=True)
class _Seen:
    """One picture after a full look at it."""

    digest: bytes | None  # none: could not even be read
    size: tuple[int, int] | None  # none: could not be decoded
    problem: Problem | None = None


def inspect_data(
    path: Place,
    val: Place | None = None,
    config: DataConfig | None = None,
    languages: tuple[str | None, str | None] = (None, None),
) -> Report | TextReport:
    """Look at every picture, or pair of texts, of every split. Only a path with nothing at all is an error; the rest is
    in the report. `languages`: from which into which, where there are more than two."""
    if isinstance(path, str | Path) and holds_text(Path(path)):
        if val is not None and not isinstance(val, str | Path):
            raise UserError(f"{path}: holds {HOLDS['translate']}; give others of them by --val")
        return inspect_texts(Path(path), None if val is None else Path(val), *languages)
    for flag, name in zip(("--text.source", "--text.target"), languages, strict=True):
        if name is not None:
            raise UserError(f"{flag} {name}: is for texts, and {path} holds none in parallel files or tables")
    return _inspect_pictures(path, val, config or DataConfig())


def _inspect_pictures(path: Place, val: Place | None, config: DataConfig) -> Report:
    found = find(path)
    problems, notes, sources = list(found.problems), list(found.notes), dict(found.splits)
    if val is not None:
        beside = find(val)
        problems += beside.problems
        notes += beside.notes
        chosen = {
            "train": choose_split(sources, "train", *sources),
            "val": choose_split(beside.splits, "val", *beside.splits),
        }
        sources = {split: source for split, source in chosen.items() if source is not None}
    names = unite_classes(list(sources.values())) if sources else ()
    sources = {split: source.with_classes(names) for split, source in sources.items()}
    seen = {split: _look(source, config) for split, source in sources.items()}
    for split, source in sources.items():
        if isinstance(source, BoxSource):
            sources[split], misfits = fit(source, _sizes(seen[split]))
            problems += misfits
    learnt = choose_split(sources, "train", "all")
    if learnt is not None:
        problems += class_problems(learnt, choose_split(sources, "val", "test"), str(path), problems)
    for split, looks in seen.items():
        none = split != "test" and not any(look.size for look in looks)  # where training has nothing to begin with
        faulty = [replace(look.problem, refuses=none) for look in looks if look.problem is not None]
        problems += _of_one_root(faulty, split, len(looks))
    problems += _same_bytes(sources, seen)
    return Report(
        path=str(path),
        format=found.format,
        task=found.task,
        splits=[_summary(split, source, seen[split]) for split, source in sources.items()],
        problems=problems,
        notes=notes,
        hints=_hints(sources, learnt, seen),
    )


def _of_one_root(problems: list[Problem], split: str, pictures: int) -> list[Problem]:
    """The same is wrong with every picture of a split, or all of the wrong ones are of one name and content."""
    same = {(problem.kind, problem.what) for problem in problems}
    if len(same) == 1 and len(problems) > 1 and (len(problems) == pictures or problems[0].kind == "wrong_extension"):
        return [replace(problem, root=f"{split}: {problem.what}") for problem in problems]
    return problems


def _sizes(looks: list[_Seen]) -> np.ndarray:
    """Height and width of each picture, int64 (N, 2); 0 where it cannot be read."""
    return np.array([look.size or (0, 0) for look in looks], dtype=np.int64).reshape(-1, 2)


def _look(source: Source, config: DataConfig) -> list[_Seen]:
    def look(i: int) -> _Seen:
        name, digest = source.id(i), None
        try:
            data = source.read(i)
            digest = hashlib.blake2b(data, digest_size=16).digest()
            picture = Picture(data, name, config.max_pixels)
            picture.whole()
        except PictureError as error:
            return _Seen(digest, None, Problem(error.kind, name, error.reason, refuses=False))
        suffix = PurePath(name).suffix.lower()
        if SUFFIXES.get(suffix, picture.format) != picture.format:
            what = f"the name ends in {suffix}, the content is {picture.format}; rename it"
            return _Seen(digest, picture.size, Problem("wrong_extension", name, what, refuses=False))
        return _Seen(digest, picture.size)

    console = Console(stderr=True)
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        looks = pool.map(look, range(len(source)))
        label = f"looking at {source.name}"
        return list(track(looks, label, len(source), console=console, transient=True, disable=not sys.stderr.isatty()))


def _same_bytes(sources: dict[str, Source], seen: dict[str, list[_Seen]]) -> list[Problem]:
    """Groups of pictures with the same bytes: within a split, across splits, and under different labels."""
    groups: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for split, looks in seen.items():
        for i, look in enumerate(looks):
            # all empty files are the same, and have been reported as such
            if look.digest is not None and look.size is not None:
                groups[look.digest].append((split, i))
    problems = []
    leaks: dict[tuple[str, ...], list[Problem]] = defaultdict(list)
    for group in groups.values():
        if len(group) < 2:
            continue
        by_split: dict[str, list[str]] = defaultdict(list)
        labels = {}
        for split, i in group:
            source = sources[split]
            by_split[split].append(source.id(i))
            if isinstance(source, LabelledSource):
                labels[source.class_names[source.labels[i]]] = None
        first, *others = [name for names in by_split.values() for name in names]
        for names in by_split.values():
            if len(names) > 1:
                what = f"the same bytes as {', '.join(names[1:])}; keep one of them"
                problems.append(Problem("duplicate", names[0], what, refuses=False))
        if len(by_split) > 1:
            what = f"in {' and '.join(by_split)}: the same bytes as {', '.join(others)}; keep it in one split only"
            leaks[tuple(by_split)].append(Problem("leak", first, what, refuses=False))
        if len(labels) > 1:
            what = f"labelled {' and '.join(labels)}: the same bytes as {', '.join(others)}; keep the right one"
            problems.append(Problem("two_labels", first, what, refuses=False))
    for splits, same in leaks.items():  # a whole split that is a copy of another's part is one fault
        whole = len(same) > 1 and len(same) == min(len(sources[split]) for split in splits)
        root = f"{' and '.join(splits)} are the same" if whole else ""
        problems += [replace(problem, root=root) for problem in same]
    return problems


def _summary(split: str, source: Source, looks: list[_Seen]) -> SplitReport:
    classes = dict(zip(source.class_names, source.counts().tolist(), strict=True))
    report = SplitReport(split, str(source.path), len(source), classes)
    if isinstance(source, BoxSource):
        report.boxes = box_report(source)
    sizes = _sizes([look for look in looks if look.size is not None])
    if len(sizes):
        low, middle, high = sizes.min(axis=0), np.median(sizes, axis=0).round().astype(int), sizes.max(axis=0)
        report.height, report.width = ((int(low[k]), int(middle[k]), int(high[k])) for k in range(2))
        bins = np.bincount(np.digitize(sizes[:, 1] / sizes[:, 0], ASPECT_EDGES), minlength=len(ASPECT_EDGES) + 1)
        edges = [f"{edge:g}" for edge in ASPECT_EDGES]
        between = [f"{a} to {b}" for a, b in pairwise(edges)]
        labels = [f"below {edges[0]}", *between, f"over {edges[-1]}"]
        report.aspects = dict(zip(labels, bins.tolist(), strict=True))
    return report


def _hints(sources: dict[str, Source], learnt: Source | None, seen: dict[str, list[_Seen]]) -> list[str]:
    hints = []
    if isinstance(learnt, BoxSource):
        hints += box_hints(learnt, _sizes(seen["train" if "train" in seen else "all"]))
    elif learnt is not None and len(learnt):
        counts = learnt.counts()
        most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max() + 1).argmin())
        if counts[most] > UNBALANCED * counts[least]:
            hints.append(
                f"very unequal classes: {counted(int(counts[most]), 'picture')} of {learnt.class_names[most]}, "
                f"{counts[least]} of {learnt.class_names[least]}; look at the recall of each class"
            )
        few = [name for name, count in zip(learnt.class_names, counts, strict=True) if 0 < count < FEW]
        if few:
            hints.append(f"fewer than {FEW} pictures to learn from: {', '.join(few)}; start from trained weights")
    what, measure = ("objects", "AP") if isinstance(learnt, BoxSource) else ("pictures", "accuracy")
    for split in ("val", "test"):
        if split in sources:
            empty = [n for n, c in zip(sources[split].class_names, sources[split].counts(), strict=True) if not c]
            if empty and len(sources[split]):
                hints.append(f"no {what} in {split} of {', '.join(empty)}; their {measure} cannot be measured")
    return hints


def _three(values: tuple[int, int, int] | None) -> str:
    return ", ".join(map(str, values)) if values else "-"
