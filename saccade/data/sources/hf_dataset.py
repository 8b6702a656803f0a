"""What Hugging Face `datasets` saves with save_to_disk: a Dataset, or a DatasetDict with splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from saccade.data.decode import PictureError
from saccade.data.source import SPLIT_NAMES, Found, LabelledSource, Problem, sort_names
from saccade.data.sources.table import LABEL_COLUMNS, PATH_COLUMNS
from saccade.errors import UserError

REMEDY = "pip install 'saccade[datasets]'"


@dataclass(frozen=True, kw_only=True, eq=False)
class HfSource(LabelledSource):
    """Rows of a Dataset; the Dataset itself is opened anew in every process."""

    split: str  # empty for a Dataset without splits
    column: str
    rows: np.ndarray  # int64 (N,)

    def id(self, i: int) -> str:
        return f"{self.path / self.split}[{self.rows[i]}]"

    def read(self, i: int) -> bytes:
        value = _open_column(str(self.path), self.split, self.column)[int(self.rows[i])][self.column]
        if value and value["bytes"] is not None:
            return value["bytes"]
        if not value or not value["path"]:
            raise PictureError(self.id(i), "the row holds no picture; fill or remove it")
        try:
            return Path(value["path"]).read_bytes()
        except OSError as error:
            raise PictureError(self.id(i), f"its file {value['path']} cannot be read ({error.strerror})") from None

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        indices = np.asarray(indices, dtype=np.int64)
        return replace(self, labels=self.labels[indices], rows=self.rows[indices])


def is_dataset(path: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one or (path / "dataset_dict.json").is_file()


def find(path: Path) -> Found:
    """Read features and labels; pictures stay on disk."""
    found = Found("hf_dataset")
    loaded = _load(str(path))
    if hasattr(loaded, "keys"):
        for name in loaded:
            split = SPLIT_NAMES.get(str(name).lower())
            if split is None or split in found.splits:
                found.notes.append(f"{path}: the split {name!r} is left out; train, validation and test are used")
            else:
                found.splits[split] = _read(path, str(name), loaded[name], found)
        if set(found.splits) != {"train"} and "train" not in found.splits and len(found.splits) == 1:
            found.splits = {"all": next(iter(found.splits.values()))}
        if not found.splits:
            found.problems.append(Problem("no_split", str(path), "no split is called train; rename one of them"))
    else:
        found.splits["all"] = _read(path, "", loaded, found)
    return found


def _read(path: Path, split: str, dataset: Any, found: Found) -> HfSource:
    where = str(path / split)
    features = dict(dataset.features)
    pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    pictures.sort(key=lambda name: PATH_COLUMNS.index(name) if name in PATH_COLUMNS else len(PATH_COLUMNS))
    label = next((name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"), None)
    label = label or next((name for name in LABEL_COLUMNS if name in features), None)
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    if not pictures:
        what = f"no column of pictures among {columns}; cast one to datasets.Image()"
        found.problems.append(Problem("no_column", where, what))
    if label is None:
        what = f"no column of labels among {columns}; call it label, or cast one to datasets.ClassLabel"
        found.problems.append(Problem("no_column", where, what))
    names: tuple[str, ...] = ()
    rows = np.zeros(0, dtype=np.int64)
    labels = np.zeros(0, dtype=np.int64)
    if pictures and label is not None:
        values = dataset.select_columns([label]).with_format(None)[:][label]
        declared = getattr(features[label], "names", None)
        kept: list[int] = []
        texts: list[str] = []
        for row, value in enumerate(values):
            text = _name_of(value, declared)
            if text is None:
                what = "no label; fill it or remove the row" if value in (None, -1) else f"the label is {value!r}"
                found.problems.append(Problem("missing_label", f"{where}[{row}]", what))
            else:
                kept.append(row)
                texts.append(text)
        names = tuple(declared) if declared else sort_names(texts)
        position = {name: k for k, name in enumerate(names)}
        labels = np.array([position[text] for text in texts], dtype=np.int64)
        rows = np.array(kept, dtype=np.int64)
    if not len(rows) and pictures and label is not None:
        found.problems.append(Problem("no_pictures", where, "no rows with a label; is this the right dataset?"))
    return HfSource(
        name=split or path.name,
        path=path,
        class_names=names,
        labels=labels,
        split=split,
        column=pictures[0] if pictures else "",
        rows=rows,
    )


def _name_of(value: Any, declared: list[str] | None) -> str | None:
    if declared is not None:
        return declared[value] if isinstance(value, int) and 0 <= value < len(declared) else None
    return str(value) if isinstance(value, int | str) and value != "" else None


def _load(path: str) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise UserError(f"{path}: a Hugging Face dataset, which needs one more package: {REMEDY}") from None
    try:
        return load_from_disk(path)
    except Exception as error:  # whatever Arrow and datasets say about damaged files
        text = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be opened as a Hugging Face dataset ({text}); save it to disk again") from None


@lru_cache(maxsize=8)
def _open_column(path: str, split: str, column: str) -> Any:
    """The encoded pictures only: datasets would decode them with its own settings."""
    from datasets import Image

    loaded = _load(path)
    return (loaded[split] if split else loaded).select_columns([column]).cast_column(column, Image(decode=False))
