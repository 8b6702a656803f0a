"""What an evaluation of boxes found: figures, tables for a terminal, charts and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from saccade.drawing import BLUE, FAINT, GREEN, INK, ORANGE, chart_style, class_colour, save_figure, shorten
from saccade.metrics.classification import percent
from saccade.metrics.detection_errors import KINDS, ClassConfusion, ErrorKind, PictureMistakes
from saccade.metrics.detection_matching import RECALLS
from saccade.metrics.folder import begin_folder
from saccade.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

SWEEP = np.linspace(0, 1, 101)  # thresholds of DetectionReport.sweep
MANY = 10  # classes, beyond which not every curve is named


@dataclass(frozen=True)
class DetectionScores:
    """Of one class. Average precision is none without an object to be found, the threshold where nothing is right."""

    name: str
    ap: float | None
    ap50: float | None
    ap75: float | None
    objects: int
    detections: int
    threshold: float | None  # of the model; where it is not known, the best one
    f1: float  # at that threshold and IoU 0.5, as the next two
    precision: float
    recall: float
    best_threshold: float | None  # where F1 is best for this class, on these pictures
    best_f1: float


@dataclass(frozen=True, eq=False)
class DetectionReport:
    """What an evaluation found. Average precision and recall are COCO's: means over the classes that have an object.

    They are none where there is no object (of that size). Threshold, F1, precision and recall are of all classes
    together at IoU 0.5, and mistakes are counted there: at the model's own threshold, by which it will be used; where
    it is not `known`, where F1 is best on these pictures, which is none where no detection is right.
    """

    pictures: int
    objects: int  # without crowds
    crowds: int
    detections: int  # without those that found a crowd
    ap: float | None  # mean over IoU 0.5, 0.55, ..., 0.95
    ap50: float | None
    ap75: float | None
    ap_small: float | None  # area up to 32^2 px
    ap_medium: float | None
    ap_large: float | None  # from 96^2 px
    ar1: float | None  # recall with one detection per class and picture, mean over the IoUs
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    threshold: float | None
    f1: float
    precision: float
    recall: float
    best_threshold: float | None  # where F1 is best on these pictures
    best_f1: float
    known: bool  # `threshold` was chosen before, on others
    classes: tuple[DetectionScores, ...]
    errors: tuple[ErrorKind, ...]
    confusions: tuple[ClassConfusion, ...]
    curves: np.ndarray  # (K, 2, 101) precision at each recall, at IoU 0.5 and the mean over all; NaN without an object
    sweep: np.ndarray  # (3, 101) precision, recall and F1 at thresholds from 0 to 1; NaN where nothing is left
    worst: tuple[PictureMistakes, ...]  # the pictures with the most mistakes, to look at

    def __repr__(self) -> str:
        seen = f"{counted(self.pictures, 'picture')} with {counted(self.objects, 'object')}"
        figures = f"AP {_known(self.ap)}, AP50 {_known(self.ap50)}, AP75 {_known(self.ap75)}"
        used = "none" if self.threshold is None else f"{self.threshold:.3f} (F1 {percent(self.f1)})"
        return f"<DetectionReport: {seen}; {figures}, {'' if self.known else 'best '}threshold {used}>"

    def scalars(self) -> dict[str, float]:
        """The figures that a run's table shows, all of them always: 0 for what is not known, 0.5 for a threshold."""
        return {
            "ap": self.ap or 0.0,
            "ap50": self.ap50 or 0.0,
            "ap75": self.ap75 or 0.0,
            "f1": self.f1,
            "threshold": 0.5 if self.threshold is None else self.threshold,
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON. The curves of single classes are there up to 200 classes."""
        counts = ("pictures", "objects", "crowds", "detections")
        averages = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        recalls = ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
        at_threshold = ("threshold", "f1", "precision", "recall", "best_threshold", "best_f1")
        mean, small = self.mean_curves(), len(self.classes) <= 200
        return {
            **{name: getattr(self, name) for name in (*counts, *averages, *recalls, *at_threshold)},
            "class_names": [scores.name for scores in self.classes],
            "classes": [asdict(scores) for scores in self.classes],
            "errors": [asdict(kind) for kind in self.errors],
            "confusions": [asdict(pair) for pair in self.confusions[:20]],
            "precision_recall": {
                "recall": _numbers(RECALLS),
                "mean_iou50": _numbers(mean[0]),
                "mean": _numbers(mean[1]),
                "classes_iou50": [_numbers(curve[0]) for curve in self.curves] if small else None,
                "classes": [_numbers(curve[1]) for curve in self.curves] if small else None,
            },
            "thresholds": {
                "threshold": _numbers(SWEEP),
                **{name: _numbers(row) for name, row in zip(("precision", "recall", "f1"), self.sweep, strict=True)},
            },
        }

    def mean_curves(self) -> np.ndarray:
        """(2, 101): of the classes that have an object; NaN where none has."""
        known = self.curves[~np.isnan(self.curves[:, 0, 0])]
        return known.mean(axis=0) if len(known) else np.full((2, len(RECALLS)), np.nan)

    files: ClassVar = ("metrics.json", "precision_recall.png", "errors.png")

    def save(self, folder: str | Path, of: Mapping[str, Any] | None = None) -> Path:
        """Write the `files`: figures (with what they are `of`, if given), curves and kinds of mistakes. UserError where
        the folder holds a report, or cannot be written."""
        folder = begin_folder(folder, self.to_dict(), of)
        _draw_curves(self, folder / "precision_recall.png")
        _draw_errors(self, folder / "errors.png")
        return folder

    def render(self, console: Console) -> None:
        """Print the figures, the classes (of many, the worst and the best), and the mistakes."""
        from rich.text import Text

        summary = _table("", "", header=False)
        seen = counted(self.objects, "object") + (f" and {counted(self.crowds, 'crowd')}" if self.crowds else "")
        summary.add_row("pictures", f"{self.pictures}, with {seen}")
        summary.add_row(
            "average precision", f"{_known(self.ap)}; IoU 0.5 {_known(self.ap50)}, 0.75 {_known(self.ap75)}"
        )
        sizes = (self.ap_small, self.ap_medium, self.ap_large)
        summary.add_row("  by size", "small {}, medium {}, large {}".format(*map(_known, sizes)))
        limits = (self.ar1, self.ar10, self.ar100)
        summary.add_row("average recall", "1 detection {}, 10 {}, 100 {}".format(*map(_known, limits)))
        sizes = (self.ar_small, self.ar_medium, self.ar_large)
        summary.add_row("  by size", "small {}, medium {}, large {}".format(*map(_known, sizes)))
        if self.threshold is not None:
            figures = f"F1 {percent(self.f1)}, precision {percent(self.precision)}, recall {percent(self.recall)}"
            name = "at the model's threshold" if self.known else "best threshold"
            summary.add_row(name, f"{self.threshold:.3f}: {figures}")
        if self.best_threshold is None:
            summary.add_row("best threshold", "none: no detection is right")
        elif self.known:
            summary.add_row("best threshold here", f"{self.best_threshold:.3f}: F1 {percent(self.best_f1)}")
        console.print(summary)
        console.print()

        best = ("best F1", "at") if self.known else ("at",)
        table = _table("class", *("AP", "AP50", "AP75", "F1", *best, "objects"))
        table.columns[0].max_width = 32
        shown, left_out = self._listed()
        for position, scores in enumerate(shown):
            if left_out and position == len(shown) // 2:
                table.add_row(f"({left_out} more)", *[""] * (5 + len(best)), style="dim")
            numbers = (_known(value) for value in (scores.ap, scores.ap50, scores.ap75))
            f1 = ["–" if scores.threshold is None else percent(scores.f1)]
            if self.known:
                f1.append("–" if scores.best_threshold is None else percent(scores.best_f1))
            f1.append("–" if scores.best_threshold is None else f"{scores.best_threshold:.3f}")
            table.add_row(Text(" ".join(scores.name.split())), *numbers, *f1, str(scores.objects))
        console.print(table)
        console.print()

        table = _table("mistake", *("AP50 lost", "at threshold", "of all"))
        for kind in self.errors:
            name = Text.assemble(f"{kind.name:<11}", (KINDS[kind.name], "dim"))
            table.add_row(name, percent(kind.ap50), str(kind.shown), str(kind.count))
        console.print(table)
        if not self.confusions:
            return
        console.print()
        table = _table("most confused", "taken for", "at threshold")
        table.columns[1].justify = "left"
        for column in table.columns[:2]:
            column.max_width = 28
        for pair in self.confusions[:5]:
            table.add_row(Text(pair.truth), Text(pair.prediction), str(pair.count))
        console.print(table)

    def _listed(self) -> tuple[list[DetectionScores], int]:
        """All classes in their order, or of more than thirty the worst and the best ten; and how many are left out."""
        if len(self.classes) <= 30:
            return list(self.classes), 0
        ranked = sorted((scores for scores in self.classes if scores.ap is not None), key=lambda scores: scores.ap or 0)
        shown = ranked if len(ranked) <= 20 else ranked[:10] + ranked[-10:]
        return shown, len(self.classes) - len(shown)


def _table(first: str, *others: str, header: bool = True) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=header, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True, overflow="ellipsis")
    for name in others:
        table.add_column(name, justify="right" if header else "left", no_wrap=header, overflow="ellipsis")
    return table


def _known(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _numbers(values: np.ndarray) -> list[float | None]:
    """Six digits, for people; null for what is not known."""
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def _draw_curves(report: DetectionReport, path: Path) -> None:
    """Precision over recall, at IoU 0.5 and as the mean over the IoUs; and what a threshold makes of it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with chart_style():
        figure = Figure(figsize=(15, 6), layout="constrained")
        loose, strict, thresholds = figure.subplots(1, 3)
        named = _named_curves(report)
        loose.set_title("Precision and recall at IoU 0.5")
        _draw_classes(loose, report, 0, named, lambda scores: scores.ap50)
        strict.set_title("Mean over IoU 0.5 to 0.95")
        _draw_classes(strict, report, 1, named, lambda scores: scores.ap)
        if report.threshold is not None:
            label = f"all together, at threshold {report.threshold:.2f}"
            loose.plot(
                report.recall, report.precision, "o", color=INK, ms=9, mfc="white", mew=1.5, zorder=3, label=label
            )

        used = "none" if report.threshold is None else f"F1 {percent(report.f1)} at {report.threshold:.2f}"
        thresholds.set_title(f"{'Threshold of the model' if report.known else 'Best threshold'}: {used}")
        thresholds.set_xlabel("threshold: what scores less is left out (IoU 0.5)")
        # of the last few detections the precision is a matter of luck
        enough = np.nan_to_num(report.sweep[1]) >= 0.02
        for name, row, colour in zip(("precision", "recall", "F1"), report.sweep, (BLUE, ORANGE, GREEN), strict=True):
            thresholds.plot(SWEEP[enough], row[enough], color=colour, linewidth=2, label=name)
        if report.threshold is not None:
            thresholds.axvline(report.threshold, color=FAINT, linestyle="--", linewidth=1.2)
        for axes in (loose, strict, thresholds):
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
            axes.grid(True)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            if axes.get_legend_handles_labels()[0]:  # below, for anywhere else it may hide a curve
                columns = 3 if axes is thresholds else 2
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, fontsize=9, frameon=False)
        for axes in (loose, strict):
            axes.set_xlabel("recall")
            axes.set_ylabel("precision")
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        save_figure(figure, path)


