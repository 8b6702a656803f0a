"""The folder of a run: made once, never overwritten, continued only as it was begun."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from saccade.config import RunConfig, build_config, load_config, merge
from saccade.engine import distributed
from saccade.engine.checkpoint import list_checkpoints
from saccade.engine.distributed import World
from saccade.errors import UserError
from saccade.weights.model_file import write_atomically


def resume_config(folder: Path, changes: dict[str, Any]) -> RunConfig:
    """The settings of a run that is to be continued. Only what changes no result may be changed."""
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


def remove_unused(folder: Path) -> None:
    """Take back what `make_run_folder` made, where a run is refused before it begins; what others put there stays."""
    (folder / "config.json").unlink(missing_ok=True)
    for each in (folder / "checkpoints", folder):
        with suppress(OSError):  # not empty
            each.rmdir()


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """All rows so far as CSV. No times are in it: a resumed run writes the same bytes."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names)] + [",".join(repr(row[name]) if name in row else "" for name in names) for row in rows]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
