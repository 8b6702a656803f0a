"""A run that is killed and resumed ends as one that was never stopped, bit for bit.

A few kills are here; `python -m benchmarks.resume_matrix` makes all of them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from saccade import UserError
from saccade.cli import main
from saccade.engine import checkpoint
from saccade.engine.checkpoint import list_checkpoints
from saccade.engine.distributed import World
from saccade.engine.run_folder import resume_config
from saccade.engine.train import train

COMMON = [
    "--image-size=16", "--steps=8", "--batch-size=8", "--checkpoint-seconds=0", "--evaluations=3", "--device=cpu",
    "--precision=float32",
]  # fmt: skip

# every source of randomness and state is on in one of them
VARIANTS = {
    "vit, AdamW": [
        "--model=vit_micro", "--optimizer.name=adamw", "--network.drop-path=0.2", "--augment.mixup=0.3",
        "--network.dropout=0.1",
    ],
    "vit, Muon": ["--model=vit_micro", "--optimizer.name=muon", "--network.registers=2", "--augment.policy=rand"],
    "cct, AdamW": [
        "--model=cct_nano", "--optimizer.name=adamw", "--augment.erase=0.5", "--augment.cutmix=1.0",
        "--optimizer.layer-decay=0.8",
    ],
    "cct, Muon, bfloat16": [
        "--model=cct_nano", "--optimizer.name=muon", "--ema.decay=none", "--optimizer.accumulate=2",
        "--precision=bfloat16",
    ],
}  # fmt: skip


class Place:
    """One uninterrupted run, and a folder for the others."""

    def __init__(self, runner: Any, killing: Any, folder: Path, data: Path, flags: list[str]):
        self.runner, self.killing, self.folder, self.data, self.flags = runner, killing, folder, data, flags
        self.reference = folder / "reference"
        ended = self.train(self.reference)
        assert ended.code == 0, ended.output
        self.moments = ended.moments

    def train(self, run: Path, **how: Any) -> Any:
        arguments = ["train", self.data, *COMMON, *self.flags, "--out", run]
        return self.runner.run(arguments, scratch=self.folder / "scratch", **how)

    def resume(self, run: Path, *flags: str, **how: Any) -> Any:
        return self.runner.run(["train", "--resume", run, *flags], scratch=self.folder / "scratch", **how)

    def copy(self, run: Path) -> Path:
        """The uninterrupted run, for a test that spoils it."""
        shutil.copytree(self.reference, run)
        return run

    def assert_equal(self, run: Path) -> None:
        assert self.killing.differences(run, self.reference) == []


@pytest.fixture(scope="module")
def spoilt_pictures(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """With one that cannot be read: that it was reported is state, too."""
    root = tmp_path_factory.mktemp("spoilt") / "colours"
    shutil.copytree(pictures, root)
    (root / "train" / "red" / "0.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, runner: Any, killing: Any, spoilt_pictures: Path) -> Place:
    return Place(runner, killing, tmp_path_factory.mktemp("runs"), spoilt_pictures, VARIANTS["vit, AdamW"])


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_twice_with_other_workers(
    variant: str, runner: Any, killing: Any, spoilt_pictures: Path, tmp_path: Path
) -> None:
    place = Place(runner, killing, tmp_path, spoilt_pictures, VARIANTS[variant])
    run = tmp_path / "run"
    assert place.train(run, kill_at="after step 2").code == -signal.SIGKILL
    assert place.resume(run, "--workers=1", kill_at="before step 5").code == -signal.SIGKILL
    ended = place.resume(run, "--workers=2")
    assert ended.code == 0, ended.output
    assert "continuing at step 5" in ended.output
    place.assert_equal(run)


@pytest.mark.parametrize(
    ("kill_at", "left"),
    [
        ("half of a state is written", 0),
        ("before renaming to step-000000004.pt", 3),
        ("after renaming to step-000000004.pt", 4),
        ("half of .model.safetensors.tmp is written", 2),
        ("before renaming to metrics.csv", 2),
        ("before renaming to plan.json", 0),
        ("after renaming to config.json", 0),
    ],
)
def test_killed_inside_a_save(place: Place, kill_at: str, left: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert place.train(run, kill_at=kill_at).code == -signal.SIGKILL
    newest = list_checkpoints(run / "checkpoints")
    assert [path.name for path in newest[:1]] == ([f"step-{left:09d}.pt"] if left else [])
    ended = place.resume(run)
    assert ended.code == 0, ended.output
    place.assert_equal(run)
    assert not list(run.rglob(".*.tmp")), "files of the broken save are left"


@pytest.mark.slow
def test_killed_at_every_moment_of_a_save(place: Place, tmp_path: Path) -> None:
    """Between the third evaluation's first step and the step after it: everything that is ever written is written."""
    first, last = place.moments.index("after step 5"), place.moments.index("after step 6")
    for moment in range(first, last):
        run = tmp_path / str(moment)
        assert place.train(run, kill_at=moment).code == -signal.SIGKILL
        ended = place.resume(run)
        assert ended.code == 0, ended.output
        place.assert_equal(run)


