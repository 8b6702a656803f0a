"""A trained model and its predictions for pictures in any form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.config import DataConfig, PreprocessingConfig, RunConfig
from saccade.data.buckets import assign, bucket_shapes
from saccade.data.decode import RESAMPLE, Box, Picture, PictureError
from saccade.data.sources import find_pictures
from saccade.data.transforms import central_box, to_tensor
from saccade.engine.device import autocast, choose_device, choose_precision
from saccade.engine.evaluate import Normalise
from saccade.errors import UserError
from saccade.explain import explain
from saccade.models.classifier import Classifier
from saccade.models.embedder import Embedder
from saccade.predictions import Classification
from saccade.tasks.classification import ClassificationTask, probabilities
from saccade.weights.load import load_network
from saccade.weights.model_file import ModelCard

PictureInput = str | Path | Image.Image | np.ndarray | Tensor
READ_AHEAD = 8  # batches that are sorted by shape at a time


@dataclass(frozen=True)
class Model:
    """A network with all that is needed to use it on pictures."""

    # normalised float images (B, 3, H, W) -> outputs with .logits (B, K), or .embedding (B, C) without classes
    network: Classifier | Embedder
    card: ModelCard
    device: torch.device
    precision: torch.dtype

    @classmethod
    def load(cls, source: str | Path, *, device: str = "auto", precision: str = "auto") -> Model:
        """From a run folder, a model file, or weights of another library (a hub name, a folder, a file)."""
        network, card = load_network(source)
        place = choose_device(device)
        return cls(network.to(place), card, place, choose_precision(precision, place))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.card.class_names

    @property
    def preprocessing(self) -> PreprocessingConfig:
        return self.card.preprocessing

    @property
    def task(self) -> ClassificationTask:
        return ClassificationTask(self.class_names, RunConfig(data="", preprocessing=self.preprocessing))

    def predict(
        self, inputs: PictureInput | Iterable[PictureInput], *, batch_size: int = 64, attention: bool = False
    ) -> list[Classification]:
        """Classify files, folders, PIL images, arrays (H, W, 3) or (H, W), or tensors (3, H, W), in the order given.

        Arrays and tensors are uint8, or floats from 0 to 1; with four axes they are many pictures. With `attention`,
        each result carries the attention rollout. A picture that cannot be read is a UserError that names it.
        """
        failed: list[str] = []
        results = list(self.stream(inputs, batch_size=batch_size, attention=attention, failed=failed))
        if failed:
            raise UserError("\n".join(failed))
        return results

    def stream(
        self,
        inputs: PictureInput | Iterable[PictureInput],
        *,
        batch_size: int = 64,
        attention: bool = False,
        failed: list[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Classification]:
        """As `predict`, one after the other while it goes; what is wrong with unreadable ones is added to `failed`."""
        if not isinstance(self.network, Classifier):
            raise UserError(f"{self.card.model}: has no classes; `saccade embed` gives vectors, or train a head on it")
        places = list_inputs(inputs)
        for start in range(0, len(places), batch_size * READ_AHEAD):
            part = places[start : start + batch_size * READ_AHEAD]
            opened: list[Picture] = []
            for name, value in part:
                try:
                    opened.append(open_picture(name, value))
                except PictureError as error:
                    failed.append(str(error))
            yield from self._predict_pictures(opened, batch_size, attention, failed)
            if progress is not None:
                progress(start + len(part), len(places))

    def _predict_pictures(
        self, pictures: list[Picture], batch_size: int, attention: bool, failed: list[str]
    ) -> list[Classification]:
        shapes = bucket_shapes(self.preprocessing)
        buckets = assign(np.array([picture.size for picture in pictures]).reshape(-1, 2), shapes)
        results: dict[int, Classification] = {}
        for bucket in np.unique(buckets):
            members = np.flatnonzero(buckets == bucket)
            for start in range(0, len(members), batch_size):
                part = [int(i) for i in members[start : start + batch_size]]
                results.update(self._predict_batch(pictures, part, shapes[bucket], attention, failed))
        return [results[i] for i in sorted(results)]

    def _predict_batch(
        self, pictures: list[Picture], part: list[int], shape: tuple[int, int], attention: bool, failed: list[str]
    ) -> dict[int, Classification]:
        """Classify pictures of one shape (H, W)."""
        preprocessing = self.preprocessing
        tensors: dict[int, Tensor] = {}
        boxes: dict[int, Box] = {}
        for i in part:
            boxes[i] = central_box(pictures[i].size, shape, preprocessing.crop)
            try:
                tensors[i] = to_tensor(pictures[i].crop(boxes[i], shape, RESAMPLE[preprocessing.interpolation]))
            except PictureError as error:
                failed.append(str(error))
        if not tensors:
            return {}
        assert isinstance(self.network, Classifier)
        images = Normalise(preprocessing, self.device)(torch.stack(list(tensors.values())).to(self.device))
        with torch.no_grad(), autocast(self.device, self.precision):
            shares = probabilities(self.network(images)).cpu().numpy()  # (B, K)
        maps = explain(self.network, images).cpu().numpy() if attention else None
        return {
            i: self._describe(pictures[i], shares[b], boxes[i], None if maps is None else maps[b])
            for b, i in enumerate(tensors)
        }

    def _describe(self, picture: Picture, shares: np.ndarray, box: Box, heat: np.ndarray | None) -> Classification:
        best = np.argsort(-shares, kind="stable")[:5]
        return Classification(
            label=self.class_names[best[0]],
            score=float(shares[best[0]]),
            top=tuple((self.class_names[k], float(shares[k])) for k in best),
            probabilities=shares,
            source=picture.name,
            image=picture.whole() if heat is not None else None,
            attention=heat,
            region=box,
        )


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
