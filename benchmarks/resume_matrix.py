"""Kill-and-resume, all of it: a run that is killed and continued must end as one that was never stopped, bit for bit.

    python -m benchmarks.resume_matrix --json benchmarks/results/resume_matrix.json

Compared are weights, averaged weights, optimizer state, progress, the bytes of the model file and of the metrics.
`steps`: killed before every step, with 0, 1 and 2 loader workers, and continued with another number of them. `saves`:
killed at every moment of a save (the first one, one with an evaluation, the last one). `twice`: killed twice, whenever
that happens to be. `cost`: the share of its time that a run with default settings spends on saving its state, which
may be 1 % at most. The exit code is 1 where a run differs or saving costs more.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import report
from benchmarks.killing import Runner, differences

STEPS = 12
EVALUATIONS = 3
MODELS = ("vit_micro", "cct_nano")
OPTIMIZERS = ("adamw", "muon")
WORKERS = (0, 1, 2)
COLUMNS = {"name": "", "compared": "d", "kills": "d", "differed": "d", "seconds": ".0f"}
MOST = 1.0  # percent of a run's time for saving its state


@dataclass(frozen=True)
class Case:
    """One run to kill. `kills`: moments by name or number, or seconds; one after the other, continued after each."""

    part: str
    model: str
    optimizer: str
    workers: tuple[int, ...]  # of each piece of the run; the last of them for all further ones
    kills: tuple[str | int | float, ...]

    @property
    def name(self) -> str:
        workers = f", {self.workers[0]} workers" if self.part == "steps" else ""
        return f"{self.part}: {self.model}, {self.optimizer}{workers}"


@dataclass
class Outcome:
    case: Case
    kills: int
    differences: list[str]


def draw_pictures(root: Path, per_class: int, size: int, classes: int = 3) -> Path:
    """Noise with more of one colour per class, in three aspect ratios; one file is no picture."""
    rng = np.random.default_rng(0)
    for split, count in (("train", per_class), ("val", max(2, per_class // 4))):
        for k in range(classes):
            folder = root / split / f"class {k}"
            folder.mkdir(parents=True)
            for i in range(count):
                h, w = ((size, size), (size * 3 // 4, size * 5 // 4), (size * 5 // 4, size * 3 // 4))[i % 3]
                values = rng.integers(0, 120, (h, w, 3), dtype=np.uint8)
                values[..., k % 3] += 100
                Image.fromarray(values).save(folder / f"{i}.jpg", quality=90)
    (root / "train" / "class 0" / "0.jpg").write_bytes(b"not a picture")
    return root


def flags(model: str, optimizer: str) -> list[str]:
    return [
        f"--model={model}", f"--optimizer.name={optimizer}", f"--steps={STEPS}", f"--evaluations={EVALUATIONS}",
        "--image-size=16", "--batch-size=8", "--checkpoint-seconds=0", "--device=cpu", "--precision=float32",
        "--network.drop-path=0.2", "--augment.mixup=0.3", "--augment.cutmix=1.0", "--augment.policy=trivial",
    ]  # fmt: skip


class Matrix:
    """The data, an uninterrupted run for each model and optimizer, and the processes that runs are forked from."""

    def __init__(self, folder: Path, jobs: int):
        self.folder, self.jobs = folder, jobs
        self.data = draw_pictures(folder / "data", 8, 32)
        self.runners: SimpleQueue[Runner] = SimpleQueue()
        self.all = [Runner() for _ in range(jobs)]
        for runner in self.all:
            self.runners.put(runner)
        self.moments: dict[tuple[str, str], tuple[str, ...]] = {}
        self.seconds = 0.0

    def reference(self, model: str, optimizer: str) -> Path:
        return self.folder / f"{model}-{optimizer}"

    def make_references(self) -> None:
        for model in MODELS:
            for optimizer in OPTIMIZERS:
                start = time.monotonic()
                out = self.reference(model, optimizer)
                arguments = ["train", self.data, *flags(model, optimizer), "--out", out]
                ended = self.all[0].run(arguments, scratch=self.folder / "scratch")
                if ended.code:
                    raise SystemExit(f"the uninterrupted run fails:\n{ended.output}")
                self.moments[model, optimizer] = ended.moments
                self.seconds = time.monotonic() - start

    def cases(self, parts: list[str], doubles: int, seed: int) -> Iterator[Case]:
        for model in MODELS:
            for optimizer in OPTIMIZERS:
                moments = self.moments[model, optimizer]
                if "steps" in parts:
                    for workers in WORKERS:
                        for step in range(STEPS):
                            pieces = (workers, (workers + 1) % 3)
                            yield Case("steps", model, optimizer, pieces, (f"before step {step}",))
                if "saves" in parts and (model, optimizer) in (("vit_micro", "adamw"), ("cct_nano", "muon")):
                    middle = STEPS // EVALUATIONS - 1
                    for first, last in ((0, 1), (middle, middle + 1), (STEPS - 1, None)):
                        end = len(moments) if last is None else moments.index(f"before step {last}")
                        for moment in range(moments.index(f"after step {first}"), end):
                            yield Case("saves", model, optimizer, (0,), (moment,))
        rng = random.Random(seed)
        for _ in range(doubles if "twice" in parts else 0):
            # the second piece starts with what the first one has done
            kills = (rng.uniform(0.1, 1.0) * self.seconds, rng.uniform(0.1, 0.7) * self.seconds)
            workers = tuple(rng.choice(WORKERS) for _ in range(3))
            yield Case("twice", rng.choice(MODELS), rng.choice(OPTIMIZERS), workers, kills)

    def play(self, number: int, case: Case) -> Outcome:
        """Kill, continue, kill, continue, ..., compare."""
        runner = self.runners.get()
        try:
            out, scratch, kills = self.folder / f"run-{number}", self.folder / f"scratch-{number}", 0
            for piece in range(len(case.kills) + 1):
                how: dict[str, Any] = {}
                if piece < len(case.kills):
                    kill = case.kills[piece]
                    how = {"kill_after": kill} if isinstance(kill, float) else {"kill_at": kill}
                workers = f"--workers={case.workers[min(piece, len(case.workers) - 1)]}"
                if (out / "config.json").exists():
                    arguments = ["train", "--resume", out, workers]
                else:
                    arguments = ["train", self.data, *flags(case.model, case.optimizer), "--out", out, workers]
                ended = runner.run(arguments, scratch=scratch, **how)
                kills += ended.code == -signal.SIGKILL
                if ended.code not in (0, -signal.SIGKILL) or (not how and ended.code):
                    return Outcome(case, kills, [f"exit code {ended.code}: {ended.output[-2000:]}"])
                if isinstance(how.get("kill_at"), str | int) and ended.code == 0:
                    return Outcome(case, kills, ["the run was not killed"])
            found = differences(out, self.reference(case.model, case.optimizer))
            shutil.rmtree(out)
            return Outcome(case, kills, found)
        finally:
            self.runners.put(runner)

    def close(self) -> None:
        for runner in self.all:
            runner.__exit__()


def run_matrix(parts: list[str], jobs: int, doubles: int, seed: int) -> list[report.Row]:
    """A row for each part, model, optimizer and number of workers."""
    rows: dict[str, report.Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder), jobs)
        try:
            matrix.make_references()
            cases = list(matrix.cases(parts, doubles, seed))
            start = shown = time.monotonic()
            with ThreadPoolExecutor(jobs) as pool:
                futures = [pool.submit(matrix.play, number, case) for number, case in enumerate(cases)]
                for done, future in enumerate(as_completed(futures), 1):
                    outcome = future.result()
                    row = rows.setdefault(
                        outcome.case.name,
                        {"name": outcome.case.name, "compared": 0, "kills": 0, "differed": 0, "differences": []},
                    )
                    row["compared"] += 1
                    row["kills"] += outcome.kills
                    row["differed"] += bool(outcome.differences)
                    now = time.monotonic()
                    if outcome.differences:
                        row["differences"].append([str(outcome.case.kills), *outcome.differences[:5]])
                        print(f"DIFFERS: {outcome.case}: {outcome.differences[:5]}", flush=True)
                    if now - shown > 5 or done == len(cases):
                        shown = now
                        left = (now - start) / done * (len(cases) - done)
                        print(f"{done}/{len(cases)} runs, left {left:.0f} s", file=sys.stderr, flush=True)
        finally:
            matrix.close()
    return sorted(rows.values(), key=lambda row: row["name"])


def measure_cost(minutes: float) -> report.Row:
    """The share of its time that a run with default settings spends on saving its state."""
    import saccade
    from saccade.engine import train as engine
    from saccade.engine.checkpoint import list_checkpoints

    spent: list[float] = []
    save = engine.Saver.save

    def timed(saver: engine.Saver, progress: engine.Progress) -> None:
        start = time.monotonic()
        save(saver, progress)
        spent.append(time.monotonic() - start)

    engine.Saver.save = timed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = draw_pictures(Path(folder) / "data", 200, 128)
            load, start, out = report.Load(), time.monotonic(), Path(folder) / "run"
            result = saccade.train(str(data), model="cct_small", minutes=minutes, out=str(out))
            seconds = time.monotonic() - start
            size = sum(path.stat().st_size for path in list_checkpoints(out / "checkpoints")[:1])
    finally:
        engine.Saver.save = save
    return {
        "name": "cost: cct_small", "percent": 100 * sum(spent) / seconds, "saves": len(spent),
        "seconds_per_save": sum(spent) / len(spent), "megabytes": size / 1e6, "seconds": seconds,
        "steps": result.steps, "others_cores": load.others(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="steps,saves,twice,cost", help="parts, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--doubles", type=int, default=40, help="how many runs are killed twice at random times")
    parser.add_argument("--seed", type=int, default=0, help="of those times")
    parser.add_argument("--minutes", type=float, default=2.0, help="length of the run whose saves are timed")
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := sorted(set(parts) - {"steps", "saves", "twice", "cost"}):
        parser.error(f"unknown: {', '.join(unknown)}")

    start, failed = time.monotonic(), False
    rows: list[report.Row] = []
    if set(parts) - {"cost"}:
        rows = run_matrix(parts, arguments.jobs, arguments.doubles, arguments.seed)
        compared, differed = (sum(row[key] for row in rows) for key in ("compared", "differed"))
        kills = sum(row["kills"] for row in rows)
        total = {"name": "all", "compared": compared, "kills": kills, "differed": differed}
        rows.append({**total, "seconds": time.monotonic() - start})
        print(report.table(rows, COLUMNS))
        print(f"{compared} runs killed {kills} times and compared, {differed} differed", flush=True)
        failed = differed > 0 or compared == 0
    if "cost" in parts:
        cost = measure_cost(arguments.minutes)
        rows.append(cost)
        print(
            f"saving the state took {cost['percent']:.2f} % of {cost['seconds']:.0f} s ({cost['saves']} saves of "
            f"{cost['megabytes']:.0f} MB, {cost['seconds_per_save']:.2f} s each; at most {MOST} % is allowed)"
        )
        failed = failed or cost["percent"] > MOST
    if arguments.json:
        for row in rows:
            row["versions"] = report.versions()
        report.merge(arguments.json, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
