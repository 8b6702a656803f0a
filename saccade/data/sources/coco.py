"""Objects in COCO's JSON (https://cocodataset.org/#format-data): one file for each split, the pictures in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saccade.data.source import SPLIT_NAMES, BoxSource, Found, Problem, printable
from saccade.data.sources.boxes import LARGEST, Annotations, build, missing_sizes
from saccade.data.sources.doubts import COCO_FORM, as_corners, corners, fractions
from saccade.data.sources.listing import Listing, PictureFinder, plain_name
from saccade.errors import UserError

SNIFF = 1 << 20  # bytes at either end of a file by which its kind is known
ANNOTATION_FOLDERS = ("annotations", "labels")
PICTURE_FOLDERS = ("images", "data", "JPEGImages", "imgs")
OURS = re.compile(r"^instances_|_annotations\.coco$|\.coco$")  # how stems of such files are written
OTHERS = re.compile(r"^(captions|person_keypoints|panoptic|stuff|image_info|images_info)_")
KEYS = (b"images", b"annotations", b"categories", b"bbox", b"segments_info")
SPLIT_ORDER = ("train", "val", "test", "all")


def sniff(path: Path) -> str:
    """`boxes`, `segments` (panoptic), `bare` (lists of pictures), `empty` or nothing, by the two ends of the file."""
    try:
        with path.open("rb") as file:
            text = file.read(SNIFF)
            file.seek(0, 2)
            if file.tell() > SNIFF:
                file.seek(max(SNIFF, file.tell() - SNIFF))
                text += file.read(SNIFF)
    except OSError:
        return ""
    if text.strip() in (b"", b"{}", b"[]"):
        return "empty"
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return ""
    seen = {key for key in KEYS if re.search(rb'"%s"\s*:' % key, text)}
    if b"segments_info" in seen:
        return "segments"
    if b"bbox" in seen and seen & {b"images", b"annotations"}:
        return "boxes"
    return "bare" if len(seen) > 1 or b"images" in seen else ""


def list_files(path: Path) -> list[Path]:
    """COCO's files in a folder, its folder for annotations and its folders for splits; a panoptic one is an error."""
    try:
        inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    below = [entry for entry in inside if entry.name.lower() in ANNOTATION_FOLDERS or _split_word(entry.name)]
    files = [file for folder in [path, *below] for file in sorted(folder.glob("*.json"))]
    kinds = {file: sniff(file) for file in files if not file.name.startswith(".")}
    chosen = [file for file, kind in kinds.items() if kind == "boxes"]
    expected = bool(chosen) or _has_pictures(path)
    bare = [
        file
        for file, kind in kinds.items()
        if (kind == "bare" or (kind == "empty" and expected))
        and not OTHERS.match(file.stem)
        and (OURS.search(file.stem) or _split_word(file.stem))
    ]
    there = {_split_of(file, path) for file in [*chosen, *bare]}
    bare += [  # cut off before its first word, a page of a web server in its place, ...
        file
        for file, kind in kinds.items()
        if not kind
        and not OTHERS.match(file.stem)
        and (OURS.search(file.stem) or (_split_word(file.stem) and expected))
        and _split_of(file, path) not in there
        and load_json(file)[1]
    ]
    if not chosen and not bare:
        panoptic = [file for file, kind in kinds.items() if kind == "segments"]
        if panoptic:
            raise _panoptic(panoptic[0])
    ours = [file for file in chosen if not OTHERS.match(file.stem)]
    return sorted([*(ours or chosen), *bare])


def _has_pictures(path: Path) -> bool:
    return any((path / name).is_dir() for name in (*PICTURE_FOLDERS, *ANNOTATION_FOLDERS))


def _panoptic(path: Path) -> UserError:
    return UserError(
        f"{path}: COCO's panoptic annotations (segments_info), from which saccade cannot learn yet; "
        "to detect objects, give a file with a bbox for each annotation"
    )


