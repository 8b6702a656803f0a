"""The features of pictures as vectors; for a file, made in parts that survive a kill."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from saccade.config import DataConfig, PreprocessingConfig, describe_faults
from saccade.data.loader import eval_batches, measure_sizes
from saccade.data.source import FileSource, LabelledSource, Source, open_file
from saccade.data.sources import open_pictures
from saccade.data.transforms import EvalTransform, collate_eval
from saccade.engine.device import autocast
from saccade.engine.evaluate import Normalise
from saccade.engine.lock import NAME as LOCK
from saccade.engine.lock import alone_in
from saccade.engine.predict import Model, PictureInput, list_inputs, open_picture
from saccade.engine.vector_files import Rows, check_suffix, read_metadata, write_vectors
from saccade.errors import UserError
from saccade.models.translator import Translator
from saccade.weights.fingerprint import hash_tensors
from saccade.weights.model_file import write_atomically
from saccade.words import counted

What = Literal["summary", "map-mean"]  # the picture's own vector, or the mean of the last map over all places
DATA = DataConfig(cache="off")  # every picture is read once
PART_SECONDS = 10.0  # of work that a kill may cost
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Embeddings:
    """A vector per picture, in the order in which the pictures were given."""

    paths: tuple[str, ...]
    vectors: np.ndarray  # float32 (N, C)
    sizes: np.ndarray  # int64 (N, 2): height and width of the pictures
    unreadable: tuple[str, ...]  # what is wrong with those that are left out
    metadata: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Embeddings of {counted(len(self), 'picture')}, {self.vectors.shape[1]} numbers each>"

    def __len__(self) -> int:
        return len(self.paths)

    def save(self, path: str | Path) -> Path:
        """To a .parquet, .npz, .csv or .jsonl file."""
        path = Path(path)
        check_suffix(path)
        write_vectors(path, Rows(self.paths, self.sizes, self.vectors), self.metadata)
        return path


@dataclass(frozen=True)
class EmbeddedFile:
    """What `embed_to_file` leaves behind."""

    path: Path
    count: int
    channels: int
    unreadable: tuple[str, ...]
    finished_before: bool  # there was nothing left to do


@dataclass(frozen=True)
class Part:
    """Some pictures that are done, by their positions in the list."""

    indices: np.ndarray  # int64 (n,)
    vectors: np.ndarray  # float32 (n, C)
    unreadable: list[tuple[int, str]]

    @property
    def done(self) -> int:
        return len(self.indices) + len(self.unreadable)


@dataclass(frozen=True)
class Encoder:
    """How a batch of pictures becomes vectors."""

    model: Model
    what: What
    preprocessing: PreprocessingConfig

    @classmethod
    def build(cls, model: Model, what: str, image_size: int | None) -> Encoder:
        if what not in get_args(What):
            raise UserError(f"--what {what}: not known; use {' or '.join(get_args(What))}")
        values = {**model.preprocessing.model_dump(), **({} if image_size is None else {"image_size": image_size})}
        try:
            preprocessing = PreprocessingConfig.model_validate(values)
        except ValidationError as error:
            raise UserError(f"--image-size: {describe_faults(error)}") from None
        return cls(model, what, preprocessing)  # pyright: ignore[reportArgumentType]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> np.ndarray:
        """Normalised pictures (B, 3, H, W) -> float32 (B, C)."""
        assert not isinstance(self.model.network, Translator)  # a Model is of pictures
        backbone = self.model.network.backbone
        with autocast(self.model.device, self.model.precision):
            if self.what == "summary":
                vectors = backbone.summary(images)  # (B, C)
            else:
                vectors = backbone(images).maps[-1].float().mean(dim=(2, 3))  # (B, C)
        return vectors.float().cpu().numpy()

    def parts(self, source: Source, sizes: np.ndarray, batch_size: int, workers: int) -> Iterator[Part]:
        """A part per batch: pictures of one aspect bucket, in an order that only the list decides."""
        normalise = Normalise(self.preprocessing, self.model.device)
        batches = eval_batches(
            source,
            sizes,
            EvalTransform(self.preprocessing),
            collate_eval,
            preprocessing=self.preprocessing,
            data=DATA,
            batch_size=batch_size,
            workers=workers,
            pin_memory=self.model.device.type == "cuda",
        )
        with closing(batches):
            for batch in batches:
                batch = batch.to(self.model.device)
                vectors = self.encode(normalise(batch.images))[: len(batch.indices)]
                yield Part(batch.indices.cpu().numpy(), vectors, batch.unreadable)

    def describe(self) -> dict[str, Any]:
        """All that the vectors depend on, beside the pictures."""
        return {
            "model": self.model.card.model,
            "weights_sha256": hash_tensors(self.model.network.state_dict()),
            # what is no tensor, such as merging of tokens, decides too
            "architecture": self.model.card.architecture,
            "what": self.what,
            "precision": str(self.model.precision).removeprefix("torch."),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenPictures(LabelledSource):
    """Paths, PIL images, arrays and tensors in any mixture."""

    values: tuple[tuple[str, PictureInput], ...]

    def id(self, i: int) -> str:
        return self.values[i][0]

    def read(self, i: int) -> bytes:
        """A file's own bytes; pixels as a PNG, which keeps every one of them."""
        name, value = self.values[i]
        if isinstance(value, str | Path):
            with open_file(str(value)) as file:
                return file.read()
        encoded = io.BytesIO()
        open_picture(name, value).whole().save(encoded, "PNG", compress_level=1)
        return encoded.getvalue()

    def subset(self, indices: Sequence[int] | np.ndarray) -> GivenPictures:
        return list_source([self.values[int(i)] for i in indices])


