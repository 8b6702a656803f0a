"""How good a classifier is: accuracy, per class scores, confusion and calibration."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from saccade.drawing import BLUE, FAINT, INK, chart_style, save_figure, shorten, typeface
from saccade.errors import UserError
from saccade.metrics.folder import begin_folder
from saccade.words import counted

if TYPE_CHECKING:
    from rich.console import Console

BINS = 15
FIXED = 2**30  # see ClassificationMetric
SMALLEST = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class ClassScores:
    """Of one class; 0 where nothing was to be divided by."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int  # pictures that are of this class


@dataclass(frozen=True)
class CalibrationBin:
    """Pictures whose highest probability is in (lower, upper]."""

    lower: float
    upper: float
    count: int
    confidence: float  # mean of the highest probability; 0 where the bin is empty
    accuracy: float


@dataclass(frozen=True)
class Confusion:
    """Pictures of class `truth` that were taken for `prediction`."""

    truth: str
    prediction: str
    count: int
    share: float  # of all pictures of that class


class ClassificationMetric:
    """Collects probabilities batch by batch; what comes out does not depend on the batches or their order.

    Sums of fractions are kept as integers (units of 2^-30), because those can be added in any order, over any number
    of processes, with the same result to the last bit. Memory grows with the pairs of classes that occur, not with K^2.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self._pairs: Counter[int] = Counter()  # truth * K + prediction -> pictures
        self._totals = torch.zeros(2, dtype=torch.int64)  # true class among the first five; negative log likelihood
        self._bins = torch.zeros(BINS, 3, dtype=torch.int64)  # pictures, right ones, confidence

    @torch.no_grad()
    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch: probabilities (B, K) float, labels (B,) int. UserError for NaN and for an unknown label."""
        K = len(self.class_names)
        assert probabilities.ndim == 2 and probabilities.shape[1] == K, f"{tuple(probabilities.shape)}, {K} classes"
        assert labels.shape == probabilities.shape[:1], f"{tuple(labels.shape)}, {tuple(probabilities.shape)}"
        if len(labels) == 0:
            return
        labels = labels.to(probabilities.device, torch.int64)
        if not bool(torch.isfinite(probabilities).all()):
            raise UserError("the model's probabilities are not finite: its weights are damaged or training diverged")
        if bool(((labels < 0) | (labels >= K)).any()):
            wrong = sorted({label for label in labels.tolist() if not 0 <= label < K})
            raise UserError(f"labels {wrong[:5]} do not belong to the {K} classes: do data and model belong together?")

        confidence, prediction = probabilities.max(dim=1)  # (B,), (B,)
        of_truth = probabilities.gather(1, labels[:, None])  # (B, 1)
        # Equal probabilities are ranked by class, so that a model that says the same of all classes earns no luck.
        classes = torch.arange(K, device=labels.device)
        before = (probabilities > of_truth) | ((probabilities == of_truth) & (classes < labels[:, None]))
        in_top5 = before.sum(dim=1) < 5

        # Not on the device: float64 does not exist on all of them.
        confidence, of_truth = confidence.cpu().double(), of_truth[:, 0].cpu().double()
        labels, prediction = labels.cpu(), prediction.cpu()
        loss = -of_truth.clamp(SMALLEST, 1).log()
        self._pairs.update((labels * K + prediction).tolist())
        self._totals += torch.stack([in_top5.sum().cpu(), (loss * FIXED).round().long().sum()])
        columns = [torch.ones_like(labels), (labels == prediction).long(), (confidence * FIXED).round().long()]
        bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        self._bins.index_add_(0, bins, torch.stack(columns, dim=1))

    def state(self) -> dict[str, Tensor]:
        """All that was collected, for another process's `merge`: pairs (M, 3) of truth, prediction, count; sums."""
        pairs = torch.from_numpy(self._pair_table())
        return {"pairs": pairs, "totals": self._totals.clone(), "bins": self._bins.clone()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what another process collected on other pictures."""
        K = len(self.class_names)
        truth, prediction, count = state["pairs"].cpu().long().unbind(dim=1)
        self._pairs.update(dict(zip((truth * K + prediction).tolist(), count.tolist(), strict=True)))
        self._totals += state["totals"].cpu()
        self._bins += state["bins"].cpu()

    def compute(self) -> ClassificationReport:
        """UserError where no picture was seen."""
        pairs, K = self._pair_table(), len(self.class_names)
        truth, prediction, count = pairs.T
        total = int(count.sum())
        if total == 0:
            raise UserError("there is nothing to evaluate: no picture with a label was read")
        right = np.where(truth == prediction, count, 0)
        hits, support, predicted = (
            np.bincount(classes, weights, minlength=K)
            for classes, weights in ((truth, right), (truth, count), (prediction, count))
        )
        precision, recall, f1 = _ratio(hits, predicted), _ratio(hits, support), _ratio(2 * hits, support + predicted)
        occurs = support + predicted > 0
        top5, loss = self._totals.tolist()
        bins, error = [], 0.0
        for i, (inside, correct, confidence) in enumerate(self._bins.tolist()):
            mean = confidence / FIXED / max(inside, 1)
            accuracy = correct / max(inside, 1)
            bins.append(CalibrationBin(i / BINS, (i + 1) / BINS, inside, mean, accuracy))
            error += inside / total * abs(accuracy - mean)
        columns = precision.tolist(), recall.tolist(), f1.tolist(), support.astype(int).tolist()
        return ClassificationReport(
            count=total,
            top1=float(hits.sum() / total),
            top5=top5 / total if K > 5 else None,
            loss=loss / FIXED / total,
            precision=float(precision[occurs].mean()),
            recall=float(recall[occurs].mean()),
            f1=float(f1[occurs].mean()),
            calibration_error=error,
            classes=tuple(ClassScores(*row) for row in zip(self.class_names, *columns, strict=True)),
            bins=tuple(bins),
            pairs=pairs,
        )

    def _pair_table(self) -> np.ndarray:
        """(M, 3): truth, prediction, count; in the order of the classes."""
        K = len(self.class_names)
        table = [(key // K, key % K, count) for key, count in sorted(self._pairs.items())]
        return np.array(table, dtype=np.int64).reshape(-1, 3)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)


@dataclass(frozen=True, eq=False)
class ClassificationReport:
    """What an evaluation found. Precision, recall and F1 are means over the classes that occur, each counted once.

    The calibration error is that of Guo et al. 2017: the mean distance of confidence and accuracy over 15 bins.
    """

    count: int  # pictures
    top1: float
    top5: float | None  # none with five classes or fewer
    loss: float  # mean negative log likelihood
    precision: float
    recall: float
    f1: float
    calibration_error: float
    classes: tuple[ClassScores, ...]
    bins: tuple[CalibrationBin, ...]
    pairs: np.ndarray  # (M, 3) int: truth, prediction, pictures; the confusion matrix without its zeros

    def __repr__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {percent(self.top5)}"
        seen = f"{counted(self.count, 'picture')} of {counted(len(self.classes), 'class', 'classes')}"
        return f"<ClassificationReport: {seen}; top-1 {percent(self.top1)}{top5}, loss {self.loss:.4g}>"

    @property
    def confusion(self) -> np.ndarray:
        """Confusion matrix (K, K) int; rows are the truth. Made when asked for: with 21k classes it takes 3.5 GB."""
        matrix = np.zeros((len(self.classes), len(self.classes)), np.int64)
        matrix[self.pairs[:, 0], self.pairs[:, 1]] = self.pairs[:, 2]
        return matrix

    def most_confused(self, limit: int) -> list[Confusion]:
        """The pairs of classes that were mistaken most often; of equals, first those of the smaller class."""
        wrong = self.pairs[self.pairs[:, 0] != self.pairs[:, 1]]
        support = np.array([scores.support for scores in self.classes])
        wrong = wrong[np.lexsort((support[wrong[:, 0]], -wrong[:, 2]))][:limit].tolist()
        return [
            Confusion(self.classes[t].name, self.classes[p].name, count, count / self.classes[t].support)
            for t, p, count in wrong
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON. `confusion` is a matrix up to 200 classes, beyond that null, and `confusion_pairs` lists it."""
        small = len(self.classes) <= 200
        names = ("count", "top1", "top5", "loss", "precision", "recall", "f1", "calibration_error")
        return {
            **{name: getattr(self, name) for name in names},
            "class_names": [scores.name for scores in self.classes],
            "classes": [asdict(scores) for scores in self.classes],
            "calibration_bins": [asdict(one) for one in self.bins],
            "most_confused": [asdict(pair) for pair in self.most_confused(20)],
            "confusion": self.confusion.tolist() if small else None,
            "confusion_pairs": None if small else self.pairs.tolist(),
        }

    files: ClassVar = ("metrics.json", "confusion.png", "calibration.png")

    def save(self, folder: str | Path, of: Mapping[str, Any] | None = None) -> Path:
        """Write the `files`: figures (with what they are `of`, if given), confusion and calibration. UserError where
        the folder holds a report, or cannot be written."""
        folder = begin_folder(folder, self.to_dict(), of)
        (_draw_confusion if len(self.classes) <= 200 else _draw_most_confused)(self, folder / "confusion.png")
        _draw_calibration(self, folder / "calibration.png")
        return folder

    def render(self, console: Console) -> None:
        """Print the figures, the classes (of many, the worst and the best) and what is confused most."""
        from rich.table import Table
        from rich.text import Text

        summary = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        top5 = [] if self.top5 is None else [("top-5", percent(self.top5))]
        means = f"precision {percent(self.precision)}, recall {percent(self.recall)}, F1 {percent(self.f1)}"
        for name, value in (
            ("pictures", f"{self.count}"),
            ("top-1", percent(self.top1)),
            *top5,
            ("mean of classes", means),
            ("loss", f"{self.loss:.4f}"),
            ("calibration error", percent(self.calibration_error)),
        ):
            summary.add_row(name, value)
        console.print(summary)
        console.print()

        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("class", no_wrap=True, overflow="ellipsis", max_width=40)
        for name in ("precision", "recall", "F1", "pictures"):
            table.add_column(name, justify="right", no_wrap=True)
        shown, left_out = self._listed()
        for position, scores in enumerate(shown):
            if left_out and position == len(shown) // 2:
                table.add_row(f"({left_out} more)", "", "", "", "", style="dim")
            numbers = (percent(value) for value in (scores.precision, scores.recall, scores.f1))
            table.add_row(Text(" ".join(scores.name.split())), *numbers, str(scores.support))
        console.print(table)
        confused = self.most_confused(5)
        if not confused:
            return
        console.print()
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("most confused", no_wrap=True, overflow="ellipsis", max_width=28)
        table.add_column("taken for", no_wrap=True, overflow="ellipsis", max_width=28)
        table.add_column("pictures", justify="right", no_wrap=True)
        table.add_column("of the class", justify="right", no_wrap=True)
        for pair in confused:
            table.add_row(Text(pair.truth), Text(pair.prediction), str(pair.count), percent(pair.share))
        console.print(table)

    def _listed(self) -> tuple[list[ClassScores], int]:
        """All classes in their order, or of more than thirty the worst and the best ten; and how many are left out."""
        if len(self.classes) <= 30:
            return list(self.classes), 0
        ranked = sorted((scores for scores in self.classes if scores.support), key=lambda scores: scores.f1)
        shown = ranked if len(ranked) <= 20 else ranked[:10] + ranked[-10:]
        return shown, len(self.classes) - len(shown)


def _title(report: ClassificationReport) -> str:
    return f"{percent(report.top1)} of {report.count} pictures right"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _draw_confusion(report: ClassificationReport, path: Path) -> None:
    """Rows are the truth. Placed by hand, in inches: with many long names an automatic layout squeezes the matrix."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    K, matrix = len(report.classes), report.confusion
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    annotated = K <= 30
    cell, size = (min(0.9, max(0.42, 6 / K)), 10 if K <= 15 else 8.5) if annotated else (0.115, 6.5)
    side = max(2.6, K * cell)
    cell = side / K
    names = [shorten(scores.name, 28) for scores in report.classes]
    label = max(typeface(name, 100).getlength(name) for name in names) / 100 * size / 72
    upright = label < 0.94 * cell  # else the names below would run into each other
    left, bottom, top, right = label + 0.65, (size / 72 if upright else label) + 0.6, 0.6, 1.25
    width, height = left + side + right, bottom + side + top
    with chart_style():
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        # The root makes a confusion of a few per cent visible beside the diagonal.
        norm = PowerNorm(0.5, 0, 1)
        picture = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
        axes.set_xticks(range(K), names, rotation=0 if upright else 90, fontsize=size)
        axes.set_yticks(range(K), names, fontsize=size)
        axes.tick_params(length=0)
        figure.text(0.28 / width, (bottom + side / 2) / height, "true class", rotation=90, ha="center", va="center")
        figure.text((left + side / 2) / width, 0.28 / height, "predicted class", ha="center", va="center")
        title_size = 12 if side > 4 else 10
        figure.text(left / width, 1 - 0.35 / height, _title(report), va="center", size=title_size, weight="bold")
        axes.spines[:].set_visible(False)
        if annotated:
            axes.set_xticks(np.arange(K + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(K + 1) - 0.5, minor=True)
            axes.grid(which="minor", color="white", linewidth=1.5)
            axes.tick_params(which="minor", length=0)
            digits = len(str(matrix.max()))
            font = min(12 if K <= 10 else 9, cell * 72 * 0.8 / (0.64 * digits))
            for j, i in itertools.product(range(K), range(K)):
                colour = "white" if norm(share[i, j]) > 0.6 else INK if matrix[i, j] else "#b8c2cc"
                axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=colour, fontsize=font)
        bar_side = min(side, 6)
        place = (left + side + 0.25) / width, (bottom + side - bar_side) / height, 0.16 / width, bar_side / height
        marks = {"ticks": [0, 0.05, 0.2, 0.5, 1], "format": PercentFormatter(1, 0, " %")}
        bar = figure.colorbar(picture, cax=figure.add_axes(place), label="share of the true class", **marks)
        bar.outline.set_visible(False)  # type: ignore[operator]
        save_figure(figure, path, dpi=150 if annotated else 120)


def _draw_most_confused(report: ClassificationReport, path: Path) -> None:
    """A matrix of more than 200 classes shows nothing: the pairs that matter, as bars."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    pairs = report.most_confused(30)
    with chart_style():
        figure = Figure(figsize=(10, 1.6 + 0.28 * max(len(pairs), 3)), layout="constrained")
        axes = figure.subplots()
        title = f"{_title(report)}; the classes that are confused most"
        figure.suptitle(title, x=0.02, ha="left", size=12, weight="bold")
        if not pairs:
            axes.axis("off")
            axes.text(0, 0.5, "No class was taken for another.", transform=axes.transAxes)
        else:
            places = range(len(pairs))
            counts = [pair.count for pair in pairs]
            axes.barh(places, counts, height=0.7, color=BLUE)
            names = [f"{shorten(pair.truth, 26)} → {shorten(pair.prediction, 26)}" for pair in pairs]
            axes.set_yticks(places, names, fontsize=9)
            axes.invert_yaxis()
            axes.set_ylim(len(pairs) - 0.4, -0.6)
            axes.set_xlim(0, max(counts) * 1.4)
            for place, pair in zip(places, pairs, strict=True):
                note = f" {pair.count}  ({100 * pair.share:.0f} % of the class)"
                axes.text(pair.count, place, note, va="center", fontsize=8.5, color=FAINT)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(True, axis="x")
            axes.tick_params(length=0)
            axes.set_xlabel("pictures (true class → predicted class)")
        save_figure(figure, path)


def _draw_calibration(report: ClassificationReport, path: Path) -> None:
    """Reliability diagram: how often the model is right, where it says that it is sure by so much."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    filled = [one for one in report.bins if one.count]
    width = 1 / len(report.bins)
    lower = [one.lower for one in filled]
    accuracy = np.array([one.accuracy for one in filled])
    confidence = np.array([one.confidence for one in filled])
    common = np.minimum(accuracy, confidence)
    under, over = accuracy - common, confidence - common
    with chart_style():
        figure = Figure(figsize=(6, 7), layout="constrained")
        upper, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1.1])
        edge = {"width": width, "align": "edge", "edgecolor": "white", "linewidth": 1}
        upper.bar(lower, common, color=BLUE, label="right", **edge)
        upper.bar(lower, under, bottom=common, color="#9cc3e6", label="more often right than it is sure", **edge)
        upper.bar(lower, over, bottom=common, color="#f0a8a0", label="less often right than it is sure", **edge)
        upper.plot([0, 1], [0, 1], linestyle="--", color=FAINT, linewidth=1.2, label="perfectly calibrated")
        upper.set_ylim(0, 1.02)
        upper.set_xlim(0, 1)
        upper.set_ylabel("share that is right")
        upper.set_title(f"Calibration error {percent(report.calibration_error)}")
        upper.legend(loc="upper left")
        upper.grid(True)
        below.bar(lower, [one.count / report.count for one in filled], color=FAINT, **edge)
        below.set_ylabel("pictures")
        below.set_xlabel("confidence: probability of the predicted class")
        below.grid(True, axis="y")
        for axis in (upper.xaxis, upper.yaxis, below.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        save_figure(figure, path)