def _split_word(name: str) -> str:
    """The part of a name that says which split it is of: `train2017` of `instances_train2017`."""
    words = re.findall(r"[a-z]+[0-9]*", name.lower())
    return next((word for word in words if word.rstrip("0123456789") in SPLIT_NAMES), "")


def _split_of(file: Path, root: Path) -> str:
    word = _split_word(file.stem) or (_split_word(file.parent.name) if file.parent != root else "")
    return SPLIT_NAMES[word.rstrip("0123456789")] if word else "all"


def find(path: Path, files: list[Path]) -> Found:
    """Read the files that `list_files` found in `path`; or `path`, with its siblings where it is the train split."""
    found = Found("coco", "detect")
    by_split: dict[str, list[Path]] = {}
    if path.is_file():
        word = _split_word(path.stem)
        if word.rstrip("0123456789") in ("train", "training"):
            for file in sorted(path.parent.glob("*.json")):
                other = _split_word(file.stem)
                if other and file.stem.lower().replace(other, "") == path.stem.lower().replace(word, ""):
                    by_split.setdefault(_split_of(file, path.parent), []).append(file)
            beside = [file for same in by_split.values() for file in same if file != path]
            found.notes += [f"{file}: taken as the {_split_of(file, path.parent)} split" for file in beside]
        if len(by_split) < 2:
            by_split = {"all": [path]}
    else:
        for file in files:
            by_split.setdefault(_split_of(file, path), []).append(file)
        if len(by_split) > 1 and "all" in by_split and "train" in by_split:
            names = ", ".join(str(file) for file in by_split.pop("all"))
            found.notes.append(f"{path}: beside the splits, {names} is left out")
    read: dict[str, _File] = {}
    for split in [split for split in SPLIT_ORDER if split in by_split]:
        same = by_split[split]
        if len(same) > 1:
            names = ", ".join(str(file) for file in same)
            what = f"{names} are all of the {split} split; give one of them, or remove the others"
            found.problems.append(Problem("two_splits", str(path), what))
        file = _read(same[0], split, found)
        if file is not None:
            read[split] = file
    class_names = _unite(list(read.values()), found)
    listing = Listing()
    for split, file in read.items():
        found.splits[split] = _source(file, split, path, class_names, listing, found)
    return found


