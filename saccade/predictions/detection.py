"""The things in a picture: text, JSON, and a picture that shows where they are and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from saccade.errors import UserError
from saccade.predictions.cards import percent, write_new
from saccade.predictions.detection_card import draw_card

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, eq=False)
class Detection:
    """One thing in a picture."""

    label: str
    score: float  # from 0 to 1
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the picture
    class_index: int  # position in the model's class names
    map: np.ndarray | None = field(default=None, repr=False)  # (h, w) over the picture, largest is 1: why it is there

    def __str__(self) -> str:
        return f"{self.label} {percent(self.score)} at ({', '.join(f'{edge:.0f}' for edge in self.box)})"


@dataclass(frozen=True, eq=False)
class Detections:
    """The n things found in one picture, the surest first; `for one in found` gives each as a Detection."""

    boxes: np.ndarray  # float32 (n, 4): left, top, right, bottom in pixels of the picture
    scores: np.ndarray  # float32 (n,), from 0 to 1
    labels: tuple[str, ...]
    classes: np.ndarray  # int64 (n,), positions in the model's class names
    size: tuple[int, int]  # height and width of the picture
    source: str = "image 1"  # path, or the place among pictures that were given as arrays
    picture: Callable[[], Image.Image] | None = field(default=None, repr=False)  # gives the picture, for drawing
    maps: np.ndarray | None = field(default=None, repr=False)  # (n, h, w) over the picture, largest is 1: why each box

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Detection:
        left, top, right, bottom = self.boxes[i].tolist()
        return Detection(
            label=self.labels[i],
            score=float(self.scores[i]),
            box=(left, top, right, bottom),
            class_index=int(self.classes[i]),
            map=None if self.maps is None else self.maps[i],
        )

    def __iter__(self) -> Iterator[Detection]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<Detections {self}>"

    def __str__(self) -> str:
        if not self.labels:
            return f"{self.source}: nothing found"
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.labels).most_common())
        return f"{self.source}: {counts}"

    def above(self, threshold: float) -> Detections:
        """Those that score this or more."""
        keep = np.flatnonzero(self.scores >= threshold)
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=tuple(self.labels[i] for i in keep),
            classes=self.classes[keep],
            maps=None if self.maps is None else self.maps[keep],
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: boxes as left, top, right, bottom in pixels of the picture as it is looked at, upright."""
        rows = zip(self.labels, self.classes.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        return {
            "source": self.source,
            "width": self.size[1],
            "height": self.size[0],
            "detections": [
                {"label": label, "class": k, "score": round(score, 6), "box": [round(edge, 2) for edge in box]}
                for label, k, score, box in rows
            ],
        }

    def to_coco(self, image_id: int | str, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Rows of a COCO results file: boxes as left, top, width, height.

        `category_ids` are those of the annotations, in the order of the model's class names; without them classes are
        counted from 1.
        """
        rows = zip(self.classes.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": k + 1 if category_ids is None else category_ids[k],
                "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
                "score": round(score, 6),
            }
            for k, score, (left, top, right, bottom) in rows
        ]

    def to_supervision(self) -> supervision.Detections:
        """For the tools of Roboflow's supervision, which must be installed."""
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision needs one more package: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=self.classes.astype(int),
            data={"class_name": np.array(self.labels, dtype=str)},
        )

    def save(self, path: str | Path) -> Path:
        """Draw the picture with its boxes; with `maps`, also why the surest of them are there. Returns where it is.

        A path without a suffix is a folder, in which the file is named after the source. No file is ever overwritten:
        the name becomes name-1.png, and so on. UserError where there is no picture or it cannot be written.
        """
        if self.picture is None:
            raise UserError(f"{self.source}: this prediction holds no picture, so there is nothing to draw")
        return write_new(draw_card(self, self.picture().convert("RGB")), path, self.source)
