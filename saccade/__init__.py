"""saccade: vision transformers that learn from your pictures. `saccade.train`, `saccade.load`, `saccade.evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saccade.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from saccade.data.inspect import Report
    from saccade.data.text.inspect import TextReport
    from saccade.engine.embed import Embeddings
    from saccade.engine.predict import Model, PictureInput
    from saccade.engine.train import TrainResult
    from saccade.predictions import Classification, Detections
    from saccade.verification import Verification

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "Detections",
    "UserError",
    "embed",
    "evaluate",
    "inspect",
    "load",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    """What predictions are, imported when asked for: with them comes all that draws."""
    if name in ("Classification", "Detections"):
        from saccade import predictions

        return getattr(predictions, name)
    raise AttributeError(f"module 'saccade' has no attribute {name!r}")


def train(data: str | None = None, *, resume: str | None = None, show: bool = True, **settings: Any) -> TrainResult:
    """Train on `data`, pictures with labels or with boxes, or texts with their translations, or continue the run in
    the folder `resume`.

    Continued, it ends in the same bits as if it had never stopped; on a GPU the state is restored exactly, but some
    kernels add in no fixed order. Settings are those of the command, nested ones as dicts:
    `train("photos", minutes=5, image_size=128, optimizer={"name": "muon"})`.
    """
    from saccade.api import train as run

    return run(data, resume=resume, show=show, settings=settings)


def load(source: str, *, device: str = "auto", precision: str = "auto") -> Any:
    """A Model of pictures: `.network`, `.class_names`, `.preprocessing`, `.predict(...)`; or a TextModel, which
    translates: `.translate(...)`, `.stream(...)`.

    From a run folder, a model file, or weights of another library: a hub name, a folder, a file. What had to be
    assumed of the latter is warned of.
    """
    import warnings

    from saccade.engine.translate import open_model

    notes: list[str] = []
    model = open_model(source, device=device, precision=precision, notes=notes)
    if notes:
        warnings.warn("\n".join(notes), stacklevel=2)
    return model


def evaluate(
    model: str,
    data: str,
    *,
    split: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int = 0,
    beams: int | None = None,
    length_penalty: float | None = None,
    languages: tuple[str | None, str | None] = (None, None),
) -> Any:
    """What a model (run folder or file) is worth on data with its truth.

    A ClassificationReport (top-1, per class figures, confusion, calibration), a DetectionReport (average precision,
    per class and size, best threshold, kinds of mistakes), or a TranslationReport (BLEU, chrF, loss, speed). Of a model
    of texts: how many `beams`, the `length_penalty`, and the `languages` from and into, where they are not those that
    it learnt.

    Without `split`, val is measured, else test. A run on data without either is measured on what it held out of them,
    which a warning says; "all" stands for everything.
    """
    from saccade.api import evaluate as run

    return run(
        model,
        data,
        split=split,
        device=device,
        batch_size=batch_size,
        workers=workers,
        beams=beams,
        length_penalty=length_penalty,
        languages=languages,
    )


def inspect(
    data: str, *, val: str | None = None, source: str | None = None, target: str | None = None
) -> Report | TextReport:
    """What is in this data, and what is wrong with it. `source`, `target`: of texts in more than two languages."""
    from pathlib import Path

    from saccade.data.inspect import inspect_data

    return inspect_data(Path(data), val, languages=(source, target))


def embed(
    model: str | Path | Model,
    pictures: PictureInput | Iterable[PictureInput],
    *,
    what: str = "summary",
    batch_size: int = 64,
    image_size: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    workers: int = 0,
) -> Embeddings:
    """A vector per picture: `.paths`, `.vectors` (N, C), `.save("vectors.parquet")`.

    Files, folders, PIL images, arrays (H, W, 3) and tensors (3, H, W). `what` is the model's own `summary`, or
    `map-mean`: the mean of the last map over all places. What cannot be read is left out, see `.unreadable`.
    """
    from saccade.engine.embed import embed as run

    return run(
        model,
        pictures,
        what=what,
        batch_size=batch_size,
        image_size=image_size,
        device=device,
        precision=precision,
        workers=workers,
    )


def verify(
    source: str | Path,
    *,
    data: str | Path | None = None,
    image_size: str | None = None,
    dtype: str = "both",
    certificate: str | Path | None = None,
    model: str | None = None,
    branch: str | None = None,
) -> Verification:
    """Compare our model of these weights with the reference code: every stage, logits, loss, gradients.

    `.agrees`, `.verdict`, `.save("certificate.json")`. With `certificate`, against its recorded answers.
    """
    from saccade.verification import verify as run

    return run(
        source,
        data=data,
        image_size=image_size,
        dtype=dtype,
        certificate=certificate,
        model=model,
        branch=branch,
    )
