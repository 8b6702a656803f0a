"""AP on `test` after a fixed budget of minutes, from scratch: ours and transformers' detectors, one method a call.

    python -m benchmarks.small_data_detection --method ours --minutes 30 --checkpoint runs/bench_ours \\
        --json benchmarks/results/small_data_detection_cells.json
    python -m benchmarks.small_data_detection --method rtdetr --measure     # seconds a step, alone
    python -m benchmarks.small_data_detection --method rtdetr --lr 2e-4 --minutes 30 --checkpoint runs/rtdetr.pt \\
        --json benchmarks/results/small_data_detection_cells.json

Ours gets what its users get: `saccade.train(DATA, minutes=...)`, whose budget also covers measuring its own speed and
ten evaluations, of which it keeps the best; then `saccade.evaluate(split="test")`.

The peers (`benchmarks/detection_peers.py`) differ in model, loss and recipe alone: the way from pictures to batches and
the metric are ours. They get zoom, crops, flips and light colour jitter, AdamW with weight decay 1e-4 for all matrices
and kernels, gradients clipped at 0.1, 5 % of the steps to warm up, a cosine to zero, and the moving average of ours,
because two of the three are published with one. The number of steps is measured first and then fixed, so that training
alone, with reading pictures, fills the budget; measuring, saving and evaluating come on top. Of the last weights and
their average, those with the better AP on `val` count.

`seconds` is what the run took, `seconds_per_step` that by its steps (ours: with its evaluations). With `--checkpoint` a
run that was stopped goes on where it was saved last: the state is written every five minutes, and when the process is
asked to stop. `processor_seconds` are those of all threads, which no pause makes more. `others_cores` near zero, or the
figure is worth little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.detection_peers import PEERS, Peer
from saccade.config import AugmentConfig, DataConfig, PreprocessingConfig, RunConfig, ScheduleConfig, load_config
from saccade.data.box_transforms import BoxTrainTransform, FitTransform
from saccade.data.loader import eval_batches, measure_sizes, train_batches
from saccade.data.sample import Batch
from saccade.data.source import Source
from saccade.data.sources import open_source, open_splits
from saccade.engine.device import autocast, choose_precision
from saccade.engine.ema import Ema
from saccade.engine.evaluate import Normalise
from saccade.engine.optimizers import lr_share
from saccade.engine.progress import clock
from saccade.engine.signals import stop_signals
from saccade.engine.step import seed_everything
from saccade.metrics.detection import DetectionMetric
from saccade.metrics.detection_report import DetectionReport
from saccade.tasks.detection import EvalTargets, collate_eval, collate_train

CPU = torch.device("cpu")
STRIDE = 32
LIGHT = AugmentConfig(policy="none", color_jitter=0.2)  # beside zoom, crop and flip, which are there without a word
SCHEDULE = ScheduleConfig(warmup=0.05)
WEIGHT_DECAY, CLIP, AVERAGE = 1e-4, 0.1, 0.998
SAVE_SECONDS, SAY_STEPS = 300.0, 100
PROBE_SECONDS = 20.0  # of measuring a step

COLUMNS = {
    "name": "", "ap50": ".3f", "ap": ".3f", "ap75": ".3f", "seconds": ".0f", "steps": "d", "epochs": ".1f",
    "seconds_per_step": ".2f", "parameters": ",d", "image_size": "d", "others_cores": ".2f",
}  # fmt: skip


class Data:
    """The three splits, and how all peers see them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        path = Path(arguments.data)
        splits = open_splits(path)
        self.train, self.val = splits.train, splits.val
        self.test = open_source(path, "test").with_classes(splits.train.class_names)
        self.class_names = splits.train.class_names
        self.config = RunConfig(
            data=str(path),
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            preprocessing=PreprocessingConfig(image_size=arguments.image_size, stride=STRIDE),
            augment=LIGHT if arguments.augment == "light" else augment_of_ours(path, arguments.minutes),
        )

    @cached_property
    def sizes(self) -> np.ndarray:
        return measure_sizes(self.train, DataConfig())

    def train_batches(self, start: int, stop: int | None) -> Generator[Batch, None, None]:
        config = self.config
        return train_batches(
            self.train,
            self.sizes,
            BoxTrainTransform(config.augment, config.train_preprocessing),
            collate_train,
            preprocessing=config.train_preprocessing,
            data=DataConfig(),
            batch_size=config.batch_size,
            seed=config.seed,
            start=start,
            stop=stop,
        )

    def eval_batches(self, source: Source) -> Generator[Batch, None, None]:
        return eval_batches(
            source,
            measure_sizes(source, DataConfig()),
            FitTransform(self.config.preprocessing),
            collate_eval,
            preprocessing=self.config.preprocessing,
            data=DataConfig(),
            batch_size=self.config.batch_size,
        )


