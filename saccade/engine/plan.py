"""What is fixed when a run starts and must be found again when it is continued."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saccade.backbones.base import Row
from saccade.data.sources import Splits
from saccade.engine.checkpoint import list_checkpoints
from saccade.engine.distributed import World
from saccade.errors import UserError
from saccade.models import read_row

EVALUATIONS = 10  # during a run, where nobody says how many
EVALUATING_SHARE = 1 / 7  # of the minutes that were asked for, at most, but for the one at the end


@dataclass(frozen=True)
class Plan:
    """What is fixed when a run starts and kept when it is resumed. Stored as `plan.json`."""

    total_steps: int
    batches_per_epoch: int
    batch_size: int
    precision: str
    class_names: tuple[str, ...]
    data_hash: str
    world_size: int
    architecture: dict[str, Any]
    evaluations: int = EVALUATIONS

    @property
    def evaluate_at(self) -> set[int]:
        """The numbers of steps after which the validation split is evaluated."""
        return {round(self.total_steps * (i + 1) / self.evaluations) for i in range(self.evaluations)}

    @property
    def dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]


def affordable_evaluations(asked: int | None, seconds: float, each: float) -> int:
    """As many as were asked for; else what fits into a share of the `seconds` of a run where one takes `each`."""
    if asked is not None:
        return asked
    return max(1, min(EVALUATIONS, int(EVALUATING_SHARE * seconds / max(each, 1e-9))))


def load_plan(folder: Path, path: Path, hash_of_data: str, world: World, evaluations: int) -> Plan:
    """The plan of a run that is continued; data or machine that would change the result are refused.

    `evaluations` are those of the settings, for plans of a time when the plan did not say.
    """
    try:
        values = json.loads((folder / "plan.json").read_text())
        plan = Plan(**{"evaluations": evaluations, **values, "class_names": tuple(values["class_names"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'plan.json'}: damaged ({error!r}); the run cannot be continued exactly") from None
    if plan.data_hash != hash_of_data:
        raise UserError(
            f"{path}: is not the data that {folder} began with (files, labels or tokenizer.json differ); put it back, "
            f"or start a new run with this (--weights {folder} to begin from that one)"
        )
    if plan.world_size != world.size:
        raise UserError(f"{folder}: was begun with {plan.world_size} processes, not {world.size}; use as many")
    return plan


def planned_row(folder: Path) -> Row | None:
    """The architecture of a run that has a state to continue from; it needs its initial weights no more."""
    if not list_checkpoints(folder / "checkpoints"):
        return None
    path = folder / "plan.json"
    return read_row(_values(path, "the run cannot be continued exactly").get("architecture"), str(path))


def hash_in_plan(folder: Path, data: Path) -> str | None:
    """Of the data that the run in `folder` began with."""
    remedy = f"what of {data} the run held out is not known; use --split all, to measure on all of it"
    return _values(folder / "plan.json", remedy).get("data_hash")


def _values(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("holds no settings")
        return values
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error!r}); {otherwise}") from None


def data_hash(splits: Splits) -> str:
    """Of the order and targets of all samples, by which a resumed run knows its data again."""
    digest = hashlib.sha256()
    for source in (splits.train, splits.val):
        digest.update("\0".join(source.class_names).encode(errors="surrogatepass"))
        digest.update(source.digest())
        for i in range(len(source)):
            digest.update(Path(source.id(i)).name.encode(errors="surrogateescape"))
    return digest.hexdigest()


class EpochEnds:
    """The numbers of steps at which an epoch ends."""

    def __init__(self, plan: Plan, accumulate: int):
        self.per_epoch, self.accumulate = plan.batches_per_epoch, accumulate

    def __contains__(self, done: int) -> bool:
        before, after = (done - 1) * self.accumulate // self.per_epoch, done * self.accumulate // self.per_epoch
        return after > before
