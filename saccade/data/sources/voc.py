"""Objects as Pascal VOC has them (https://doi.org/10.1007/s11263-009-0275-4): an XML file for each picture.

- Coordinates count pixels from 1, the last one included, so a box from 1 to the width is the whole picture. Many tools
  write edges instead, counted from 0: that is taken so where more boxes begin at 0 than at 1, or most have fractions.
- An object marked `difficult` is neither learnt nor missed, as in VOC's own evaluation: it becomes a crowd. As for all
  crowds, a detection that lies in it does not count, however small it is beside it; VOC asks for half of their union.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from saccade.data.decode import SUFFIXES
from saccade.data.source import SPLIT_NAMES, BoxSource, Found, Problem, sort_names
from saccade.data.sources.boxes import Annotations, build, missing_sizes
from saccade.data.sources.doubts import fractions
from saccade.data.sources.listing import Listing, plain_name
from saccade.words import counted

ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "xml", "xmls")
PICTURE_FOLDERS = ("JPEGImages", "images", "Images", "imgs")
MAX_BYTES = 16 << 20  # of one XML file
MAX_DEPTH = 64
YES, NO = ("1", "true", "yes"), ("0", "false", "no")
SPLIT_ORDER = ("train", "val", "test", "all")


class UnsafeXml(ValueError):
    """XML that could cost more than it shows."""


def parse_xml(data: bytes) -> Element:
    """The root element. Without document types there are no entities, so nothing can grow or be fetched."""
    builder, depth = TreeBuilder(), 0
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise UnsafeXml(f"elements within elements, {MAX_DEPTH} deep")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise UnsafeXml("a document type with entities")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.Parse(data, True)
    return builder.close()


class _Unit(NamedTuple):
    """A folder of XML files with its folders of pictures, and the lists of its splits."""

    root: Path
    xmls: Path
    pictures: list[Path]
    lists: dict[str, Path]  # stem -> file


def find_units(path: Path) -> dict[str, list[_Unit]]:
    """Sets in VOC's layout at `path`: its own, those in its folders for splits, or those in its folders for years."""
    own = _unit(path, [])
    if own is not None:
        return {"all": [own]}
    folders = _folders(path)
    by_split: dict[str, list[_Unit]] = {}
    for folder in folders:
        if folder.name.lower() in SPLIT_NAMES and (unit := _unit(folder, [path])):
            by_split.setdefault(SPLIT_NAMES[folder.name.lower()], []).append(unit)
    if by_split:
        return by_split
    inside = [*folders, *(below for folder in folders if folder.name == "VOCdevkit" for below in _folders(folder))]
    units = [unit for folder in inside if folder.name.lower().startswith("voc") and (unit := _unit(folder, []))]
    if units:
        return {"all": units}
    for folder in folders:  # annotations/train/*.xml beside images/train/
        if folder.name.lower() in ANNOTATION_FOLDERS:
            for below in _folders(folder):
                if below.name.lower() in SPLIT_NAMES and _has_xml(below):
                    pictures = [*(path / name / below.name for name in PICTURE_FOLDERS), path / below.name]
                    unit = _Unit(path, below, [*pictures, *(path / name for name in PICTURE_FOLDERS)], {})
                    by_split.setdefault(SPLIT_NAMES[below.name.lower()], []).append(unit)
    return by_split


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _has_xml(folder: Path) -> bool:
    """Whether the first of its XML files begins as VOC's do."""
    first = next((file for file in folder.glob("*.[xX][mM][lL]") if not file.name.startswith(".")), None)
    if first is None:
        return False
    try:
        with first.open("rb") as file:
            return b"<annotation" in file.read(4096) or folder.name.lower() in ANNOTATION_FOLDERS
    except OSError:
        return False


