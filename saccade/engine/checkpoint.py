"""The state of a run on disk: whole at any moment, the last two kept, read without running code."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from saccade.engine.distributed import World, agree
from saccade.engine.ema import Ema
from saccade.errors import UserError
from saccade.weights.model_file import sync_folder

KEEP = 2
_NAME = re.compile(r"step-(\d{9})(\.pt)?$")


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if _NAME.match(path.name)]
    return sorted(found, key=lambda path: path.name[:14], reverse=True)


def save_checkpoint(
    folder: Path,
    step: int,
    progress: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: Ema | None,
    world: World,
    sharded: bool,
) -> None:
    """Write under a temporary name, sync, rename; then remove all but the last two. A full disk is a UserError.

    A later step than this was passed over when the run was continued; it goes, so that it never counts as one of two.
    """
    failure = ""
    try:
        if world.is_main:
            folder.mkdir(exist_ok=True)
        if sharded:
            _save_sharded(folder, step, progress, model, optimizers, ema, world)
        elif world.is_main:
            state = {
                "progress": progress,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "ema": None if ema is None else ema.average,
            }
            _save_file(folder / f"step-{step:09d}.pt", state)
        if world.is_main:
            found = list_checkpoints(folder)
            later = [path for path in found if _step_of(path) > step]
            for old in [*later, *found[len(later) + KEEP :], *folder.glob(".step-*.tmp")]:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        failure = _reason(error)
    if agree([bool(failure)], world)[0]:
        raise UserError(
            f"{folder}: the state at step {step} cannot be saved ({failure or 'another process failed'}). The run ends "
            "here; free space or make the folder writable, then continue with `saccade train --resume`"
        )


def _reason(error: BaseException) -> str:
    """What went wrong, without the stack of every process that torch's exception for many of them prints."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(sorted({str(failure[0]) or repr(failure[0]) for failure in error.failures.values()}))
    return str(error)


def _step_of(path: Path) -> int:
    return int(path.name[5:14])


def _save_file(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _sharded_state(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], ema: Ema | None, *, moved: bool
) -> dict[str, Any]:
    """`moved`: also the optimizers' state. Where there is none, torch takes a step to make one, which then counts."""
    return {
        "model": get_model_state_dict(model),
        **({"optimizers": get_optimizer_state_dict(model, optimizers)} if moved else {}),
        **({} if ema is None else {"ema": ema.average}),
    }


def _save_sharded(
    folder: Path,
    step: int,
    progress: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: Ema | None,
    world: World,
) -> None:
    temporary, path = folder / f".step-{step:09d}.tmp", folder / f"step-{step:09d}"
    failure = ""
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
        except OSError as error:
            failure = str(error)
    # a process that left alone would leave the others waiting in the save for ever
    if agree([bool(failure)], world)[0]:
        raise OSError(failure or "another process failed")
    moved = any(optimizer.state for optimizer in optimizers)
    dcp.save(_sharded_state(model, optimizers, ema, moved=moved), checkpoint_id=temporary)
    if world.is_main:
        _save_file(temporary / "progress.pt", progress)
        for file in temporary.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        sync_folder(folder)


def load_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], ema: Ema | None
) -> dict[str, Any]:
    """Put a saved state into model, optimizers and average, strictly; returns the progress that was saved with it."""
    if path.is_dir():
        progress = _read(path / "progress.pt")
        try:
            # alone first: torch logs the stack of what goes wrong here, and tries the next best file
            names = _SafeReader(path).read_metadata().state_dict_metadata
        except (OSError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path / '.metadata'}: damaged ({error})") from None
        moved = any(name.startswith("optimizers.") for name in names)
        state = _sharded_state(model, optimizers, ema, moved=moved)
        try:
            dcp.load(state, storage_reader=_SafeReader(path), planner=_SafePlanner())
        except (dcp.CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: cannot be read or does not fit this run ({_reason(error)})") from None
        set_model_state_dict(model, state["model"])
        if moved:
            set_optimizer_state_dict(model, optimizers, optim_state_dict=state["optimizers"])
        else:
            for optimizer in optimizers:
                optimizer.state = defaultdict(dict)  # also where a damaged state was tried before this one
        if ema is not None:
            ema.load(state["ema"])
        return progress
    state = _read(path)
    try:
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        if ema is not None:
            ema.load(state["ema"])
        return state["progress"]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the state does not fit the model and optimizer of this run ({error})") from None


def _read(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch thinks of a damaged file is for us to say
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "WeightsUnpickler" in str(error) or "weights_only" in str(error).lower():
            raise UserError(f"{path}: damaged, or holds code, which was not executed") from None
        raise UserError(f"{path}: damaged ({error})") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        what = str(error).partition(". ")[0]  # advice for programmers follows
        raise UserError(f"{path}: truncated or damaged ({what})") from None


class _SafeReader(dcp.FileSystemReader):
    """torch's reader of sharded states runs what a pickle says; this one builds nothing but a state's description."""

    def read_metadata(self, *, rank: int | None = None) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(rank), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("its .metadata describes no state")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafePlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch's own reads numbers and strings with weights_only=False; here they are the only things that pass
        again = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), again)
        again.seek(0)
        super().load_bytes(read_item, again)


class _MetadataUnpickler(pickle.Unpickler):
    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"its .metadata asks for {module}.{name}, which was not executed")
        return super().find_class(module, name)
