"""From annotations as their files state them to a BoxSource: every box is checked, every fault said with its place.

A fault that a run can do without (a box without an area) is a Problem that does not refuse: `open_splits` says how
many of a kind there are. What can be understood in two ways, or leaves nothing to learn from, refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from saccade.data.decode import SWAPS_SIDES, PictureError, open_header, orientation, read_size
from saccade.data.source import BoxSource, Found, Problem, open_file
from saccade.data.sources.doubts import COCO_FORM, ROUNDING, as_corners, corners, overhang

LARGEST = 1e7  # pixels; beyond it a coordinate is no coordinate
FLAT = 0.1  # pixels; a box that is thinner has no area
LEAST = (0.5, 0.95)  # pixels of the shorter and the longer side; no picture shows a thing that is smaller
MOST = 1.5  # of an area by the box's own, to which an outline keeps but for rounding
ANY_SIZE = 1 << 40  # pixels of a picture whose header only is read

# What training does about each kind that it can do without: of one, and of several.
DROPPED = {
    "not_finite": ("box that is no number is left out", "boxes that are no numbers are left out"),
    "no_box": ("annotation without a box is left out", "annotations without a box are left out"),
    "bad_box": ("unreadable box is left out", "unreadable boxes are left out"),
    "bad_line": ("unreadable line is left out", "unreadable lines are left out"),
    "not_fractions": (
        "box in pixels where fractions belong is left out",
        "boxes in pixels where fractions belong are left out",
    ),
    "negative": ("box of negative size is left out", "boxes of negative size are left out"),
    "degenerate": ("box without an area is left out", "boxes without an area are left out"),
    "too_small": ("box of less than a pixel is left out", "boxes of less than a pixel are left out"),
    "outside": ("box outside its picture is left out", "boxes outside their pictures are left out"),
    "partly_outside": ("box that leaves its picture is clipped", "boxes that leave their pictures are clipped"),
    "duplicate_box": ("repeated box is left out", "repeated boxes are left out"),
    "unknown_category": ("object of an unknown class is left out", "objects of unknown classes are left out"),
    "no_name": ("object without a class is left out", "objects without a class are left out"),
    "unknown_image": ("annotation of no listed picture is left out", "annotations of no listed picture are left out"),
    "bad_annotation": ("unreadable annotation is left out", "unreadable annotations are left out"),
    "duplicate_annotation_id": (
        "annotation whose id another one has is kept",
        "annotations whose ids others have are kept",
    ),
    "no_id": ("annotation without an id is kept", "annotations without an id are kept"),
    "impossible_area": (
        "area that its box cannot have is replaced by that of the box",
        "areas that their boxes cannot have are replaced by those of the boxes",
    ),
    "bad_flag": (
        "object is learnt, though its mark to ignore it is neither yes nor no",
        "objects are learnt, though their marks to ignore them are neither yes nor no",
    ),
    "two_classes": ("box of two classes is kept as both", "boxes of two classes are kept as both"),
    "two_boxes": ("object with several boxes has the first of them", "objects with several boxes have their first"),
    "bad_area": ("wrong area is replaced by that of the box", "wrong areas are replaced by those of the boxes"),
    "crowd_only": (
        "picture with nothing but regions to ignore is kept",
        "pictures with nothing but regions to ignore are kept",
    ),
    "bad_image": ("unreadable entry of a picture is left out", "unreadable entries of pictures are left out"),
    "duplicate_image": ("picture that is listed twice is taken once", "pictures that are listed twice are taken once"),
    "missing_file": ("picture that does not exist is left out", "pictures that do not exist are left out"),
    "no_annotation": ("picture without annotations is left out", "pictures without annotations are left out"),
    "no_size": ("annotated picture states no size", "annotated pictures state no size"),
    "wrong_size": ("picture is not of the size that is stated", "pictures are not of the size that is stated"),
    "turned": ("picture's boxes are turned as its EXIF says", "pictures' boxes are turned as their EXIF says"),
    "duplicate_category": ("class that is listed twice is taken once", "classes that are listed twice are taken once"),
    "same_name": ("class of the same name as another is united with it", "classes of the same name are united"),
    "bad_xml": ("picture with an unreadable XML file is left out", "pictures with unreadable XML files are left out"),
    "unsafe_xml": ("picture with an unsafe XML file is left out", "pictures with unsafe XML files are left out"),
    "class_count": ("number of classes is not that of the names", "numbers of classes are not those of the names"),
    "bad_label_file": ("picture with an unreadable label file is left out", "pictures with unreadable label files are"
                       " left out"),
    "several_pictures": (
        "XML file with several pictures of its name is taken for that of the first",
        "XML files with several pictures of their names are taken for those of the first",
    ),
    "shared_labels": ("label file is that of two pictures", "label files are those of two pictures"),
    "missing_split": ("split is named that does not exist", "splits are named that do not exist"),
    "no_annotations": ("split without annotations is left out", "splits without annotations are left out"),
}  # fmt: skip


def drop_notes(problems: Iterable[Problem], where: str) -> list[str]:
    """One line for each kind that a run can do without: how many, what is done, and the first."""
    by_kind: dict[str, list[Problem]] = {}
    for problem in problems:
        if not problem.refuses:
            by_kind.setdefault(problem.kind, []).append(problem)
    notes = []
    for kind, same in by_kind.items():
        does = DROPPED[kind][len(same) > 1]
        example = f"such as {same[0].where}" if len(same) > 1 else same[0].where
        notes.append(f"{where}: {len(same)} {does}, {example}; `saccade inspect {where}` says more")
    return notes


@dataclass
class Annotations:
    """One split as its files state it: N pictures and M annotations of them, in the order of their files."""

    name: str
    path: Path
    class_names: tuple[str, ...]
    files: list[str]
    declared: np.ndarray  # int64 (N, 2): height, width; 0 where they are not stated
    picture: np.ndarray  # int64 (M,)
    boxes: np.ndarray  # float64 (M, 4): left, top, right, bottom
    labels: np.ndarray  # int64 (M,)
    crowd: np.ndarray  # bool (M,)
    ids: np.ndarray  # int64 (M,), see saccade.data.source.place
    annotated: tuple[str, ...]
    unit: str
    area: np.ndarray = field(default_factory=lambda: np.zeros(0))  # float64 (M,), NaN where unknown; or none at all
    numbers: tuple[int, ...] = ()


def build(stated: Annotations, found: Found) -> BoxSource:
    """The source of what is sound; the rest becomes problems of `found`."""
    order = np.argsort(stated.picture, kind="stable")
    picture, boxes = stated.picture[order], stated.boxes[order]
    with np.errstate(invalid="ignore", over="ignore"):
        finite: np.ndarray = np.all(np.abs(boxes) <= LARGEST, axis=1)  # false for NaN too
        side = np.subtract(boxes[:, 2:], boxes[:, :2], dtype=np.float32)
        whole = side.prod(axis=1)
        given = stated.area[order] if len(stated.area) else np.full(len(order), np.nan)
        sound = finite & np.all(np.sort(side, axis=1) >= LEAST, axis=1)
        impossible = sound & ((given == 0) | (given > MOST * (side + 1).prod(axis=1)))
        given = np.where(impossible, np.nan, given)
    source = BoxSource(
        name=stated.name,
        path=stated.path,
        class_names=stated.class_names,
        files=tuple(stated.files),
        starts=np.searchsorted(picture, np.arange(len(stated.files) + 1)).astype(np.int64),
        boxes=np.where(finite[:, None], boxes, 0).astype(np.float32),
        labels=stated.labels[order],
        crowd=stated.crowd[order],
        area=np.where(given > 0, given, np.where(finite, whole, 0)).astype(np.float32),
        ids=stated.ids[order],
        declared=stated.declared,
        annotated=stated.annotated,
        unit=stated.unit,
        numbers=stated.numbers,
    )

    def report(kind: str, which: np.ndarray, what: str) -> None:
        for k in np.flatnonzero(which).tolist():
            i, (left, top, right, bottom) = int(picture[k]), boxes[k].tolist()
            box = f"{right - left:g} x {bottom - top:g} pixels at ({left:g}, {top:g}) in {Path(source.files[i]).name}"
            said = f"{box}: {what}; draw it anew or remove it"
            root = f"{stated.path}, all boxes" if which.all() and len(which) > 1 else ""
            found.problems.append(Problem(kind, source.place(i, k), said, refuses=False, root=root))

    negative = finite & np.any(side < 0, axis=1)
    flat = finite & ~negative & np.any(side < FLAT, axis=1)
    report("not_finite", ~finite, "no numbers that a box can have")
    report("negative", negative, "a negative size")
    report("degenerate", flat, "no area")
    root = f"{stated.path}, all areas" if impossible.sum() == sound.sum() > 1 else ""
    for k in np.flatnonzero(impossible).tolist():
        what = (
            f"its area is {stated.area[order[k]]:g}, its box {side[k, 0]:g} x {side[k, 1]:g} pixels; "
            "the box's is taken, correct it"
        )
        place = source.place(int(picture[k]), k)
        found.problems.append(Problem("impossible_area", place, what, refuses=False, root=root))
    source = _visible(source.keep(finite & ~negative & ~flat), found.problems)
    source = _within(source, _trusted_sizes(source), found.problems)
    source = _without_repeats(source, found.problems)
    _two_classes(source, found.problems)
    _crowds(source, found.problems)
    return source


def _visible(source: BoxSource, problems: list[Problem], chosen: Collection[int] | None = None) -> BoxSource:
    """Drops boxes of less than a pixel; of the `chosen` pictures alone, where some are."""
    pictures = source.pictures()
    side = np.sort(source.boxes[:, 2:] - source.boxes[:, :2], axis=1)
    small: np.ndarray = np.any(side < LEAST, axis=1)
    if chosen is not None:
        small = small & np.isin(pictures, list(chosen))
    root = f"{source.path}, all boxes" if small.all() and len(small) > 1 else ""
    for k in np.flatnonzero(small).tolist():
        i = int(pictures[k])
        what = (
            f"the box {_written(source.boxes[k])} is less than a pixel of {Path(source.files[i]).name}; "
            "correct it, as it may be in fractions, or remove it"
        )
        problems.append(Problem("too_small", source.place(i, k), what, refuses=False, root=root))
    return source.keep(~small) if small.any() else source


def _trusted_sizes(source: BoxSource) -> np.ndarray:
    """The declared sizes, but 0 for a picture of another size whose boxes leave what is declared: `fit` sees to it."""
    sizes = source.declared.copy()
    pictures = source.pictures()
    leaves = overhang(source.boxes, sizes[pictures]) > ROUNDING
    doubted = np.unique(pictures[leaves & (sizes[pictures].min(axis=1) > 0)])
    true = picture_sizes([source.files[i] for i in doubted])
    wrong = (true.min(axis=1) > 0) & (true != sizes[doubted]).any(axis=1)
    sizes[doubted[wrong]] = 0
    return sizes


def picture_sizes(files: Sequence[str], threads: int = 4) -> np.ndarray:
    """Height and width of the upright pictures, int64 (N, 2), by their headers; 0 where one cannot be read."""

    def size(name: str) -> tuple[int, int]:
        try:
            with open_file(name) as file:
                return read_size(file, name, ANY_SIZE)
        except PictureError:
            return 0, 0

    with ThreadPoolExecutor(threads) as pool:
        return np.array(list(pool.map(size, files)), dtype=np.int64).reshape(-1, 2)


def _within(
    source: BoxSource, sizes: np.ndarray, problems: list[Problem], roots: Mapping[int, str] | None = None
) -> BoxSource:
    """Clips boxes to the sizes (N, 2) of their pictures where those are known, and drops what is left outside."""
    pictures = source.pictures()
    limits = sizes[pictures]
    known = limits.min(axis=1) > 0
    over = np.where(known, overhang(source.boxes, limits), 0)
    touched = over > 0
    if not touched.any():
        return source
    right, bottom = limits[:, 1], limits[:, 0]
    clipped = source.boxes.copy()
    high = np.stack([right, bottom, right, bottom], axis=1)
    clipped[touched] = np.clip(source.boxes[touched], 0, high[touched])
    side, before = clipped[:, 2:] - clipped[:, :2], source.boxes[:, 2:] - source.boxes[:, :2]
    # A thing of which less than a pixel is in the picture cannot be seen there.
    outside = touched & (side < np.minimum(before / 2, ROUNDING)).any(axis=1)
    partly = touched & ~outside & (over > ROUNDING)
    for kind, which in (("outside", outside), ("partly_outside", partly)):
        for k in np.flatnonzero(which).tolist():
            i = int(pictures[k])
            h, w = sizes[i].tolist()
            does, by = ("lies outside", "") if kind == "outside" else ("leaves", f" by {over[k]:g} pixels")
            picture = f"{Path(source.files[i]).name} of {w} x {h}"
            what = f"the box {_written(source.boxes[k])} {does} {picture}{by}; correct it"
            problems.append(Problem(kind, source.place(i, k), what, refuses=False, root=(roots or {}).get(i, "")))
    share = np.divide(side.prod(axis=1), before.prod(axis=1), out=np.ones(len(side), np.float32), where=touched)
    source = replace(source, boxes=clipped, area=(source.area * share).astype(np.float32))
    return source.keep(~outside)


def _written(box: np.ndarray) -> str:
    left, top, right, bottom = box.tolist()
    return f"from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"


def _without_repeats(source: BoxSource, problems: list[Problem]) -> BoxSource:
    """Drops a box that its picture has already, with the same class."""
    if len(source.boxes) < 2:
        return source
    pictures = source.pictures()
    order = np.lexsort((*source.boxes.T, source.crowd, source.labels, pictures))  # stable: the first one stays
    columns = (*source.boxes.T, source.crowd, source.labels, pictures)
    same = np.logical_and.reduce([column[order[1:]] == column[order[:-1]] for column in columns])
    repeats = np.zeros(len(order), np.bool_)
    repeats[order[1:][same]] = True
    for k in np.flatnonzero(repeats).tolist():
        i = int(pictures[k])
        what = (
            f"the same {source.class_names[source.labels[k]]} {_written(source.boxes[k])} is in "
            f"{Path(source.files[i]).name} already; remove it"
        )
        problems.append(Problem("duplicate_box", source.place(i, k), what, refuses=False))
    return source.keep(~repeats) if repeats.any() else source


def _two_classes(source: BoxSource, problems: list[Problem]) -> None:
    """Boxes that their pictures have already, with another class; both are kept."""
    pictures = source.pictures()
    things = np.flatnonzero(~source.crowd)
    columns = (*source.boxes[things].T, pictures[things])
    order = np.lexsort(columns)
    same = np.logical_and.reduce([column[order[1:]] == column[order[:-1]] for column in columns])
    for k, other in zip(things[order[1:][same]].tolist(), things[order[:-1][same]].tolist(), strict=True):
        i = int(pictures[k])
        what = (
            f"the {source.class_names[source.labels[k]]} {_written(source.boxes[k])} in {Path(source.files[i]).name} "
            f"is a {source.class_names[source.labels[other]]}, too; keep the right one"
        )
        problems.append(Problem("two_classes", source.place(i, k), what, refuses=False))


def _crowds(source: BoxSource, problems: list[Problem]) -> None:
    objects = np.bincount(source.pictures()[~source.crowd], minlength=len(source))
    for i in np.flatnonzero((np.diff(source.starts) > 0) & (objects == 0)).tolist():
        what = f"{Path(source.files[i]).name} has nothing but regions to ignore (crowds); it is learnt as empty"
        problems.append(Problem("crowd_only", source.place(i, int(source.starts[i])), what, refuses=False))


def picture_place(file: str, annotated: Sequence[str], i: int) -> str:
    """Where picture `i` is annotated: its own file, or the one of all pictures and its name."""
    return annotated[i] if len(annotated) > 1 else ", ".join([*annotated, Path(file).name])


def missing_sizes(files: Sequence[str], declared: np.ndarray, annotated: Sequence[str]) -> list[Problem]:
    """A problem for each picture without a stated size; one for all, where no picture of one file has any."""
    without = np.flatnonzero(declared.min(axis=1) <= 0).tolist()
    remedy = "the picture's own is taken; state width and height, by which a changed picture is noticed"
    if len(annotated) == 1 and len(without) == len(files) > 1:
        return [Problem("no_size", annotated[0], f"no sizes of any picture; {remedy}", refuses=False)]
    root = f"{files[0]} and others: no sizes" if len(without) == len(files) > 1 else ""
    return [
        Problem(
            "no_size", picture_place(files[i], annotated, i), f"no size of the picture; {remedy}", False, root
        )
        for i in without
    ]


def fit(source: BoxSource, sizes: np.ndarray) -> tuple[BoxSource, list[Problem]]:
    """Boxes that fit the pictures as they are, of upright `sizes` int64 (N, 2) with (0, 0) where one cannot be read.

    Where the annotations state another size, the picture's own counts, and its boxes are

    - turned, where they are those of the picture as it is stored, which EXIF turns;
    - scaled, where only the size has changed, and of the stated and the true size the stated one is the smallest that
      holds all such boxes of the split: then the picture has been resized after it was annotated;
    - else taken as they are, and clipped.
    """
    problems: list[Problem] = []
    declared = source.declared if len(source.declared) else np.zeros_like(sizes)
    known = sizes.min(axis=1) > 0
    differs = known & (declared.min(axis=1) > 0) & (declared != sizes).any(axis=1)
    boxes, area, pictures = source.boxes.copy(), source.area.copy(), source.pictures()
    done = {}  # picture -> what is done with its boxes
    for i in np.flatnonzero(differs & (declared[:, ::-1] == sizes).all(axis=1)).tolist():
        turn = _orientation(source.files[i])
        if turn in SWAPS_SIDES:
            part = slice(int(source.starts[i]), int(source.starts[i + 1]))
            boxes[part] = upright(source.boxes[part], declared[i], turn)
            done[i] = "turned"
    h, w = declared[:, 0], declared[:, 1]
    ratio = np.divide(sizes, declared, out=np.ones(sizes.shape), where=differs[:, None])  # (N, 2)
    slack = 1 / np.maximum(np.minimum(np.minimum(h, w), sizes.min(axis=1)), 1)
    resized = differs & (np.abs(ratio[:, 0] / np.where(ratio[:, 1] > 0, ratio[:, 1], 1) - 1) <= slack)
    resized[list(done)] = False
    for group in (resized & (ratio[:, 0] > 1), resized & (ratio[:, 0] < 1)):
        inside = group[pictures]
        if not inside.any():
            continue
        of_declared = bool((overhang(boxes[inside], declared[pictures[inside]]) <= ROUNDING).all())
        of_true = bool((overhang(boxes[inside], sizes[pictures[inside]]) <= ROUNDING).all())
        grown = bool(ratio[group][0, 0] > 1)
        if of_declared and (grown or not of_true):
            factors = ratio[pictures[inside]][:, ::-1]
            boxes[inside] *= np.concatenate([factors, factors], axis=1).astype(np.float32)
            area[inside] *= factors.prod(axis=1).astype(np.float32)
            done |= dict.fromkeys(np.flatnonzero(group).tolist(), "scaled")
    if source.unit == "annotation":  # COCO's, whose stated sizes, if any, could not show it
        told = np.where((known & ~np.isin(np.arange(len(source)), list(done)))[:, None], sizes, 0)[pictures]
        numbers = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        doubts = corners(numbers, boxes, told, str(source.path), COCO_FORM)
        if doubts:
            problems += doubts
            boxes = as_corners(numbers, boxes)
    roots: dict[int, str] = {}  # of what is wrong with the boxes of a picture
    for i in np.flatnonzero(differs).tolist():
        (stated_h, stated_w), (true_h, true_w) = declared[i].tolist(), sizes[i].tolist()
        where = picture_place(source.files[i], source.annotated, i)
        what = f"{Path(source.files[i]).name} is {true_w} x {true_h}, but {stated_w} x {stated_h} is stated"
        if done.get(i) == "turned":
            text = f"{what}: it is annotated as it is stored, and EXIF turns it; its boxes are turned with it"
            problems.append(Problem("turned", where, text, refuses=False))
            continue
        scaled = "its boxes are scaled to it" if i in done else "its boxes are taken as they are"
        roots[i] = f"{source.path}: {stated_w} x {stated_h} stated of {true_w} x {true_h}"
        problems.append(Problem("wrong_size", where, f"{what}; {scaled}; correct the size", False, roots[i]))
    source = replace(source, boxes=boxes, area=area, declared=np.where(known[:, None], sizes, declared))
    scaled = [i for i, what in done.items() if what == "scaled"]
    source = _visible(source, problems, scaled) if scaled else source
    return _within(source, np.where(known[:, None], sizes, 0), problems, roots), problems


def _orientation(file: str) -> int:
    try:
        with open_file(file) as opened, open_header(opened, file, ANY_SIZE) as header:
            return orientation(header)
    except PictureError:
        return 1


def upright(boxes: np.ndarray, stored: np.ndarray, turn: int) -> np.ndarray:
    """Boxes (M, 4) of a picture that is `stored` as (height, width) when EXIF's orientation 5 to 8 has turned it."""
    height, width = stored.tolist()
    left, top, right, bottom = boxes.T
    if turn in (6, 7):  # what was at the top comes to the right
        top, bottom = height - bottom, height - top
    if turn in (7, 8):  # what was at the left comes to the bottom
        left, right = width - right, width - left
    return np.stack([top, left, bottom, right], axis=1).astype(np.float32)
