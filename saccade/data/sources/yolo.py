"""Objects as YOLO has them: a text file for each picture, and a YAML file with the classes and the splits.

A line is `class centre_x centre_y width height` in fractions of the upright picture, or a class and the corners of an
outline, whose box is taken. A picture without a text file, or with an empty one, is one without objects
(https://docs.ultralytics.com/datasets/detect/).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from saccade.data.decode import SUFFIXES
from saccade.data.source import SPLIT_NAMES, BoxSource, Found, Problem, printable
from saccade.data.sources.boxes import Annotations, build, picture_sizes
from saccade.data.sources.doubts import YOLO_FORM, as_corners, corners
from saccade.data.sources.image_folder import walk_pictures
from saccade.data.sources.listing import Listing, plain_name
from saccade.errors import UserError

YAML_SUFFIXES = (".yaml", ".yml")
NAME_FILES = ("classes.txt", "obj.names")
NOT_LABELS = ("classes.txt", "readme.txt", "notes.txt")
MAX_YAML = 1 << 20  # bytes
MAX_TEXT = 16 << 20
FAR = 2.0  # a fraction beyond this is one in pixels
SPLIT_ORDER = ("train", "val", "test", "all")


def list_yaml(path: Path) -> Path | None:
    """The YAML file of a data set in its folder; data.yaml even where it cannot be read."""
    files = [file for suffix in YAML_SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
    usual = [file for file in files if file.stem.lower() in ("data", "dataset") and _looks_right(file, True)]
    return next(iter([*usual, *(file for file in files if _looks_right(file, False))]), None)


def _looks_right(file: Path, usual: bool) -> bool:
    try:
        values = read_yaml(file)
    except UserError:
        return usual
    splits = {"train", "val", "path"} & set(values) if isinstance(values, dict) else set()
    return bool(splits) and (usual or "names" in values)


class _Loader(yaml.SafeLoader):
    """Plain data without merge keys (`<<`), which copy what they name: copies of copies grow without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "it merges mappings by <<", node.start_mark)
        super().flatten_mapping(node)


def read_yaml(file: Path) -> Any:
    """Plain data only. Aliases are one object however often they are named: see `_shown`."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_YAML + 1)
        if len(data) > MAX_YAML:
            raise UserError(f"{file}: over {MAX_YAML >> 20} MiB, too large for a list of classes and splits")
        return yaml.load(data, _Loader)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:160]
        raise UserError(f"{file}: not readable as YAML ({text}); mend it") from None


def _plain(value: Any) -> str:
    """A text, number or date of the file as a text; nothing for what is none."""
    if isinstance(value, dict | list | set) or value is None:
        return ""
    if isinstance(value, int) and value.bit_length() > 64:
        return ""
    return str(value).strip()


def _shown(value: Any) -> str:
    """A value in a message: a list or a mapping by its kind alone, as the text of nested aliases can be endless."""
    kinds = {dict: "a mapping", list: "a list", set: "a set"}
    if type(value) in kinds:
        return kinds[type(value)]
    return f"{value!r:.60}" if _plain(value) or not isinstance(value, int) else "a number of many digits"


def has_labels(path: Path) -> bool:
    """Whether folders `images` and `labels` with text files lie there, without a YAML file."""
    return any(
        (base / "images").is_dir() and any(True for _ in (base / "labels").glob("**/*.[tT][xX][tT]"))
        for base in (path, *(path / name for name in SPLIT_NAMES))
    )


@dataclass
class _Split:
    files: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # the text file of each picture, or where it would be
    lines: list[tuple[int, int, int, tuple[float, float, float, float]]] = field(default_factory=list)
    # each: picture, number of the line, class, box from corner to corner in fractions


def find(path: Path) -> Found:
    """Read a YAML file's data set, or the folder that holds such a file or only `images` and `labels`."""
    found = Found("yolo", "detect")
    file = path if path.is_file() else list_yaml(path)
    values: Any = {}
    if file is not None:
        try:
            values = read_yaml(file)
        except UserError as error:
            what = str(error).removeprefix(f"{file}: ")
            found.problems.append(Problem("bad_yaml", str(file), what))
            return found
        if not isinstance(values, dict):
            what = "no YAML of a data set; write names, train and val"
            found.problems.append(Problem("bad_yaml", str(file), what))
            return found
    root = path if path.is_dir() else path.parent
    names = _names(file, values, root, found)
    places = _places(file, values, root, found)
    listing = Listing()
    merged = tuple(dict.fromkeys(names.values()))
    for split in [split for split in SPLIT_ORDER if split in places]:
        pictures = _pictures(places[split], split, root, found)
        found.splits[split] = _source(pictures, split, root, names, merged, values, listing, found)
    if found.splits and not any(isinstance(s, BoxSource) and s.annotated for s in found.splits.values()):
        what = "no text file of labels for any picture; they belong into labels/, as the pictures are in images/"
        found.problems.append(Problem("no_labels", str(root), what))
    return found


