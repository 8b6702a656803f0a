"""What `saccade inspect` says of objects in pictures: how many, how large, and what is worth a hint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saccade.data.source import BoxSource
from saccade.words import counted

# COCO's three sizes (https://cocodataset.org/#detection-eval): areas in pixels of the picture as it is
SMALL, LARGE = 32**2, 96**2
FEW = 50  # objects of a class to learn from, below which it is worth a hint
UNBALANCED = 10  # the largest class over the smallest, from which it is worth a hint
USUAL_SIDE = 640  # pixels of the longer side that a detector sees
TINY = 8  # pixels of an object's side there, below which it is hard to find
MANY_TINY = 0.25  # share of objects
MANY_EMPTY = 0.5  # share of pictures


@dataclass(frozen=True)
class BoxReport:
    """Objects of one split; what is only to be ignored is counted apart."""

    objects: int
    crowds: int
    per_picture: tuple[int, int, int]  # min, median, max
    empty_pictures: int
    areas: dict[str, int]  # objects by COCO's small, medium, large


def box_report(source: BoxSource) -> BoxReport:
    things = ~source.crowd
    counts = np.bincount(source.pictures()[things], minlength=len(source))
    middle = (int(counts.min()), round(float(np.median(counts))), int(counts.max())) if len(counts) else (0, 0, 0)
    bins = np.bincount(np.digitize(source.area[things], (SMALL, LARGE)), minlength=3).tolist()
    return BoxReport(
        objects=int(things.sum()),
        crowds=int(source.crowd.sum()),
        per_picture=middle,
        empty_pictures=int((counts == 0).sum()),
        areas=dict(zip(("small", "medium", "large"), bins, strict=True)),
    )


def box_rows(reports: list[BoxReport | None], pictures: list[int]) -> list[tuple[str, list[str]]]:
    """Rows of the printed table, a column for each split."""
    names = ("small", "medium", "large")
    ranges = {"small": "under 32² px", "medium": "to 96² px", "large": "over 96² px"}
    rows = [("objects (min, median, max)", [", ".join(map(str, r.per_picture)) if r else "-" for r in reports])]
    if any(report and report.crowds for report in reports):
        rows.append(("regions to ignore", [str(r.crowds) if r else "-" for r in reports]))
    without = [share(r.empty_pictures, count) if r else "-" for r, count in zip(reports, pictures, strict=True)]
    rows.append(("pictures without objects", without))
    rows += [
        (f"{name} ({ranges[name]})", [share(r.areas[name], r.objects) if r else "-" for r in reports]) for name in names
    ]
    return rows


def share(count: int, of: int) -> str:
    return f"{count / of:.0%}" if of else "-"


def box_hints(source: BoxSource, sizes: np.ndarray) -> list[str]:
    """Of the split to learn from, with its pictures' sizes (N, 2), 0 where one cannot be read."""
    things = ~source.crowd
    if not things.any():
        return []
    hints = []
    counts = np.bincount(source.labels[things], minlength=len(source.class_names))
    there = np.flatnonzero(counts)
    most, least = there[counts[there].argmax()], there[counts[there].argmin()]
    if counts[most] > UNBALANCED * counts[least]:
        hints.append(
            f"very unequal classes: {counted(int(counts[most]), 'object')} of {source.class_names[most]}, "
            f"{counts[least]} of {source.class_names[least]}; look at the AP of each class"
        )
    few = [name for name, count in zip(source.class_names, counts, strict=True) if 0 < count < FEW]
    if few:
        hints.append(
            f"fewer than {FEW} objects to learn from: {', '.join(few)}; annotate more, or start from trained weights"
        )
    none = [name for name, count in zip(source.class_names, counts, strict=True) if not count]
    if none:
        hints.append(f"no objects to learn from: {', '.join(none)}; these classes will never be found")
    longer = sizes.max(axis=1)[source.pictures()]
    known = things & (longer > 0)
    side = np.sqrt(source.area[known]) * USUAL_SIDE / longer[known]
    if known.any() and (tiny := float((side < TINY).mean())) > MANY_TINY:
        hints.append(
            f"{tiny:.0%} of the objects are under {TINY} pixels where a picture's longer side has {USUAL_SIDE}; "
            "train with a larger --image-size, or cut the pictures into tiles"
        )
    empty = 1 - len(np.unique(source.pictures()[things])) / len(source)
    if empty > MANY_EMPTY:
        hints.append(f"{empty:.0%} of the pictures have no objects; they are learnt as empty, so be sure that they are")
    return hints
