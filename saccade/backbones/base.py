"""What every backbone is, whatever its kind."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.backbones.features import AttentionTrace, Features
from saccade.config import NetworkConfig
from saccade.errors import UserError
from saccade.layers.convolution import statistics_kept

ONLY_TRAINING = {"image_size", "drop_path", "dropout", "frozen_norm"}  # fields of rows that change no weights' meaning


@dataclass(frozen=True, kw_only=True)
class Row(ABC):
    """A row of a table of backbones: all that is needed to build one. `image_size` is what the row is meant for."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # rows are read from files, too

    family: ClassVar[str]
    image_size: int = 224

    @property
    @abstractmethod
    def stride(self) -> int:
        """Heights and widths of batches are multiples of this."""

    @property
    @abstractmethod
    def about(self) -> str:
        """The form in a few words, for lists."""

    def changed(self, network: NetworkConfig, image_size: int | None = None) -> Self:
        """This row with the user's settings on top; one that this family lacks is a UserError."""
        values: dict[str, Any] = network.model_dump(exclude_none=True)
        known = {field.name for field in fields(self)}
        if unknown := [name for name in values if name not in known]:
            raise UserError(f"network.{unknown[0]}: a model of the family {self.family!r} has no such setting")
        row = replace(self, **values, **({} if image_size is None else {"image_size": image_size}))
        try:  # `replace` looks at no types
            return TypeAdapter(type(self)).validate_python({name: getattr(row, name) for name in known})
        except ValidationError as error:
            faults = "; ".join(
                f"network.{e['loc'][0]} {values.get(str(e['loc'][0]))}: {e['msg']}" for e in error.errors()
            )
            raise UserError(f"{faults} (for models of the family {self.family!r})") from None

    def is_like(self, other: Row) -> bool:
        """Do weights of one fit the other, but for a table of positions of another size?"""
        return self.family == other.family and self._form() == other._form()

    def _form(self) -> dict[str, Any]:
        values = {name: value for name, value in asdict(self).items() if name not in ONLY_TRAINING}
        return {name: value is not None if name == "layer_scale" else value for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """For a model file; `saccade.backbones.row_from_dict` reads it."""
        return json.loads(json.dumps({"family": self.family, **asdict(self)}))


class Backbone(nn.Module, ABC):
    """Normalised pictures (B, 3, H, W) -> Features. Subclasses set the attributes in `__init__`."""

    config: Row
    channels: tuple[int, ...]  # of the maps, finest first
    strides: tuple[int, ...]  # of the maps, in pixels
    summary_channels: int
    activation_checkpointing: bool = False

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features: ...

    def summary(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """`forward(images).summary`, for less where that is possible."""
        return self(images).summary

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The blocks in the order of computation: units of sharding, of checkpointing and of layer-wise rates."""

    @abstractmethod
    def depth_of(self, parameter: str) -> int:
        """0 for the stem, i + 1 for the i-th of `layers`, one more for what is after them: for layer-wise rates.

        What lies between two layers, such as a merging of patches, counts with the next one.
        """

    def adapt(self, weights: dict[str, Tensor], row: Row) -> list[str]:
        """Fit weights of a backbone `row` to this one in place, where only the resolution differs; says what it did."""
        return []

    def trace(self, images: Float[Tensor, "B 3 H W"]) -> AttentionTrace | None:
        """The attention of every block and of the pooling; None where tokens are not kept from end to end."""
        return None

    def run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """Call a layer; with activation checkpointing its inner activations are computed again in the backward pass."""
        if not (self.activation_checkpointing and self.training):
            return layer(*inputs)
        if torch.compiler.is_compiling() or not isinstance(layer, nn.Module):  # a compiler takes no contexts
            return checkpoint(layer, *inputs, use_reentrant=False)
        return computed_again(layer, layer, *inputs)


def computed_again(call: Callable[..., Any], layer: nn.Module, *inputs: Any) -> Any:
    """`call(*inputs)`, of which nothing inside is kept for the backward pass, where it runs once more; batches leave
    their trace in the running statistics of `layer`, which it uses, once. A compiler decides itself what it keeps."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return call(*inputs)
    again = partial(statistics_kept, layer)
    return checkpoint(call, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))
