"""Which files there are, by one look at each folder: asking for 100,000 files singly is slow on a network's disk."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePosixPath

from saccade.data.decode import SUFFIXES


class Listing:
    """Names of files by folder, read once."""

    def __init__(self) -> None:
        self._folders: dict[str, tuple[set[str], dict[str, str]]] = {}
        self._pictures: dict[str, dict[str, list[str]]] = {}

    def names(self, folder: str) -> set[str]:
        return self._read(folder)[0]

    def find(self, folder: str | Path, name: str) -> str | None:
        """The path of `name` (which may hold folders) below `folder`, also where only upper and lower case differ."""
        path = os.path.normpath(os.path.join(folder, name))
        parent, base = os.path.split(path)
        names, lower = self._read(parent)
        if base in names:
            return path
        return os.path.join(parent, lower[base.lower()]) if base.lower() in lower else None

    def pictures(self, folder: str | Path, stem: str) -> list[str]:
        """The paths of the pictures of that stem (which may hold folders) below `folder`, sorted."""
        parent, base = os.path.split(os.path.normpath(os.path.join(folder, stem)))
        if parent not in self._pictures:
            self._pictures[parent] = {}
            for head, tail in (os.path.splitext(name) for name in sorted(self.names(parent))):
                if tail.lower() in SUFFIXES:
                    self._pictures[parent].setdefault(head, []).append(head + tail)
        return [os.path.join(parent, name) for name in self._pictures[parent].get(base, [])]

    def _read(self, folder: str) -> tuple[set[str], dict[str, str]]:
        if folder not in self._folders:
            try:
                with os.scandir(folder) as entries:
                    names = {entry.name for entry in entries}
            except (OSError, ValueError):  # ValueError: of a name that no file can have
                names = set()
            self._folders[folder] = names, {name.lower(): name for name in sorted(names)}
        return self._folders[folder]


def plain_name(name: str) -> str:
    """A file's name as annotation tools write it, with forward slashes and no `./`."""
    return str(PurePosixPath(name.strip().replace("\\", "/")))


class PictureFinder:
    """Finds the pictures that an annotation file names, in the folders where such files have theirs."""

    def __init__(self, folders: list[Path], listing: Listing) -> None:
        self.folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
        self._listing = listing
        self._bases: Counter[str] = Counter()

    def prefer(self, names: list[str], sample: int = 64) -> None:
        """The folder with most of these names, which are all that will be asked for, comes first."""
        self._bases = Counter(name.rpartition("/")[2] for name in names)
        some = names[:: max(1, len(names) // sample)]
        hits = {folder: sum(self._listing.find(folder, name) is not None for name in some) for folder in self.folders}
        self.folders.sort(key=lambda folder: -hits[folder])

    def find(self, name: str) -> str | None:
        """As it is named; else by its last part, if no other has it: such names were absolute on another machine."""
        base = name.rpartition("/")[2]
        for part in dict.fromkeys((name, base) if self._bases[base] < 2 else (name,)):
            for folder in self.folders:
                path = self._listing.find(folder, part)
                if path is not None:
                    return path
        return None
