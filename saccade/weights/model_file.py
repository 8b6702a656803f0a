"""A model is one `.safetensors` file: its weights, and in the metadata all that is needed to use them.

Nothing in a file is executed or imported: the architecture is a row of figures for our own code, and pickles are only
ever read with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from saccade.config import PreprocessingConfig
from saccade.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """What a model file says of itself."""

    task: str
    model: str  # a label; what is built is `architecture`
    architecture: dict[str, Any]  # the row of the backbone, `Row.to_dict()`
    class_names: tuple[str, ...]  # none: features only
    preprocessing: PreprocessingConfig
    metrics: dict[str, float] = field(default_factory=dict)
    threshold: float | None = None  # from which score on a prediction should be believed
    tokenizer: str | None = None  # of a model of texts, as `saccade.tokenizer` writes it
    languages: tuple[str, str] | None = None  # of a translator: from, into, as its training data named them
    training_data: str = ""
    licence: str = "as the training data allows"
    provenance: str = ""
    library_version: str = ""

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["preprocessing"] = self.preprocessing.model_dump(mode="json")
        return values

    @classmethod
    def from_dict(cls, values: Any, where: str) -> ModelCard:
        if not isinstance(values, dict):
            raise UserError(f"{where}: its description is not a table; is it a model file of saccade?")
        unknown = sorted(set(values) - set(cls.__dataclass_fields__) - {"format"})
        if unknown or values.get("format", FORMAT) != FORMAT:
            what = ", ".join(unknown) or "format"
            raise UserError(f"{where}: written by a newer saccade ({what}); update the library")
        try:
            return cls(
                task=str(values["task"]),
                model=str(values["model"]),
                architecture=dict(values["architecture"]),
                class_names=tuple(str(name) for name in values["class_names"]),
                preprocessing=PreprocessingConfig.model_validate(values["preprocessing"]),
                threshold=None if values.get("threshold") is None else float(values["threshold"]),
                languages=_pair(values.get("languages")),
                tokenizer=None if values.get("tokenizer") is None else str(values["tokenizer"]),
                metrics={str(k): float(v) for k, v in values.get("metrics", {}).items()},
                **{k: str(values.get(k, "")) for k in ("training_data", "licence", "provenance", "library_version")},
            )
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, ValidationError) as error:
            raise UserError(f"{where}: its description is incomplete or wrong ({error!r}); get the file anew") from None


def _pair(values: Any) -> tuple[str, str] | None:
    if values is None:
        return None
    of, into = values
    return str(of), str(into)


def save_model(path: Path, weights: dict[str, Tensor], card: ModelCard, *, new: bool = False) -> None:
    """Write weights and card to one file: first under another name, synced, then renamed. See `write_atomically`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    data = serialise(tensors, {"saccade": json.dumps({"format": FORMAT, **card.to_dict()})})
    write_atomically(path, data, new=new)


def load_model_file(path: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """Weights and card of a model file. Every fault is a UserError that names the file."""
    tensors, metadata = read_safetensors(path)
    if "saccade" not in metadata:
        raise UserError(f"{path}: holds weights but no description of saccade's; it was written by another program")
    try:
        values = json.loads(metadata["saccade"])
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its description is not valid JSON; the file is damaged, get it anew") from None
    return tensors, ModelCard.from_dict(values, str(path))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a `.safetensors` file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        _refuse_pickle(path)
        raise UserError(f"{path}: truncated or not a .safetensors file ({error}); get or copy it anew") from None


def read_metadata(path: Path) -> dict[str, str] | None:
    """Only the metadata of a `.safetensors` file; None where it cannot be read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return None


def _refuse_pickle(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(4)  # only of a file that is no model: such bytes may also begin a sound one
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if start == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise UserError(
            f"{path}: a pickle (.pt, .pth), which can hold code; it was not executed. A model of saccade is a "
            ".safetensors file"
        )


def find_model(source: str | Path) -> Path:
    """The model file that a source names: the file itself, or `model.safetensors` of a run folder."""
    path = Path(source)
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            what = "the run has not reached its first evaluation yet" if (path / "config.json").exists() else "no run"
            if (path / "metrics.csv").exists():  # which is written with it
                what = "the run had one; bring it back, or train anew"
            raise UserError(f"{path}: holds no model.safetensors ({what})")
        return path / "model.safetensors"
    if not path.exists():
        raise UserError(f"{source}: no such model file or run folder")
    return path


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Refuse weights that do not fit, with every missing, unused and misshapen key in one error."""
    faults = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in weights]
    faults += [f"unused: {name} {tuple(weights[name].shape)}" for name in weights if name not in expected]
    faults += [
        f"shape: {name} is {tuple(weights[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    if faults:
        shown = "".join(f"\n  {fault}" for fault in faults[:40])
        more = f"\n  and {len(faults) - 40} more" if len(faults) > 40 else ""
        raise UserError(f"{where}: the weights do not fit the model ({len(faults)} faults):{shown}{more}")


def write_atomically(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write a file so that a kill or a full disk at any moment leaves the old one or the new one, whole.

    With `new` there is no old one: a file that has appeared by the time that all is written stays as it is.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with alone(temporary):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if new:
                refuse_existing(path)
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"{path}: cannot be written ({what}); free space or choose another --out") from None


@contextmanager
def alone(temporary: Path) -> Iterator[None]:
    """Hold this name while a file is made under it; where that fails, the file goes.

    A second writer waits, and what a killed one left is taken over. Were the name each process's own, nobody would
    remove what killed ones leave.
    """
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError, ImportError):  # a file system without locks, or Windows
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # the one before has renamed it
            if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                break
        os.close(descriptor)
    try:
        yield
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: exists already, and nothing is written over; choose another name")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
