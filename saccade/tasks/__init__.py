"""What can be learnt. A task is one file; here they are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from saccade.backbones.base import Row
from saccade.config import RunConfig
from saccade.data.decode import Picture
from saccade.data.loader import Collate, Transform
from saccade.data.sample import Sample
from saccade.errors import UserError
from saccade.tasks.classification import ClassificationTask
from saccade.tasks.detection import DetectionTask
from saccade.tasks.translation import TranslationTask
from saccade.tokenizer import Tokenizer


class Report(Protocol):
    """What an evaluation found."""

    files: ClassVar[tuple[str, ...]]  # that `save` writes

    def to_dict(self) -> dict[str, Any]: ...

    def render(self, console: Any) -> None: ...

    def save(self, folder: str | Path, of: Mapping[str, Any] | None = None) -> Path: ...


class Task(Protocol):
    """What the training loop needs to know of a task; it knows nothing of it otherwise. `inputs` are what the network
    is called with: normalised images (B, 3, H, W), or tokens (B, S)."""

    name: str
    best: str  # the metric by which the kept model is chosen, higher is better
    usual_threshold: float | None  # of a model that does not say its own; none: predictions have no threshold
    class_names: tuple[str, ...]  # none of texts

    def forward(self, network: nn.Module, inputs: Tensor, targets: Any, /) -> Any:
        """The outputs of a training step."""

    def answer(self, network: nn.Module, inputs: Tensor, targets: Any, /) -> Any:
        """The outputs that `update` takes."""

    def losses(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Named, already weighted scalars, whose sum is learnt from."""
        ...

    def things(self, targets: Any, /) -> int | None:
        """How many the loss of these targets is divided by; none where that is what speed is counted in."""

    def metric(self) -> Any:
        """An empty metric: `update` fills it, `state` and `merge` join processes, `compute` gives a Report."""

    def update(self, metric: Any, outputs: Any, targets: Any, /) -> None: ...

    def scalars(self, report: Any) -> dict[str, float]:
        """The figures of a report that a run's table shows."""
        ...

    def threshold(self, report: Any) -> float | None:
        """From which score on a prediction should be believed, for the model file."""


class PictureTask(Task, Protocol):
    """A task whose samples are pictures."""

    @property
    def train_transform(self) -> Transform: ...

    @property
    def train_collate(self) -> Collate: ...

    @property
    def eval_transform(self) -> Transform: ...

    @property
    def eval_collate(self) -> Collate: ...

    def predict(
        self,
        network: Any,
        images: Tensor,
        pictures: Sequence[Picture],
        samples: Sequence[Sample],
        *,
        threshold: float | None,
        explained: bool,
    ) -> list[Any]:
        """A prediction for each of the normalised images (B, 3, H, W), of the pictures that `samples` were made from.

        Without a `threshold` a detector gives all that it sees.
        """
        ...


TASKS: dict[str, Callable[[tuple[str, ...], RunConfig, Row], PictureTask]] = {
    "classify": ClassificationTask,
    "detect": DetectionTask,
}
TEXT_TASKS: dict[str, Callable[[Tokenizer, RunConfig, Row], Task]] = {"translate": TranslationTask}


def build_task(
    name: str, class_names: tuple[str, ...], config: RunConfig, row: Row, tokenizer: Tokenizer | None = None
) -> Task:
    """The task of a model of this row; one of texts needs a tokenizer."""
    if name in TEXT_TASKS and tokenizer is not None:
        return TEXT_TASKS[name](tokenizer, config, row)
    return build_picture_task(name, class_names, config, row)


def build_picture_task(name: str, class_names: tuple[str, ...], config: RunConfig, row: Row) -> PictureTask:
    if name not in TASKS:
        raise UserError(f"a model for the task {name!r}; pictures are for {', '.join(TASKS)}")
    return TASKS[name](class_names, config, row)
