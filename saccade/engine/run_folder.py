"""The folder of a run: made once, never overwritten, continued only as it was begun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from saccade.config import RunConfig, build_config, load_config, merge
from saccade.engine import distributed
from saccade.engine.checkpoint import list_checkpoints
from saccade.engine.distributed import World
from saccade.engine.lock import NAME, alone_in
from saccade.errors import UserError
from saccade.weights.model_file import write_atomically

BEFORE_STEPS = ("plan.json", "tokenizer.json", "events/events.out.tfevents.*")  # written before the first step
WITH_STEPS = ("model.safetensors", "metrics.csv", "curves.png", "faults.jsonl")


def resume_config(folder: Path, changes: dict[str, Any]) -> RunConfig:
    """The settings of a run that is to be continued.

    Only what says how and where it is computed may be changed. Workers and saves change no result; another device
    computes the same in other bits.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no such run (it holds no config.json); give the folder that `saccade train` named")
    config = load_config(folder / "config.json")
    fixed = sorted(set(changes) - {"workers", "checkpoint_seconds", "data", "val", "device"})
    if fixed:
        raise UserError(
            f"{folder}: {', '.join(fixed)} cannot change when a run is continued, which must end as if it had never "
            "stopped; start a new run (with --weights to begin from this one)"
        )
    return build_config(merge(config.model_dump(mode="json"), {**changes, "out": str(folder)}))


def make_run_folder(folder: Path, config: RunConfig, world: World) -> None:
    """Made by the main process; where it cannot be, all processes say so together."""
    fault = ""
    if world.is_main:
        try:
            if (folder / "config.json").exists() or list_checkpoints(folder / "checkpoints"):
                raise UserError(f"{folder}: holds a run; continue it with --resume {folder}, or choose another --out")
            if found := _written(folder, *WITH_STEPS, *BEFORE_STEPS):
                names = ", ".join(str(path.relative_to(folder)) for path in found)
                raise UserError(f"{folder}: holds {names}, where a run would write its own; choose another --out")
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: is a file; choose another --out")
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
            write_atomically(folder / "config.json", text.encode())
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{folder}: cannot be made ({error.strerror}); choose another --out"
    fault = distributed.from_main(fault, world)
    if fault:
        raise UserError(fault)


@contextmanager
def held(folder: Path, world: World) -> Iterator[None]:
    """Nobody else trains in the folder meanwhile: two that continue one run would write over each other's state."""
    fault = ""
    with ExitStack() as stack:
        if world.is_main:
            busy = f"{folder}: another process is training in it; let that one end, or choose another --out"
            try:
                stack.enter_context(alone_in(folder / "checkpoints", busy))
            except UserError as error:
                fault = str(error)
        fault = distributed.from_main(fault, world)
        if fault:
            raise UserError(fault)
        yield


def remove_unused(folder: Path) -> None:
    """Take back what a run wrote that ended before its first step was done; what others put there stays."""
    for path in (folder / "config.json", folder / "checkpoints" / NAME, *_written(folder, *BEFORE_STEPS)):
        path.unlink(missing_ok=True)
    for each in (folder / "checkpoints", folder / "events", folder):
        with suppress(OSError):  # not empty, or not there
            each.rmdir()


def _written(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """All rows so far as CSV. No times are in it: a resumed run writes the same bytes."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names)] + [",".join(repr(row[name]) if name in row else "" for name in names) for row in rows]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
