"""Detections in the words of a COCO annotation file, for the programs that compare them with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.config import closest
from saccade.errors import UserError
from saccade.predictions.detection import Detections


@dataclass(frozen=True)
class CocoIds:
    """The numbers that an annotation file gives to pictures and classes."""

    where: str
    pictures: dict[str, int | str]  # by the file's name, without folders
    categories: tuple[int | None, ...]  # in the order of the model's class names; none: not in the file

    @classmethod
    def read(cls, path: str | Path, class_names: Sequence[str]) -> CocoIds:
        """UserError where the file says nothing of pictures or classes, or two pictures have one name."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            names = [str(row["file_name"]).strip().replace("\\", "/") for row in values["images"]]
            pictures = [(Path(name).name, row["id"]) for name, row in zip(names, values["images"], strict=True)]
            categories = {str(row["name"]).strip(): int(row["id"]) for row in values["categories"]}
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not a COCO annotation file with images and categories ({error!r})") from None
        ids = dict(pictures)
        if len(ids) < len(pictures):
            twice = next(name for i, (name, _) in enumerate(pictures) if name in dict(pictures[:i]))
            raise UserError(f"{path}: several pictures are called {twice}; their detections could not be told apart")
        known = tuple(categories.get(name) for name in class_names)
        if all(number is None for number in known):
            raise UserError(
                f"{path}: none of its classes ({', '.join(list(categories)[:10])}) is one that the model knows "
                f"({', '.join(class_names[:10])})"
            )
        return cls(str(path), ids, known)

    def rows(self, found: Detections) -> list[dict[str, Any]]:
        """Of one picture, for a results file; without those of classes that the annotation file does not have."""
        name = Path(found.source).name
        if name not in self.pictures:
            raise UserError(f"{self.where}: names no picture {name}{closest(name, list(self.pictures), 1)}")
        rows = found.to_coco(self.pictures[name], [-1 if k is None else k for k in self.categories])
        return [row for row, k in zip(rows, found.classes.tolist(), strict=True) if self.categories[k] is not None]
