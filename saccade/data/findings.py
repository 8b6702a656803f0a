"""What `saccade inspect` says, whatever lies there: splits, what is wrong, and what is worth a hint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rich.console import Console

from saccade.data.source import Problem, faults, told
from saccade.words import counted

LISTED = 40  # problems of a kind in a printed report; all of them are in to_dict()


class SplitFindings(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


S = TypeVar("S", bound=SplitFindings)


@dataclass
class Findings(ABC, Generic[S]):
    """A report of one kind of data."""

    path: str
    format: str
    task: str
    splits: list[S]
    problems: list[Problem]
    notes: list[str]
    hints: list[str]

    def __repr__(self) -> str:
        problems = counted(len(faults(self.problems)), "problem")
        return f"<Report on {self.path}: {self.format}, {self.amount}, {problems}>"

    @property
    @abstractmethod
    def amount(self) -> str:
        """How much of what there is, such as `12 pictures`."""

    @abstractmethod
    def render_splits(self, console: Console) -> None:
        """Tables of counts and sizes."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "task": self.task,
            "ok": self.ok,
            "splits": [split.to_dict() for split in self.splits],
            "faults": len(faults(self.problems)),  # problems of one root are one
            "problems": [vars(problem) for problem in self.problems],
            "notes": self.notes,
            "hints": self.hints,
        }

    def render(self, console: Console) -> None:
        """Tables of counts and sizes, then problems by kind."""
        self.render_splits(console)
        for text in self.notes:
            console.print(f"note: {text}", markup=False, soft_wrap=True)
        for text in self.hints:
            console.print(f"hint: {text}", markup=False, soft_wrap=True)
        by_kind: dict[str, list[list[Problem]]] = defaultdict(list)
        found = faults(self.problems)
        for fault in found:
            by_kind[fault[0].kind].append(fault)
        for kind, same in by_kind.items():
            console.print(f"[bold red]{kind.replace('_', ' ')}[/bold red]: {len(same)}")
            for fault in same[:LISTED]:
                for line in told(fault):
                    console.print(f"  {line}", markup=False, soft_wrap=True)
            if len(same) > LISTED:
                console.print(f"  ... and {len(same) - LISTED} more, all of them with --json")
        console.print("nothing is wrong" if self.ok else counted(len(found), "problem"))