def _unit(root: Path, beside: list[Path]) -> _Unit | None:
    pictures = [folder for base in (root, *beside) for folder in (*(base / name for name in PICTURE_FOLDERS), base)]
    xmls = [folder for folder in _folders(root) if folder.name.lower() in ANNOTATION_FOLDERS and _has_xml(folder)]
    if not xmls and not _has_xml(root):
        return None
    lists: dict[str, Path] = {}
    for folder in (root, root / "ImageSets", root / "ImageSets" / "Main"):
        for name in ("train", "val", "test", "trainval"):
            if (folder / f"{name}.txt").is_file():
                lists[name] = folder / f"{name}.txt"
    return _Unit(root, xmls[0] if xmls else root, [folder for folder in pictures if folder.is_dir()], lists)


@dataclass
class _Split:
    """What the files of one split state."""

    files: list[str] = field(default_factory=list)
    annotated: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # height, width
    picture: list[int] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


def find(path: Path, by_split: dict[str, list[_Unit]]) -> Found:
    """Read the sets that `find_units` found."""
    found = Found("voc", "detect")
    listing = Listing()
    read: dict[str, _Split] = {}
    without_lists: list[_Unit] = []
    for split, units in by_split.items():
        if split != "all" and len(units) > 1:
            names = ", ".join(str(unit.xmls) for unit in units)
            what = f"{names} are all the {split} split; keep one of them"
            found.problems.append(Problem("two_splits", str(path), what))
            units = units[:1]
        for unit in units:
            lists = _lists(unit, found) if split == "all" else {}
            if split == "all" and not lists:
                without_lists.append(unit)
            for name in lists or [split]:
                entries = _listed(lists[name], unit, listing, found) if lists else _all(unit, path, listing, found)
                _read(entries, read.setdefault(name, _Split()), found)
    if "train" in read and "all" in read:
        apart = ", ".join(str(unit.xmls) for unit in without_lists)
        found.notes.append(f"{path}: {apart} is of no split, so nothing is learnt from it (--split all has it)")
    class_names = sort_names(name for split in read.values() for name in split.names)
    from_one = _counts_from_one(list(read.values()))
    if not from_one:
        found.notes.append(f"{path}: coordinates are taken as edges counted from 0, not as VOC's pixels counted from 1")
    difficult = sum(sum(split.difficult) for split in read.values())
    if difficult:
        marked = f"{counted(difficult, 'object')} {'is' if difficult == 1 else 'are'} marked difficult"
        found.notes.append(f"{path}: {marked}, so neither learnt nor counted as missed")
    for name in [name for name in SPLIT_ORDER if name in read]:
        found.splits[name] = _source(read[name], name, path, class_names, from_one, found)
    return found


def _lists(unit: _Unit, found: Found) -> dict[str, Path]:
    """The lists to read by split. VOC's own names: trainval is both, for those who train on all that is not test."""
    lists = dict(unit.lists)
    both = lists.pop("trainval", None)
    if both is not None and "train" not in lists:
        lists = {"train": both, **({"test": lists["test"]} if "test" in lists else {})}
    elif both is not None and "val" not in lists:
        found.notes.append(f"{both}: left out, {lists['train']} is used")
    return lists if "train" in lists else {}


