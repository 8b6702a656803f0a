"""Which detection has found which object, by the rules of COCO (Lin et al. 2014), and precision and recall from that.

Written here and not taken from faster-coco-eval (releases since 2023, wheels for all systems) or pycocotools: the error
split, the best threshold and the curves need to know of each detection what it found, and must come from the same
evaluation as AP. The first keeps that in an object of C++ that Python cannot read, the second is slow, and both want a
dictionary per box. Tests hold the figures equal to those of pycocotools; benchmarks/detection_metric.py compares speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (T,)
RECALLS = np.linspace(0, 1, 101)  # (R,)
# square pixels, both ends included
AREAS = {"all": (0, np.inf), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # A
LIMITS = (1, 10, 100)  # (L,) detections that count, of one class in one picture
LEAST_OVERLAP = 0.1  # below it, a detection has nothing to do with an object (Bolya et al. 2020)


@dataclass(frozen=True, eq=False)
class Detections:
    """Of all pictures, in order of class, then of falling score; of equals, the first picture's and the first there."""

    picture: np.ndarray  # (N,) int, from 0
    label: np.ndarray  # (N,) int
    score: np.ndarray  # (N,) float
    box: np.ndarray  # (N, 4) left, top, right, bottom
    rank: np.ndarray  # (N,) int, among those of its class in its picture

    @staticmethod
    def of(picture: np.ndarray, label: np.ndarray, score: np.ndarray, box: np.ndarray) -> Detections:
        """Given in the order of pictures; what is beyond the largest limit is left out."""
        order = np.lexsort((-score, label))  # stable
        rank = rank_within(label[order] * (picture.max(initial=0) + 1) + picture[order])
        inside = rank < LIMITS[-1]
        order = order[inside]
        return Detections(picture[order], label[order], score[order], box[order], rank[inside])


@dataclass(frozen=True, eq=False)
class Objects:
    """What was to be found, in the order of pictures."""

    picture: np.ndarray  # (M,) int, from 0
    label: np.ndarray  # (M,) int
    box: np.ndarray  # (M, 4) left, top, right, bottom
    crowd: np.ndarray  # (M,) bool: many objects in one box. Finding them is neither right nor wrong.
    area: np.ndarray  # (M,) of the object, which may be less than that of its box


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Pairs of a detection and an object in one picture, of any classes, that overlap by LEAST_OVERLAP or more."""

    detection: np.ndarray  # (E,) int
    object: np.ndarray  # (E,) int
    iou: np.ndarray  # (E,)


@dataclass(frozen=True, eq=False)
class Matching:
    """Per detection, range of areas and IoU threshold. What is neither right nor ignored is a false positive."""

    right: np.ndarray  # (N, A, T) bool
    ignored: np.ndarray  # (N, A, T) bool
    object: np.ndarray  # (N,) int: that the detection found at IoU 0.5, of any size; -1 for none


def rank_within(groups: np.ndarray) -> np.ndarray:
    """How many equal values stand before each one."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered, "left")
    return rank


def box_area(box: np.ndarray) -> np.ndarray:
    """(..., 4) -> (...); 0 where right is not right of left."""
    return np.maximum(box[..., 2] - box[..., 0], 0) * np.maximum(box[..., 3] - box[..., 1], 0)


def box_iou(box: np.ndarray, other: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4); with a crowd, over the first box's own area."""
    area = box_area(box)[:, None]
    first, last = np.maximum(box[:, None, :2], other[:, :2]), np.minimum(box[:, None, 2:], other[:, 2:])
    both = box_area(np.concatenate([first, last], axis=-1))
    union = np.where(crowd, area, area + box_area(other) - both)
    return both / np.maximum(union, np.finfo(np.float64).tiny)


def find_overlaps(detections: Detections, objects: Objects) -> Overlaps:
    pictures = 1 + max(detections.picture.max(initial=-1), objects.picture.max(initial=-1))
    order = np.argsort(detections.picture, kind="stable")
    starts = np.searchsorted(detections.picture[order], np.arange(pictures + 1))
    object_starts = np.searchsorted(objects.picture, np.arange(pictures + 1))
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    # Picture by picture: all pairs of a large data set at once would need gigabytes, and most do not overlap.
    for picture in np.flatnonzero((np.diff(starts) > 0) & (np.diff(object_starts) > 0)):
        here = order[starts[picture] : starts[picture + 1]]
        first, last = object_starts[picture], object_starts[picture + 1]
        iou = box_iou(detections.box[here], objects.box[first:last], objects.crowd[first:last])
        i, j = np.nonzero(iou >= LEAST_OVERLAP)
        found.append((here[i], first + j, iou[i, j]))
    detection, object_, iou = (np.concatenate(column) for column in zip(*found, strict=True))
    return Overlaps(detection, object_, iou)