@dataclass
class _File:
    """What one JSON file holds, in arrays: the objects that Python makes of it are large."""

    path: Path
    names: dict[Hashable, str] = field(default_factory=dict)  # category id -> name
    above: set[str] = field(default_factory=set)  # super-categories
    image_ids: list[int | float | str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # height, width
    same: dict[Hashable, int] = field(default_factory=dict)  # image id -> position
    picture: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    category: list[Hashable] = field(default_factory=list)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # left, top, width, height
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bool_))
    area: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def load_json(path: Path) -> tuple[Any, str]:
    """What the file holds, without outlines, and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            return None, "the file is empty; export it again"
        return json.loads(text, object_hook=_without_outline), ""
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        why = "the file is cut off" if cut else "not valid JSON"
        return None, f"{why} (line {error.lineno}, column {error.colno}: {error.msg}); copy or export it again"
    except (ValueError, RecursionError) as error:
        return None, f"not valid JSON in UTF-8 ({' '.join(str(error).split())[:100]}); export it again"
    except OSError as error:
        return None, f"cannot be read ({error.strerror}); check its permissions"


def _without_outline(values: dict[str, Any]) -> dict[str, Any]:
    """Outlines are nine tenths of such a file, and are freed while the rest is being read."""
    values.pop("segmentation", None)
    return values


def _read(path: Path, split: str, found: Found) -> _File | None:
    """Categories, pictures and annotations of one file; nothing where it is no such file."""
    data, fault = load_json(path)
    if fault:
        found.problems.append(Problem("bad_json", str(path), fault))
        return None
    lists: dict[str, list[Any]] = {}
    for key in ("images", "annotations", "categories"):
        value = data.get(key) if isinstance(data, dict) else None
        if isinstance(value, list):
            lists[key] = value
    if "images" not in lists:
        what = "no COCO file, which is an object with lists of images, annotations and categories"
        found.problems.append(Problem("not_coco", str(path), f"{what}; export it again as COCO"))
        return None
    if "annotations" not in lists:
        refuses = split in ("train", "all")
        what = "no list of annotations; " + ("export it with them" if refuses else "it is left out")
        found.problems.append(Problem("no_annotations", str(path), what, refuses))
        return None
    if any(isinstance(one, dict) and "segments_info" in one for one in lists["annotations"][:10]):
        raise _panoptic(path)
    if not lists["images"]:
        what = "no pictures are listed; export it again, or remove it"
        found.problems.append(Problem("no_pictures", str(path), what))
    if not lists.get("categories"):
        what = 'no categories; list each as {"id": ..., "name": ...}'
        found.problems.append(Problem("no_categories", str(path), what))
    file = _File(path)
    _read_categories(file, lists.get("categories", []), found)
    _read_images(file, lists["images"], found)
    _read_annotations(file, lists["annotations"], found)
    return file


def _read_categories(file: _File, entries: list[Any], found: Found) -> None:
    for k, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        name = printable(str(name)).strip() if isinstance(name, str | int) else ""
        if not _is_id(number) or not name:
            what = 'no category, which is {"id": ..., "name": ...}; complete it'
            found.problems.append(Problem("bad_category", f"{file.path}, categories[{k}]", what))
            continue
        above = printable(str(entry.get("supercategory") or "")).strip()
        if above != name:  # COCO's person is of the group person
            file.above.add(above)
        where = f"{file.path}, category {number}"
        if number not in file.names:
            file.names[number] = name
        elif file.names[number] == name:
            found.problems.append(Problem("duplicate_category", where, "listed twice; remove one of them", False))
        else:
            what = f"both {file.names[number]!r} and {name!r} have this id; give one of them another"
            found.problems.append(Problem("duplicate_category_id", where, what))


def _read_images(file: _File, entries: list[Any], found: Found) -> None:
    by_name: dict[str, int] = {}
    for k, entry in enumerate(entries):
        number: Any = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not _is_id(number) or not isinstance(name, str) or not name.strip() or "\0" in name:
            lacks = "file_name" if _is_id(number) else "id"
            what = f"no {lacks}; complete or remove it"
            found.problems.append(Problem("bad_image", f"{file.path}, images[{k}]", what, False))
            continue
        name, where = plain_name(name), f"{file.path}, image {number}"
        if number in file.same:
            other = file.files[file.same[number]]
            if other == name:
                found.problems.append(Problem("duplicate_image", where, f"{name} is listed twice", False))
            else:
                what = (
                    f"both {other} and {name} have this id, so annotations of it have no one picture; number them anew"
                )
                found.problems.append(Problem("duplicate_image_id", where, what))
            continue
        if name in by_name:
            what = f"{name} is listed as image {file.image_ids[by_name[name]]} too; their annotations are united"
            found.problems.append(Problem("duplicate_image", where, what, False))
            file.same[number] = by_name[name]
            continue
        file.same[number] = by_name[name] = len(file.files)
        file.image_ids.append(number)
        file.files.append(name)
        file.sizes.append((_side(entry.get("height")), _side(entry.get("width"))))


def _is_id(value: Any) -> bool:
    """Also 3.0, as tables export it, which is the same key as 3."""
    return isinstance(value, int | str) and not isinstance(value, bool) or isinstance(value, float) and value % 1 == 0


def _side(value: Any) -> int:
    """A height or width; 0 where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return int(number) if 1 <= number <= 1e9 else 0


