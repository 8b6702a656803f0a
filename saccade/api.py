"""The Python entry points, which the command shares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saccade.config import DataConfig
from saccade.data.decode import Picture
from saccade.data.loader import eval_batches, measure_sizes
from saccade.data.source import BoxSource, Source
from saccade.data.sources import fit_to_pictures, open_source
from saccade.data.text.pairs import Pairs
from saccade.data.text.splits import open_pairs
from saccade.engine import train as engine
from saccade.engine.distributed import World
from saccade.engine.evaluate import Normalise, PictureInputs, evaluate_batches
from saccade.engine.held_out import held_out
from saccade.engine.run_folder import resume_config
from saccade.engine.text_data import other_direction
from saccade.engine.translate import TextModel, open_model
from saccade.errors import UserError
from saccade.flags import spread
from saccade.metrics.detection import DetectionMetric
from saccade.metrics.detection_errors import PictureMistakes
from saccade.metrics.detection_report import DetectionReport
from saccade.metrics.translation import TranslationReport
from saccade.predictions.mistakes_sheet import Compared, mistakes_sheet
from saccade.recipes import resolve
from saccade.words import DOES, HOLDS, counted


def train(
    data: str | None, *, resume: str | None, settings: Mapping[str, Any], show: bool = True
) -> engine.TrainResult:
    """A new run on `data`, or the continuation of the one in `resume`."""
    changes = spread(settings if data is None else {"data": str(data), **settings})
    if resume is not None:
        return engine.train(resume_config(Path(resume), changes), resume=True, show=show)
    return engine.train(resolve(changes), show=show)


def evaluate(
    model: str,
    data: str,
    *,
    split: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    unreadable: list[str] | None = None,
    notes: list[str] | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    languages: tuple[str | None, str | None] = (None, None),
) -> Any:
    """Run a model over data with its truth. `progress(done, total)` is called after each batch.

    What is wrong with pictures that cannot be read is added to `unreadable`, or warned of; they do not count. What of
    the truth is left out because it does not fit its picture, and what was assumed of the weights of other libraries,
    is added to `notes`. Of a model of texts: `beams`,
    `length_penalty`, and the `languages` from and into where they are not those that it learnt.
    """
    failed: list[str] = [] if unreadable is None else unreadable
    told: list[str] = []
    loaded = open_model(model, device=device, notes=told)
    if loaded.card.task == "embed":
        head = f"saccade train {data} --weights {model}"
        raise UserError(f"{model}: has no classes that could be right; train a head on it, such as by `{head}`")
    held = _held_out(model, data, split, told)
    if isinstance(loaded, TextModel):
        if any(languages) or not isinstance(held, Pairs):  # the first: another direction than that of the run
            held = open_pairs(Path(data), split, *languages, usual=loaded.card.languages, notes=told)
        _tell([*told, *other_direction(loaded.card.languages, held.languages)], notes)
        given = {"beams": beams, "length_penalty": length_penalty, "batch_size": batch_size, "notes": notes}
        return evaluate_texts(loaded, held, {k: v for k, v in given.items() if v is not None}, progress)
    names = ("beams", "length-penalty", "text.source", "text.target")
    for name, value in zip(names, (beams, length_penalty, *languages), strict=True):
        if value is not None:
            raise UserError(f"--{name} {value}: is for translating, and {model} is a model of pictures")
    source = held if isinstance(held, Source) else open_source(Path(data), split, told)
    if isinstance(source, BoxSource) != (loaded.task.name == "detect"):
        found = HOLDS["detect" if isinstance(source, BoxSource) else "classify"]
        raise UserError(f"{data}: holds {found}, and {model} {DOES[loaded.task.name]}; give data of its kind")
    source = with_class_names(source, loaded.class_names, str(model))
    config = DataConfig()
    sizes = measure_sizes(source, config)
    source, left_out = fit_to_pictures(source, sizes)
    _tell([*told, *left_out], notes)
    task, done = loaded.task, 0

    def count(pictures: int) -> None:
        nonlocal done
        done += pictures
        if progress is not None:
            progress(done, len(source))

    batches = eval_batches(
        source,
        sizes,
        task.eval_transform,
        task.eval_collate,
        preprocessing=loaded.preprocessing,
        data=config,
        batch_size=loaded.usual_batch_size if batch_size is None else batch_size,
        workers=workers,
    )
    inputs = PictureInputs(Normalise(loaded.preprocessing, loaded.device))
    # as it will be used: a threshold that is chosen on what is measured flatters
    metric = None if loaded.threshold is None else DetectionMetric(loaded.class_names, loaded.threshold)
    report = evaluate_batches(
        loaded.network, batches, task, inputs, loaded.device, loaded.precision, World(), count, failed, metric
    )
    if failed and unreadable is None:
        what = f"{counted(len(failed), 'picture')} could not be read; the report is without them"
        warnings.warn(f"{what}:\n" + "\n".join(failed), stacklevel=3)
    return report


def _tell(what: list[str], notes: list[str] | None) -> None:
    """Of the caller of `evaluate`: added to its `notes`, or warned of."""
    if notes is not None:
        notes += what
    elif what:
        warnings.warn("\n".join(what), stacklevel=4)


def _held_out(model: str, data: str, split: str | None, notes: list[str]) -> Source | Pairs | None:
    """What is measured instead of a split, where none is asked for."""
    return held_out(Path(model), Path(data), notes) if split is None else None


def evaluate_texts(
    model: TextModel,
    pairs: Pairs,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
) -> TranslationReport:
    done = 0

    def count(texts: int) -> None:
        nonlocal done
        done += texts
        if progress is not None:
            progress(done, len(pairs))

    return model.evaluate(pairs, **options, progress=count)


def save_report(report: Any, folder: Path, model: str, data: str, *, split: str | None = None) -> tuple[str, ...]:
    """Write what `evaluate` found of these, with their names; for boxes also a sheet of pictures with most mistakes.

    Returns the names of the files.
    """
    report.save(folder, {"model": model, "data": data, "split": split})
    if not isinstance(report, DetectionReport) or not report.worst:
        return report.files
    held = _held_out(model, data, split, [])
    source = held if isinstance(held, Source) else open_source(Path(data), split)
    names = [scores.name for scores in report.classes]

    def compared(one: PictureMistakes) -> Compared:
        place = source.id(one.index)
        return Compared(
            picture=lambda: Picture(source.read(one.index), place, DataConfig().max_pixels).whole(),
            source=place,
            boxes=one.boxes,
            labels=tuple(names[k] for k in one.labels),
            mistakes=one.kinds,
            truth_boxes=one.truth_boxes,
            truth_labels=tuple(names[k] for k in one.truth_labels),
            missed=one.missed,
        )

    mistakes_sheet([compared(one) for one in report.worst], folder / "mistakes.png")
    return *report.files, "mistakes.png"


def with_class_names(source: Source, class_names: tuple[str, ...], model: str) -> Source:
    """The same source with labels in the model's order. Classes that the model does not know are a UserError."""
    unknown = [name for name in source.class_names if name not in class_names]
    if unknown:
        many = "1 class is" if len(unknown) == 1 else f"{len(unknown)} classes are"
        raise UserError(
            f"{source.path}: {many} unknown to {model}: {', '.join(unknown[:10])}; "
            f"it knows {', '.join(class_names[:10])}{' ...' if len(class_names) > 10 else ''}. "
            "Rename them in the data, or train on this data"
        )
    return source.with_classes(class_names)
