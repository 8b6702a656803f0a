"""What every benchmark writes: a JSON file that is merged by name, so that runs can be made in parts, and a table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def versions(packages: Sequence[str] = ("torch", "torchvision", "timm", "pillow")) -> dict[str, str]:
    """Versions of the named packages, as far as they are installed, and of Python and the processor's kind."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Load:
    """How much of the processor other processes took meanwhile: a timing made on a busy machine is known as such."""

    def __init__(self) -> None:
        self.start = self.now()

    @staticmethod
    def now() -> tuple[float, float, float]:
        """Seconds of processor time of this process and its ended children, of the whole machine, and on the wall."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return own, machine_seconds(), time.perf_counter()

    def others(self) -> float:
        """Cores that others kept busy on average; nan where the system does not tell."""
        own, machine, wall = (after - before for after, before in zip(self.now(), self.start, strict=True))
        return max(0.0, machine - own) / max(wall, 1e-9)


def machine_seconds() -> float:
    try:
        user, nice, system, _idle, _wait, *interrupts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return float("nan")
    return sum(int(ticks) for ticks in (user, nice, system, *interrupts)) / os.sysconf("SC_CLK_TCK")


def read(path: Path) -> dict[str, Row]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def merge(path: Path, rows: Iterable[Row]) -> dict[str, Row]:
    """Put `rows` into the file, each under its `name`; rows of other names stay. Returns all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = read(path) | {row["name"]: row for row in rows}
    # a benchmark of half an hour must not lose what is there when it is stopped while it writes
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(json.dumps(everything, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return everything


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A markdown table; `columns` maps a key of the rows to its format, such as `top1: .1f`."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