def _named_curves(report: DetectionReport) -> list[int]:
    """The classes whose curves get a colour, in their order: all, or of many the three best and the three worst."""
    known = [k for k, scores in enumerate(report.classes) if scores.ap is not None]
    ranked = sorted(known, key=lambda k: -(report.classes[k].ap or 0))
    return known if len(known) <= MANY else sorted(ranked[:3] + ranked[-3:])


def _draw_classes(
    axes: Axes, report: DetectionReport, i: int, named: list[int], average: Callable[[Any], float | None]
) -> None:
    known = np.flatnonzero(~np.isnan(report.curves[:, 0, 0]))
    for k in known:
        if k not in named:
            axes.plot(RECALLS, report.curves[k, i], color=FAINT, linewidth=0.6, alpha=0.35)
    for k in named:
        scores = report.classes[k]
        label = f"{shorten(scores.name, 16)}  {_known(average(scores))}"
        axes.plot(RECALLS, report.curves[k, i], color=class_colour(k), linewidth=1.3, label=label)
    if len(known) > 1:
        label = f"mean of {len(known)} classes  {_known(report.ap if i else report.ap50)}"
        axes.plot(RECALLS, report.mean_curves()[i], color=INK, linewidth=2.6, label=label)
    if not len(known):
        axes.text(0.5, 0.5, "There is no object to be found.", ha="center")


