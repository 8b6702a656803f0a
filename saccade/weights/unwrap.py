"""The state of the network itself, out of what training scripts wrap around it. All that is left aside is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from saccade.config import closest
from saccade.errors import UserError
from saccade.weights.formats.table import Shapes

# Where a state is kept within a checkpoint, the preferred first: averaged weights are what is evaluated and published.
BRANCHES = (
    "teacher",
    "model_ema",
    "state_dict_ema",
    "ema",
    "model",
    "state_dict",
    "model_state_dict",
    "student",
    "network",
    "net",
    "module",
)
# Only the training without labels uses these: DINO, iBOT and DINOv2, and their kin.
PROJECTIONS = (
    "head.mlp.",
    "head.last_layer",
    "dino_head.",
    "ibot_head.",
    "dino_loss.",
    "ibot_patch_loss.",
    "projector.",
    "projection_head.",
    "predictor.",
    "prototypes.",
)
LINEAR_HEADS = ("head.", "fc.", "classifier.", "linear.")
NPZ_ROOTS = ("opt/target/", "params/")  # of JAX checkpoints that also hold the optimizer's state
DEEPEST = 4
MOST = 100_000  # tensors


def unwrap(
    values: Any, where: str, branch: str | None = None, known: Callable[[Shapes], bool] = lambda shapes: False
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one network, without wrappers' prefixes, in float32; and what was chosen and left aside.

    `branch` names the part of a checkpoint to take, such as `student`. Names that are `known` keep their prefixes.
    """
    notes: list[str] = []
    state = _choose(values, where, branch, notes)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        notes.append(f"left aside, being no weights: {shortened(others)}")
    if len(tensors) > MOST:
        raise UserError(f"{where}: {len(tensors)} tensors are more than any model here has; damaged, or made to harm")
    tensors = _strip(tensors, known, notes)
    return _as_float32(tensors, where, notes), notes


def shortened(names: list[str], most: int = 6) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _choose(values: Any, where: str, branch: str | None, notes: list[str]) -> Mapping[Any, Any]:
    """Go down into the branch that holds the weights."""
    seen: list[str] = []
    for _ in range(DEEPEST):
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: holds {type(values).__name__}, not weights by name")
        values = cast(Mapping[Any, Any], values)
        seen += (branches := _branches(values))
        if branch is not None and branch in branches:
            chosen, branch = branch, None
        else:
            chosen = next((name for name in BRANCHES if name in branches), None)
        if chosen is None:
            break
        if rest := [str(name) for name in values if name != chosen]:
            other = " (--branch takes another)" if any(name in BRANCHES for name in branches if name != chosen) else ""
            notes.append(f"of the checkpoint, {chosen!r} is taken; left aside: {shortened(rest)}{other}")
        values = values[chosen]
    if branch is not None:
        near = closest(branch, seen).removesuffix("?")
        has = f"its parts are {', '.join(seen)}" if seen else "it has no parts"
        raise UserError(f"{where}: no part {branch!r} in this checkpoint{near}; {has}")
    state = cast(Mapping[Any, Any], values)
    if not any(isinstance(value, Tensor) for value in state.values()):
        keys = shortened([repr(str(name)[:60]) for name in state]) or "nothing"
        raise UserError(f"{where}: no weights found; it holds {keys}")
    return state


def _branches(values: Mapping[Any, Any]) -> list[str]:
    return [name for name, value in values.items() if isinstance(name, str) and _holds_tensors(value)]


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or depth > DEEPEST:
        return False
    inner = cast(Mapping[Any, Any], value).values()
    return any(isinstance(each, Tensor) or _holds_tensors(each, depth + 1) for each in inner)


def _strip(tensors: dict[str, Tensor], known: Callable[[Shapes], bool], notes: list[str]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers put before every name."""
    compiled = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}  # of torch.compile
    tensors = compiled if len(compiled) == len(tensors) else tensors
    for root in NPZ_ROOTS:
        if inside := {name.removeprefix(root): value for name, value in tensors.items() if name.startswith(root)}:
            if len(inside) < len(tensors):
                notes.append(f"left aside: {len(tensors) - len(inside)} arrays outside {root} (the optimizer's)")
            tensors = inside
    while not known({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        whole = next((p for p in ("module.", "model.", "backbone.", "encoder.") if _all_begin(tensors, p)), None)
        if whole is not None:
            tensors = {name.removeprefix(whole): tensor for name, tensor in tensors.items()}
        elif (smaller := _without_heads(tensors, notes)) is not None:
            tensors = smaller
        else:
            break
    return tensors


def _all_begin(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return bool(tensors) and all(name.startswith(prefix) and len(name) > len(prefix) for name in tensors)


def _without_heads(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor] | None:
    """A backbone beside nothing but heads that make no predictions, or an encoder beside one linear layer."""
    projections = [name for name in tensors if name.startswith(PROJECTIONS)]
    if projections and any(name.startswith("backbone.") for name in tensors):
        if all(name.startswith(("backbone.", *PROJECTIONS)) for name in tensors):
            notes.append(f"left aside, being of use only in training: {shortened(_modules(projections))}")
            return {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
        return None
    outside = [name for name in tensors if not name.startswith("encoder.")]
    probe = {name.rpartition(".")[0] + "." for name in outside}
    if outside and len(outside) < len(tensors) and len(probe) == 1 and probe <= set(LINEAR_HEADS):
        (head,) = probe
        renamed = {
            name.removeprefix("encoder.") if name.startswith("encoder.") else f"head.{name.removeprefix(head)}": tensor
            for name, tensor in tensors.items()
        }
        return renamed if len(renamed) == len(tensors) else None
    return None


def _modules(names: list[str]) -> list[str]:
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def _as_float32(tensors: dict[str, Tensor], where: str, notes: list[str]) -> dict[str, Tensor]:
    """All that is not whole numbers in float32."""
    changed: dict[torch.dtype, int] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise UserError(f"{where}: {name} is sparse, quantised or complex; only plain weights can be read")
        tensor = tensor.detach()
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            changed[tensor.dtype] = changed.get(tensor.dtype, 0) + 1
            tensor = tensor.float()
        result[name] = tensor
    for dtype, count in changed.items():
        how = "rounded to" if dtype == torch.float64 else "with the same values in"
        tensors_are = "1 tensor" if count == 1 else f"{count} tensors"
        notes.append(f"{tensors_are} in {str(dtype).removeprefix('torch.')}, read {how} float32")
    return result
