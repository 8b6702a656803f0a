"""Tar shards as WebDataset writes them: members of one key are one sample (https://github.com/webdataset/webdataset)."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from saccade.data.decode import SUFFIXES, PictureError
from saccade.data.source import SPLIT_NAMES, Found, LabelledSource, Problem, sort_names
from saccade.errors import UserError

LABEL_KEYS = ("label", "class", "cls", "target", "category")


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource(LabelledSource):
    """Pictures at known places within tar files."""

    shards: tuple[Path, ...]
    members: tuple[str, ...]
    places: np.ndarray  # int64 (N, 3): shard, offset, length

    def id(self, i: int) -> str:
        return f"{self.shards[self.places[i, 0]]}!{self.members[i]}"

    def read(self, i: int) -> bytes:
        shard, offset, length = self.places[i].tolist()
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise PictureError(self.id(i), f"cannot be read ({error.strerror})") from None
        if len(data) < length:
            raise PictureError(self.id(i), "the shard is cut off within this picture; make it anew", "truncated")
        return data

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        indices = np.asarray(indices, dtype=np.int64)
        members = tuple(self.members[i] for i in indices)
        return replace(self, labels=self.labels[indices], members=members, places=self.places[indices])


def list_shards(path: Path) -> list[Path]:
    """The shards of a folder, also of its folders for splits."""
    shards = [*path.glob("*.tar"), *(s for s in path.glob("*/*.tar") if s.parent.name.lower() in SPLIT_NAMES)]
    return sorted(shard for shard in shards if not shard.name.startswith("."))


def find(shards: Sequence[Path]) -> Found:
    """Read the headers and labels of all shards. The split is in a shard's name (train-0000.tar) or its folder's."""
    found = Found("webdataset")
    by_split: dict[str, list[Path]] = {}
    for shard in shards:
        by_split.setdefault(_split_of(shard), []).append(shard)
    if "train" not in by_split:
        by_split = {"all": list(shards)}
    for split, same in by_split.items():
        found.splits[split] = _read_shards(same, found)
    return found


def _split_of(shard: Path) -> str:
    word = re.match(r"[a-z]*", shard.name.lower())
    name = word.group() if word else ""
    return SPLIT_NAMES.get(name) or SPLIT_NAMES.get(shard.parent.name.lower(), "all")


@dataclass
class _Entry:
    key: str
    member: str = ""
    place: tuple[int, int] = (0, 0)
    label: Any = None
    faults: list[Problem] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)


def _read_shards(shards: Sequence[Path], found: Found) -> TarSource:
    declared = _declared_names(shards[0])
    members: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[str] = []
    for number, shard in enumerate(shards):
        for entry in _read_shard(shard, found):
            where = f"{shard}!{entry.member or entry.key}"
            if entry.faults:
                found.problems += entry.faults
            elif not entry.member:
                found.problems.append(Problem("no_picture", where, "a label without a picture; remove or complete it"))
            elif entry.label is None:
                what = "a picture without a label; add a member .cls, or .json with a label"
                found.problems.append(Problem("missing_label", where, what))
            else:
                name, fault = _name_of(entry.label, declared)
                if fault:
                    found.problems.append(Problem("bad_label", where, fault))
                else:
                    members.append(entry.member)
                    places.append((number, *entry.place))
                    labels.append(name)
    path = shards[0] if len(shards) == 1 else shards[0].parent
    if not members:
        what = "no labelled pictures in the shards; is this the right folder?"
        found.problems.append(Problem("no_pictures", str(path), what))
    class_names = declared or sort_names(labels)
    position = {name: k for k, name in enumerate(class_names)}
    return TarSource(
        name=path.stem,
        path=path,
        class_names=class_names,
        labels=np.array([position[label] for label in labels], dtype=np.int64),
        shards=tuple(shards),
        members=tuple(members),
        places=np.array(places, dtype=np.int64).reshape(-1, 3),
    )


def _read_shard(shard: Path, found: Found) -> list[_Entry]:
    """Every sample of a shard in its order; what is cut off or damaged becomes a problem, the rest is kept."""
    entries: list[_Entry] = []
    try:
        length = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                base = member.name.rpartition("/")[2]
                if not member.isfile() or base.startswith("."):
                    continue
                stem, _, suffix = base.partition(".")
                suffix = "." + suffix.lower()
                key = member.name[: len(member.name) - len(base)] + stem
                picture = "." + suffix.rpartition(".")[2] in SUFFIXES
                if not picture and suffix not in (".cls", ".json"):
                    continue
                if member.offset_data + member.size > length:
                    what = "the shard ends within this member; make the shard anew"
                    found.problems.append(Problem("truncated", f"{shard}!{member.name}", what))
                    break
                if not entries or entries[-1].key != key or suffix in entries[-1].suffixes:
                    entries.append(_Entry(key))
                entry = entries[-1]
                entry.suffixes.add(suffix)
                if picture:
                    if not entry.member:
                        entry.member, entry.place = member.name, (member.offset_data, member.size)
                else:
                    opened = tar.extractfile(member)
                    label, fault = _parse_label(opened.read() if opened else b"", suffix)
                    if fault:
                        entry.faults.append(Problem("bad_label", f"{shard}!{member.name}", fault))
                    elif label is not None:
                        entry.label = label
    except tarfile.TarError as error:
        what = f"not a readable tar file ({error}); compressed shards must be unpacked first"
        found.problems.append(Problem("bad_shard", str(shard), what))
    except OSError as error:
        found.problems.append(Problem("bad_shard", str(shard), f"cannot be read ({error.strerror})"))
    return entries


def _parse_label(data: bytes, suffix: str) -> tuple[Any, str]:
    """A class number or name, and what is wrong with it."""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None, "the label is not text in UTF-8; write a class number or name"
    if suffix == ".cls":
        if not text:
            return None, "the label is empty; write a class number or name"
        return (int(text) if re.fullmatch(r"-?\d+", text) else text), ""
    try:
        values = json.loads(text)
    except ValueError as error:
        return None, f"not valid JSON ({error}); mend or remove it"
    if not isinstance(values, dict):
        return None, 'not a JSON object; write {"label": ...}'
    label = next((values[key] for key in LABEL_KEYS if key in values), None)
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
        return None, f"the label is {label!r}; write a class number or name"
    return label, ""


def _name_of(label: int | str, declared: tuple[str, ...]) -> tuple[str, str]:
    if not declared:
        return str(label), ""
    if isinstance(label, int):
        if 0 <= label < len(declared):
            return declared[label], ""
        return "", f"class {label}, but classes.json names {len(declared)} classes (0 to {len(declared) - 1})"
    return (label, "") if label in declared else ("", f"class {label!r} is not in classes.json")


def _declared_names(shard: Path) -> tuple[str, ...]:
    """What classes.json beside the shards, or above their split folders, says: a list, or an object name <-> number."""
    above = [shard.parent.parent] if shard.parent.name.lower() in SPLIT_NAMES else []
    path = next((f / "classes.json" for f in [shard.parent, *above] if (f / "classes.json").is_file()), None)
    if path is None:
        return ()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); mend or remove it") from None
    if isinstance(names, dict):
        pairs = [(k, v) if isinstance(v, int) else (v, k) for k, v in names.items()]  # (name, number)
        numbered = {int(number): name for name, number in pairs if str(number).isdecimal()}
        names = [numbered.get(k) for k in range(len(names))]
    good = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if not good or len(good) < len(names) or len(set(good)) < len(good):
        raise UserError(f"{path}: must be a list of different class names, in the order of their numbers")
    return tuple(good)