def test_killed_before_anything_is_written(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert place.train(run, kill_at=0).code == -signal.SIGKILL
    ended = place.resume(run)
    assert ended.code == 2 and "config.json" in ended.output and "Traceback" not in ended.output
    assert place.train(run).code == 0, "a folder in which nothing has begun is no run"
    place.assert_equal(run)


# --- SIGTERM and SIGINT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "group", "workers"), [(signal.SIGTERM, False, 1), (signal.SIGINT, True, 2)])
def test_signal_saves_and_stops(
    place: Place, number: signal.Signals, group: bool, workers: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [argument for argument in COMMON if not argument.startswith("--checkpoint-seconds")]
    ended = place.runner.run(
        ["train", place.data, *arguments, *place.flags, "--out", run, f"--workers={workers}"],
        scratch=tmp_path / "scratch", kill_at="before step 3", number=number, group=group,
    )  # fmt: skip
    assert ended.code == 128 + number, ended.output
    assert f"stopped at step 4 of 8; continue with: saccade train --resume {run}" in ended.output
    assert "Traceback" not in ended.output
    assert list_checkpoints(run / "checkpoints")[0].name == "step-000000004.pt"
    ended = place.resume(run)
    assert ended.code == 0 and "continuing at step 4" in ended.output
    place.assert_equal(run)


def test_terminating_the_whole_group_saves_and_stops(place: Place, tmp_path: Path) -> None:
    """As `timeout` and batch systems do: the workers get the signal, too."""
    run = tmp_path / "run"
    how: dict[str, Any] = {"kill_at": "before step 3", "number": signal.SIGTERM, "group": True}
    ended = place.runner.run(
        ["train", place.data, *COMMON, *place.flags, "--out", run, "--workers=2"], scratch=tmp_path / "scratch", **how
    )
    assert ended.code == 143, ended.output
    assert place.resume(run).code == 0
    place.assert_equal(run)


def test_signal_in_the_last_step_is_no_stop(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = place.train(run, kill_at="before step 7", number=signal.SIGTERM)
    assert ended.code == 0 and "finished in" in ended.output
    place.assert_equal(run)


# --- damaged states --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(place: Place) -> Path:
    """A run that was killed after the fifth state was saved; copy it before you change it."""
    run = place.folder / "killed"
    assert place.train(run, kill_at="before step 5").code == -signal.SIGKILL
    return run


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another run's"])
def test_damaged_newest_state(place: Place, killed: Path, damage: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    newest, before = list_checkpoints(run / "checkpoints")
    match damage:
        case "truncated":
            os.truncate(newest, newest.stat().st_size // 2)
        case "empty":
            newest.write_bytes(b"")
        case "text":
            newest.write_text("not a state")
        case "another run's":
            state = torch.load(newest, weights_only=True)
            state["model"]["head.weight"] = state["model"]["head.weight"][:2]
            torch.save(state, newest)
    ended = place.resume(run)
    assert ended.code == 0, ended.output
    assert f"passed over: {newest}" in ended.output and "continuing at step 4" in ended.output
    place.assert_equal(run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000000007.pt", "step-000000008.pt"}
    assert before.name == "step-000000004.pt"


def test_damaged_states_never_push_out_sound_ones(place: Place, killed: Path, tmp_path: Path) -> None:
    """A kill between rename and clean-up leaves three; with two of them damaged, the sound one is the oldest."""
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    for step in (6, 7):
        (run / "checkpoints" / f"step-{step:09d}.pt").write_bytes(b"damaged")
    assert place.resume(run, kill_at="after renaming to step-000000006.pt").code == -signal.SIGKILL
    assert place.resume(run, kill_at="before step 7").code == -signal.SIGKILL
    found = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert found == ["step-000000007.pt", "step-000000006.pt"]
    assert place.resume(run).code == 0
    place.assert_equal(run)


def test_all_states_damaged(killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    paths = list_checkpoints(run / "checkpoints")
    for path in paths:
        os.truncate(path, 1000)
    assert main(["train", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint can be used" in error and "Traceback" not in error
    assert error.count(str(paths[0])) == 2 and error.count(str(paths[1])) == 1
    assert error.count("the one before it is used") == 1 and "start anew with another --out" in error
    assert f"--weights {run} to begin from its best model" in error
    (run / "model.safetensors").unlink()
    paths[0].unlink()
    assert main(["train", "--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "passed over" not in error and "--weights" not in error and error.count(str(paths[1])) == 1
    del paths[0]
    assert list_checkpoints(run / "checkpoints") == paths, "damaged states are the user's to remove"


class Payload:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "torch", "in the progress"])
def test_state_with_code_is_not_executed(
    killed: Path, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    created = tmp_path / "created"
    for path in list_checkpoints(run / "checkpoints"):
        if form == "pickle":
            path.write_bytes(pickle.dumps(Payload(created)))
        elif form == "torch":
            torch.save(Payload(created), path)
        else:
            state = torch.load(path, weights_only=True)
            torch.save({**state, "progress": {"step": Payload(created)}}, path)
    assert main(["train", "--resume", str(run)]) == 2
    assert not created.exists()
    error = capsys.readouterr().err
    assert "not executed" in error and "Traceback" not in error
    Path.touch(created)  # the payload's own action works
    assert created.exists()


@pytest.mark.parametrize("progress", [{"steps": 3}, 3, None])
def test_state_without_progress(killed: Path, progress: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    for path in list_checkpoints(run / "checkpoints"):
        torch.save({**torch.load(path, weights_only=True), "progress": progress}, path)
    with pytest.raises(UserError, match="no checkpoint can be used"):
        train(resume_config(run, {}), resume=True, show=False)


# --- what may change -------------------------------------------------------------------------------------------------


def test_changed_data_is_refused(
    place: Place, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "data", Path(shutil.copytree(killed, tmp_path / "run"))
    shutil.copytree(place.data, data)
    shutil.copy(data / "train" / "red" / "1.png", data / "train" / "red" / "more.png")
    assert main(["train", str(data), "--resume", str(run)]) == 2
    assert f"is not the data that {run} began with" in capsys.readouterr().err
    (data / "train" / "red" / "more.png").unlink()
    shutil.move(data / "train" / "red" / "1.png", data / "train" / "green" / "red.png")
    assert main(["train", str(data), "--resume", str(run)]) == 2
    assert f"is not the data that {run} began with" in capsys.readouterr().err


def test_moved_data_is_the_same(place: Place, killed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    moved = tmp_path / "elsewhere" / place.data.name
    shutil.copytree(place.data, moved)
    ended = place.runner.run(["train", moved, "--resume", run], scratch=tmp_path / "scratch")
    assert ended.code == 0, ended.output
    assert (run / "model.safetensors").read_bytes() == (place.reference / "model.safetensors").read_bytes()


def test_changed_settings_are_refused(killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(killed), "--lr", "0.1", "--seed=3", "--optimizer.beta1=0.5"]) == 2
    error = capsys.readouterr().err
    assert "lr, optimizer, seed cannot change" in error and "Traceback" not in error


def test_damaged_plan_and_settings(killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("plan.json", "{"), ("plan.json", '{"steps": 3}'), ("config.json", "{"), ("config.json", "[]")):
        run = Path(shutil.copytree(killed, tmp_path / "run"))
        (run / name).write_text(text)
        assert main(["train", "--resume", str(run)]) == 2
        error = capsys.readouterr().err
        assert name in error and "Traceback" not in error
        shutil.rmtree(run)
    assert main(["train", "--resume", str(tmp_path / "nowhere")]) == 2
    assert "no such run" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_finished_run_is_left_as_it_is(place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = place.copy(tmp_path / "run")
    before = contents(run)
    assert main(["train", "--resume", str(run), "--json"]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)["finished"] is True and json.loads(answer.out)["steps"] == 8
    assert "finished already" in answer.err
    assert contents(run) == before


def test_folder_with_a_run_is_never_overwritten(place: Place, killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (place.reference, killed):
        before = contents(run)
        assert main(["train", str(place.data), *COMMON, *place.flags, "--out", str(run)]) == 2
        assert f"--resume {run}" in capsys.readouterr().err
        assert contents(run) == before


# --- several processes -----------------------------------------------------------------------------------------------

STRATEGIES = ["ddp", "fsdp"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [VARIANTS["vit, Muon"], VARIANTS["cct, AdamW"]], ids=["vit, Muon", "cct, AdamW"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes(
    strategy: str, model: list[str], runner: Any, killing: Any, spoilt_pictures: Path, tmp_path: Path
) -> None:
    data, common = spoilt_pictures, [*COMMON, *model, f"--distributed.strategy={strategy}"]

    def run(*arguments: Any, **how: Any) -> Any:
        return runner.run(["train", *arguments], scratch=tmp_path / "scratch", world=2, **how)

    reference, stopped = tmp_path / "reference", tmp_path / "run"
    ended = run(data, *common, "--out", reference)
    assert ended.code == 0, ended.output
    assert len(killing.final_state(reference)["progress"]["unreadable"]) == 1, "reported by whichever process met it"
    rename = "before renaming to step-000000003" + (".pt" if strategy == "ddp" else "")
    assert run(data, *common, "--out", stopped, kill_at=rename, rank=0).code == -signal.SIGKILL
    assert run("--resume", stopped, "--workers=1", kill_at="after step 4", rank=1).code == -signal.SIGKILL
    ended = run("--resume", stopped, kill_at="before step 6", rank=1, number=signal.SIGTERM)
    assert ended.code == 143, ended.output
    ended = run("--resume", stopped)
    assert ended.code == 0 and "continuing at step 7" in ended.output, ended.output
    assert killing.differences(stopped, reference) == []


@pytest.mark.slow
def test_other_number_of_processes_is_refused(runner: Any, place: Place, tmp_path: Path) -> None:
    run = place.copy(tmp_path / "run")
    ended = runner.run(["train", "--resume", run], scratch=tmp_path / "scratch", world=2)
    assert ended.code == 2 and "was begun with 1 processes, not 2" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_sharded_state_with_code_is_not_executed(runner: Any, pictures: Path, tmp_path: Path) -> None:
    flags = [*COMMON, "--model=vit_micro", "--distributed.strategy=fsdp"]
    run, created = tmp_path / "run", tmp_path / "created"

    def start(*arguments: Any, **how: Any) -> Any:
        return runner.run(["train", *arguments], scratch=tmp_path / "scratch", world=2, **how)

    assert start(pictures, *flags, "--out", run, kill_at="before step 3").code == -signal.SIGKILL
    sound = tmp_path / "sound"
    shutil.copytree(run, sound)
    for name in (".metadata", "progress.pt", "__0_0.distcp"):
        shutil.rmtree(run)
        shutil.copytree(sound, run)
        for path in list_checkpoints(run / "checkpoints"):
            (path / name).write_bytes(pickle.dumps(Payload(created)))
        ended = start("--resume", run)
        assert ended.code == 2, ended.output
        assert not created.exists(), name
        assert "Traceback" not in ended.output


def test_parts_of_a_sharded_state_with_code(tmp_path: Path) -> None:
    """torch's own reader unpickles the description of a sharded state, and the numbers in it, without any limit."""
    created = tmp_path / "created"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(created)))
    with pytest.raises(pickle.UnpicklingError, match="not executed"):
        checkpoint._SafeReader(tmp_path).read_metadata()
    number = io.BytesIO()
    torch.save(Payload(created), number)
    number.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint._SafePlanner().load_bytes(None, number)  # pyright: ignore[reportArgumentType]
    assert not created.exists()


def test_sharded_state_before_the_first_sound_step(tmp_path: Path) -> None:
    """torch makes up the state of an optimizer that has none by a step, which would count as the run's first."""
    model = torch.nn.Linear(3, 2)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters(), lr=0.1)]

    def save(step: int) -> None:
        checkpoint.save_checkpoint(tmp_path, step, {"step": step}, model, optimizers, None, World(), sharded=True)

    def load(step: int) -> dict[str, Any]:
        return checkpoint.load_checkpoint(tmp_path / f"step-{step:09d}", model, optimizers, None)

    save(1)
    assert not optimizers[0].state
    model(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    save(2)
    assert load(1) == {"step": 1} and not optimizers[0].state
    assert load(2) == {"step": 2}
    assert [int(state["step"]) for state in optimizers[0].state.values()] == [1, 1]
    assert all(state["exp_avg"].any() for state in optimizers[0].state.values())


@pytest.mark.slow
def test_merged_tokens_in_shards(runner: Any, killing: Any, pictures: Path, tmp_path: Path) -> None:
    """Blocks that merge are not called by their `forward`, and gather their shards all the same."""
    flags = [*COMMON, "--model=vit_micro", "--network.merge-tokens=2", "--network.drop-path=0"]
    for strategy in STRATEGIES:
        arguments = ["train", pictures, *flags, f"--distributed.strategy={strategy}", "--out", tmp_path / strategy]
        ended = runner.run(arguments, scratch=tmp_path / "scratch", world=2)
        assert ended.code == 0, ended.output
    losses = [
        [line.split(",")[3] for line in (tmp_path / strategy / "metrics.csv").read_text().splitlines()[1:]]
        for strategy in STRATEGIES
    ]
    assert [float(loss) for loss in losses[0]] == pytest.approx([float(loss) for loss in losses[1]], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torchrun(strategy: str, pictures: Path, killing: Any, tmp_path: Path) -> None:
    """Once as users do it: the real torchrun, SIGKILL for one of its processes, and the same command with --resume."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(saccade.__file__).parents[1])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*COMMON, "--model=vit_micro", f"--distributed.strategy={strategy}"]
    # the process of rank 1 kills itself after its fourth step
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\n"
        "from saccade.cli import main\n"
        "from saccade.engine import train\n"
        "step = train.train_step\n"
        "def watched(session, batches, number):\n"
        "    result = step(session, batches, number)\n"
        "    if os.environ.get('KILL') == '1' and os.environ['RANK'] == '1' and number == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return result\n"
        "train.train_step = watched\n"
        "sys.exit(main())\n"
    )

    def start(*arguments: Any, kill: bool = False) -> Any:
        command = [*torchrun, str(program), "train", *map(str, arguments)]
        ended = subprocess.run(command, env=environment | {"KILL": str(int(kill))}, capture_output=True, text=True)
        return ended.returncode, ended.stdout + ended.stderr

    code, output = start(pictures, *flags, "--out", tmp_path / "reference")
    assert code == 0, output
    code, output = start(pictures, *flags, "--out", tmp_path / "run", kill=True)
    assert code != 0, output
    code, output = start("--resume", tmp_path / "run")
    assert code == 0, output
    assert killing.differences(tmp_path / "run", tmp_path / "reference") == []


def test_killed_run_can_be_used_meanwhile(place: Place, killed: Path) -> None:
    assert saccade.load(str(killed)).class_names == ("blue", "green", "red")
