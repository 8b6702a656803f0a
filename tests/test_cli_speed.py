"""`--help` and a wrong flag answer at once, because nothing heavy is imported for them. (No test measures time.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import saccade

HEAVY = {"torch", "torchvision", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "tensorboard", "safetensors"}

RUN = """
import json, sys
report = sys.argv.pop(1)
sys.argv[0] = "saccade"
from saccade.cli import main
try:
    code = main()
except SystemExit as end:
    code = end.code
with open(report, "w") as file:
    json.dump({"code": code or 0, "modules": sorted({name.partition(".")[0] for name in sys.modules})}, file)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["predict", "--help"], 0),
        (["embed", "--help"], 0),
        (["verify", "--help"], 0),
        (["inspect", "--help"], 0),
        (["models", "--help"], 0),
        (["demo", "--help"], 0),
        ([], 0),
        (["trian"], 2),
        (["train", "photos", "--epoch", "3"], 2),
        (["train", "photos", "--epochs", "many"], 2),
        (["train", "photos", "--optimizer.wieght-decay", "0.1"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answers_without_heavy_imports(arguments: list[str], code: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    answer = subprocess.run(
        [sys.executable, "-c", RUN, str(report), *arguments],
        capture_output=True, text=True, cwd=Path(saccade.__file__).parents[1], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert report.exists(), answer.stderr
    found = json.loads(report.read_text())
    assert HEAVY & set(found["modules"]) == set()
    assert found["code"] == code, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    assert (answer.stdout if code == 0 else answer.stderr).strip(), "no answer"
