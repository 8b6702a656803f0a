"""A trained model and its predictions for pictures in any form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.config import DataConfig, PreprocessingConfig, RunConfig
from saccade.data.buckets import assign, bucket_shapes
from saccade.data.decode import Picture, PictureError
from saccade.data.sample import Around, Sample
from saccade.data.sources import find_pictures
from saccade.engine.device import autocast, choose_device, choose_precision
from saccade.engine.evaluate import Normalise
from saccade.errors import UserError
from saccade.models import Network
from saccade.models.embedder import Embedder
from saccade.models.translator import Translator
from saccade.tasks import PictureTask, build_picture_task
from saccade.weights.load import load_network
from saccade.weights.model_file import ModelCard
from saccade.words import counted

PictureInput = str | Path | Image.Image | np.ndarray | Tensor
RNG = np.random.default_rng(0)  # no transform of evaluation draws from it
READ_AHEAD = 8  # batches that are sorted by shape at a time
MOST_PICTURES, MOST_PIXELS = 64, 64 * 224 * 224  # of a batch whose size is not given


def _alone(_: int) -> tuple[Picture, Any]:
    raise AssertionError("a prediction has no other pictures beside it")


ALONE = Around(0.0, 0, _alone)


@dataclass(frozen=True)
class Model:
    """A network with all that is needed to use it on pictures."""

    # normalised float images (B, 3, H, W) -> outputs with .logits (B, K) (detectors: and .boxes), or .embedding (B, C)
    network: Network
    card: ModelCard
    device: torch.device
    precision: torch.dtype

    @classmethod
    def load(
        cls, source: str | Path, *, device: str = "auto", precision: str = "auto", notes: list[str] | None = None
    ) -> Model:
        """From a run folder, a model file, or weights of another library (a hub name, a folder, a file).

        What there is to know of such weights, such as what was assumed, is added to `notes`.
        """
        network, card = load_network(source, notes)
        if isinstance(network, Translator):
            raise UserError(f"{source}: a {card.model}, which translates texts; this is for models of pictures")
        return cls.of(network, card, device=device, precision=precision)

    @classmethod
    def of(cls, network: Network, card: ModelCard, *, device: str = "auto", precision: str = "auto") -> Model:
        place = choose_device(device)
        return cls(network.to(place), card, place, choose_precision(precision, place))

    def __repr__(self) -> str:
        classes = counted(len(self.class_names), "class", "classes")
        what = f"{self.card.task}, {classes}, about {self.preprocessing.image_size} px"
        return f"<Model {self.card.model}: {what}; {self.device}, {str(self.precision).removeprefix('torch.')}>"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.card.class_names

    @property
    def preprocessing(self) -> PreprocessingConfig:
        return self.card.preprocessing

    @property
    def usual_batch_size(self) -> int:
        """As many pictures as fit into about the same memory, whatever their size. It changes no result."""
        return max(1, min(MOST_PICTURES, MOST_PIXELS // self.preprocessing.image_size**2))

    @cached_property
    def task(self) -> PictureTask:
        config = RunConfig(data="", preprocessing=self.preprocessing)
        return build_picture_task(self.card.task, self.class_names, config, self.network.config)

    @property
    def threshold(self) -> float | None:
        """From which score on a detection is believed; none where there are no detections."""
        return self.task.usual_threshold if self.card.threshold is None else self.card.threshold

    def predict(
        self,
        inputs: PictureInput | Iterable[PictureInput],
        *,
        batch_size: int | None = None,
        attention: bool = False,
        threshold: float | None = None,
    ) -> list[Any]:
        """Predict for files, folders, PIL images, arrays (H, W, 3) or (H, W), or tensors (3, H, W), in the order given.

        A Classification or Detections for each. Arrays and tensors are uint8, or floats from 0 to 1; with four axes
        they are many pictures. With `attention`, each result carries what the model looked at, or took each box from.
        `threshold`: the least score of a detection, instead of the model's own; 0 gives all that there are. A picture
        that cannot be read is a UserError that names it.
        """
        failed: list[str] = []
        results = list(
            self.stream(inputs, batch_size=batch_size, attention=attention, threshold=threshold, failed=failed)
        )
        if failed:
            raise UserError("\n".join(failed))
        return results

    def stream(
        self,
        inputs: PictureInput | Iterable[PictureInput],
        *,
        batch_size: int | None = None,
        attention: bool = False,
        threshold: float | None = None,
        failed: list[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Any]:
        """As `predict`, one after the other while it goes; what is wrong with unreadable ones is added to `failed`."""
        if isinstance(self.network, Embedder):
            raise UserError(f"{self.card.model}: has no classes; `saccade embed` gives vectors, or train a head on it")
        if threshold is not None and self.task.usual_threshold is None:
            raise UserError(f"{self.card.model}: gives every picture a class, however sure; leave the threshold out")
        if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
            raise UserError(f"threshold {threshold!r}: is the least score of a detection, from 0 to 1")
        least = self.threshold if threshold is None else threshold
        places = list_inputs(inputs)
        batch_size = self.usual_batch_size if batch_size is None else batch_size
        for start in range(0, len(places), batch_size * READ_AHEAD):
            part = places[start : start + batch_size * READ_AHEAD]
            opened: list[Picture] = []
            for name, value in part:
                try:
                    opened.append(open_picture(name, value))
                except PictureError as error:
                    failed.append(str(error))
            yield from self._predict_pictures(opened, batch_size, attention, least, failed)
            if progress is not None:
                progress(start + len(part), len(places))

    def _predict_pictures(
        self, pictures: list[Picture], batch_size: int, attention: bool, threshold: float | None, failed: list[str]
    ) -> list[Any]:
        shapes = bucket_shapes(self.preprocessing)
        buckets = assign(np.array([picture.size for picture in pictures]).reshape(-1, 2), shapes)
        results: dict[int, Any] = {}
        for bucket in np.unique(buckets):
            members = np.flatnonzero(buckets == bucket)
            for start in range(0, len(members), batch_size):
                part = [int(i) for i in members[start : start + batch_size]]
                samples: dict[int, Sample] = {}
                for i in part:
                    try:
                        samples[i] = self.task.eval_transform(pictures[i], None, i, shapes[bucket], RNG, ALONE)
                    except PictureError as error:
                        failed.append(str(error))
                if samples:
                    results.update(self._predict_batch(pictures, samples, attention, threshold))
        return [results[i] for i in sorted(results)]

    def _predict_batch(
        self, pictures: list[Picture], samples: dict[int, Sample], attention: bool, threshold: float | None
    ) -> dict[int, Any]:
        """For pictures of one shape (H, W)."""
        pixels = torch.stack([sample.image for sample in samples.values()])
        images = Normalise(self.preprocessing, self.device)(pixels.to(self.device))
        with torch.no_grad(), autocast(self.device, self.precision):
            found = self.task.predict(
                self.network,
                images,
                [pictures[i] for i in samples],
                list(samples.values()),
                threshold=threshold,
                explained=attention,
            )
        return dict(zip(samples, found, strict=True))


def list_inputs(inputs: PictureInput | Iterable[PictureInput]) -> list[tuple[str, PictureInput]]:
    """Each picture with a name for messages; folders become the pictures in them.

    Paths that lead nowhere are all named in one UserError.
    """
    if isinstance(inputs, np.ndarray | Tensor):
        several = list(inputs) if inputs.ndim == 4 else [inputs]
    elif isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable):
        several = [inputs]
    else:
        several = inputs
    listed: list[tuple[str, PictureInput]] = []
    faults: list[str] = []
    for i, value in enumerate(several):
        if not isinstance(value, str | Path):
            listed.append((getattr(value, "filename", "") or f"image {i + 1}", value))
            continue
        try:
            listed += [(str(path), path) for path in find_pictures([value])]
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return listed


def open_picture(name: str, value: PictureInput) -> Picture:
    if isinstance(value, str | Path):
        try:
            data = Path(value).read_bytes()
        except OSError as error:
            raise PictureError(name, f"cannot be read ({error.strerror})") from None
        return Picture(data, name, DataConfig().max_pixels)
    if isinstance(value, Image.Image):
        return Picture.from_image(value, name)
    if isinstance(value, np.ndarray | Tensor):
        return Picture.from_image(Image.fromarray(to_pixels(name, value)), name)
    raise PictureError(name, f"a {type(value).__name__}; give a path, a PIL image, an array or a tensor")


def to_pixels(name: str, value: np.ndarray | Tensor) -> np.ndarray:
    """uint8, (H, W), (H, W, 3) or (H, W, 4)."""
    shape = tuple(value.shape)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        array = (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    else:
        array = value
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise PictureError(name, f"shape {shape}; give an array (H, W, 3) or (H, W), or a tensor (3, H, W)")
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        if not np.issubdtype(array.dtype, np.floating) or not (low >= 0 and high <= 1):  # in this form NaN is refused
            raise PictureError(name, f"{array.dtype} from {low} to {high}; give uint8, or floats from 0 to 1")
        array = np.round(255 * array).astype(np.uint8)
    return array
