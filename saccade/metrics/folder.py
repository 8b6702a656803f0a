"""The folder that a report is written into."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade.errors import UserError

FIGURES = "metrics.json"


def refuse_folder(folder: Path) -> None:
    """A folder for a report that cannot be written, or holds one: a UserError."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file; choose another folder for the report")
    if (folder / FIGURES).exists():
        raise UserError(f"{folder}: holds the report of before ({FIGURES}); choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written ({there} may not be changed); choose another folder")


def begin_folder(folder: str | Path, figures: Mapping[str, Any], of: Mapping[str, Any] | None) -> Path:
    """Make it and write the figures, and what they are `of`. Nothing is overwritten; UserError where that cannot be."""
    folder = Path(folder)
    refuse_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FIGURES).open("x", encoding="utf-8") as file:
            file.write(json.dumps({**({} if of is None else {"of": of}), **figures}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error.strerror or error})") from None
    return folder