def match(detections: Detections, objects: Objects, overlaps: Overlaps) -> Matching:
    """Greedily, by falling score: each takes, of the objects of its class that are free, the one that it overlaps most.

    One that does not count (a crowd, or of another size than asked for) is taken only where none that counts can be;
    a crowd is never used up. Of equal overlaps the last object is taken, as pycocotools does. Pictures and classes do
    not touch each other, so the best detections of all of them are matched at once, then all second ones, and so on.
    A detection that found nothing counts as wrong only where it is of the size asked for.
    """
    lower, upper = np.array(list(AREAS.values())).T  # (A,)
    N, A, T = len(detections.label), len(AREAS), len(IOU_THRESHOLDS)
    right, ignored = np.zeros((N, A, T), bool), np.zeros((N, A, T), bool)
    found = np.full(N, -1)

    same = detections.label[overlaps.detection] == objects.label[overlaps.object]
    chosen = np.flatnonzero(same & (overlaps.iou >= IOU_THRESHOLDS[0]))
    matched = np.zeros(N, bool)  # overlaps with anything at all
    matched[overlaps.detection[chosen]] = True
    candidates = np.flatnonzero(matched)
    turn = np.zeros(N, np.int64)
    key = detections.label[candidates] * (detections.picture.max(initial=0) + 1) + detections.picture[candidates]
    turn[candidates] = rank_within(key)

    pair_order = np.lexsort((overlaps.detection[chosen], turn[overlaps.detection[chosen]]))
    chosen = chosen[pair_order]
    detection, object_, iou = overlaps.detection[chosen], overlaps.object[chosen], overlaps.iou[chosen]
    E = len(chosen)
    preference = np.empty(E, np.int64)  # names the pair, too
    by_preference = np.lexsort((object_, iou))
    preference[by_preference] = np.arange(E)
    aside = objects.crowd[:, None] | (objects.area[:, None] < lower) | (objects.area[:, None] > upper)  # (M, A)
    taken = np.zeros((len(objects.label), A, T), bool)
    turns = np.searchsorted(turn[detection], np.arange(turn.max(initial=-1) + 2))
    for start, stop in zip(turns[:-1], turns[1:], strict=True):
        if start == stop:
            continue
        o = object_[start:stop]
        able = ~taken[o] & (iou[start:stop, None, None] >= IOU_THRESHOLDS)  # (e, A, T)
        first_choice = np.where(aside[o], 0, E)  # (e, A)
        score = preference[start:stop, None] + first_choice
        score = np.where(able, score[:, :, None], -1)
        first = np.flatnonzero(np.diff(detection[start:stop], prepend=-1))
        best = np.maximum.reduceat(score, first, axis=0)  # (d, A, T)
        d = detection[start:stop][first]
        right[d], ignored[d] = best >= E, (best >= 0) & (best < E)
        winner = object_[by_preference[best % E]]  # (d, A, T)
        found[d] = np.where(best[:, 0, 0] >= E, winner[:, 0, 0], -1)
        hit, a, t = np.nonzero(best >= 0)
        o = winner[hit, a, t]
        taken[o, a, t] = ~objects.crowd[o]

    area = box_area(detections.box)
    other_size = (area[:, None] < lower) | (area[:, None] > upper)  # (N, A)
    ignored |= ~right & other_size[:, :, None]
    return Matching(right, ignored, found)


def count_objects(objects: Objects, classes: int) -> np.ndarray:
    """(K, A): how many objects of each class and size are to be found."""
    counts = np.zeros((classes, len(AREAS)), np.int64)
    for a, (lower, upper) in enumerate(AREAS.values()):
        inside = ~objects.crowd & (objects.area >= lower) & (objects.area <= upper)
        counts[:, a] = np.bincount(objects.label[inside], minlength=classes)
    return counts


def precision_at_recalls(right: np.ndarray, wrong: np.ndarray, total: int) -> np.ndarray:
    """(n, T), in order of falling score, -> (T, R): the best precision at each recall or beyond; 0 where none is."""
    hits = np.cumsum(right, axis=0, dtype=np.float64)
    precision = hits / np.maximum(hits + np.cumsum(wrong, axis=0), 1)  # 0 while all were ignored
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    padded = np.concatenate([precision, np.zeros((1, right.shape[1]))])
    recall = hits / total
    places = [np.searchsorted(recall[:, t], RECALLS) for t in range(right.shape[1])]
    return np.stack([padded[place, t] for t, place in enumerate(places)])


def precision_and_recall(
    detections: Detections, matching: Matching, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision (K, A, T, R) with the largest limit, final recall (K, A, T, L); NaN where there is no object."""
    K, A = totals.shape
    precision = np.full((K, A, len(IOU_THRESHOLDS), len(RECALLS)), np.nan)
    recall = np.full((K, A, len(IOU_THRESHOLDS), len(LIMITS)), np.nan)
    starts = np.searchsorted(detections.label, np.arange(K + 1))
    for k, a in np.argwhere(totals).tolist():
        here = slice(starts[k], starts[k + 1])
        right = matching.right[here, a]  # (n, T)
        precision[k, a] = precision_at_recalls(right, ~(right | matching.ignored[here, a]), int(totals[k, a]))
        for i, limit in enumerate(LIMITS):
            recall[k, a, :, i] = right[detections.rank[here] < limit].sum(axis=0) / totals[k, a]
    return precision, recall
