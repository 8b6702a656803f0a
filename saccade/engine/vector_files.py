"""Vectors on disk, in the format that the suffix says, written so that a kill leaves no half of a file."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saccade.errors import UserError
from saccade.weights.model_file import alone, sync_folder, write_atomically

CHUNK = 4096  # rows that are held in memory at a time


@dataclass(frozen=True)
class Rows:
    """A table: path, height, width, vector."""

    paths: Sequence[str]
    sizes: np.ndarray  # int64 (N, 2)
    vectors: np.ndarray  # float32 (N, C), perhaps a file that is mapped into memory

    def chunks(self) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        for start in range(0, len(self.paths), CHUNK):
            part = slice(start, start + CHUNK)
            yield [readable(path) for path in self.paths[part]], self.sizes[part], np.asarray(self.vectors[part])


def readable(path: str) -> str:
    """File names that are no UTF-8 have their odd bytes spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def check_suffix(path: Path) -> None:
    """Before any work: is this a format that can be written here?"""
    if path.suffix not in WRITERS:
        raise UserError(f"--out {path}: the name must end in {', '.join(WRITERS)}, which decides the format")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"--out {path}: .parquet needs pyarrow (pip install pyarrow, or saccade[datasets]); without it choose a "
            "name that ends in .npz, .csv or .jsonl"
        )
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; give the name of a file")
    other = beside(path)
    if path.suffix in BESIDE and (other.exists() or other.is_symlink()) and not _is_description(_read_beside(path)):
        raise UserError(
            f"--out {path}: its description would be {other}, which exists and was not written by this command; "
            "choose another --out, or move that file"
        )


def write_vectors(path: Path, rows: Rows, metadata: dict[str, Any]) -> None:
    """Under another name first, synced, then renamed."""
    metadata = {**metadata, "rows": len(rows.paths), "channels": int(rows.vectors.shape[1])}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_suffix(path)  # again: it may have taken hours to come here
        with alone(temporary):
            if path.suffix in BESIDE:
                write_atomically(beside(path), json.dumps(metadata, indent=2).encode())
            WRITERS[path.suffix](temporary, rows, json.dumps(metadata))
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"{path}: cannot be written ({what}); free space or choose another --out") from None


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What `write_vectors` was told; None where the file is not of this kind."""
    try:
        if path.suffix == ".parquet":
            from pyarrow import ArrowException, parquet

            try:
                text = (parquet.read_schema(path).metadata or {})[b"saccade"].decode()
            except ArrowException:
                return None
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as values:
                text = str(values["metadata"])
        else:
            return _read_beside(path)
        found = json.loads(text)
    except (OSError, KeyError, ValueError, EOFError, RecursionError, zipfile.BadZipFile):
        return None
    return found if isinstance(found, dict) else None


def _read_beside(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(beside(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_description(found: dict[str, Any] | None) -> bool:
    return found is not None and {"weights_sha256", "rows", "channels"} <= found.keys()


def _write_parquet(path: Path, rows: Rows, metadata: str) -> None:
    import pyarrow
    from pyarrow import parquet

    channels = rows.vectors.shape[1]
    fields = [("path", pyarrow.string()), ("height", pyarrow.int32()), ("width", pyarrow.int32())]
    vector = ("vector", pyarrow.list_(pyarrow.float32(), channels))
    schema = pyarrow.schema([*fields, vector], metadata={"saccade": metadata})
    with parquet.ParquetWriter(path, schema) as writer:
        for paths, sizes, vectors in rows.chunks():
            flat = pyarrow.array(vectors.reshape(-1), pyarrow.float32())
            listed = pyarrow.FixedSizeListArray.from_arrays(flat, channels)
            heights, widths = (pyarrow.array(side.astype(np.int32)) for side in sizes.T)
            columns = [pyarrow.array(paths), heights, widths, listed]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _write_npz(path: Path, rows: Rows, metadata: str) -> None:
    paths = np.array([readable(path) for path in rows.paths])
    heights, widths = rows.sizes.T
    with open(path, "wb") as file:
        np.savez(file, path=paths, height=heights, width=widths, vector=rows.vectors, metadata=np.array(metadata))


def _write_csv(path: Path, rows: Rows, metadata: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "height", "width", *(f"v{c}" for c in range(rows.vectors.shape[1]))])
        for paths, sizes, vectors in rows.chunks():
            for name, size, vector in zip(paths, sizes.tolist(), vectors, strict=True):
                writer.writerow([name, *size, *map(str, vector)])  # the shortest digits that give the same float32


def _write_jsonl(path: Path, rows: Rows, metadata: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for paths, sizes, vectors in rows.chunks():
            for name, (height, width), vector in zip(paths, sizes.tolist(), vectors, strict=True):
                row = {"path": name, "height": height, "width": width, "vector": [float(str(v)) for v in vector]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


WRITERS: dict[str, Callable[[Path, Rows, str], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
BESIDE = (".csv", ".jsonl")  # formats without a place for metadata


def beside(path: Path) -> Path:
    """The description of a text file lies beside it: `vectors.csv.json`."""
    return path.with_name(path.name + ".json")