def list_source(values: Sequence[tuple[str, PictureInput]]) -> GivenPictures:
    labels = np.full(len(values), -1, dtype=np.int64)
    return GivenPictures(name="pictures", path=Path(), class_names=(), labels=labels, values=tuple(values))


def embed(
    model: str | Path | Model,
    pictures: PictureInput | Iterable[PictureInput],
    *,
    what: str = "summary",
    batch_size: int = 64,
    image_size: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    workers: int = 0,
    progress: Progress | None = None,
) -> Embeddings:
    """The features of files, folders, PIL images, arrays (H, W, 3) or tensors (3, H, W), held in memory.

    What cannot be read is left out and described in `unreadable`. A loaded `Model` keeps its own device and precision.
    What had to be assumed of weights of another library is warned of.
    """
    notes: list[str] = []
    encoder = Encoder.build(_loaded(model, device, precision, notes), what, image_size)
    if notes:
        warnings.warn("\n".join(notes), stacklevel=3)
    source = list_source(list_inputs(pictures))
    sizes = measure_sizes(source, DATA)
    merged, done = Merged(len(source)), 0
    for part in encoder.parts(source, sizes, batch_size, workers):
        merged.add(part)
        done += part.done
        if progress is not None:
            progress(done, len(source))
    rows = merged.rows([source.id(i) for i in range(len(source))], sizes)
    metadata = {**encoder.describe(), "unreadable": merged.complaints()}
    return Embeddings(tuple(rows.paths), rows.vectors, rows.sizes, tuple(merged.complaints()), metadata)


