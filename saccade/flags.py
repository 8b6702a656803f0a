"""Settings as flags of the command, and flags as settings."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, get_args, get_origin

from saccade.config import Config, RunConfig, closest
from saccade.errors import UserError
from saccade.words import either

# What a recipe chooses for the task, the data and the model, so that no one default is true of it. A test holds this.
CHOSEN = frozenset((
    "model", "epochs", "batch_size", "lr", "train_part", "preprocessing.image_size", "preprocessing.max_aspect",
    "augment.train_share", "augment.crop_scale", "augment.zoom", "augment.policy", "augment.magnitude",
    "augment.color_jitter", "augment.erase", "augment.mixup", "augment.cutmix", "augment.mix_prob", "augment.mosaic",
    "text.vocabulary", "text.batch_tokens", "network.drop_path", "network.pool", "network.position",
    "loss.label_smoothing", "optimizer.name", "optimizer.weight_decay", "optimizer.beta2", "optimizer.layer_decay",
    "optimizer.backbone_lr", "optimizer.clip_norm", "network.frozen_norm", "schedule.shape", "schedule.warmup",
    "ema.decay",
))  # fmt: skip

ALIASES = {"image_size": "preprocessing.image_size"}  # short names, of the command and in Python, of inner settings


def add_alias(group: Any, name: str) -> None:
    """A short flag for an inner setting."""
    path = ALIASES[name]
    short, long = (f"--{each}".replace("_", "-") for each in (name, path))
    group.add_argument(short, dest=path, metavar="N", help=f"as {long} (default: from the recipe)")


def add_field(group: Any, model: type[Config], name: str, prefix: str) -> None:
    """A flag for a field of the settings. The text is parsed by `from_text` and checked by the settings themselves."""
    field = model.model_fields[name]
    default = "" if field.default is None else f" (default {shown(field.default)})"
    if prefix + name in CHOSEN:
        default = " (default: from the recipe)"
    if prefix + name == "out":
        default = " (default: runs/NAME of the data, or NAME-2, NAME-3, ... where that is there)"
    choices = [str(choice) for choice in literals(field.annotation)]
    flag = f"--{prefix}{name}".replace("_", "-")
    is_bool = field.annotation is bool
    group.add_argument(
        flag,
        dest=prefix + name,
        metavar="{" + ",".join(choices) + "}" if choices else "BOOL" if is_bool else name.split("_")[-1].upper(),
        nargs="?" if is_bool else None,
        const="true" if is_bool else None,
        help=((field.description or "") + default).replace("%", "%%"),
    )


def shown(value: object) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def literals(annotation: Any) -> list[Any]:
    """The allowed words of a Literal, also inside an optional one."""
    if get_origin(annotation) is not None and str(get_origin(annotation)) == "typing.Literal":
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in literals(part)]


def from_text(model: type[Config], path: str, text: str) -> Any:
    """`none` for a setting that may be absent, a list for a tuple, otherwise the text, which pydantic reads."""
    name, _, rest = path.partition(".")
    annotation = model.model_fields[name].annotation
    if rest:
        assert isinstance(annotation, type) and issubclass(annotation, Config)
        return from_text(annotation, rest, text)
    if text.lower() == "none" and type(None) in get_args(annotation):
        return None
    return text.split(",") if get_origin(annotation) is tuple else text


def read_changes(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, as a nested mapping."""
    changes: dict[str, Any] = {}
    for path, text in vars(options).items():
        if text is None or path.split(".")[0] not in RunConfig.model_fields:
            continue
        branch = changes
        *parents, name = path.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = from_text(RunConfig, path, text)
    return changes


def spread(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a Python program gives them: short names go where they belong, paths become text."""
    changes = {name: str(value) if isinstance(value, PurePath) else value for name, value in settings.items()}
    for name, path in ALIASES.items():
        if name not in changes:
            continue
        value, (branch, inner) = changes.pop(name), path.split(".")
        given = changes.get(branch, {})
        if not isinstance(given, Mapping):
            continue  # which is refused with all other faults
        if given.get(inner, value) != value:
            raise UserError(f"settings: {name} is {value!r}, and {path} is {given[inner]!r}; give one of both")
        changes[branch] = {**given, inner: value}
    return changes


def nearest_flag(flag: str, flags: Sequence[str]) -> str:
    """A hint at the flags that are nearly called so, whole or behind their groups."""
    if near := closest(flag, list(flags)):
        return near
    inner = {each.rpartition(".")[2]: each for each in flags if "." in each}
    found = difflib.get_close_matches(flag.lstrip("-"), inner, n=3, cutoff=0.75)
    return f"; did you mean {either([inner[name] for name in found])}?" if found else ""


# --- kinds of values -------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value