def _listed(file: Path, unit: _Unit, listing: Listing, found: Found) -> Iterator[tuple[Path, str]]:
    """XML file and picture of each line that has both."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found.problems.append(
            Problem("bad_list", str(file), f"cannot be read ({error}); write one name a line, in UTF-8")
        )
        return
    seen = set()
    for number, line in enumerate(lines, 1):
        name = plain_name(line)
        if not line.strip():
            continue
        xml = _xml_of(unit, name, listing)
        if xml is None:  # VOC's lists of one class hold a second column
            name = name.split()[0]
            xml = _xml_of(unit, name, listing)
        where = f"{file}:{number}"
        if (xml or name) in seen:
            found.problems.append(Problem("duplicate_image", where, f"{name} is listed twice; remove the line", False))
            continue
        seen.add(xml or name)
        if xml is None:
            what = f"{name} has no XML file in {unit.xmls}; annotate it, if only to say that nothing is in it"
            found.problems.append(Problem("no_annotation", where, what, False))
            continue
        picture = _picture_of(unit, name, xml, listing, found)
        if picture is None:
            found.problems.append(_missing(where, name, unit))
        else:
            yield Path(xml), picture


def _all(unit: _Unit, path: Path, listing: Listing, found: Found) -> Iterator[tuple[Path, str]]:
    """Every XML file of a folder with its picture."""
    taken = set()
    names = sorted(name for name in listing.names(str(unit.xmls)) if not name.startswith("."))
    for xml in (unit.xmls / name for name in names if name.lower().endswith(".xml")):
        picture = _picture_of(unit, xml.stem, str(xml), listing, found)
        if picture is None:
            found.problems.append(_missing(str(xml), xml.stem, unit))
        else:
            taken.add(picture)
            yield xml, picture
    for folder in sorted({str(Path(picture).parent) for picture in taken}):
        parts = Path(os.path.relpath(folder, path)).parts
        if unit.root == path and unit.xmls.parent != path and not any(part.lower() in SPLIT_NAMES for part in parts):
            continue  # the splits share this folder
        for name in sorted(listing.names(folder)):
            picture = f"{folder}/{name}"
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".") and picture not in taken:
                what = f"no XML file in {unit.xmls}; annotate it, if only to say that nothing is in it"
                found.problems.append(Problem("no_annotation", picture, what, False))


def _xml_of(unit: _Unit, name: str, listing: Listing) -> str | None:
    stem = name.rpartition(".")[0] if Path(name).suffix.lower() in SUFFIXES else name
    return listing.find(unit.xmls, f"{stem}.xml") if stem else None


def _picture_of(unit: _Unit, name: str, xml: str, listing: Listing, found: Found) -> str | None:
    """The picture of the XML file's own name; what is written inside is often of another time, and tells only which of
    several of that name it is."""
    stem = name.rpartition(".")[0] if Path(name).suffix.lower() in SUFFIXES else name
    of_stem = next((same for folder in unit.pictures if (same := listing.pictures(folder, stem))), [])
    if len(of_stem) == 1:
        return of_stem[0]
    try:
        inside = plain_name(_text(parse_xml(_bytes(Path(xml))), "filename")).rpartition("/")[2]
    except (OSError, LookupError, ValueError, expat.ExpatError, UnsafeXml):  # of an encoding that does not exist, too
        inside = ""
    if of_stem:
        named = [picture for picture in of_stem if Path(picture).name.lower() == inside.lower()]
        if not named:
            names = " and ".join(Path(picture).name for picture in of_stem)
            what = f"{names} are of its name, and the first is taken; name the right one as its filename"
            found.problems.append(Problem("several_pictures", xml, what, False))
        return (named or of_stem)[0]
    for folder in unit.pictures:
        picture = listing.find(folder, inside) if inside else None
        if picture is not None and Path(picture).suffix.lower() in SUFFIXES:
            return picture
    return None


def _missing(where: str, name: str, unit: _Unit) -> Problem:
    folder = unit.pictures[0] if unit.pictures else unit.root
    return Problem("missing_file", where, f"no picture {name} in {folder}; add it, or remove its annotation", False)


def _bytes(xml: Path) -> bytes:
    with xml.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UnsafeXml(f"over {MAX_BYTES >> 20} MiB")
    return data


def _text(element: Element, name: str) -> str:
    child = element.find(name)
    return (child.text or "").strip() if child is not None else ""


def _read(entries: Iterator[tuple[Path, str]], split: _Split, found: Found) -> None:
    for xml, picture in entries:
        try:
            root = parse_xml(_bytes(xml))
        except UnsafeXml as error:
            what = f"not read, for it holds {error}; VOC's files need no such thing: write it anew"
            found.problems.append(Problem("unsafe_xml", str(xml), what, False))
            continue
        except (OSError, LookupError, ValueError, expat.ExpatError) as error:
            what = f"not readable XML ({error}); write it anew or remove it"
            found.problems.append(Problem("bad_xml", str(xml), what, False))
            continue
        if root.tag != "annotation":
            what = f"not VOC's XML: it begins with {root.tag!r}, not 'annotation'; write it anew or remove it"
            found.problems.append(Problem("bad_xml", str(xml), what, False))
            continue
        size = root.find("size")
        height, width = (_side(_text(size, name)) if size is not None else 0 for name in ("height", "width"))
        split.files.append(picture)
        split.annotated.append(str(xml))
        split.sizes.append((height, width))
        for number, thing in enumerate(root.iterfind("object"), 1):
            _read_object(thing, number, xml, split, found)


def _read_object(thing: Element, number: int, xml: Path, split: _Split, found: Found) -> None:
    where, name, corners = f"{xml}, object {number}", _text(thing, "name"), thing.find("bndbox")
    if not name:
        found.problems.append(Problem("no_name", where, "no name of a class; add one or remove it", False))
        return
    if corners is None:
        what = f"{name} without a bndbox; draw an upright box around it, or remove it"
        found.problems.append(Problem("no_box", where, what, False))
        return
    texts = [_text(corners, side) for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = map(float, texts)
    except ValueError:
        what = f"{name} with the box {', '.join(text or '?' for text in texts)}, not four numbers; correct it"
        found.problems.append(Problem("bad_box", where, what, False))
        return
    if len(thing.findall("bndbox")) > 1:
        what = f"{name} with several boxes, of which the first is taken; make an object of each, or remove the others"
        found.problems.append(Problem("two_boxes", where, what, False))
    difficult = _text(thing, "difficult").lower()
    if difficult not in ("", *YES, *NO):
        what = f"{name} is {difficult[:60]!r} difficult, not 0 or 1; it is taken as 0, correct it"
        found.problems.append(Problem("bad_flag", where, what, False))
    split.picture.append(len(split.files) - 1)
    split.boxes.append((left, top, right, bottom))
    split.names.append(name)
    split.difficult.append(difficult in YES)
    split.ids.append(number)


def _side(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        return 0
    return int(number) if 1 <= number <= 1e9 else 0


def _counts_from_one(splits: list[_Split]) -> bool:
    boxes = np.array([box for split in splits for box in split.boxes]).reshape(-1, 4)
    starts = boxes[:, :2]
    fractions = np.any(np.isfinite(boxes) & (boxes != np.round(boxes)), axis=1)
    return not (np.sum(starts == 0) > np.sum(starts == 1) or 2 * fractions.sum() > len(boxes))


def _source(
    split: _Split, name: str, root: Path, class_names: tuple[str, ...], from_one: bool, found: Found
) -> BoxSource:
    if not split.files:
        what = "no pictures with annotations; VOC has an XML file in Annotations for each picture in JPEGImages"
        found.problems.append(Problem("no_pictures", str(root), what))
    declared = np.array(split.sizes, np.int64).reshape(-1, 2)
    found.problems += missing_sizes(split.files, declared, split.annotated)
    boxes = np.array(split.boxes, np.float64).reshape(-1, 4)
    if doubts := fractions(boxes, boxes, str(root) if name == "all" else f"{root}, {name}", "VOC"):
        found.problems += doubts
        boxes *= declared[split.picture][:, [1, 0, 1, 0]]
    elif from_one:  # but a box that begins where it ends is a click, not a thing of one pixel
        boxes[:, :2] -= boxes[:, :2] != boxes[:, 2:]
    position = {class_name: k for k, class_name in enumerate(class_names)}
    stated = Annotations(
        name=root.name if name == "all" else name,
        path=root,
        class_names=class_names,
        files=split.files,
        declared=declared,
        picture=np.array(split.picture, np.int64),
        boxes=boxes,
        labels=np.array([position[class_name] for class_name in split.names], np.int64),
        crowd=np.array(split.difficult, np.bool_),
        ids=np.array(split.ids, np.int64),
        annotated=tuple(split.annotated),
        unit="object",
    )
    return build(stated, found)
