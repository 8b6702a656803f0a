"""A list of labelled pictures on disk, whatever format they are stored in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from saccade.data.decode import PictureError
from saccade.errors import UserError


def printable(text: str) -> str:
    """With what no output can hold replaced: halves of a character (lone surrogates), which JSON's escapes can make."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data: what kind, where, and what it is, with what to do about it.

    One that `refuses` keeps a run from starting; without what the others are about, training does. Problems of one
    `root`, such as a category that is missing, are one fault.
    """

    kind: str
    where: str
    what: str
    refuses: bool = True
    root: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "what", "root"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def faults(problems: Iterable[Problem]) -> list[list[Problem]]:
    """The problems of each fault, in the order of the first of each."""
    by_root: dict[Any, list[Problem]] = {}
    for i, problem in enumerate(problems):
        by_root.setdefault(problem.root or i, []).append(problem)
    return list(by_root.values())


def told(fault: Sequence[Problem]) -> list[str]:
    """A fault in lines: its first problem, and what else comes of the same root."""
    first, *rest = fault
    lines = [str(first)]
    same = [problem.where for problem in rest if problem.kind == first.kind]
    if same:
        file = first.where.partition(", ")[0] + ", "
        some = ", ".join(where.removeprefix(file) for where in list(dict.fromkeys(same))[:3])
        often = "once" if len(same) == 1 else f"{len(same)} times"
        lines.append(f"  the same {often} more: {some}{' ...' if len(same) > 3 else ''}")
    others = [problem for problem in rest if problem.kind != first.kind]
    if others:
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        lines.append(f"  and so {others[0]}{more}")
    return lines


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(ABC):
    """Pictures with targets: plain data without open files, so that it travels to workers however they are started."""

    name: str
    path: Path
    class_names: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def id(self, i: int) -> str:
        """What messages call picture `i`: its path, `shard.tar!member` or `folder[17]`."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded picture. PictureError where it cannot be read."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The pictures at these positions, in this order, with the same classes."""

    @abstractmethod
    def target(self, i: int) -> Any:
        """What the task's transform gets beside the picture."""

    @abstractmethod
    def counts(self) -> np.ndarray:
        """Pictures, or things in pictures, per class, int64 (K,)."""

    @abstractmethod
    def with_classes(self, class_names: tuple[str, ...]) -> Self:
        """The same with targets by position in `class_names`, which must hold every class of this source."""

    @abstractmethod
    def digest(self) -> bytes:
        """Of all targets in their order, by which a run that is continued knows its data again."""

    @abstractmethod
    def strata(self) -> np.ndarray:
        """A number per picture, int64 (N,): a held-out part takes of each number its share."""

    def open(self, i: int) -> BinaryIO:
        """For those who need the header only."""
        return BytesIO(self.read(i))


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSource(Source):
    """A label per picture."""

    labels: np.ndarray  # int64 (N,), positions in class_names; -1 where there is no label

    def __len__(self) -> int:
        return len(self.labels)

    def target(self, i: int) -> int:
        return int(self.labels[i])

    def counts(self) -> np.ndarray:
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.class_names))

    def with_classes(self, class_names: tuple[str, ...]) -> Self:
        if class_names == self.class_names:
            return self
        return replace(self, class_names=class_names, labels=moved_labels(self.labels, self.class_names, class_names))

    def digest(self) -> bytes:
        return np.ascontiguousarray(self.labels).tobytes()

    def strata(self) -> np.ndarray:
        return self.labels


def moved_labels(labels: np.ndarray, old: tuple[str, ...], new: tuple[str, ...]) -> np.ndarray:
    """Positions in `old` as positions in `new`; -1, no label, stays."""
    position = {name: k for k, name in enumerate(new)}
    table = np.array([*(position[name] for name in old), -1], dtype=np.int64)  # the last entry is that of -1
    return table[labels]


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSource(LabelledSource):
    """A file and a label per picture."""

    files: tuple[str, ...]

    def id(self, i: int) -> str:
        return self.files[i]

    def read(self, i: int) -> bytes:
        with self.open(i) as file:
            return file.read()

    def open(self, i: int) -> BinaryIO:
        return open_file(self.files[i])

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        indices = np.asarray(indices, dtype=np.int64)
        return replace(self, labels=self.labels[indices], files=tuple(self.files[i] for i in indices))