def _draw_errors(report: DetectionReport, path: Path) -> None:
    """What each kind of mistake costs, beside how often it is made at the threshold."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    places = np.arange(len(report.errors))
    with chart_style():
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        cost, often = figure.subplots(1, 2, sharey=True)
        gains = [kind.ap50 for kind in report.errors]
        cost.barh(places, gains, height=0.62, color=BLUE)
        cost.set_title("AP50 that each kind of mistake costs")
        cost.set_yticks(places, [f"{kind.name}\n({KINDS[kind.name]})" for kind in report.errors], linespacing=1.3)
        shown = [kind.shown for kind in report.errors]
        often.barh(places, shown, height=0.62, color=ORANGE)
        at = "without any detection" if report.threshold is None else f"at threshold {report.threshold:.2f}"
        often.set_title(f"Mistakes {at}")
        for axes, values, notes in (
            (cost, gains, [percent(gain) for gain in gains]),
            (often, shown, [str(count) for count in shown]),
        ):
            for place, value, note in zip(places, values, notes, strict=True):
                axes.text(value, place, f" {note}", va="center", fontsize=9, color=INK)
            axes.set_xlim(0, 1.18 * max(values) or 1)  # with room for the notes
            axes.grid(True, axis="x")
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
        cost.invert_yaxis()
        cost.xaxis.set_major_locator(MaxNLocator(5))
        cost.xaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
        often.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        save_figure(figure, path)