def _names(file: Path | None, values: dict[str, Any], root: Path, found: Found) -> dict[int, str]:
    """The name of each class number."""
    where, names = str(file or root), values.get("names")
    if names is None:
        listed = next((f for n in NAME_FILES for f in (root / n, root / "labels" / n) if f.is_file()), None)
        if listed is not None:
            names = [
                line.strip()
                for line in listed.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.strip()
            ]
            where = str(listed)
    if names is None:
        count = values.get("nc")
        what = f"no names of its {_plain(count)} classes" if isinstance(count, int) else "no names of classes"
        remedy = "add `names: [...]` to it" if file else "add a data.yaml with `names: [...]`, or a classes.txt"
        found.problems.append(Problem("no_names", where, f"{what}; {remedy}"))
        return {}
    pairs = (
        list(names.items()) if isinstance(names, dict) else list(enumerate(names)) if isinstance(names, list) else []
    )
    table: dict[int, str] = {}
    for number, name in pairs:
        text = printable(_plain(name)) if isinstance(name, str | int | float) else ""
        digits = _plain(number)
        number = int(digits) if digits.isdecimal() and len(digits) < 10 else -1
        if number < 0 or not text:
            which = number if number >= 0 else "?"
            what = f"class {which} is {_shown(name)}; names are a list, or numbers with a name each"
            found.problems.append(Problem("bad_names", where, what))
        else:
            table[number] = text
    for number, one, other in _numbered_twice(file) if file is not None and isinstance(names, dict) else []:
        if one == other:
            what = "listed twice; remove one of them"
            found.problems.append(Problem("duplicate_category", f"{where}, class {number}", what, False))
        else:
            what = f"both {one!r:.60} and {other!r:.60} have this number; give one of them another"
            found.problems.append(Problem("duplicate_category_id", f"{where}, class {number}", what))
    if not pairs:
        found.problems.append(Problem("no_names", where, "the list of names is empty; write the names of the classes"))
    table = dict(sorted(table.items()))
    for number, name in table.items():
        if next(k for k, other in table.items() if other == name) != number:
            what = f"class {number} has the name {name!r} of another class; both are taken as one"
            found.problems.append(Problem("same_name", f"{where}, class {number}", what, False))
    count = values.get("nc")
    if count is not None and table and count != len(table):
        what = f"nc is {_shown(count)}, but {len(table)} names are given; correct the wrong one"
        found.problems.append(Problem("class_count", where, what, False))
    return table


def _numbered_twice(file: Path) -> list[tuple[str, str, str]]:
    """Each number that `names` has again, with both names: of a mapping only the last is read."""
    root = yaml.compose(file.read_bytes(), _Loader)
    inside = next((value for key, value in root.value if key.value == "names"), None)
    seen: dict[str, str] = {}
    twice = []
    for key, value in inside.value if isinstance(inside, yaml.MappingNode) else []:
        number, name = (str(n.value) if isinstance(n, yaml.ScalarNode) else "" for n in (key, value))
        if number in seen:
            twice.append((number, seen[number], name))
        seen.setdefault(number, name)
    return twice


def _places(file: Path | None, values: dict[str, Any], root: Path, found: Found) -> dict[str, list[Path]]:
    """Folders and lists of pictures of each split."""
    given = {
        SPLIT_NAMES[key]: values[key] for key in values if key in ("train", "val", "valid", "test") and values[key]
    }
    if not given:
        return _usual_places(root)
    stated = plain_name(_plain(values.get("path")))
    bases = (
        [root / stated, Path(stated).absolute(), root, root.parent] if stated not in ("", ".") else [root, root.parent]
    )
    places: dict[str, list[Path]] = {}
    for split, value in given.items():
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            text = plain_name(_plain(part))
            if not _plain(part):
                what = f"{split}: {_shown(part)} is no folder; write the path of one"
                found.problems.append(Problem("missing_split", str(file), what))
                continue
            # exports that were made for another place write ../train/images for train/images
            tries = [text, *([text.lstrip("./")] if text.startswith("../") else [])]
            place = next((base / one for one in tries for base in bases if os.path.exists(base / one)), None)
            if place is None:
                refuses = split != "test"
                what = f"{split}: {part} does not exist in {bases[0]}; correct it" + (
                    "" if refuses else " or remove it"
                )
                found.problems.append(Problem("missing_split", str(file), what, refuses))
            else:
                places.setdefault(split, []).append(place)
    return places


