"""What kinds of mistakes a detector makes, what each costs, and where its threshold should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saccade.metrics.detection_matching import (
    IOU_THRESHOLDS,
    Detections,
    Matching,
    Objects,
    Overlaps,
    precision_at_recalls,
)

KINDS = {
    "class": "wrong class on an object",
    "box": "right class, box is off",
    "both": "wrong class, box is off",
    "duplicate": "object was found already",
    "background": "no object is there",
    "missed": "object without a detection",
}
CLASS, BOX, BOTH, DUPLICATE, BACKGROUND = range(5)


@dataclass(frozen=True)
class ErrorKind:
    name: str  # of KINDS
    ap50: float  # what AP50 would gain, were there no error of this kind
    shown: int  # errors at the best threshold; where there is none, no detection is kept and every object missed
    count: int  # errors among all detections, however unsure


@dataclass(frozen=True, eq=False)
class PictureMistakes:
    """What is right and wrong in one picture at the best threshold; of n detections and m objects, without crowds."""

    index: int  # the picture's number in the source
    boxes: np.ndarray  # (n, 4) left, top, right, bottom
    labels: np.ndarray  # (n,) int
    scores: np.ndarray  # (n,)
    kinds: tuple[str, ...]  # (n,) of KINDS; "" for what is right, or found a crowd
    truth_boxes: np.ndarray  # (m, 4)
    truth_labels: np.ndarray  # (m,) int
    missed: np.ndarray  # (m,) bool

    @property
    def wrong(self) -> int:
        return sum(kind != "" for kind in self.kinds)


@dataclass(frozen=True)
class ClassConfusion:
    """Detections at the best threshold that lie on an object of class `truth` and say `prediction`."""

    truth: str
    prediction: str
    count: int


@dataclass(frozen=True)
class Threshold:
    """The score from which on detections are kept so that F1 is best, at IoU 0.5, and what comes of it."""

    threshold: float | None  # none where no detection is right
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True, eq=False)
class Split:
    """Every false positive and every object that was not found."""

    kind: np.ndarray  # (N,) int: index into KINDS, -1 for what is no error
    target: np.ndarray  # (N,) int: the object that a wrong class or a wrong box was meant for
    missed: np.ndarray  # (M,) bool

    def counts(self) -> list[int]:
        """In the order of KINDS."""
        return [*np.bincount(self.kind[self.kind >= 0], minlength=5).tolist(), int(self.missed.sum())]


def split_errors(
    detections: Detections, objects: Objects, overlaps: Overlaps, matching: Matching, threshold: float | None
) -> Split:
    """TIDE (Bolya et al. 2020, https://arxiv.org/abs/2008.08115), at IoU 0.5, of what scores `threshold` or more.

    A false positive is of the first kind that fits: box, class, duplicate, background, both; the order is that of
    the authors' code, the paper names none. Leaving out what scores less does not change how the rest is matched.
    """
    kept = detections.score >= (np.inf if threshold is None else threshold)
    N, real = len(detections.label), ~objects.crowd[overlaps.object]
    same = detections.label[overlaps.detection] == objects.label[overlaps.object]
    own, own_object = _largest(overlaps, real & same, N)
    other, other_object = _largest(overlaps, real & ~same, N)
    enough = IOU_THRESHOLDS[0]
    # overlaps below LEAST_OVERLAP are not among the pairs
    rules = {
        BOX: (own > 0) & (own < enough),
        CLASS: other >= enough,
        DUPLICATE: own >= enough,
        BACKGROUND: other == 0,
    }
    kind = np.select(list(rules.values()), list(rules), BOTH)
    kind[matching.right[:, 0, 0] | matching.ignored[:, 0, 0] | ~kept] = -1
    target = np.where(kind == BOX, own_object, np.where(kind == CLASS, other_object, -1))
    accounted = np.zeros(len(objects.label), bool)
    accounted[matching.object[kept & (matching.object >= 0)]] = True
    accounted[target[target >= 0]] = True
    return Split(kind, target, ~accounted & ~objects.crowd)


def worst_pictures(
    detections: Detections,
    objects: Objects,
    split: Split,
    threshold: float | None,
    numbers: Sequence[int],
    most: int,
) -> tuple[PictureMistakes, ...]:
    """The pictures with the most mistakes, those with any; `numbers` are what pictures 0, 1, ... are called."""
    mistakes = np.bincount(detections.picture[split.kind >= 0], minlength=len(numbers))
    mistakes += np.bincount(objects.picture[split.missed], minlength=len(numbers))
    order = np.argsort(-mistakes, kind="stable")[:most]
    kept = detections.score >= (np.inf if threshold is None else threshold)
    names = (*KINDS, "")  # the last one is that of -1
    worst = []
    for picture in order[mistakes[order] > 0]:
        found = np.flatnonzero(kept & (detections.picture == picture))
        found = found[np.argsort(-detections.score[found], kind="stable")]
        truth = np.flatnonzero((objects.picture == picture) & ~objects.crowd)
        worst.append(
            PictureMistakes(
                index=int(numbers[picture]),
                boxes=detections.box[found],
                labels=detections.label[found],
                scores=detections.score[found],
                kinds=tuple(names[kind] for kind in split.kind[found]),
                truth_boxes=objects.box[truth],
                truth_labels=objects.label[truth],
                missed=split.missed[truth],
            )
        )
    return tuple(worst)


def _largest(overlaps: Overlaps, which: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU (N,) of each detection among the pairs `which` (E,), and the object; 0 and -1 without a pair."""
    chosen = np.flatnonzero(which)
    chosen = chosen[np.argsort(overlaps.iou[chosen], kind="stable")]
    iou, object_ = np.zeros(count), np.full(count, -1)
    iou[overlaps.detection[chosen]] = overlaps.iou[chosen]  # of several, the last one stays
    object_[overlaps.detection[chosen]] = overlaps.object[chosen]
    return iou, object_


def ap50_gains(
    detections: Detections, objects: Objects, matching: Matching, split: Split, totals: np.ndarray
) -> list[float]:
    """What AP50 gains where the errors of one kind are put right and all others stay, in the order of KINDS.

    A wrong class or box is made right; where its object was found anyway, or by a surer one of them, it is left out, as
    every other false positive is. Objects that were missed are no longer asked for. `totals` (K,) are those asked for.
    """
    label, right = detections.label, matching.right[:, 0, 0]
    ignored = matching.ignored[:, 0, 0]
    before = _ap50(label, detections.score, right, ~right & ~ignored, totals)
    found = np.zeros(len(objects.label), bool)
    found[matching.object[matching.object >= 0]] = True

    gains = []
    for kind in range(5):
        mended, new_label = right.copy(), label
        if kind in (CLASS, BOX):
            candidates = np.flatnonzero(split.kind == kind)
            candidates = candidates[~found[split.target[candidates]]]
            candidates = candidates[np.argsort(-detections.score[candidates], kind="stable")]
            _, first = np.unique(split.target[candidates], return_index=True)
            surest = candidates[first]
            mended[surest] = True
            new_label = label.copy()
            new_label[surest] = objects.label[split.target[surest]]
        wrong = ~mended & ~ignored & (split.kind != kind)
        gains.append(_ap50(new_label, detections.score, mended, wrong, totals) - before)
    missed = np.bincount(objects.label[split.missed], minlength=len(totals))
    gains.append(_ap50(label, detections.score, right, ~right & ~ignored, totals - missed) - before)
    return gains


def _ap50(label: np.ndarray, score: np.ndarray, right: np.ndarray, wrong: np.ndarray, totals: np.ndarray) -> float:
    """Mean over the classes with an object; 0 where there is none."""
    counted = right | wrong
    label, score, right, wrong = (column[counted] for column in (label, score, right, wrong))
    order = np.lexsort((-score, label))
    starts = np.searchsorted(label[order], np.arange(len(totals) + 1))
    values = [
        precision_at_recalls(right[here, None], wrong[here, None], totals[k]).mean()
        for k in np.flatnonzero(totals)
        for here in [order[starts[k] : starts[k + 1]]]
    ]
    return float(np.mean(values)) if values else 0.0


def best_threshold(score: np.ndarray, right: np.ndarray, total: int) -> Threshold:
    """Of detections (n,) that are right or wrong, and `total` objects.

    The threshold is half-way to the next lower score, so that a difference in rounding drops nothing; of equally good
    ones it is the highest.
    """
    if not right.any():
        return Threshold(None, 0.0, 0.0, 0.0)
    order = np.argsort(-score, kind="stable")
    score, hits = score[order], np.cumsum(right[order])
    last = np.flatnonzero(
        np.diff(score, append=-np.inf)
    )  # of each run of equal scores: they are kept or dropped together
    f1 = 2 * hits[last] / (last + 1 + total)
    best = last[np.argmax(f1)]
    threshold = score[best]
    if best + 1 < len(score):
        middle = (score[best] + score[best + 1]) / 2
        threshold = middle if middle > score[best + 1] else threshold
    return Threshold(float(threshold), float(f1.max()), float(hits[best] / (best + 1)), float(hits[best] / total))


def at_threshold(score: np.ndarray, right: np.ndarray, total: int, threshold: float) -> Threshold:
    """What keeping all that scores `threshold` or more makes of detections (n,), of which some are right."""
    kept = int((score >= threshold).sum())
    hits = int(right[score >= threshold].sum())
    f1 = 2 * hits / (kept + total) if kept + total else 0.0
    return Threshold(threshold, f1, hits / kept if kept else 0.0, hits / total if total else 0.0)


def sweep(score: np.ndarray, right: np.ndarray, total: int, thresholds: np.ndarray) -> np.ndarray:
    """Precision, recall and F1 (3, S) of keeping what scores `thresholds` (S,) or more; NaN where nothing is."""
    order = np.argsort(-score, kind="stable")
    hits = np.concatenate([[0], np.cumsum(right[order])])
    kept = np.searchsorted(-score[order], -thresholds, "right")
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(kept > 0, hits[kept] / kept, np.nan)
        return np.stack([precision, hits[kept] / total, 2 * hits[kept] / (kept + total)])