def open_file(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise PictureError(path, f"cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Boxes:
    """The n things in one picture. A crowd is a region with many of a class: neither learnt nor a miss."""

    boxes: np.ndarray  # float32 (n, 4): left, top, right, bottom; pixels of the whole, upright picture
    labels: np.ndarray  # int64 (n,), positions in class_names
    crowd: np.ndarray  # bool (n,)
    area: np.ndarray  # float32 (n,): of the outline where the format knows it, else of the box

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def none(cls) -> Boxes:
        return cls(
            np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.float32)
        )


def _no_numbers() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxSource(Source):
    """A file per picture, and the things in it: those of picture i are `starts[i]` to `starts[i + 1]`."""

    files: tuple[str, ...]
    starts: np.ndarray  # int64 (N + 1,)
    boxes: np.ndarray  # float32 (M, 4), see Boxes
    labels: np.ndarray  # int64 (M,)
    crowd: np.ndarray  # bool (M,)
    area: np.ndarray  # float32 (M,)
    ids: np.ndarray = field(default_factory=_no_numbers)  # int64 (M,), or none: what `place` calls them by
    declared: np.ndarray = field(default_factory=_no_numbers)  # int64 (N, 2), or none: height and width as the
    # annotations state them, 0 where they do not; the pictures themselves may say otherwise
    annotated: tuple[str, ...] = ()  # the file with the annotations: one for all pictures, or one for each
    unit: str = "annotation"  # what one annotation is called in messages: "object", "line"
    numbers: tuple[int, ...] = ()  # of the pictures, where the format gives them (COCO); for results in its form

    def __len__(self) -> int:
        return len(self.files)

    def id(self, i: int) -> str:
        return self.files[i]

    def place(self, i: int, k: int) -> str:
        """What messages call annotation `k` of all, which is in picture `i`: its file and its number there."""
        file = self.annotated[i if len(self.annotated) > 1 else 0] if self.annotated else self.files[i]
        number = int(self.ids[k]) if len(self.ids) else k - int(self.starts[i])
        return place(file, self.unit, number)

    def read(self, i: int) -> bytes:
        with self.open(i) as file:
            return file.read()

    def open(self, i: int) -> BinaryIO:
        return open_file(self.files[i])

    def target(self, i: int) -> Boxes:
        part = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return Boxes(self.boxes[part], self.labels[part], self.crowd[part], self.area[part])

    def pictures(self) -> np.ndarray:
        """The picture of each thing, int64 (M,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def keep(self, chosen: np.ndarray) -> Self:
        """The same pictures with some of the things, bool (M,)."""
        counts = np.bincount(self.pictures()[chosen], minlength=len(self))
        return replace(
            self,
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=self.boxes[chosen],
            labels=self.labels[chosen],
            crowd=self.crowd[chosen],
            area=self.area[chosen],
            ids=self.ids[chosen] if len(self.ids) else self.ids,
        )

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        indices = np.asarray(indices, dtype=np.int64)
        spans = [np.arange(int(self.starts[i]), int(self.starts[i + 1])) for i in indices]
        chosen = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        return replace(
            self,
            files=tuple(self.files[i] for i in indices),
            starts=np.concatenate([[0], np.cumsum([len(span) for span in spans])]).astype(np.int64),
            boxes=self.boxes[chosen],
            labels=self.labels[chosen],
            crowd=self.crowd[chosen],
            area=self.area[chosen],
            ids=self.ids[chosen] if len(self.ids) else self.ids,
            declared=self.declared[indices] if len(self.declared) else self.declared,
            annotated=tuple(self.annotated[i] for i in indices) if len(self.annotated) > 1 else self.annotated,
            numbers=tuple(self.numbers[i] for i in indices) if self.numbers else (),
        )

    def counts(self) -> np.ndarray:
        """Without crowds, from which nothing is learnt."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.class_names))

    def with_classes(self, class_names: tuple[str, ...]) -> Self:
        if class_names == self.class_names:
            return self
        return replace(self, class_names=class_names, labels=moved_labels(self.labels, self.class_names, class_names))

    def digest(self) -> bytes:
        parts = (self.starts, self.boxes, self.labels, self.crowd, self.area)
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)

    def strata(self) -> np.ndarray:
        """1 + the rarest class in each picture; 0 where there is nothing."""
        rank = self.counts()
        strata = np.zeros(len(self), np.int64)
        for i in range(len(self)):
            labels = self.target(i).labels
            if len(labels):
                strata[i] = 1 + labels[rank[labels].argmin()]
        return strata


@dataclass
class Found:
    """What a format's reader saw: sources by split, and everything that is wrong, without raising."""

    format: str
    task: str = "classify"  # what can be learnt from such targets
    splits: dict[str, Source] = field(default_factory=dict)  # train, val, test; or all, where nothing says more
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def place(file: str, unit: str, number: int) -> str:
    """`file, annotation 17`; `file:3` of a line; `file, annotations[16]` of one without an id, whose number is -17."""
    if unit == "line":
        return f"{file}:{number}"
    return f"{file}, {unit} {number}" if number >= 0 else f"{file}, {unit}s[{-1 - number}]"


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted as people count: 2 before 10, where all are numbers."""
    names = set(names)
    by_number = bool(names) and all(name.isascii() and name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name)) if by_number else sorted(names))


SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def raise_problems(problems: Sequence[Problem], where: str, most: int = 12) -> None:
    """One error for all of them; nothing where there are none."""
    groups = faults(problems)
    if not groups:
        return
    if len(problems) == 1:
        raise UserError(str(problems[0]))
    lines = [f"\n  {line}" for group in groups[:most] for line in told(group)]
    if len(groups) > most:
        lines.append(f"\n  ... and {len(groups) - most} more; `saccade inspect {where}` lists them all")
    what = "one thing is" if len(groups) == 1 else f"{len(groups)} things are"
    raise UserError(f"{where}: {what} wrong with this data{''.join(lines)}")