def _usual_places(root: Path) -> dict[str, list[Path]]:
    """images/train or train/images; or images alone."""
    places: dict[str, list[Path]] = {}
    for name, split in SPLIT_NAMES.items():
        for folder in (root / "images" / name, root / name / "images"):
            if folder.is_dir():
                places.setdefault(split, []).append(folder)
    return places or {"all": [root / "images" if (root / "images").is_dir() else root]}


def _pictures(places: list[Path], split: str, root: Path, found: Found) -> _Split:
    """Every picture of a split with the place of its text file."""
    result = _Split()
    seen: set[str] = set()
    for place in places:
        files = walk_pictures(place)[0] if place.is_dir() else _listed(place, root, found)
        if place.is_dir():
            _orphans({_text_of(file) for file in files}, found)
        for file in [file for file in files if file in seen]:
            what = f"is in the {split} split twice; name each place once"
            found.problems.append(Problem("duplicate_image", file, what, False, f"{place}, of {split} again"))
        result.files += [file for file in files if file not in seen]
        seen.update(files)
    result.texts = [_text_of(file) for file in result.files]
    if not result.files:
        what = f"no pictures in the {split} split; pictures end in {', '.join(SUFFIXES)}"
        found.problems.append(Problem("no_pictures", str(places[0]), what))
    return result


def _text_of(picture: str) -> str:
    """In the folder `labels` where the picture is in `images`; else beside it."""
    head, mark, tail = f"{os.sep}{picture}".rpartition(f"{os.sep}images{os.sep}")  # also of a path that begins with it
    text = f"{head}{os.sep}labels{os.sep}{tail}"[1:] if mark else picture
    return os.path.splitext(text)[0] + ".txt"


def _orphans(texts: set[str], found: Found) -> None:
    """Text files in a folder of labels that are of no picture."""
    folders = {os.path.dirname(text) for text in texts if f"{os.sep}labels{os.sep}" in f"{os.sep}{text}"}
    of_pictures = {text.lower() for text in texts}
    for folder in sorted(folders):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            text = os.path.join(folder, name)
            if name.lower().endswith(".txt") and name.lower() not in NOT_LABELS and text.lower() not in of_pictures:
                what = "no picture of this name; add it, or remove the labels"
                found.problems.append(Problem("missing_file", text, what, False))


def _listed(file: Path, root: Path, found: Found) -> list[str]:
    """The pictures that a text file names, one a line, relative to it or to the data set."""
    if file.suffix.lower() in SUFFIXES:
        return [str(file)]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found.problems.append(
            Problem("bad_list", str(file), f"cannot be read ({error}); name a picture a line, in UTF-8")
        )
        return []
    listing, files, seen = Listing(), [], set()
    for number, line in enumerate(lines, 1):
        name = plain_name(line)
        if not line.strip():
            continue
        path = next((p for base in (file.parent, root, root.parent) if (p := listing.find(base, name))), None)
        if path is None:
            what = f"{name} does not exist in {file.parent}; add it, or remove the line"
            found.problems.append(Problem("missing_file", f"{file}:{number}", what, False))
        elif path in seen:
            what = f"{name} is listed twice; remove the line"
            found.problems.append(Problem("duplicate_image", f"{file}:{number}", what, False))
        else:
            seen.add(path)
            files.append(path)
    return files


