"""What a recipe looks at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSummary:
    task: str
    samples: int
    classes: int
    height: int  # median, in pixels
    width: int
    seconds: float | None = None  # of training that were asked for, on one processor; none: any

    @property
    def short_side(self) -> int:
        return min(self.height, self.width)
