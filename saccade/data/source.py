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


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data: what kind, where, and what it is, with what to do about it."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(ABC):
    """Labelled pictures: plain data without open files, so that it travels to workers however they are started."""

    name: str
    path: Path
    class_names: tuple[str, ...]
    labels: np.ndarray  # int64 (N,), positions in class_names; -1 where there is no label

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def id(self, i: int) -> str:
        """What messages call picture `i`: its path, `shard.tar!member` or `folder[17]`."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded picture. PictureError where it cannot be read."""

    @abstractmethod
    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The pictures at these positions, in this order, with the same classes."""

    def open(self, i: int) -> BinaryIO:
        """For those who need the header only."""
        return BytesIO(self.read(i))

    def target(self, i: int) -> Any:
        """What the task's transform gets beside the picture."""
        return int(self.labels[i])

    def counts(self) -> np.ndarray:
        """Pictures per class, int64 (K,)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.class_names))

    def with_classes(self, class_names: tuple[str, ...]) -> Self:
        """The same pictures, labelled by position in `class_names`, which must hold every class of this source."""
        if class_names == self.class_names:
            return self
        position = {name: k for k, name in enumerate(class_names)}
        # the extra last entry keeps -1, no label, at -1
        table = np.array([*(position[name] for name in self.class_names), -1], dtype=np.int64)
        return replace(self, class_names=class_names, labels=table[self.labels])


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSource(Source):
    """A file per picture."""

    files: tuple[str, ...]

    def id(self, i: int) -> str:
        return self.files[i]

    def read(self, i: int) -> bytes:
        with self.open(i) as file:
            return file.read()

    def open(self, i: int) -> BinaryIO:
        try:
            return open(self.files[i], "rb")
        except OSError as error:
            raise PictureError(self.files[i], f"cannot be read ({error.strerror})") from None

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        indices = np.asarray(indices, dtype=np.int64)
        return replace(self, labels=self.labels[indices], files=tuple(self.files[i] for i in indices))


@dataclass
class Found:
    """What a format's reader saw: sources by split, and everything that is wrong, without raising."""

    format: str
    splits: dict[str, Source] = field(default_factory=dict)  # train, val, test; or all, where nothing says more
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    if not problems:
        return
    if len(problems) == 1:
        raise UserError(str(problems[0]))
    lines = [f"\n  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"\n  ... and {len(problems) - most} more; `saccade inspect {where}` lists them all")
    raise UserError(f"{where}: {len(problems)} things are wrong with this data{''.join(lines)}")
