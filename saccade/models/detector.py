"""What every detector is, whatever its kind: a picture -> for each of Q queries scores of K classes and a box."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from jaxtyping import Float, Int
from torch import Tensor, nn

from saccade.backbones.base import Backbone, Row
from saccade.config import NetworkConfig


@dataclass(frozen=True)
class LayerOutputs:
    """What one layer says of its queries. Boxes are centre x, centre y, width, height as shares of the picture."""

    logits: Float[Tensor, "B Q K"]
    boxes: Float[Tensor, "B Q 4"]


@dataclass(frozen=True)
class DetectionOutputs:
    """`layers` are those of the decoder, of which the last is the answer; `encoder` proposes the queries of two stages.

    A model that learns from more than that has a subclass of this with the more.
    """

    layers: tuple[LayerOutputs, ...]
    encoder: LayerOutputs | None = None

    @property
    def logits(self) -> Float[Tensor, "B Q K"]:
        return self.layers[-1].logits

    @property
    def boxes(self) -> Float[Tensor, "B Q 4"]:
        return self.layers[-1].boxes


@dataclass(frozen=True)
class BoxTargets:
    """The M things of a batch of B pictures, picture after picture; a picture without any is simply not named."""

    boxes: Float[Tensor, "M 4"]  # centre x, centre y, width, height as shares of the picture
    labels: Int[Tensor, " M"]
    picture: Int[Tensor, " M"]  # 0 to B - 1, ascending


@dataclass(frozen=True, kw_only=True)
class DetectorRow(Row):
    """A row of a table of detectors: all that is needed to build one, its backbone's row included."""

    backbone: Row
    queries: int  # the most that can be found in one picture
    loss: str  # how it learns: a name of `tasks.detection.LOSSES`

    @property
    def stride(self) -> int:
        return self.backbone.stride

    def changed(self, network: NetworkConfig, image_size: int | None = None) -> Self:
        """Settings that the detector has itself are its own, the others its backbone's."""
        values: dict[str, Any] = network.model_dump(exclude_none=True)
        own = {name: value for name, value in values.items() if name in {field.name for field in fields(self)}}
        rest = network.model_copy(update=dict.fromkeys(own))
        size = self.image_size if image_size is None else image_size
        return replace(self, **own, image_size=size, backbone=self.backbone.changed(rest, size))

    def _form(self) -> dict[str, Any]:
        values = super()._form()
        return {**values, "loss": "", "backbone": (self.backbone.family, self.backbone._form())}

    def to_dict(self) -> dict[str, Any]:
        values = {"family": self.family, **asdict(self), "backbone": self.backbone.to_dict()}
        return json.loads(json.dumps(values))


class Detector(nn.Module, ABC):
    """Normalised pictures (B, 3, H, W) -> DetectionOutputs. Subclasses set the attributes in `__init__`."""

    config: DetectorRow
    backbone: Backbone
    num_classes: int

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"], targets: BoxTargets | None = None) -> DetectionOutputs:
        """`targets` are given in training, for models that also learn from disturbed copies of them."""

    @abstractmethod
    def with_maps(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[DetectionOutputs, Float[Tensor, "B Q h w"]]:
        """`forward`, and how much each query of the last layer took from where: non-negative maps of one grid."""

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The backbone's layers and those of encoder and decoder, in the order of computation: units of sharding."""

    @abstractmethod
    def class_tensors(self) -> tuple[str, ...]:
        """The tensors with a row per class (and perhaps one for nothing after them)."""

    def proposal_tensors(self) -> tuple[str, ...]:
        """Those whose first row says whether there is anything, of whatever class, and whose other rows say nothing."""
        return ()

    def depth_of(self, parameter: str) -> int:
        """For layer-wise learning rates: those of the backbone count, all after it is the deepest."""
        if self.in_backbone(parameter):
            return self.backbone.depth_of(parameter.removeprefix("backbone."))
        return self.depth

    @property
    def depth(self) -> int:
        return len(self.backbone.layers) + 1

    @staticmethod
    def in_backbone(parameter: str) -> bool:
        return parameter.startswith("backbone.")