def embed_to_file(
    model: str | Path | Model,
    pictures: Iterable[str | Path],
    out: str | Path,
    *,
    what: str = "summary",
    batch_size: int = 64,
    image_size: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    workers: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> EmbeddedFile:
    """As `embed`, into a file. After a kill at any moment the same call goes on where it was, to the same file."""
    path = Path(out)
    check_suffix(path)
    source = open_pictures(pictures)
    notes: list[str] = []
    encoder = Encoder.build(_loaded(model, device, precision, notes), what, image_size)
    for note in notes:
        say(f"note: {note}")
    job = {**encoder.describe(), **describe_pictures(source.files)}
    parts = PartsFolder(path.with_name(f".{path.name}.parts"), job)
    finished = finished_already(path, job)
    if finished is not None:
        parts.remove()
        return finished
    busy = f"{path}: another process is writing it; let that one end, or choose another --out"
    with alone_in(parts.path, busy):
        finished = finished_already(path, job)  # meanwhile, by the one that was here before
        return finished or _in_parts(encoder, source, parts, path, batch_size, workers, progress, say)


def _in_parts(
    encoder: Encoder,
    source: FileSource,
    parts: PartsFolder,
    path: Path,
    batch_size: int,
    workers: int,
    progress: Progress | None,
    say: Callable[[str], None],
) -> EmbeddedFile:
    """What is not done yet, then the whole file."""
    done = parts.open()
    sizes = parts.sizes(source)
    if done.any():
        say(f"{done.sum()} of {len(source)} pictures are done already; going on from there")
    rest = np.flatnonzero(~done)
    count = 0
    writer = PartWriter(parts)
    # batches are cut from each bucket in the list's order, so what is left is cut as if nothing had been interrupted
    for part in encoder.parts(source.subset(rest), sizes[rest], batch_size, workers):
        writer.add(Part(rest[part.indices], part.vectors, [(int(rest[i]), what) for i, what in part.unreadable]))
        count += part.done
        if progress is not None:
            progress(count, len(rest))
    writer.flush()
    merged = parts.merge(len(source))
    complaints = merged.complaints()
    if missing := merged.missing:
        raise UserError(
            f"{parts.path}: lacks {counted(missing, 'picture')} that were done; did something else change it "
            "meanwhile? The same command does them anew"
        )
    if merged.vectors is None:
        parts.remove()
        listed = "".join(f"\n  {line}" for line in complaints)
        raise UserError(f"{path}: not written, because none of the pictures could be read:{listed}")
    rows = merged.rows(source.files, sizes)
    write_vectors(path, rows, {**parts.job, "unreadable": complaints})
    channels = rows.vectors.shape[1]
    del rows, merged
    parts.remove()
    return EmbeddedFile(path, len(source) - len(complaints), channels, tuple(complaints), False)


def _loaded(model: str | Path | Model, device: str, precision: str, notes: list[str] | None = None) -> Model:
    return model if isinstance(model, Model) else Model.load(model, device=device, precision=precision, notes=notes)


def describe_pictures(files: Sequence[str]) -> dict[str, Any]:
    """The list of files, and a hash of it with their sizes and times: a picture that changes makes another job."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)
            facts = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            facts = "gone"
        digest.update(os.fsencode(file) + f"\0{facts}\n".encode())
    return {"pictures": len(files), "pictures_sha256": digest.hexdigest()}


def finished_already(path: Path, job: dict[str, Any]) -> EmbeddedFile | None:
    """What an earlier call of the same job wrote; None where nothing is there, a UserError where something else is."""
    if not path.exists():
        return None
    found = read_metadata(path)
    if found is None:
        raise UserError(f"{path}: exists and was not written by this command; choose another --out")
    differing = differences(found, job)
    if differing:
        raise UserError(f"{path}: holds vectors of another job ({differing}); choose another --out, or remove the file")
    unreadable = tuple(str(line) for line in found.get("unreadable", ()))
    return EmbeddedFile(path, int(found["rows"]), int(found["channels"]), unreadable, True)


NAMES = {
    "model": "another model",
    "weights_sha256": "other weights",
    "architecture": "other settings of the network",
    "what": "another --what",
    "precision": "another --precision",
    "preprocessing": "another --image-size or preprocessing",
    "pictures": "another number of pictures",
    "pictures_sha256": "other or changed pictures",
}


def differences(found: Any, job: dict[str, Any]) -> str:
    """In words, what is not the same; empty for the same job."""
    if not isinstance(found, dict):
        return "its description is damaged"
    return ", ".join(NAMES[name] for name in job if found.get(name) != job[name])


class Merged:
    """Vectors at their pictures' positions; the first part tells how long they are."""

    def __init__(self, count: int, scratch: Path | None = None):
        self.count, self.scratch = count, scratch
        self.vectors: np.ndarray | None = None  # float32 (N, C), on disk where there is a scratch file
        self.done = np.zeros(count, dtype=bool)
        self.unreadable: dict[int, str] = {}

    def add(self, part: Part) -> None:
        if len(part.indices):
            if self.vectors is None:
                shape = (self.count, part.vectors.shape[1])
                if self.scratch is None:
                    self.vectors = np.zeros(shape, dtype=np.float32)
                else:
                    self.vectors = np.memmap(self.scratch, dtype=np.float32, mode="w+", shape=shape)
            self.vectors[part.indices] = part.vectors
            self.done[part.indices] = True
        self.unreadable.update(part.unreadable)

    @property
    def missing(self) -> int:
        """Pictures that have neither a vector nor a complaint."""
        seen = self.done.copy()
        seen[list(self.unreadable)] = True
        return int((~seen).sum())

    def complaints(self) -> list[str]:
        return [self.unreadable[i] for i in sorted(self.unreadable)]

    def rows(self, paths: Sequence[str], sizes: np.ndarray) -> Rows:
        """Of the pictures that could be read, in the list's order."""
        vectors = np.zeros((self.count, 0), dtype=np.float32) if self.vectors is None else self.vectors
        if self.done.all():
            return Rows(paths, sizes, vectors)
        kept = np.flatnonzero(self.done)
        return Rows([paths[int(i)] for i in kept], sizes[kept], vectors[kept])


@dataclass(frozen=True)
class PartsFolder:
    """The hidden folder beside --out in which finished parts wait: `job.json`, `sizes.npy`, `part-*.npz`.

    Whoever opens it holds its lock: parts of two processes would take each other's names.
    """

    path: Path
    job: dict[str, Any]

    def open(self) -> np.ndarray:
        """Begin here, or find the same job's parts; which pictures are done, bool (N,)."""
        description = self.path / "job.json"
        if description.exists():
            try:
                found = json.loads(description.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = None
            if differing := differences(found, self.job):
                raise UserError(
                    f"{self.path}: holds unfinished work of another job ({differing}); give the same model, pictures "
                    "and flags to finish that one, choose another --out, or remove this folder"
                )
        else:
            write_atomically(description, json.dumps(self.job, indent=2).encode())
        done = np.zeros(self.job["pictures"], dtype=bool)
        for part in self.read():
            done[part.indices] = True
            done[[i for i, _ in part.unreadable]] = True
        return done

    def sizes(self, source: Source) -> np.ndarray:
        """Height and width of every picture (N, 2), measured once."""
        file = self.path / "sizes.npy"
        if file.exists():
            try:
                sizes = np.load(file, allow_pickle=False)
                if sizes.shape == (len(source), 2):
                    return sizes
            except (OSError, ValueError, EOFError):
                pass  # it is quicker measured anew than explained
        sizes = measure_sizes(source, DATA)
        buffer = io.BytesIO()
        np.save(buffer, sizes)
        write_atomically(file, buffer.getvalue())
        return sizes

    def files(self) -> list[Path]:
        return sorted(self.path.glob("part-*.npz"))

    def read(self) -> Generator[Part, None, None]:
        for file in self.files():
            try:
                with np.load(file, allow_pickle=False) as values:
                    unreadable = [(int(i), str(what)) for i, what in json.loads(str(values["unreadable"]))]
                    yield Part(values["indices"], values["vectors"], unreadable)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{file}: damaged ({error}); remove it, and its pictures are done anew") from None

    def write(self, part: Part) -> None:
        buffer = io.BytesIO()
        unreadable = np.array(json.dumps(part.unreadable))
        np.savez(buffer, indices=part.indices, vectors=part.vectors, unreadable=unreadable)
        first = min([*part.indices.tolist(), *(i for i, _ in part.unreadable)])
        # no two parts have a picture in common, so its first one is a name
        write_atomically(self.path / f"part-{first:09d}.npz", buffer.getvalue())

    def merge(self, count: int) -> Merged:
        merged = Merged(count, self.path / "merged.f32")
        for part in self.read():
            merged.add(part)
        return merged

    def remove(self) -> None:
        """The lock comes last: who finds none may begin anew here, and nothing of that one is taken away."""
        for file in self.path.glob("*"):
            if file.name != LOCK:
                with suppress(OSError):
                    file.unlink()
        shutil.rmtree(self.path, ignore_errors=True)


class PartWriter:
    """Collects batches and writes a part now and then."""

    def __init__(self, folder: PartsFolder):
        self.folder = folder
        self.waiting: list[Part] = []
        self.last = time.monotonic()

    def add(self, part: Part) -> None:
        self.waiting.append(part)
        if time.monotonic() - self.last >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            with_vectors = [part for part in self.waiting if len(part.indices)]
            self.folder.write(
                Part(
                    np.concatenate([part.indices for part in self.waiting]),
                    np.concatenate([p.vectors for p in with_vectors]) if with_vectors else np.zeros((0, 0), np.float32),
                    [each for part in self.waiting for each in part.unreadable],
                )
            )
        self.waiting, self.last = [], time.monotonic()