def _read_annotations(file: _File, entries: list[Any], found: Found) -> None:
    """Fills the arrays of `file` with every annotation of a known picture, a known category and four numbers."""
    if not all(type(entry) is dict for entry in entries):
        for k, entry in enumerate(entries):
            if type(entry) is not dict:
                what = "not an object; complete or remove it"
                found.problems.append(Problem("bad_annotation", f"{file.path}, annotations[{k}]", what, False))
    rows = [k for k, entry in enumerate(entries) if type(entry) is dict]
    chosen = [entries[k] for k in rows]
    keys = [_plain_id(entry.get("id")) for entry in chosen]
    ids = np.array(
        [n if isinstance(n, int) and 0 <= n < 1 << 62 else -1 - k for k, n in zip(rows, keys, strict=True)], np.int64
    )

    def report(kind: str, j: int, what: str, root: str = "") -> None:
        number = int(ids[j])
        name = f"annotation {number}" if number >= 0 else f"annotations[{rows[j]}]"
        root = f"{file.path}, {root}" if root else ""
        found.problems.append(Problem(kind, f"{file.path}, {name}", what, refuses=False, root=root))

    seen: set[int | str] = set()
    none = "no ids" if len(keys) > 1 and not any(key is not None for key in keys) else ""
    for j, key in enumerate(keys):
        if key is None:
            report("no_id", j, "no id, which is a number; give it one that no other has", none)
        elif key in seen:
            what = f"annotations[{rows[j]}] has the id of another; both are kept, number them anew"
            report("duplicate_annotation_id", j, what, f"annotations of the id {key!s:.20}")
        else:
            seen.add(key)
    picture = np.array([_look_up(file.same, entry.get("image_id")) for entry in chosen], np.int64)
    if file.files:  # else it has been said
        for j in np.flatnonzero(picture < 0).tolist():
            what = f"its image_id is {chosen[j].get('image_id')!r}, and no image has that id; correct or remove it"
            root = f"image {chosen[j].get('image_id')!r}" if (picture >= 0).any() else "all annotations"
            report("unknown_image", j, what, root)
    category = [entry.get("category_id") for entry in chosen]
    known = np.array([_is_id(number) and _key(file.names, number) is not None for number in category], np.bool_)
    if file.names:
        for j in np.flatnonzero(~known & (picture >= 0)).tolist():
            what = f"its category_id is {category[j]!r}, and no category has that id; add the category or correct it"
            report("unknown_category", j, what, f"category {category[j]!r}")
    sound = known & (picture >= 0)
    boxes, faults = _numbers([entry.get("bbox") for entry in chosen])
    all_alike = len(faults) == len(chosen) > 1 and len({kind for kind, _ in faults.values()}) == 1
    for j, (kind, what) in faults.items():
        if sound[j]:
            report(kind, j, what, "all boxes" if all_alike else "")
        sound[j] = False
    area = np.array([_area(entry.get("area")) for entry in chosen], np.float64)
    for j in np.flatnonzero(sound & (area < 0)).tolist():
        report("bad_area", j, f"its area is {chosen[j]['area']!r:.80}; that of the box is taken, correct it")
    crowd = [_flag(entry.get("iscrowd")) for entry in chosen]
    for j in [j for j, flag in enumerate(crowd) if flag is None and sound[j]]:
        what = f"its iscrowd is {chosen[j]['iscrowd']!r:.80}, not 0 or 1; it is taken as 0, correct it"
        report("bad_flag", j, what)
    kept = np.flatnonzero(sound)
    file.picture, file.boxes, file.ids = picture[kept], boxes[kept], ids[kept]
    file.category = [_key(file.names, category[j]) for j in kept]
    file.crowd = np.array([bool(crowd[j]) for j in kept], np.bool_)
    file.area = np.where(area >= 0, area, np.nan)[kept]


def _key(table: dict[Hashable, Any], number: Any) -> Hashable:
    """The key that means this id: exporters disagree on whether ids are numbers or texts."""
    if number in table:
        return number
    if isinstance(number, str):
        other: Hashable = int(number) if number.isdecimal() and number.isascii() and len(number) < 20 else None
    else:
        other = str(int(number))
    return other if other in table else None


