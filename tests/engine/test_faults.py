"""What goes wrong during a run: losses that are not finite, pictures that cannot be read, disks that are full."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import saccade
from saccade import UserError
from saccade.backbones import BACKBONES
from saccade.backbones.levit import LEVIT
from saccade.config import RunConfig
from saccade.data import measured
from saccade.data.sources import open_splits
from saccade.engine import train as engine
from saccade.engine.checkpoint import list_checkpoints
from saccade.engine.distributed import World
from saccade.engine.ema import Ema
from saccade.engine.run_folder import resume_config
from saccade.tasks.classification import ClassificationTask
from saccade.weights import model_file

Build = Callable[..., RunConfig]


def snapshot(session: engine.Session) -> dict[str, Any]:
    state = {
        "model": session.model.state_dict(),
        "optimizers": [optimizer.state_dict()["state"] for optimizer in session.optimizers],
    }
    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, state)


def assert_same(one: Any, two: Any) -> None:
    ones, shape = tree_flatten(one)
    twos, other = tree_flatten(two)
    assert shape == other
    for a, b in zip(ones, twos, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Watched:
    """Spoils chosen steps, and keeps what was before and after each of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int], spoil: Callable[[torch.Tensor], torch.Tensor]):
        self.steps, self.now = steps, -1
        self.before: dict[int, Any] = {}
        self.after: dict[int, Any] = {}
        self.samples: dict[int, list[int]] = {}
        self.averaged: list[int] = []
        take_step, losses, update = engine.train_step, ClassificationTask.losses, Ema.update

        def watched_step(session: engine.Session, batches: Any, number: int) -> engine.StepResult:
            self.now = number
            self.before[number] = snapshot(session)
            result = take_step(session, batches, number)
            self.after[number] = snapshot(session)
            self.samples[number] = result.indices
            return result

        def watched_losses(task: ClassificationTask, outputs: Any, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            found = losses(task, outputs, targets)
            if outputs.logits.requires_grad and self.now in self.steps:
                return {name: spoil(value) for name, value in found.items()}
            return found

        def watched_update(ema: Ema, step: int) -> None:
            self.averaged.append(step)
            update(ema, step)

        monkeypatch.setattr(engine, "train_step", watched_step)
        monkeypatch.setattr(ClassificationTask, "losses", watched_losses)
        monkeypatch.setattr(Ema, "update", watched_update)


class SpoilGradient(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * math.nan


SPOIL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN": lambda value: value * math.nan,
    "infinity": lambda value: value + math.inf,
    "gradient": lambda value: SpoilGradient.apply(value),  # pyright: ignore[reportReturnType]
}


@pytest.mark.parametrize(
    ("model", "spoil", "optimizer"),
    [("cct_nano", "NaN", "adamw"), ("cct_nano", "gradient", "muon"), ("vit_micro", "infinity", "adamw")],
)
def test_fault_changes_nothing(
    config: Build,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    spoil: str,
    optimizer: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoilt = {0, 3, 4}
    watched = Watched(monkeypatch, spoilt, SPOIL[spoil])
    settings = config(model=model, steps=7, optimizer={"name": optimizer})
    result = engine.train(settings, show=True)
    assert result.finished and result.steps == 7
    for step in range(7):
        if step in spoilt:
            assert_same(watched.before[step], watched.after[step])
        else:
            with pytest.raises(AssertionError):
                assert_same(watched.before[step], watched.after[step])
    assert watched.averaged == [1, 2, 5, 6]
    rows = [json.loads(line) for line in (Path(settings.out) / "faults.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(spoilt)
    source = open_splits(Path(settings.data)).train
    assert [row["samples"] for row in rows] == [[source.id(i) for i in watched.samples[k]] for k in sorted(spoilt)]
    assert {row["fault"] for row in rows} == {"gradient" if spoil == "gradient" else "loss"}
    told = capsys.readouterr().err
    assert told.count("is not finite") == 3 and "faults.jsonl" in told
    for row in (Path(settings.out) / "metrics.csv").read_text().splitlines()[1:]:
        assert "nan" not in row, "the mean training loss is of the sound steps"


def test_fault_in_a_part_of_an_accumulated_step(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the parts before it are dropped, too."""
    calls = []

    def second(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return value * math.nan if len(calls) == 2 else value

    watched = Watched(monkeypatch, {1}, second)
    result = engine.train(config(model="cct_nano", steps=4, optimizer={"accumulate": 2}), show=False)
    assert result.finished and len(calls) == 2
    assert_same(watched.before[1], watched.after[1])
    assert len(watched.samples[1]) == 16, "all samples of the step are named"


def test_several_faults_in_a_row_stop_the_run(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, {1, 3, 4, 5, 6}, SPOIL["NaN"])
    settings = config(steps=9, max_faults=3, checkpoint_seconds=0)
    with pytest.raises(UserError, match=r"3 steps in a row with a non-finite loss.*faults\.jsonl"):
        engine.train(settings, show=False)
    assert watched.now == 5
    folder = Path(settings.out)
    assert len((folder / "faults.jsonl").read_text().splitlines()) == 4
    assert list_checkpoints(folder / "checkpoints")[0].name == "step-000000005.pt"


def test_faults_are_remembered_by_a_resumed_run(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of faults in a row and the file of faults go on where they were."""
    settings = config(steps=9, max_faults=3, checkpoint_seconds=0)
    watched = Watched(monkeypatch, {0, 3, 4, 5}, SPOIL["NaN"])
    for _ in range(2):
        with pytest.raises(UserError, match="3 steps in a row"):
            engine.train(resume_config(Path(settings.out), {}) if watched.after else settings,
                         resume=bool(watched.after), show=False)  # fmt: skip
    assert watched.now == 5
    lines = (Path(settings.out) / "faults.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fault_in_one_of_two_processes(strategy: str, pictures: Path, tmp_path: Path) -> None:
    """All skip the step, so that they stay equal."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from saccade.cli import main\n"
        "from saccade.tasks.classification import ClassificationTask\n"
        "losses, count = ClassificationTask.losses, [0]\n"
        "def spoilt(task, outputs, targets):\n"
        "    found = losses(task, outputs, targets)\n"
        "    count[0] += 1\n"
        "    bad = os.environ['RANK'] == '1' and count[0] == 3\n"
        "    return {name: value * float('nan') if bad else value for name, value in found.items()}\n"
        "ClassificationTask.losses = spoilt\n"
        "sys.exit(main())\n"
    )
    flags = ["--model=cct_nano", "--image-size=16", "--steps=6", "--batch-size=8", "--precision=float32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(saccade.__file__).parents[1])}
    ended = subprocess.run(
        [*command, "train", str(pictures), *flags, "--device=cpu", f"--distributed.strategy={strategy}",
         "--out", str(tmp_path / "run")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert row["step"] == 2 and len(row["samples"]) == 8, "of both processes"


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_picture_is_reported_once(
    config: Build, fresh_pictures: Callable[..., Path], workers: int, capsys: pytest.CaptureFixture
) -> None:
    data = fresh_pictures()
    bad = data / "train" / "red" / "3.png"
    bad.write_bytes(b"this is text")
    cut = data / "train" / "blue" / "5.png"
    cut.write_bytes(cut.read_bytes()[:200])
    result = engine.train(config(data=str(data), workers=workers), show=True)
    assert result.finished and set(result.unreadable) == {str(bad), str(cut)}
    told = capsys.readouterr().err
    assert told.count(str(bad)) == 1 and told.count(str(cut)) == 1, "four epochs, one word each"


def test_no_readable_picture_is_an_error(config: Build, fresh_pictures: Callable[..., Path]) -> None:
    data = fresh_pictures()
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"this is text")
    with pytest.raises(UserError, match="no training picture can be read"):
        engine.train(config(data=str(data)), show=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_any_readable_picture(
    config: Build, fresh_pictures: Callable[..., Path], accumulate: int, precision: str
) -> None:
    """It teaches nothing and is no fault, however many batches it has."""
    data = fresh_pictures()
    for path in sorted((data / "train").rglob("*.png"))[:22]:
        path.write_bytes(b"this is text")
    how = {"optimizer": {"accumulate": accumulate}, "precision": precision}
    settings = config(data=str(data), batch_size=2, steps=12, **how)
    result = engine.train(settings, show=False)
    assert result.finished and not (Path(settings.out) / "faults.jsonl").exists()


@pytest.mark.parametrize("readable", [0, 1])
def test_one_readable_picture_in_a_batch(config: Build, monkeypatch: pytest.MonkeyPatch, readable: int) -> None:
    """It has no statistics of a batch: the running ones serve, and stay. A batch that was to have one is an error."""
    row = replace(LEVIT["levit_128s"], dims=(16, 24, 32), heads=(2, 2, 2), key_dim=8, depths=(1, 1, 1))
    monkeypatch.setitem(BACKBONES, "levit_micro", row)
    settings = config(model="levit_micro", optimizer={"name": "adamw"}, preprocessing={"image_size": 32})
    session = engine.open_session(settings, World())
    batch = next(session.data.train_batches(0, 1))
    lone = replace(
        batch, images=batch.images[:1], targets=batch.targets[:1] * readable, indices=batch.indices[:readable]
    )
    with pytest.raises(UserError, match="larger --batch-size"):
        engine.train_step(session, iter([replace(lone, indices=batch.indices[:1])]), 0)
    before = {name: buffer.clone() for name, buffer in session.model.named_buffers()}
    broken = replace(lone, unreadable=[(0, "broken"), (1, "broken")])
    assert engine.train_step(session, iter([broken]), 0).fault == ""
    for name, buffer in session.model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(module.training for module in session.model.modules())
    engine.train_step(session, iter([batch]), 1)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in session.model.named_buffers())


@pytest.mark.parametrize("few", [True, False])
def test_unreadable_pictures_for_validation_are_reported_once(
    config: Build,
    fresh_pictures: Callable[..., Path],
    few: bool,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the run where there are few pictures, else when it is first measured; they do not count."""
    monkeypatch.setattr(measured, "FEW", 64 if few else 2)
    data = fresh_pictures()
    cut = data / "val" / "blue" / "1.png"
    cut.write_bytes(cut.read_bytes()[:200])
    result = engine.train(config(data=str(data)), show=True)
    assert result.finished and result.unreadable == {}
    assert len(result.unmeasured) == 1 and str(cut) in result.unmeasured[0]
    told = capsys.readouterr().err
    assert told.count(f"note: not measured on: {cut}: the file is cut off") == 1
    before_the_first_row = told.partition("val_top1")[0]
    assert (str(cut) in before_the_first_row) and told.count(str(cut)) == 1


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("few", "text"), [(True, None), (False, b"this is text"), (False, None)])
def test_a_split_of_nothing_but_unreadable_pictures(
    config: Build,
    fresh_pictures: Callable[..., Path],
    split: str,
    few: bool,
    text: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found before the run, but for many pictures whose headers are sound; one of them is named."""
    monkeypatch.setattr(measured, "FEW", 64 if few else 2)
    data = fresh_pictures()
    for path in (data / split).rglob("*.png"):
        path.write_bytes(text or path.read_bytes()[:200])
    late = not few and text is None
    said = "no training picture can be read" if split == "train" else "no validation picture can be read"
    if late and split == "val":
        said = "none of 9 pictures can be read"
    settings = config(data=str(data))
    with pytest.raises(UserError, match=said) as caught:
        engine.train(settings, show=False)
    assert (str(data / split) in str(caught.value)) and Path(settings.out).exists() == late


# --- disks -----------------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
    if "w" in mode and "run" in str(path):
        raise PermissionError(errno.EROFS, "Read-only file system", str(path))
    return builtins.open(path, mode, *rest, **options)


class FailsAt:
    """Calls through until the n-th call, which and all after which fail as on a full disk."""

    def __init__(self, function: Callable[..., Any], number: int):
        self.function, self.left = function, number

    def __call__(self, *values: Any, **options: Any) -> Any:
        self.left -= 1
        return full() if self.left < 0 else self.function(*values, **options)


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_full_disk_ends_the_run(config: Build, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    settings = config(steps=8, checkpoint_seconds=0, evaluations=1)
    name, attribute = where.split(".")
    module = {"torch": torch, "os": os}[name]
    # the settings and the plan are written first
    count = {"torch.save": 3, "os.fsync": 4 + 3 * 2, "os.replace": 2 + 3}[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, attribute, FailsAt(getattr(module, attribute), count))
        with pytest.raises(UserError, match=r"the state at step 4 cannot be saved \(.*[Nn]o space left"):
            engine.train(settings, show=False)
    folder = Path(settings.out)
    found = list_checkpoints(folder / "checkpoints")
    assert [path.name for path in found] == ["step-000000003.pt", "step-000000002.pt"]
    assert not list(folder.rglob("*.tmp"))
    assert engine.train(resume_config(folder, {}), resume=True, show=False).finished


def test_full_disk_when_the_model_is_kept(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(steps=8, checkpoint_seconds=0, evaluations=2)
    saved = []
    write = model_file.write_atomically

    def fails_second_time(path: Path, data: bytes, **options: Any) -> None:
        if path.name == "model.safetensors":
            saved.append(path)
        with monkeypatch.context() as patch:
            if len(saved) == 2:
                patch.setattr(os, "fsync", full)
            write(path, data, **options)

    monkeypatch.setattr(model_file, "write_atomically", fails_second_time)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be written \(No space left on device\)"):
        engine.train(settings, show=False)
    assert len(saved) == 2
    assert saccade.load(settings.out).class_names == ("blue", "green", "red"), "the one before is whole"
    assert not list(Path(settings.out).rglob("*.tmp"))


def test_read_only_run_folder(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "open", read_only, raising=False)
        with pytest.raises(UserError, match=r"config\.json: cannot be written \(Read-only file system\)"):
            engine.train(settings, show=False)
    assert engine.train(settings, show=False).finished, "a folder in which nothing could be written is no run"


@pytest.mark.skipif(os.geteuid() == 0, reason="for root every folder is writable")
def test_truly_read_only_folder(config: Build, tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be made"):
        engine.train(config(out=str(parent / "run")), show=False)


def test_full_disk_under_the_events(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.engine import events

    class Full(events.RecordWriter):
        def write(self, data: bytes) -> None:
            full()

    monkeypatch.setattr(events, "RecordWriter", Full)
    with pytest.raises(UserError, match="events: cannot be written .No space left"):
        engine.train(config(steps=2), show=False)


def test_files_that_truly_cannot_grow(runner: Any, killing: Any, pictures: Path, tmp_path: Path) -> None:
    """A limit of the system on the size of files, so that the writes themselves fail, inside torch's own writer."""
    flags = ["--model=cct_nano", "--image-size=16", "--steps=8", "--batch-size=8", "--checkpoint-seconds=0",
             "--evaluations=2", "--device=cpu", "--precision=float32"]  # fmt: skip

    def start(*arguments: Any, **how: Any) -> Any:
        return runner.run(["train", *arguments], scratch=tmp_path / "scratch", **how)

    assert start(pictures, *flags, "--out", tmp_path / "reference").code == 0
    run = tmp_path / "run"
    assert start(pictures, *flags, "--out", run, kill_at="before step 5").code == -signal.SIGKILL
    before = [(path.name, path.read_bytes()) for path in list_checkpoints(run / "checkpoints")]
    for limit in (200_000, 2_000_000):
        ended = start("--resume", run, file_limit=limit)
        assert ended.code == 2, ended.output
        assert "cannot be saved" in ended.output and "--resume" in ended.output and "Traceback" not in ended.output
        assert [(path.name, path.read_bytes()) for path in list_checkpoints(run / "checkpoints")] == before
        assert not list(run.rglob("*.tmp"))
    assert start("--resume", run).code == 0
    assert killing.differences(run, tmp_path / "reference") == []


def test_no_checkpoints_folder(config: Build) -> None:
    """Someone tidied up meanwhile: the run begins anew rather than to end in a traceback."""
    settings = config(steps=3)
    engine.train(settings, show=False)
    model = (Path(settings.out) / "model.safetensors").read_bytes()
    shutil.rmtree(Path(settings.out) / "checkpoints")
    assert engine.train(resume_config(Path(settings.out), {}), resume=True, show=False).finished
    assert (Path(settings.out) / "model.safetensors").read_bytes() == model


def test_a_run_without_a_step_leaves_nothing(config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused in its first step, after all that comes before was written: the corrected command is not refused."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")

    def refused(*_: Any) -> engine.StepResult:
        assert {path.name for path in folder.iterdir()} >= {"config.json", "plan.json", "events"}
        raise UserError("a larger --batch-size")

    settings = config(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", refused)
        with pytest.raises(UserError, match="larger"):
            engine.train(settings, show=False)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert engine.train(settings, show=False).finished


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.csv", "tokenizer.json", "plan.json", "faults.jsonl"])
def test_files_of_others_are_not_overwritten(config: Build, tmp_path: Path, name: str) -> None:
    """Such as a lone model file, which the run perhaps begins from."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(UserError, match=f"run: holds {name}, where a run would write its own; choose another --out"):
        engine.train(config(), show=False)
    assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == "mine"


HOLD = """
import sys
from pathlib import Path
from saccade.engine.lock import alone_in
with alone_in(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_continued_by_one_process_at_a_time(config: Build) -> None:
    run = config()
    folder = Path(run.out)
    engine.train(run, show=False)
    assert not (folder / "checkpoints" / "lock").exists()
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    command = [sys.executable, "-c", HOLD, str(folder / "checkpoints")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"^{folder}: another process is training in it; let that one end"):
            engine.train(resume_config(folder, {}), resume=True, show=False)
        assert {path: path.read_bytes() for path in before} == before
        other.kill()
    assert (folder / "checkpoints" / "lock").exists()  # who is killed leaves it, and it hinders nobody
    engine.train(resume_config(folder, {}), resume=True, show=False)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
