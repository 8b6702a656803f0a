"""Running reference models as they are meant: exact in float64, and under the names of their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.errors import UserError


class InDouble(TorchFunctionMode):
    """Whatever asks for float32 gets float64.

    Reference code computes some constants and interpolations in float32 even in a float64 model, which would hide what
    float64 is there to show.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        named = {key: torch.float64 if each is torch.float32 else each for key, each in (kwargs or {}).items()}
        return func(*args, **named)


def exact(images: Tensor) -> AbstractContextManager[Any]:
    """The mode for these inputs."""
    return InDouble() if images.dtype == torch.float64 else nullcontext()


# of timm's create_model: whether and from where weights are loaded, and what a model is made into
NOT_ITS_FORM = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "features_only", "feature_cfg", "out_indices",
}  # fmt: skip


def as_described(config: Mapping[str, Any], classes: int, more: Mapping[str, Any]) -> nn.Module | None:
    """timm's own model as the source's config.json describes it; None where that names none of timm's.

    So a form that was misread departs, instead of being built twice.
    """
    import timm

    name = str(config.get("architecture") or "").split(".")[0]
    if not name or not timm.is_model(name):
        return None
    described = {key: value for key, value in (config.get("model_args") or {}).items() if key not in NOT_ITS_FORM}
    try:
        return timm.create_model(name, **{**described, **more, "num_classes": classes})
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"config.json: timm cannot build its {name} with model_args {described}: {error}") from None


SAID_OTHERWISE = ("architectures", "id2label", "label2id", "num_labels", "dtype", "torch_dtype")


def stated(config: Mapping[str, Any], instead: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' classes are described by: the source's own words, and without any what we would write."""
    words = config.get("vision_config", config) or instead
    return {name: value for name, value in words.items() if name not in SAID_OTHERWISE}


class FileNamed(nn.Module):
    """A reference model under the names of its files, where those in memory are others.

    `places` gives for each name in files the tensors in memory that stand in it one above the other. `answer` computes
    logits, or the summary without classes, or what a detector gives. `parts` are modules that are found by other paths
    than in memory.
    """

    def __init__(
        self,
        inner: nn.Module,
        places: Mapping[str, tuple[str, ...]],
        answer: Callable[[Any, Tensor], Any],
        parts: Mapping[str, nn.Module],
    ):
        super().__init__()
        self.inner = inner
        self.places = dict(places)
        self.answer = answer
        self.parts = dict(parts)
        self.register_state_dict_post_hook(_to_files)
        self.register_load_state_dict_pre_hook(_from_files)

    def forward(self, images: Tensor) -> Any:
        with exact(images):
            return self.answer(self.inner, images)

    def get_submodule(self, target: str) -> nn.Module:
        return self.parts[target] if target in self.parts else super().get_submodule(target)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.inner.parameters(recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """With their gradients; what is several tensors in memory is a copy."""
        inner = dict(self.inner.named_parameters(remove_duplicate=remove_duplicate))
        for name, parts in self.places.items():
            found = [inner[part] for part in parts if part in inner]
            if len(found) == 1:
                yield prefix + name, found[0]
            elif found:
                whole = nn.Parameter(torch.cat([part.detach() for part in found]))
                if all(part.grad is not None for part in found):
                    whole.grad = torch.cat([part.grad for part in found if part.grad is not None])
                yield prefix + name, whole


def _to_files(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    assert isinstance(model, FileNamed)
    inner = {name: state.pop(name) for name in list(state) if name.startswith(f"{prefix}inner.")}
    for name, parts in model.places.items():
        tensors = [inner[f"{prefix}inner.{part}"] for part in parts]
        state[prefix + name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _from_files(
    model: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    assert isinstance(model, FileNamed)
    for name, parts in model.places.items():
        if prefix + name in state:
            whole = state.pop(prefix + name)
            pieces = whole.chunk(len(parts)) if len(parts) > 1 else (whole,)
            state.update({f"{prefix}inner.{part}": piece for part, piece in zip(parts, pieces, strict=True)})


def transformers_places(model: Any, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Names in files, with `prefix` before them, and what they hold of a model of transformers.

    transformers says it itself, by its own conversion for saving; before version 5 the names were the same.
    """
    names = list(model.state_dict())
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {prefix + name: (name,) for name in names}
    # tensors of one number each, by which it can be seen where they went
    tags = {name: torch.full((1, 1), float(i)) for i, name in enumerate(names)}
    written = revert_weight_conversion(model, tags)
    return {prefix + name: tuple(names[int(i)] for i in tag.flatten()) for name, tag in written.items()}