def _look_up(table: dict[Hashable, int], number: Any) -> int:
    if not _is_id(number):
        return -1
    position = table.get(number)
    return table.get(_key(table, number), -1) if position is None else position


def _plain_id(value: Any) -> int | str | None:
    """An id as the same key however it is written; None for what is none."""
    if not _is_id(value):
        return None
    if isinstance(value, str):
        return int(value) if value.isdecimal() and value.isascii() and len(value) < 20 else value
    return int(value)


def _flag(value: Any) -> bool | None:
    """Yes or no, which is also what is not stated; None for what is neither."""
    if value is None:
        return False
    if isinstance(value, str):
        return {"0": False, "1": True, "false": False, "true": True}.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _area(value: Any) -> float:
    """An area, NaN where none is stated, -1 for what cannot be one."""
    if value is None:
        return float("nan")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return -1.0
    return number if 0 <= number <= LARGEST**2 else -1.0


def _numbers(values: list[Any]) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """Boxes (M, 4), and what is wrong with those that are not four numbers."""
    try:
        boxes = np.array(values, dtype=np.float64) if values else np.zeros((0, 4))
        if boxes.shape == (len(values), 4) and all(type(value) is list for value in values):
            return boxes, {}
    except (TypeError, ValueError, OverflowError):
        pass
    boxes, faults = np.zeros((len(values), 4)), {}
    for j, value in enumerate(values):
        if value is None or value == []:
            faults[j] = "no_box", "no bbox; draw one or remove it"
        elif not isinstance(value, list) or len(value) != 4:
            has = f"{len(value)} values" if isinstance(value, list) else repr(value)[:40]
            faults[j] = "bad_box", f"its bbox has {has}, not (left, top, width, height); correct it"
        else:
            try:
                boxes[j] = [float("nan") if part is None else float(part) for part in value]
            except (TypeError, ValueError, OverflowError):
                faults[j] = "bad_box", f"its bbox is {value!r:.80}, not four numbers; correct it"
    return boxes, faults


def _unite(files: list[_File], found: Found) -> tuple[str, ...]:
    """The classes of all splits by their ids; without what is only the name of a group of classes."""
    first: dict[str, tuple[bool, int, str]] = {}
    used: set[str] = set()
    for file in files:
        with_objects = set(file.category)
        by_name: dict[str, list[Hashable]] = {}
        for number, name in file.names.items():
            by_name.setdefault(name, []).append(number)
            text = str(number)
            value = int(text) if text.isdecimal() and len(text) < 20 else 0
            first.setdefault(name, (not text.lstrip("-").isdecimal(), value, text))
        for name, same in by_name.items():
            both = [number for number in same if number in with_objects]
            if len(both) > 1:
                what = f"the categories {', '.join(map(str, both))} are all called {name!r} and taken as one class"
                found.problems.append(Problem("same_name", f"{file.path}, category {both[1]}", what, False))
        used |= {file.names[number] for number in with_objects}
    above = {name for file in files for name in file.above}
    groups = [name for name in first if name in above and name not in used]
    if groups and used:
        found.notes.append(f"{files[0].path}: {', '.join(groups)} groups classes and has no objects; it is left out")
        first = {name: key for name, key in first.items() if name not in groups}
    return tuple(sorted(first, key=lambda name: first[name]))