def augment_of_ours(path: Path, minutes: float) -> AugmentConfig:
    """What the recipe that we choose for this data does to its pictures."""
    from saccade.recipes import resolve

    return resolve({"data": str(path), "minutes": minutes}).augment


@dataclass
class Progress:
    """How far a run has come. `settings` are those that must not change on the way."""

    settings: dict[str, Any]
    steps: int
    step: int = 0
    seconds: float = 0.0  # of training
    wall: float = 0.0  # of training and saving
    busy: float = 0.0  # seconds of processor time that others used in it
    processor: float = 0.0  # seconds of processor time of this process, all threads: a pause does not count


class Run:
    """One peer in training: all that a checkpoint holds."""

    def __init__(self, peer: Peer, classes: int, settings: dict[str, Any], steps: int) -> None:
        seed_everything(settings["seed"], 0, 0)
        self.peer = peer
        self.network = peer.build(classes)
        self.optimizer = build_optimizer(self.network)
        self.average = Ema(self.network, AVERAGE)
        self.progress = Progress(settings, steps)
        self.precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings["precision"]]

    def save(self, path: Path) -> None:
        """Under another name first: what is there already stays whole, whenever the process ends."""
        state = {
            "progress": asdict(self.progress),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.average,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(path.name + ".tmp")
        with open(written, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)

    def load(self, state: Mapping[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load(state["average"])


def build_optimizer(network: nn.Module) -> torch.optim.AdamW:
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    matrices, others = [p for p in weights if p.dim() > 1], [p for p in weights if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def train_step(run: Run, batch: Batch, normalise: Normalise, lr: float) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with autocast(CPU, run.precision):
        loss = run.peer.loss(run.network, normalise(batch.images), batch.targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(run.network.parameters(), CLIP)
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise SystemExit(f"step {run.progress.step}: loss {loss.item()}, gradient {norm.item()}; try a lower --lr")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss.item()


def measure_step(peer: Peer, data: Data, settings: dict[str, Any], seconds: float) -> float:
    """Seconds of a training step, with a network that is thrown away."""
    run = Run(peer, len(data.class_names), settings, 1)
    run.network.train()
    normalise = Normalise(data.config.preprocessing, CPU)
    with closing(data.train_batches(0, None)) as batches:
        for _ in range(2):
            train_step(run, next(batches), normalise, 0.0)
        load, start, steps = report.Load(), time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < seconds:
            train_step(run, next(batches), normalise, 0.0)
            steps += 1
        per_step = (time.perf_counter() - start) / steps
    say(f"measured {per_step:.3f} s a step over {steps} steps; others kept {load.others():.2f} cores busy")
    return per_step


def fit(run: Run, data: Data, checkpoint: Path | None) -> bool:
    """Trains to the end, or until the process is asked to stop: False."""
    progress, lr, seed = run.progress, run.progress.settings["lr"], run.progress.settings["seed"]
    normalise = Normalise(data.config.preprocessing, CPU)
    run.network.train()
    batches = data.train_batches(progress.step, progress.steps)
    total, count, first, began = 0.0, 0, progress.step, progress.seconds
    with stop_signals() as stop, closing(batches):
        load, start = report.Load(), time.perf_counter()
        saved, mark, used = start, start, time.process_time()
        while progress.step < progress.steps and stop.number is None:
            seed_everything(seed, 1 + progress.step, 0)
            share = lr_share(progress.step, progress.steps, SCHEDULE)
            total += train_step(run, next(batches), normalise, lr * share)
            run.average.update(progress.step)
            progress.step, count = progress.step + 1, count + 1
            now = time.perf_counter()
            progress.seconds, mark = progress.seconds + now - mark, now
            progress.processor, used = progress.processor + time.process_time() - used, time.process_time()
            if progress.step % SAY_STEPS == 0 or progress.step in (1, 10, progress.steps):
                per_step = (progress.seconds - began) / (progress.step - first)
                left = clock(per_step * (progress.steps - progress.step))
                done = f"step {progress.step}/{progress.steps}"
                say(f"{done}  loss {total / count:.3f}  {per_step:.2f} s a step  left {left}")
                total, count = 0.0, 0
            due = now - saved > SAVE_SECONDS or stop.number is not None or progress.step == progress.steps
            if due and checkpoint is not None:
                wall = now - start
                progress.wall, progress.busy = progress.wall + wall, progress.busy + load.others() * wall
                run.save(checkpoint)
                load = report.Load()
                start = saved = mark = time.perf_counter()
                used = time.process_time()
        if checkpoint is None:
            progress.wall = time.perf_counter() - start
            progress.busy = load.others() * progress.wall
    return progress.step == progress.steps


@torch.no_grad()
def evaluate(run: Run, data: Data, source: Source) -> DetectionReport:
    """The published post-processing, then our metric."""
    run.network.eval()
    metric = DetectionMetric(data.class_names)
    normalise = Normalise(data.config.preprocessing, CPU)
    with closing(data.eval_batches(source)) as batches:
        for batch in batches:
            if not len(batch.indices):
                continue  # nothing could be read
            outputs = run.network(pixel_values=normalise(batch.images))  # in float32, as ours is measured
            measure(metric, run.peer.find(outputs, batch.targets.regions[:, [3, 2]]), batch.targets)
    return metric.compute()


def measure(metric: DetectionMetric, found: list[dict[str, Tensor]], targets: EvalTargets) -> None:
    """Boxes are in pixels of the picture already, of which `regions` begin at the corner; padding is cut off."""
    for index, one, truth, size in zip(targets.indices, found, targets.truths, targets.sizes, strict=True):
        boxes = torch.minimum(one["boxes"].float().clamp(min=0), size.repeat(2))
        there = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        scores, labels = one["scores"].float()[there], one["labels"][there]
        metric.update(index, boxes[there], scores, labels, truth.boxes, truth.labels, truth.crowd, truth.area)


def run_peer(arguments: argparse.Namespace) -> report.Row | None:
    peer, data = PEERS[arguments.method], Data(arguments)
    precision = str(choose_precision(arguments.precision, CPU, learns=True)).removeprefix("torch.")
    settings = {
        "method": arguments.method,
        "data": Path(arguments.data).resolve().name,
        "lr": arguments.lr or peer.lr,
        "minutes": arguments.minutes if arguments.steps is None else None,
        "batch_size": arguments.batch_size,
        "image_size": arguments.image_size,
        "augment": arguments.augment,
        "precision": precision,
        "seed": arguments.seed,
    }
    budget = 60 * arguments.minutes
    if arguments.measure:
        measure_step(peer, data, settings, PROBE_SECONDS)
        return None
    checkpoint: Path | None = arguments.checkpoint
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        before, steps = state["progress"]["settings"], state["progress"]["steps"]
        if before != settings or arguments.steps not in (None, steps):
            changed = {name: f"{before.get(name)}, not {value}" for name, value in settings.items()}
            changed = {name: what for name, what in changed.items() if before.get(name) != settings[name]}
            raise SystemExit(f"{checkpoint}: is of another run ({changed or steps}); take it away, or name another")
        run = Run(peer, len(data.class_names), settings, steps)
        run.load(state)
        say(f"continuing at step {run.progress.step} of {steps}")
    else:
        steps = arguments.steps
        if steps is None:
            probe = min(PROBE_SECONDS, max(2.0, 0.04 * budget))
            steps = max(1, int(budget / measure_step(peer, data, settings, probe)))
        run = Run(peer, len(data.class_names), settings, steps)
    parameters = sum(p.numel() for p in run.network.parameters())
    say(f"{peer.about}: {parameters / 1e6:.1f} M parameters, {precision}, {steps} steps, lr {settings['lr']:g}")
    if not fit(run, data, checkpoint):
        where = f"step {run.progress.step} of {run.progress.steps}"
        say(f"stopped at {where}" + ("; the same command continues" if checkpoint else ", and nothing is kept"))
        return None
    reports: dict[str, tuple[DetectionReport, DetectionReport]] = {}
    for weights, applied in (("last", nullcontext), ("average", run.average.applied)):
        with applied():
            reports[weights] = evaluate(run, data, data.val), evaluate(run, data, data.test)
    kept = max(reports, key=lambda weights: reports[weights][0].ap or 0.0)
    val, test = reports[kept]
    progress = run.progress
    name = f"{arguments.method}, lr {settings['lr']:g}" + (", augmented as ours" if arguments.augment == "ours" else "")
    return {
        "name": name,
        **figures(test, val),
        "weights": kept,
        "steps": progress.steps,
        "epochs": progress.steps * arguments.batch_size / len(data.train),
        "seconds": progress.seconds,
        "seconds_per_step": progress.seconds / progress.steps,
        "processor_seconds": progress.processor,
        "parameters": parameters,
        "others_cores": progress.busy / max(progress.wall, 1e-9),
        **settings,
    }


def run_ours(arguments: argparse.Namespace) -> report.Row | None:
    """`--checkpoint` is the folder of the run. What it took is kept beside its state, for a run in several parts."""
    if arguments.checkpoint is not None:
        return run_ours_in(Path(arguments.checkpoint), arguments)
    with tempfile.TemporaryDirectory() as folder:
        return run_ours_in(Path(folder) / "run", arguments)


def run_ours_in(folder: Path, arguments: argparse.Namespace) -> report.Row | None:
    import saccade

    notes = folder / "benchmark.json"
    parts = json.loads(notes.read_text()) if notes.exists() else []
    if not (parts and parts[-1]["finished"]):
        parts = [part if "seconds" in part else killed(part, folder) for part in parts]
        parts.append({"start": time.time(), "finished": False})
        folder.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps(parts) + "\n")
    load, start, used = report.Load(), time.perf_counter(), time.process_time()
    if (folder / "config.json").exists():
        result = saccade.train(resume=str(folder))
    else:
        length = {"minutes": arguments.minutes} if arguments.steps is None else {"steps": arguments.steps}
        result = saccade.train(arguments.data, out=str(folder), seed=arguments.seed, **length)
    if "seconds" not in parts[-1]:
        seconds = time.perf_counter() - start
        parts[-1] |= {"seconds": seconds, "others": load.others() * seconds, "finished": result.finished}
        parts[-1]["processor"] = time.process_time() - used
        notes.write_text(json.dumps(parts) + "\n")
    if not result.finished:
        return None
    seconds = sum(part["seconds"] for part in parts)
    known = [part for part in parts if "others" in part]
    others = sum(part["others"] for part in known) / sum(part["seconds"] for part in known)
    test = saccade.evaluate(str(folder), arguments.data, split="test")
    val = saccade.evaluate(str(folder), arguments.data, split="val")
    assert isinstance(test, DetectionReport) and isinstance(val, DetectionReport)
    config = load_config(folder / "config.json")
    plan = json.loads((folder / "plan.json").read_text())
    seen = result.steps * config.batch_size * config.optimizer.accumulate
    return {
        "name": "ours",
        "method": "ours",
        "data": Path(arguments.data).resolve().name,
        **figures(test, val),
        "weights": "best of its evaluations on val",
        "steps": result.steps,
        "epochs": seen / len(open_splits(Path(arguments.data)).train),
        "seconds": seconds,
        "seconds_per_step": seconds / result.steps,
        "processor_seconds": sum(part["processor"] for part in parts) if known == parts else None,
        "parameters": sum(p.numel() for p in saccade.load(str(folder)).network.parameters()),
        "others_cores": others,
        "parts": len(parts),
        "model": config.model,
        "lr": config.lr,
        "minutes": arguments.minutes if arguments.steps is None else None,
        "batch_size": config.batch_size,
        "image_size": config.preprocessing.image_size,
        "precision": plan["precision"],
        "seed": config.seed,
    }


def killed(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A part of a run that could not say its end: it counts until its last save, from which the run continued."""
    saves = [path.stat().st_mtime for path in (folder / "checkpoints").glob("*")]
    return part | {"seconds": max(0.0, max(saves, default=0.0) - part["start"])}


def figures(test: DetectionReport, val: DetectionReport) -> report.Row:
    return {
        "ap": test.ap,
        "ap50": test.ap50,
        "ap75": test.ap75,
        "ap50_by_class": {scores.name: scores.ap50 for scores in test.classes},
        "val_ap": val.ap,
        "val_ap50": val.ap50,
    }


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("ours", *PEERS), required=True)
    parser.add_argument("--data", default="../shared/data/cells", help="with splits train, val and test")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="as many, whatever they take")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="file (ours: the run's folder) to save to and to continue from")
    parser.add_argument("--json", type=Path, help="file that the result is merged into, by name")
    peers = parser.add_argument_group("of the peers alone")
    peers.add_argument("--lr", type=float, help="highest learning rate, of all weights; else the published one")
    peers.add_argument("--image-size", type=int, default=320, help="pictures get about its square of pixels")
    peers.add_argument("--batch-size", type=int, default=8)
    peers.add_argument("--augment", choices=("light", "ours"), default="light", help="ours: as the recipe of ours does")
    peers.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as ours")
    peers.add_argument("--measure", action="store_true", help="only print seconds a step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    row = run_ours(arguments) if arguments.method == "ours" else run_peer(arguments)
    if row is None:
        return
    row |= {"threads": arguments.threads, "versions": report.versions(("torch", "torchvision", "timm", "transformers"))}
    rows = report.merge(arguments.json, [row]) if arguments.json else {row["name"]: row}
    say(report.table(sorted(rows.values(), key=lambda row: row["ap50"] or 0.0), COLUMNS))


if __name__ == "__main__":
    main()
