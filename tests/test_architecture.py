"""Imports point one way, files stay readable, and the command starts without torch. docs/architecture.md says why."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import saccade

PACKAGE = Path(saccade.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 600  # lines that one file may have

# What each room may import, beside itself, `errors`, `config` and `words`. Nothing is inherited, so that a line
# says all there is to know about its room.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "words": set(),
    "flags": set(),
    "drawing": set(),
    "synthetic": set(),
    "tokenizer": set(),
    "predictions": {"drawing"},
    "layers": set(),
    "backbones": {"layers"},
    "models": {"layers", "backbones"},
    "catalog": {"backbones", "models", "weights"},
    "explain": {"backbones", "models"},
    "decoding": {"models"},
    "data": set(),
    "metrics": {"drawing"},
    "weights.formats": {"layers", "backbones", "models", "tokenizer"},
    "weights": {"weights.formats", "layers", "backbones", "models", "tokenizer"},
    "tasks": {
        "layers", "backbones", "models", "data", "metrics", "predictions", "drawing", "explain", "tokenizer",
        "decoding",
    },  # fmt: skip
    "engine": {
        "layers", "backbones", "models", "tasks", "data", "metrics", "weights", "predictions", "drawing", "explain",
        "tokenizer", "decoding",
    },  # fmt: skip
    "verification": {"backbones", "models", "decoding", "tokenizer", "tasks", "data", "weights", "weights.formats"},
    "recipes": {"backbones", "models", "catalog", "data", "weights", "tasks", "engine"},
    "demo": {"*"},
    "api": {"*"},
    "cli_texts": {"flags", "data", "engine"},
    "cli": {"*"},
    "__init__": {"*"},
    "__main__": {"cli"},
}
EVERYWHERE = {"errors", "config", "words"}
# nothing imports these, but what starts the program or is imported by users
TOP = {"cli", "demo", "api", "__init__", "__main__"}
TOP_IMPORTERS = {"cli", "demo", "__init__", "__main__"}


def dotted(path: Path) -> str:
    """`saccade/layers/attention.py` -> `layers.attention`; the package's own file -> `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    """The longest row of the table that the module lies in."""
    parts = name.split(".")
    rows = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((row for row in rows if row in MAY_IMPORT), name)


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of saccade in the file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            # `from saccade.engine import train` imports the module, `from saccade.config import Config` a part of one
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "saccade":
                yield node.lineno, ".".join(parts[1:]) or "__init__"


def test_imports_point_one_way() -> None:
    faults = []
    for path in FILES:
        room = room_of(dotted(path))
        if room not in MAY_IMPORT:
            faults.append(f"{path.relative_to(PACKAGE)}: in no room of the table in this test")
            continue
        for line, name in own_imports(path):
            target = room_of(name)
            if name == "__version__":
                continue
            if target not in MAY_IMPORT:  # such as `from saccade import load`, a part of the package's own file
                target = "__init__"
            allowed = MAY_IMPORT[room] | EVERYWHERE | {room}
            wrong_top = target in TOP and target != room and room not in TOP_IMPORTERS
            if wrong_top or ("*" not in allowed and target not in allowed):
                faults.append(f"{path.relative_to(PACKAGE)}:{line}: {room} imports {target} ({name})")
    assert not faults, "\n" + "\n".join(faults)


def test_table_has_no_circles() -> None:
    """A table that lets two rooms import each other would allow what this file is there to prevent."""

    def reach(room: str, seen: tuple[str, ...]) -> None:
        assert room not in seen, " -> ".join([*seen, room])
        for target in MAY_IMPORT[room] - {"*"}:
            reach(target, (*seen, room))

    for room in MAY_IMPORT:
        reach(room, ())


def test_layers_need_only_torch() -> None:
    foreign = set()
    for path in FILES:
        if not dotted(path).startswith("layers"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                foreign |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                foreign.add(str(node.module).split(".")[0])
    assert foreign - set(sys.stdlib_module_names) <= {"torch", "jaxtyping", "saccade"}


def test_no_room_for_odds_and_ends() -> None:
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [str(path) for path in FILES if names & {*path.relative_to(PACKAGE).with_suffix("").parts}]


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_file_is_readable_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LIMIT, f"{path.relative_to(PACKAGE)} has {lines} lines; split it along its concepts"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_bare_except_and_no_keyword_sinks(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: a bare except hides every fault"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # the public `saccade.train(...)` takes all settings by name and has every one of them validated
            public = dotted(path) == "__init__" and node.name == "train"
            assert node.args.kwarg is None or public, f"{path}:{node.lineno}: {node.name} takes any keyword; name them"


@pytest.mark.parametrize("name", [dotted(path) for path in FILES if dotted(path) not in ("__init__", "__main__")])
def test_module_imports(name: str) -> None:
    importlib.import_module(f"saccade.{name}")


@pytest.mark.parametrize("name", ["saccade", "saccade.cli", "saccade.config", "saccade.errors"])
def test_starts_without_torch(name: str) -> None:
    heavy = "'torch', 'torchvision', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'PIL', 'tensorboard', 'jaxtyping'"
    code = f"import sys, {name}; print(*sorted({{{heavy}}} & set(sys.modules)))"
    python = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert python.stdout.split() == []
