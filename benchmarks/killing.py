"""Runs of the command that end where they are told to: the kill-and-resume tests and benchmark are made of these.

`Runner` starts one Python process that imports the library once; every run is a fork of it, so that a killed run costs
a second and not the start of an interpreter. A run counts the moments at which a kill could do harm, and kills itself
at the one it was given: before and after every step, in the middle of what `torch.save` and the model file write, and
before and after every fsync and rename.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a run ended. `code` is negative where a signal ended it; with several processes, that of the worst."""

    code: int
    output: str
    moments: tuple[str, ...]  # of the first process, in order


class Runner:
    """Forks runs from a process that has everything imported. Use as a context."""

    def __init__(self) -> None:
        import saccade

        package = str(Path(saccade.__file__).parents[1])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MPLBACKEND": "Agg"},
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(
        self,
        arguments: Sequence[object],
        *,
        scratch: Path,
        kill_at: int | str | None = None,
        kill_after: float | None = None,
        number: signal.Signals = signal.SIGKILL,
        group: bool = False,
        world: int = 1,
        rank: int = 0,
        file_limit: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """`saccade ARGUMENTS`, with signal `number` to process `rank` at moment `kill_at` (its number, or its name).

        `kill_after`: the signal comes after so many seconds, wherever the run is then.
        `group`: the signal goes to the loader's workers, too. `file_limit`: no file may grow larger than so many bytes.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        job = {
            "arguments": [str(argument) for argument in arguments],
            "scratch": str(scratch),
            "kill_at": kill_at,
            "kill_after": kill_after,
            "number": int(number),
            "group": group,
            "world": world,
            "rank": rank,
            "file_limit": file_limit,
            "environment": dict(environment or {}),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that runs are forked from has ended"
        outputs = [(scratch / f"output-{r}.txt").read_text(encoding="utf-8") for r in range(world)]
        moments = (scratch / "moments-0.txt").read_text(encoding="utf-8").splitlines()
        return Ended(int(answer), "".join(outputs), tuple(moments))


# --- in the forked process -------------------------------------------------------------------------------------------


class Moments:
    """Counts and names the moments of a run, and sends the signal at the chosen one."""

    def __init__(self, path: str, kill_at: int | str | None, number: int, group: bool) -> None:
        # unbuffered: what is written is there after a SIGKILL
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115
        self.kill_at, self.number, self.group = kill_at, number, group
        self.count = 0
        self.lock = threading.Lock()

    def pass_by(self, name: str) -> None:
        with self.lock:
            self.file.write(f"{name}\n".encode())
            here = self.kill_at in (self.count, name)
            self.count += 1
        if here and self.group:
            os.killpg(os.getpgrp(), self.number)
        elif here:
            os.kill(os.getpid(), self.number)


class Halves(io.FileIO):
    """A file that passes by a moment in the middle of every large write."""

    def __init__(self, path: str | Path, mode: str, moments: Moments) -> None:
        super().__init__(path, mode)
        self.moments = moments

    def write(self, data: Any) -> int:
        middle = len(data) // 2
        if middle < 512:
            return self.write_all(data)
        self.write_all(data[:middle])
        self.moments.pass_by(f"half of {Path(str(self.name)).name} is written")
        return middle + self.write_all(data[middle:])

    def write_all(self, data: Any) -> int:
        # a raw file may take less than it is given, a buffered one never does
        view, done = memoryview(data), 0
        while done < len(view):
            done += super().write(view[done:]) or 0
        return done


def watch(moments: Moments) -> None:
    """Put moments around all that a kill could harm."""
    import torch

    from saccade.engine import train
    from saccade.weights import model_file

    save, replace, step, evaluate = torch.save, os.replace, train.train_step, train.evaluate

    def watched_save(state: Any, file: Any, **options: Any) -> None:
        if not isinstance(file, io.BufferedWriter):  # memory, by which processes send each other objects
            return save(state, file, **options)
        buffer = io.BytesIO()
        save(state, buffer, **options)
        data = buffer.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        moments.pass_by("half of a state is written")
        file.write(data[len(data) // 2 :])

    def watched_fsync(descriptor: Any) -> None:
        # not synced: a kill takes nothing from what the kernel holds, and half of a tiny run's time would be syncs
        moments.pass_by("before a sync")
        os.fstat(descriptor)
        moments.pass_by("after a sync")

    def watched_replace(source: Any, target: Any, **places: Any) -> None:
        moments.pass_by(f"before renaming to {Path(target).name}")
        replace(source, target, **places)
        moments.pass_by(f"after renaming to {Path(target).name}")

    def watched_step(session: Any, batches: Any, number: int) -> Any:
        moments.pass_by(f"before step {number}")
        result = step(session, batches, number)
        moments.pass_by(f"after step {number}")
        return result

    def watched_evaluate(*values: Any) -> Any:
        moments.pass_by("before an evaluation")
        return evaluate(*values)

    def watched_open(path: Path, mode: str) -> Any:
        return Halves(path, mode, moments) if "w" in mode else io.FileIO(path, mode)

    torch.save, os.fsync, os.replace = watched_save, watched_fsync, watched_replace  # pyright: ignore
    train.train_step, train.evaluate = watched_step, watched_evaluate
    model_file.open = watched_open  # pyright: ignore


def run_job(job: dict[str, Any], rank: int) -> int:
    """In a fork: run the command as told."""
    os.setpgid(0, 0)
    os.environ.update(job["environment"])
    output = os.open(f"{job['scratch']}/output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    kill_at = job["kill_at"] if rank == job["rank"] else None
    watch(Moments(f"{job['scratch']}/moments-{rank}.txt", kill_at, job["number"], job["group"]))
    if job["kill_after"] is not None:
        threading.Timer(job["kill_after"], os.kill, (os.getpid(), job["number"])).start()
    if job["file_limit"] is not None:
        # with the signal ignored, a write beyond the limit fails as it does on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    from saccade.cli import main

    return main(job["arguments"])


def start(job: dict[str, Any], rank: int) -> int:
    """Fork a run; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        code = run_job(job, rank)
    except BaseException:  # a fork that returned from here would serve as a second server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Run one job a line until there are no more."""
    import torch

    torch.set_num_threads(1)
    # what a run imports late, once for all
    import torch._dynamo
    import torchvision.transforms.v2  # noqa: F401

    import saccade.api
    import saccade.cli  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        processes = []
        for rank in range(job["world"]):
            if job["world"] > 1:
                job["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
                if rank == 0:
                    job["environment"] |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            processes.append(start(job, rank))
        print(wait(processes), flush=True)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def wait(processes: list[int]) -> int:
    """The first exit code that is not 0. Where one process is killed, the others are, too, as torchrun does it."""
    codes = []
    left = set(processes)
    while left:
        process, status = os.wait()
        if process not in left:
            continue
        left.discard(process)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] < 0:
            for other in left:
                os.kill(other, signal.SIGKILL)
    for process in processes:
        # loader workers that outlived their run
        try:
            os.killpg(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    return next((code for code in codes if code), 0)


# --- what must be equal ----------------------------------------------------------------------------------------------


def final_state(run: Path) -> Any:
    """The newest saved state of a run, one file or sharded."""
    import torch

    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: path.name)
    if newest.is_file():
        return torch.load(newest, weights_only=True)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = run / "whole.pt"
    dcp_to_torch_save(newest, whole)
    state = torch.load(whole, weights_only=True)
    whole.unlink()
    return {**state, "progress": torch.load(newest / "progress.pt", weights_only=True)}


def differences(run: Path, reference: Path) -> list[str]:
    """All in which two finished runs differ: weights, average, optimizer state, progress, model file, metrics."""
    found = [
        f"{name}: bytes differ"
        for name in ("model.safetensors", "metrics.csv")
        if (run / name).read_bytes() != (reference / name).read_bytes()
    ]
    compare(final_state(run), final_state(reference), "state", found)
    return found


def compare(mine: Any, other: Any, where: str, found: list[str]) -> None:
    """Adds the places where two nested values differ in a single bit."""
    import torch

    if type(mine) is not type(other):
        found.append(f"{where}: {type(mine).__name__} and {type(other).__name__}")
    elif isinstance(mine, torch.Tensor):
        if mine.dtype != other.dtype or not torch.equal(mine, other):
            found.append(f"{where}: tensors differ")
    elif isinstance(mine, Mapping):
        if list(mine) != list(other):
            found.append(f"{where}: keys differ")
        for key in mine:
            if key in other:
                compare(mine[key], other[key], f"{where}.{key}", found)
    elif isinstance(mine, list | tuple):
        if len(mine) != len(other):
            found.append(f"{where}: {len(mine)} and {len(other)} entries")
        for i, pair in enumerate(zip(mine, other, strict=False)):
            compare(*pair, f"{where}[{i}]", found)
    elif mine != other and not (mine != mine and other != other):
        found.append(f"{where}: {mine!r} and {other!r}")


if __name__ == "__main__":
    serve()
