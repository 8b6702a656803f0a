"""The commands in README.md run.

A fenced block is executed when an HTML comment stands on the line before it:

    <!-- runs -->          the block runs in every test run
    <!-- runs slow -->     the block runs with the slow tests (such as `saccade demo`)

Without such a comment a block is only shown. In a `console` block the lines that start with `$ ` are commands (a line
that ends in a backslash goes on in the next); all else is their output, which is not compared. A `python` block is one
program. All blocks of one kind run in their order in one folder, so that a later one finds the run of an earlier one.

The data of the README are replaced by tiny ones: the word `DATA` and any path that ends in `data/flowers` by a folder
of 48 pictures of two classes (`train/` and `val/`), `photo.jpg` by one picture, `folder/` by a folder of two;
`--minutes 5` and `--epochs 30` by very short runs.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import saccade

README = Path(__file__).resolve().parents[1] / "README.md"

BLOCK = re.compile(r"^<!-- runs(?P<slow> slow)? -->\n+```(?P<kind>console|python)\n(?P<text>.*?)^```$", re.M | re.S)

SHORTER = [
    (re.compile(r"(--minutes[ =])\S+"), r"\g<1>0.05"),
    (re.compile(r"(--epochs[ =])\S+"), r"\g<1>1"),
    (re.compile(r"\b(minutes=)[\d.]+"), r"\g<1>0.05"),
    (re.compile(r"\b(epochs=)[\d.]+"), r"\g<1>1"),
    (re.compile(r"(?<![\w./-])(?:DATA|(?:[\w.-]+/)*data/flowers|flowers)(?![\w.-])"), "data/flowers"),
]


@dataclass(frozen=True)
class Block:
    kind: str
    slow: bool
    text: str
    line: int

    def program(self) -> str:
        """The block as it is executed here."""
        text = self.text if self.kind == "python" else "\n".join(commands(self.text))
        for pattern, replacement in SHORTER:
            text = pattern.sub(replacement, text)
        return text


def commands(text: str) -> list[str]:
    """The commands of a console block."""
    found: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
    return found


def blocks(markdown: str) -> list[Block]:
    return [
        Block(match["kind"], match["slow"] is not None, match["text"], markdown.count("\n", 0, match.start()) + 1)
        for match in BLOCK.finditer(markdown)
    ]


def draw(path: Path, label: int, rng: random.Random) -> None:
    """Two classes that anybody can tell apart: a disc, or a cross."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = rng.choice([(48, 32), (32, 48), (40, 40)])
    image = Image.new("RGB", (width, height), tuple(rng.randrange(60) for _ in range(3)))
    pen, colour = ImageDraw.Draw(image), tuple(rng.randrange(150, 256) for _ in range(3))
    x, y, r = rng.randrange(12, width - 12), rng.randrange(12, height - 12), rng.randrange(6, 11)
    if label:
        pen.line((x - r, y - r, x + r, y + r), colour, 3)
        pen.line((x - r, y + r, x + r, y - r), colour, 3)
    else:
        pen.ellipse((x - r, y - r, x + r, y + r), colour)
    image.save(path, quality=90)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the README's reader has: a command on the path, a folder of pictures, and some new pictures."""
    rng = random.Random(0)
    for split, count in (("train", 16), ("val", 8)):
        for label, name in enumerate(("disc", "cross")):
            for number in range(count):
                draw(tmp_path / "data" / "flowers" / split / name / f"{number}.jpg", label, rng)
    draw(tmp_path / "photo.jpg", 0, rng)
    for number in range(2):
        draw(tmp_path / "folder" / f"{number}.jpg", number, rng)
    command = tmp_path / "bin" / "saccade"
    command.parent.mkdir()
    code = "import sys; sys.argv[0] = 'saccade'; from saccade.cli import main; sys.exit(main())"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    command.chmod(0o755)
    return tmp_path


def execute(block: Block, folder: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "Agg", "COLUMNS": "100"}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment["PYTHONPATH"] = str(Path(saccade.__file__).parents[1])
    program = block.program()
    start = [sys.executable, "-c"] if block.kind == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*start, program], cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"README.md:{block.line} ended with {done.returncode}\n{program}\n{done.stdout}"


def test_readme_runs(folder: Path) -> None:
    found = [block for block in blocks(README.read_text(encoding="utf-8")) if not block.slow]
    assert found, "no block of README.md is marked with <!-- runs -->"
    for block in found:
        execute(block, folder)


@pytest.mark.slow
def test_slow_parts_of_readme_run(folder: Path) -> None:
    found = [block for block in blocks(README.read_text(encoding="utf-8")) if block.slow]
    if not found:
        pytest.skip("no block of README.md is marked with <!-- runs slow -->")
    for block in found:
        execute(block, folder)


def test_marks_are_understood() -> None:
    """A mark with a typo would leave its block untested."""
    markdown = README.read_text(encoding="utf-8")
    marks = re.findall(r"<!--\s*run.*?-->", markdown)
    assert len(marks) == len(blocks(markdown)), f"{marks}: a mark stands on the line before its block, as in this file"


def test_reader_of_blocks() -> None:
    markdown = """Text

<!-- runs -->
```console
$ saccade train ../shared/data/flowers --minutes 5 \\
    --out runs/flowers
epoch 1
$ saccade evaluate runs/flowers ../shared/data/flowers/val
```

```console
$ pip install .
```

<!-- runs slow -->
```python
saccade.train("DATA", epochs=30)
```
"""
    console, python = blocks(markdown)
    assert (console.kind, console.slow, console.line) == ("console", False, 3)
    assert console.program().splitlines() == [
        "saccade train data/flowers --minutes 0.05      --out runs/flowers",
        "saccade evaluate runs/flowers data/flowers/val",
    ]
    assert (python.kind, python.slow, python.program()) == ("python", True, 'saccade.train("data/flowers", epochs=1)\n')