def _source(
    file: _File, split: str, root: Path, class_names: tuple[str, ...], listing: Listing, found: Found
) -> BoxSource:
    finder = PictureFinder(_folders(file.path, root), listing)
    finder.prefer(file.files)
    paths = [finder.find(name) for name in file.files]
    there = np.array([path is not None for path in paths], np.bool_)
    if not there.any() and len(paths):
        looked = ", ".join(map(str, finder.folders))
        what = f"none of its {len(paths)} pictures exists, such as {file.files[0]}; they were looked for in {looked}"
        found.problems.append(Problem("no_pictures", str(file.path), what))
    else:
        folders = {file.files[i].rpartition("/")[0] for i in np.flatnonzero(there).tolist()}
        for i in np.flatnonzero(~there).tolist():
            what = f"{file.files[i]} does not exist in {finder.folders[0]}; add it, or remove it from the list"
            folder = file.files[i].rpartition("/")[0]
            gone = f"{file.path}, folder {folder}" if folder and folder not in folders else ""
            place = f"{file.path}, image {file.image_ids[i]}"
            found.problems.append(Problem("missing_file", place, what, refuses=False, root=gone))
    once = _once(file, paths, found)
    there &= once == np.arange(len(paths))
    moved = np.where(there, np.cumsum(there) - 1, -1)
    picture = moved[once[file.picture]] if len(file.picture) else file.picture
    kept = np.flatnonzero(picture >= 0)
    files = [path for path, is_there in zip(paths, there, strict=True) if path is not None and is_there]
    declared = np.array(file.sizes, dtype=np.int64).reshape(-1, 2)[there]
    found.problems += missing_sizes(files, declared, (str(file.path),))
    position = {name: k for k, name in enumerate(class_names)}
    labels = np.array([position[file.names[file.category[j]]] for j in kept], np.int64)
    numbers, limits = file.boxes[kept], declared[picture[kept]]
    with np.errstate(invalid="ignore", over="ignore"):
        boxes = np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], axis=1)
        if doubts := fractions(numbers, boxes, str(file.path), "COCO"):
            boxes *= limits[:, [1, 0, 1, 0]]
        elif doubts := corners(numbers, boxes, limits, str(file.path), COCO_FORM):
            boxes = as_corners(numbers, boxes)
    found.problems += doubts
    image_ids = [number for number, is_there in zip(file.image_ids, there, strict=True) if is_there]
    stated = Annotations(
        name=root.stem if split == "all" else split,
        path=file.path,
        class_names=class_names,
        files=files,
        declared=declared,
        picture=picture[kept],
        boxes=boxes,
        labels=labels,
        crowd=file.crowd[kept],
        ids=file.ids[kept],
        annotated=(str(file.path),),
        unit="annotation",
        area=file.area[kept],
        numbers=() if any(isinstance(n, str) for n in image_ids) else tuple(int(n) for n in image_ids),
    )
    return build(stated, found)


def _once(file: _File, paths: list[str | None], found: Found) -> np.ndarray:
    """The first entry of the same picture for each, int64 (N,): names may differ and mean one file."""
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        if path is not None and first.setdefault(path, i) != i:
            other = f"image {file.image_ids[first[path]]}"
            what = f"{file.files[i]} is the picture of {other}, too; their annotations are united, correct the name"
            found.problems.append(Problem("duplicate_image", f"{file.path}, image {file.image_ids[i]}", what, False))
    return np.array([i if path is None else first[path] for i, path in enumerate(paths)], np.int64)


def _folders(file: Path, root: Path) -> list[Path]:
    """Where the pictures of such a file may lie, the most usual places first."""
    bases = [file.parent, *([file.parent.parent] if file.parent.name.lower() in ANNOTATION_FOLDERS else [])]
    if root.is_dir():
        bases.append(root)
    word = _split_word(file.stem) or _split_word(file.parent.name)
    split = SPLIT_NAMES.get(word.rstrip("0123456789"), "")
    names = [word, word.rstrip("0123456789"), *(name for name, same in SPLIT_NAMES.items() if same == split)]
    tail = file.stem.rpartition("_")[2]  # "default" of instances_default
    names = [name for name in dict.fromkeys([*names, tail, file.stem]) if name]
    inside = [
        folder / name for name in names for base in bases for folder in (base, *(base / p for p in PICTURE_FOLDERS))
    ]
    plain = [folder for base in bases for folder in (base, *(base / name for name in PICTURE_FOLDERS))]
    return [*inside, *plain]
