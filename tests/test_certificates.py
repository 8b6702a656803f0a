"""Certificates as files: checked to the last figure when they are read, and never written over anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.cli import main
from saccade.errors import UserError
from saccade.verification import Verification
from saccade.verification.certificate import Digest, digest_gap, read_certificate, record
from saccade.verification.compare import Outcome


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sound() -> dict[str, Any]:
    """As JSON has it."""
    answers = {"greedy": torch.arange(4)}
    outcome = Outcome({"norm": values(2, 5)}, values(2, 3), values(), {"head.weight": values(3, 5)}, None, answers)
    certificate = {
        "certificate": 1,
        "verdict": "agrees with it",
        "source": "somewhere/tiny",
        "architecture": {"family": "vit", "projection": None},
        "versions": {"timm": "1.0"},
        "weights": {"sha256": "ab"},
        "pictures": {"sha256": "cd", "count": 2, "origin": "two", "height": 32, "width": 32},
        "recorded": {"float32": record(outcome), "float64": record(outcome)},
    }
    return json.loads(json.dumps(certificate))


def write(path: Path, certificate: Any) -> Path:
    path.write_text(json.dumps(certificate))
    return path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    read = read_certificate(write(tmp_path / "c.json", sound()))
    for name in ("architecture", "versions", "weights", "pictures", "recorded"):
        assert read[name] == sound()[name]
    assert "texts" not in read


FIGURE = ([], {}, "words", None, float("inf"), 10**400)
TABLE = ([[1.0], [1.0, 2.0]], {"shape": [2]}, "words", None, [float("nan")], [10**400])


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("architecture", ([], None)),
        ("versions", ([], {"timm": 3}, None)),
        ("weights", ({}, "ab", None)),
        ("pictures", ({}, [], None)),
        ("pictures.height", ({}, "tall")),
        ("recorded", ([], None, {"float32": {}, "float64": {}})),
        ("recorded.float64", ([], None, {})),
        ("recorded.float64.loss", FIGURE),
        ("recorded.float64.logits", TABLE),
        ("recorded.float64.answers.greedy", TABLE),
        ("recorded.float64.stages", ([], None)),
        ("recorded.float64.stages.norm", ([], {}, None)),
        ("recorded.float64.stages.norm.mean", FIGURE),
        ("recorded.float64.stages.norm.shape", ([-1], None, "2")),
        ("recorded.float64.stages.norm.projections", ([], [None], [float("nan")], None)),
        ("recorded.float64.gradients", ([], None)),
    ],
)
def test_damaged_certificate(tmp_path: Path, path: str, wrong: tuple[Any, ...]) -> None:
    *outer, last = path.split(".")
    for value in wrong:
        certificate = sound()
        place = certificate
        for name in outer:
            place = place[name]
        place[last] = value
        with pytest.raises(UserError, match=rf"c\.json: incomplete or damaged \({path}.*get it anew"):
            read_certificate(write(tmp_path / "c.json", certificate))


def test_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"c\.json: not valid JSON"):
        read_certificate(tmp_path / "c.json")


def test_more_projections_than_numbers() -> None:
    found = digest_gap("norm", values(2, 5), Digest((2, 5), 0.0, 1.0, 1.0, 50 * (0.0,)), 1.0)
    assert not found.agrees and "50 projections" in found.note


def test_only_a_certificate_makes_way_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Verification("it", {}, {}, {})
    for name, content in (("model.safetensors", b"\xff\x00 weights"), ("a.json", b'{"my": "own"}'), ("b", b"")):
        other = tmp_path / name
        other.write_bytes(content)
        assert main(["verify", "nowhere.safetensors", "--out", str(other)]) == 2
        assert f"--out {other}: exists and is no certificate" in capsys.readouterr().err, "before anything is read"
        with pytest.raises(UserError, match="choose another --out"):
            result.save(other)
        assert other.read_bytes() == content
    mine = write(tmp_path / "c.json", sound())
    result.save(mine)
    assert json.loads(mine.read_text())["verdict"] == "agrees with it"