def _source(
    split: _Split,
    name: str,
    root: Path,
    names: dict[int, str],
    merged: tuple[str, ...],
    values: dict[str, Any],
    listing: Listing,
    found: Found,
) -> BoxSource:
    keypoints = "kpt_shape" in values
    unread: set[int] = set()
    of_text: dict[str, int] = {}  # label file -> its first picture
    any_text = False
    for i, text in enumerate(split.texts):
        beside = os.path.splitext(split.files[i])[0] + ".txt"
        text = next((there for one in (text, beside) if (there := _there(one, listing))), None)
        if text is None:
            continue
        split.texts[i] = text
        any_text = True
        if text in of_text:
            both = " and ".join(os.path.basename(split.files[k]) for k in (of_text[text], i))
            what = f"{both} have these labels in common, and both are learnt with them; rename one, or remove it"
            found.problems.append(Problem("shared_labels", text, what, False))
        of_text.setdefault(text, i)
        if not _read_text(text, i, split, names, keypoints, found):
            unread.add(i)
    kept = [i for i in range(len(split.files)) if i not in unread]
    moved = {i: k for k, i in enumerate(kept)}
    lines = [line for line in split.lines if line[0] in moved]
    files = [split.files[i] for i in kept]
    with_lines = sorted({line[0] for line in lines})
    sizes = np.zeros((len(kept), 2), np.int64)
    sizes[[moved[i] for i in with_lines]] = picture_sizes([split.files[i] for i in with_lines])
    picture = np.array([moved[line[0]] for line in lines], np.int64)
    # a picture whose size cannot be read cannot be learnt from either, and is reported when it is decoded
    lines = [line for line, known in zip(lines, sizes[picture].min(axis=1) > 0, strict=True) if known]
    picture = np.array([moved[line[0]] for line in lines], np.int64)
    fractions = np.array([line[3] for line in lines], np.float64).reshape(-1, 4)
    limits = sizes[picture]
    boxes = fractions * limits[:, [1, 0, 1, 0]]
    with np.errstate(invalid="ignore", over="ignore"):
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        numbers = np.concatenate([centres, sides], axis=1)
        if doubts := corners(numbers, boxes, limits, str(root) if name == "all" else f"{root}, {name}", YOLO_FORM):
            found.problems += doubts
            boxes = as_corners(numbers, boxes)
    position = {class_name: k for k, class_name in enumerate(merged)}
    stated = Annotations(
        name=root.name if name == "all" else name,
        path=root,
        class_names=merged,
        files=files,
        declared=sizes,
        picture=picture,
        boxes=boxes,
        labels=np.array([position[names[line[2]]] for line in lines], np.int64),
        crowd=np.zeros(len(lines), np.bool_),
        ids=np.array([line[1] for line in lines], np.int64),
        annotated=tuple(split.texts[i] for i in kept) if any_text else (),
        unit="line",
    )
    return build(stated, found)


def _there(file: str, listing: Listing) -> str | None:
    """The file as it is written on disk, if only in upper and lower case otherwise."""
    folder, base = os.path.split(file)
    return file if base in listing.names(folder) else listing.find(folder, base)


def _read_text(text: str, i: int, split: _Split, names: dict[int, str], keypoints: bool, found: Found) -> bool:
    """Adds the lines of a picture's text file to the split; false where the whole file cannot be read."""
    try:
        with open(text, "rb") as file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise ValueError(f"over {MAX_TEXT >> 20} MiB")
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        what = f"not readable as labels ({error}); write it anew or remove it"
        found.problems.append(Problem("bad_label_file", text, what, False))
        return False

    def report(kind: str, what: str, root: str = "") -> None:
        root = f"{os.path.dirname(text)}: {root}" if root else ""
        found.problems.append(Problem(kind, f"{text}:{number}", what, refuses=False, root=root))

    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        try:
            values = [float(part) for part in fields]
        except ValueError:
            report("bad_line", f"{line.strip()[:60]!r} is not made of numbers; write class, centre x, y, width, height")
            continue
        outline = len(values) >= 7 and len(values) % 2 == 1 and not keypoints
        if len(values) != 5 and not outline and not (keypoints and len(values) > 5):
            report("bad_line", f"{len(values)} numbers, not a class and four, or a class and an outline; correct it")
            continue
        if not math.isfinite(values[0]) or values[0] != int(values[0]) or int(values[0]) not in names:
            if names:  # else that has been said
                known = f"the names are of {min(names)} to {max(names)}"
                what = f"class {fields[0]}, but {known}; correct it, or add its name"
                report("unknown_category", what, f"class {fields[0]}")
            continue
        places = values[1:] if outline else values[1:5]
        if any(abs(value) > FAR for value in places if math.isfinite(value)):
            what = "numbers are in pixels, not in fractions of the picture; divide by its width and height"
            report("not_fractions", what, "pixels")
            continue
        if outline:
            xs, ys = places[0::2], places[1::2]
            box = (min(xs), min(ys), max(xs), max(ys))
            if not all(map(math.isfinite, places)):  # min and max pass over NaN
                box = (math.nan, math.nan, math.nan, math.nan)
        else:
            x, y, w, h = places
            box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        split.lines.append((i, number, int(values[0]), box))
    return True
