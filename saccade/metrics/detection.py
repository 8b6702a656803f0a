"""How good a detector is: average precision as COCO counts it, the best threshold, and the kinds of its mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.metrics.detection_errors import (
    CLASS,
    KINDS,
    ClassConfusion,
    ErrorKind,
    Split,
    Threshold,
    ap50_gains,
    at_threshold,
    best_threshold,
    split_errors,
    sweep,
    worst_pictures,
)
from saccade.metrics.detection_matching import (
    AREAS,
    IOU_THRESHOLDS,
    Detections,
    Objects,
    box_area,
    count_objects,
    find_overlaps,
    match,
    precision_and_recall,
)
from saccade.metrics.detection_report import SWEEP, DetectionReport, DetectionScores

WORST = 12  # pictures that a report names
AT_75 = int(np.argmin(np.abs(IOU_THRESHOLDS - 0.75)))


class DetectionMetric:
    """Collects the boxes of picture after picture; what comes out does not depend on their order.

    As with pycocotools, the 100 surest detections of each class count in a picture. `threshold` is the model's own, at
    which F1 and mistakes are counted; without one, where F1 is best on these pictures.
    """

    def __init__(self, class_names: Sequence[str], threshold: float | None = None) -> None:
        self.class_names = tuple(class_names)
        self.threshold = threshold
        # by the picture's number: (n, 6) box, score, label; (m, 7) box, label, crowd, area
        self._pictures: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def update(
        self,
        index: int,
        prediction_boxes: Any,
        scores: Any,
        labels: Any,
        truth_boxes: Any,
        truth_labels: Any,
        truth_crowd: Any,
        truth_area: Any = None,
    ) -> None:
        """Add a picture, `index` being its number in the source; tensors or arrays, boxes as left, top, right, bottom.

        prediction_boxes (n, 4) px, scores (n,), labels (n,); truth_boxes (m, 4) px, truth_labels (m,), truth_crowd
        (m,) bool, truth_area (m,) of the objects themselves where it is known, else of their boxes.
        """
        boxes, scores, labels = _array(prediction_boxes).reshape(-1, 4), _array(scores), _array(labels)
        truth_boxes, truth_labels = _array(truth_boxes).reshape(-1, 4), _array(truth_labels)
        crowd = _array(truth_crowd)
        area = box_area(truth_boxes) if truth_area is None else _array(truth_area)
        assert index not in self._pictures, f"picture {index} was evaluated twice"
        assert len(boxes) == len(scores) == len(labels), f"{boxes.shape}, {scores.shape}, {labels.shape}"
        assert len(truth_boxes) == len(truth_labels) == len(crowd) == len(area), f"truth of picture {index}"
        K = len(self.class_names)
        assert ((labels >= 0) & (labels < K)).all(), f"predicted labels of picture {index} are not of {K} classes"
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserError("the model's boxes or scores are not finite: its weights are damaged or training diverged")
        wrong = sorted({int(label) for label in truth_labels if not 0 <= label < K})
        if wrong:
            raise UserError(f"labels {wrong[:5]} do not belong to the {K} classes: do data and model belong together?")
        self._pictures[int(index)] = (
            np.column_stack([boxes, scores, labels]),
            np.column_stack([truth_boxes, truth_labels, crowd, area]),
        )

    def state(self) -> dict[str, Tensor]:
        """All that was collected, for another process's `merge`: pictures (P, 3) of number, detections, objects."""
        counts = [(index, len(found), len(truth)) for index, (found, truth) in self._pictures.items()]
        found = [np.zeros((0, 6)), *(found for found, _ in self._pictures.values())]
        truth = [np.zeros((0, 7)), *(truth for _, truth in self._pictures.values())]
        return {
            "pictures": torch.tensor(counts, dtype=torch.int64).reshape(-1, 3),
            "detections": torch.from_numpy(np.concatenate(found)),
            "objects": torch.from_numpy(np.concatenate(truth)),
        }

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what another process collected on other pictures."""
        indices, *counts = state["pictures"].cpu().numpy().T
        found, truth = (
            np.split(state[name].cpu().numpy(), np.cumsum(count))[:-1]  # the last part is what no picture has
            for name, count in zip(("detections", "objects"), counts, strict=True)
        )
        for index, *boxes in zip(indices.tolist(), found, truth, strict=True):
            assert index not in self._pictures, f"picture {index} was evaluated twice"
            self._pictures[index] = (boxes[0], boxes[1])

    def compute(self) -> DetectionReport:
        """UserError where no picture was seen."""
        if not self._pictures:
            raise UserError("there is nothing to evaluate: no picture was read")
        detections, objects = self._arranged()
        overlaps = find_overlaps(detections, objects)
        matching = match(detections, objects, overlaps)
        totals = count_objects(objects, len(self.class_names))
        precision, recall = precision_and_recall(detections, matching, totals)
        right, counted = matching.right[:, 0, 0], ~matching.ignored[:, 0, 0]
        total = int(totals[:, 0].sum())
        used, best = self._thresholds(detections.score[counted], right[counted], total)
        shown = split_errors(detections, objects, overlaps, matching, used.threshold)
        every = split_errors(detections, objects, overlaps, matching, -np.inf)

        of_size = {size: a for a, size in enumerate(AREAS)}
        ap = {size: _mean(precision[:, a]) for size, a in of_size.items()}
        return DetectionReport(
            pictures=len(self._pictures),
            objects=total,
            crowds=int(objects.crowd.sum()),
            detections=int(counted.sum()),
            ap=ap["all"],
            ap50=_mean(precision[:, 0, 0]),
            ap75=_mean(precision[:, 0, AT_75]),
            ap_small=ap["small"],
            ap_medium=ap["medium"],
            ap_large=ap["large"],
            ar1=_mean(recall[:, 0, :, 0]),
            ar10=_mean(recall[:, 0, :, 1]),
            ar100=_mean(recall[:, 0, :, 2]),
            ar_small=_mean(recall[:, of_size["small"], :, -1]),
            ar_medium=_mean(recall[:, of_size["medium"], :, -1]),
            ar_large=_mean(recall[:, of_size["large"], :, -1]),
            threshold=used.threshold,
            f1=used.f1,
            precision=used.precision,
            recall=used.recall,
            best_threshold=best.threshold,
            best_f1=best.f1,
            known=self.threshold is not None,
            classes=self._classes(detections, right, counted, precision, totals[:, 0]),
            errors=_errors(shown, every, ap50_gains(detections, objects, matching, every, totals[:, 0])),
            confusions=self._confusions(detections, objects, shown),
            curves=np.stack([precision[:, 0, 0], precision[:, 0].mean(axis=1)], axis=1),
            sweep=sweep(detections.score[counted], right[counted], total, SWEEP),
            worst=worst_pictures(detections, objects, shown, used.threshold, sorted(self._pictures), WORST),
        )

    def _thresholds(self, score: np.ndarray, right: np.ndarray, total: int) -> tuple[Threshold, Threshold]:
        """The one that is used, which is the model's own where that is known, and the best one on these pictures."""
        best = best_threshold(score, right, total)
        return best if self.threshold is None else at_threshold(score, right, total, self.threshold), best

    def _arranged(self) -> tuple[Detections, Objects]:
        """In the order of the pictures' numbers, whatever order they came in."""
        pictures = [self._pictures[index] for index in sorted(self._pictures)]
        found, truth = (np.concatenate(tables) for tables in zip(*pictures, strict=True))
        places = np.arange(len(pictures))
        of_found, of_truth = (np.repeat(places, [len(pair[i]) for pair in pictures]) for i in (0, 1))
        detections = Detections.of(of_found, found[:, 5].astype(np.int64), found[:, 4], found[:, :4])
        label, crowd, area = truth[:, 4].astype(np.int64), truth[:, 5] != 0, truth[:, 6]
        return detections, Objects(of_truth, label, truth[:, :4], crowd, area)

    def _classes(
        self, detections: Detections, right: np.ndarray, counted: np.ndarray, precision: np.ndarray, totals: np.ndarray
    ) -> tuple[DetectionScores, ...]:
        starts = np.searchsorted(detections.label, np.arange(len(totals) + 1))
        rows = []
        for k, name in enumerate(self.class_names):
            here = np.arange(starts[k], starts[k + 1])
            here = here[counted[here]]
            used, best = self._thresholds(detections.score[here], right[here], int(totals[k]))
            rows.append(
                DetectionScores(
                    name=name,
                    ap=_mean(precision[k, 0]),
                    ap50=_mean(precision[k, 0, 0]),
                    ap75=_mean(precision[k, 0, AT_75]),
                    objects=int(totals[k]),
                    detections=len(here),
                    threshold=used.threshold,
                    f1=used.f1,
                    precision=used.precision,
                    recall=used.recall,
                    best_threshold=best.threshold,
                    best_f1=best.f1,
                )
            )
        return tuple(rows)

    def _confusions(self, detections: Detections, objects: Objects, split: Split) -> tuple[ClassConfusion, ...]:
        """The most frequent pair first, then in the order of the classes."""
        wrong = split.kind == CLASS
        pairs = np.stack([objects.label[split.target[wrong]], detections.label[wrong]], axis=1)
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        names = self.class_names
        return tuple(ClassConfusion(names[pairs[i, 0]], names[pairs[i, 1]], int(counts[i])) for i in order)


def _errors(shown: Split, every: Split, gains: Sequence[float]) -> tuple[ErrorKind, ...]:
    rows = zip(KINDS, gains, shown.counts(), every.counts(), strict=True)
    return tuple(ErrorKind(*row) for row in rows)


def _mean(values: np.ndarray) -> float | None:
    """Over what is known: classes without an object have no precision. None where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _array(values: Any) -> np.ndarray:
    """float64 of a tensor on any device, an array or a list."""
    # not on the device: float64 does not exist on all of them
    return torch.as_tensor(values).detach().cpu().double().numpy()
