"""The training loop, whole and in one place.

Exactness: every random number comes from (seed, step) or (seed, epoch, sample), so the state of a run is its weights,
average, optimizer state and step number; a run continued from them takes the same path, on a processor bit for bit.
Some of CUDA's kernels (backward passes of interpolation, sampling and attention, `index_add`) add in no fixed order.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saccade.config import RunConfig
from saccade.drawing import training_curves
from saccade.engine import distributed
from saccade.engine.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from saccade.engine.device import choose_device, choose_precision, make_current
from saccade.engine.distributed import World
from saccade.engine.ema import Ema
from saccade.engine.evaluate import evaluate_batches
from saccade.engine.events import Events
from saccade.engine.muon import Muon
from saccade.engine.optimizers import build_optimizers, lr_share, set_lr
from saccade.engine.picture_data import unmeasured
from saccade.engine.plan import EVALUATIONS, EpochEnds, Plan, affordable_evaluations, load_plan, planned_row
from saccade.engine.progress import RunTable, clock
from saccade.engine.run_data import RunData, open_data
from saccade.engine.run_folder import held, make_run_folder, remove_unused, write_rows
from saccade.engine.signals import stop_signals
from saccade.engine.step import StepResult, seed_everything, train_step
from saccade.errors import UserError
from saccade.models import build_network
from saccade.models.classifier import Classifier
from saccade.models.detector import Detector
from saccade.models.translator import Translator
from saccade.tasks import Task, build_task
from saccade.weights.load import initial_network
from saccade.weights.model_file import ModelCard, save_model, write_atomically
from saccade.words import counted

FEW_STEPS = 50
SAVING_SHARE = 0.01  # of the run's time, at most, unless the interval was given


@dataclass
class Progress:
    """How far a run has come, apart from its tensors. Saved with them."""

    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    faults_in_row: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """`metrics` are those of the kept model on the validation split.

    `unreadable` says by name what is wrong with training pictures that were left out, `unmeasured` with those of the
    validation split, which do not count.
    """

    folder: Path
    finished: bool
    steps: int
    metrics: dict[str, float]
    unreadable: dict[str, str]
    unmeasured: tuple[str, ...] = ()
    signal: int | None = None


@dataclass
class Session:
    """Everything that is built anew whenever a run starts or is resumed."""

    config: RunConfig
    world: World
    device: torch.device
    precision: torch.dtype
    task: Task
    data: RunData
    model: Classifier | Detector | Translator  # holds the parameters
    network: nn.Module  # the model as it is called: wrapped, compiled
    optimizers: list[torch.optim.Optimizer]
    begun: bool = False  # a step of the run was done; those that measure the machine do not count

    @property
    def sharded(self) -> bool:
        return self.world.size > 1 and self.config.distributed.strategy == "fsdp"

    def learn_in(self, precision: torch.dtype) -> None:
        """Of products: those of the network, and Muon's."""
        self.precision = precision
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.precision = precision


def train(config: RunConfig, *, resume: bool = False, show: bool = True) -> TrainResult:
    """Run, or continue, one training. Returns when it is finished or was stopped by SIGINT or SIGTERM."""
    began = time.monotonic()
    world = distributed.start()
    together = False
    try:
        result = train_in(world, config, resume, began, show and world.is_main)
        together = True
        return result
    finally:
        distributed.finish(world, together)


def train_in(world: World, config: RunConfig, resume: bool, began: float, show: bool) -> TrainResult:
    """`train` in a world that has started; what it holds is freed before the world ends."""
    folder = Path(config.out)
    if not resume:
        make_run_folder(folder, config, world)
    with held(folder, world):
        return train_held(world, config, resume, began, show)


def train_held(world: World, config: RunConfig, resume: bool, began: float, show: bool) -> TrainResult:
    """`train` in a folder that is its own."""
    folder, session = Path(config.out), None
    try:
        session = open_session(config, world, folder if resume else None)
        if resume and (folder / "plan.json").exists():
            plan = load_plan(folder, session.data.path, session.data.hash(), world, config.evaluations or EVALUATIONS)
        else:
            plan = make_plan(session, began, show)
            if world.is_main:
                session.data.keep(folder)
                write_atomically(folder / "plan.json", (json.dumps(plan.__dict__, indent=2) + "\n").encode())
        return run(session, plan, folder, show)
    except UserError:
        if not resume and world.is_main and (session is None or not session.begun):
            remove_unused(folder)
        raise


def open_session(config: RunConfig, world: World, folder: Path | None = None) -> Session:
    """All that a run works with. With the `folder` of one that is continued, the weights may be yet to be restored."""
    device = choose_device(config.device, world)
    make_current(device)
    precision = choose_precision(config.precision, device, learns=True)
    row = None if folder is None else planned_row(folder)
    data = open_data(config, world, device, folder)
    seed_everything(config.seed, 0, 0)  # the same initial weights in every process
    if row is not None:
        model = build_network(row, len(data.class_names))
    else:
        model, notes = initial_network(config, data.class_names, data.tokenizer)
        data.notes.extend(notes)
    assert isinstance(model, Classifier | Detector | Translator)  # there are classes, or a vocabulary
    task = build_task(config.task or data.task, data.class_names, config, model.config, data.tokenizer)
    data.serve(task)
    trunk = model if isinstance(model, Translator) else model.backbone
    trunk.activation_checkpointing = config.activation_checkpointing
    model.to(device)
    if config.train_part == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not model.in_backbone(name))
    network = distributed.wrap(model, model.layers, config.distributed.strategy, device, world)
    session = Session(
        config=config,
        world=world,
        device=device,
        precision=precision,
        task=task,
        data=data,
        model=model,
        network=torch.compile(network) if config.compile else network,  # pyright: ignore[reportArgumentType]
        optimizers=build_optimizers(model, config.optimizer),
    )
    session.learn_in(precision)
    return session


def make_plan(session: Session, began: float, show: bool) -> Plan:
    """Fix the number of steps: given, from epochs, or from minutes by measuring this machine's speed."""
    config = session.config
    per_epoch = session.data.batches_per_epoch
    evaluations = config.evaluations or EVALUATIONS
    if config.steps is not None:
        total = config.steps
    elif config.minutes is not None:
        total, evaluations = steps_within(session, config.minutes * 60, began, show)
    else:
        total = max(1, round((config.epochs or 100) * per_epoch / config.optimizer.accumulate))
    return Plan(
        total_steps=distributed.from_main(total, session.world),
        batches_per_epoch=per_epoch,
        batch_size=config.batch_size,
        precision="float32" if session.precision == torch.float32 else "bfloat16",
        class_names=session.data.class_names,
        data_hash=session.data.hash(),
        world_size=session.world.size,
        architecture=session.model.config.to_dict(),
        evaluations=distributed.from_main(evaluations, session.world),
    )


def steps_within(session: Session, seconds: float, began: float, show: bool) -> tuple[int, int]:
    """How many steps fit, and evaluations.

    Takes real steps for a few seconds, evaluates once, and puts everything back as it was. An evaluation of texts is
    never longer than this one: what has learnt nothing ends no translation before its limit.
    """
    config, table = session.config, RunTable(1, 0, show=show)
    weights = copy.deepcopy(session.model.state_dict())
    probe = min(20.0, max(2.0, 0.04 * seconds))
    batches = session.data.train_batches(0, None)
    set_lr(session.optimizers, 0.0)
    for _ in range(2):
        train_step(session, batches, 0)
    start, steps = time.monotonic(), 0
    while distributed.agree([time.monotonic() - start < probe], session.world)[0]:
        train_step(session, batches, 0)
        steps += 1
    per_step = (time.monotonic() - start) / steps
    del batches
    start = time.monotonic()
    evaluate(session)
    per_evaluation = time.monotonic() - start
    session.model.load_state_dict(weights)
    for optimizer in session.optimizers:
        optimizer.state = defaultdict(dict)
        optimizer.zero_grad(set_to_none=True)
    evaluations = affordable_evaluations(config.evaluations, seconds, per_evaluation)
    left = seconds - (time.monotonic() - began) - (evaluations + 1) * per_evaluation
    total = max(1, int(0.92 * left / per_step))  # a short measurement catches few of the slow steps
    each = f"{per_step:.3f} s a step, {per_evaluation:.1f} s an evaluation"
    planned = f"{counted(total, 'step')} and {counted(evaluations, 'evaluation')}"
    table.say(f"measured {each}: {planned} in {clock(seconds)}")
    if total < FEW_STEPS:
        smaller = session.data.smaller
        table.say(f"note: so few steps teach next to nothing; give more --minutes, or a smaller {smaller}")
    return total, evaluations


def run(session: Session, plan: Plan, folder: Path, show: bool) -> TrainResult:
    """The loop: batches -> losses -> gradients -> step -> average; evaluations and saves between."""
    config, world = session.config, session.world
    session.learn_in(plan.dtype)
    ema = None if config.ema.decay is None else Ema(session.model, config.ema.decay)
    progress = restore(session, folder, ema, show)
    first_step = progress.step
    if first_step >= plan.total_steps:
        RunTable(1, 0, show=show).say(f"{folder}: finished already, after {first_step} steps; nothing is changed")
        return finish(session, folder, progress, None, finished=True, signal_number=None)
    evaluate_at = plan.evaluate_at
    epoch_ends = EpochEnds(plan, config.optimizer.accumulate)
    writer = Events(folder / "events", first_step) if world.is_main else None
    accumulate = config.optimizer.accumulate
    batches = session.data.train_batches(first_step * accumulate, plan.total_steps * accumulate)
    saver = Saver(session, folder, ema, config.checkpoint_seconds)
    amount, learning, clock_start = 0, 0.0, time.monotonic()
    # closed whatever happens: loader workers that take no SIGTERM would keep a failing program from its end
    shown = RunTable(plan.total_steps, first_step, show=show, counted=session.data.counted)
    with shown as table, stop_signals() as stop, closing(batches):
        announce(table, session, plan, first_step)
        while progress.step < plan.total_steps:
            step = progress.step
            lr = config.lr * lr_share(step, plan.total_steps, config.schedule)
            set_lr(session.optimizers, lr)
            step_start = time.monotonic()
            result = train_step(session, batches, step)
            learning += time.monotonic() - step_start
            amount += result.amount * world.size
            note_unreadable(progress, session, result.unreadable, table)
            progress.step, session.begun = step + 1, True
            if result.fault:
                progress.faults_in_row += 1
                note_fault(progress, session, folder, step, result, config.max_faults, table)
            else:
                progress.faults_in_row = 0
                progress.loss_sum += result.loss
                progress.loss_count += 1
                if ema is not None:
                    ema.update(step)
            table.step(progress.step, result.loss, amount / learning)
            if writer is not None:
                writer.add(step, {"train/loss": result.loss, "train/lr": lr, "train/grad_norm": result.grad_norm})
            done = progress.step
            if done in evaluate_at or done == plan.total_steps:
                evaluate_and_keep(session, plan, folder, ema, progress, lr, table, writer)
            interrupted, due = distributed.agree([stop.number is not None, saver.due()], world)
            must = due or interrupted or done == plan.total_steps
            if must or ((done in evaluate_at or done in epoch_ends) and saver.cheap()):
                saver.save(progress)
            if interrupted and done < plan.total_steps:
                where = f"step {done} of {plan.total_steps}"
                table.say(f"stopped at {where}; continue with: saccade train --resume {folder}")
                numbers = [number for number in distributed.gather(stop.number, world) if number is not None]
                return finish(session, folder, progress, writer, finished=False, signal_number=numbers[0])
        table.say(f"finished in {clock(time.monotonic() - clock_start)}; the model is {folder / 'model.safetensors'}")
        if show:
            rows = [{**row, "loss": row["train_loss"]} for row in progress.rows]
            training_curves(rows, folder / "curves.png", only_in_training(session))
    return finish(session, folder, progress, writer, finished=True, signal_number=None)


def only_in_training(session: Session) -> list[str]:
    """What makes the loss of training higher than that of an evaluation."""
    dropout = getattr(session.model.config, "dropout", 0.0)  # of models of texts; the others' loss is of other pictures
    there = {"label smoothing": session.config.loss.label_smoothing, "dropout": dropout}
    return [name for name, amount in there.items() if amount]


def evaluate(session: Session, unreadable: list[str] | None = None) -> Any:
    """In the precision in which the model will answer; a run in float32 stays in it."""
    if session.sharded:
        distributed.same_buffers(session.model, session.world)
    name = "float32" if session.precision == torch.float32 else "auto"
    return evaluate_batches(
        session.network,
        session.data.eval_batches(),
        session.task,
        session.data.inputs,
        session.device,
        choose_precision(name, session.device),
        session.world,
        unreadable=unreadable,
    )


def evaluate_and_keep(
    session: Session,
    plan: Plan,
    folder: Path,
    ema: Ema | None,
    progress: Progress,
    lr: float,
    table: RunTable,
    writer: Events | None,
) -> None:
    """Evaluate the averaged weights, write the figures down, keep the model if it is the best so far."""
    if ema is None:
        keep_if_best(session, plan, folder, progress, lr, table, writer)
        return
    with ema.applied():
        keep_if_best(session, plan, folder, progress, lr, table, writer)


def keep_if_best(
    session: Session, plan: Plan, folder: Path, progress: Progress, lr: float, table: RunTable, writer: Events | None
) -> None:
    failed: list[str] = []
    report = evaluate(session, failed)
    note_unmeasured(progress, session, failed, table)
    scalars = session.task.scalars(report)
    epoch = progress.step * session.config.optimizer.accumulate / plan.batches_per_epoch
    row = {
        "step": float(progress.step),
        "epoch": epoch,
        "lr": lr,
        "train_loss": progress.loss_sum / progress.loss_count if progress.loss_count else math.nan,
        **{f"val_{name}": value for name, value in scalars.items()},
    }
    progress.loss_sum, progress.loss_count = 0.0, 0
    progress.rows.append(row)
    score = scalars[session.task.best]
    is_best = score >= progress.best
    if is_best:
        progress.best, progress.best_step = score, progress.step
        weights = full_weights(session)
        if session.world.is_main:
            card = describe(session, plan, scalars, session.task.threshold(report), progress.step)
            save_model(folder / "model.safetensors", weights, card)
    if session.world.is_main:
        write_rows(folder / "metrics.csv", progress.rows)
    if writer is not None:
        writer.add(progress.step, {f"val/{name}": value for name, value in scalars.items()})
        writer.flush()
    shown = {name: value for name, value in row.items() if name not in ("step", "epoch")}
    table.row(progress.step, epoch, shown, is_best)


def full_weights(session: Session) -> dict[str, torch.Tensor]:
    if not session.sharded:
        return session.model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(session.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}


def describe(session: Session, plan: Plan, scalars: dict[str, float], threshold: float | None, step: int) -> ModelCard:
    from saccade import __version__

    config, data = session.config, session.data
    start = f"weights {config.weights}" if config.weights else "random weights"
    return ModelCard(
        task=session.task.name,
        model=config.model,
        class_names=plan.class_names,
        preprocessing=config.preprocessing,
        architecture=plan.architecture,
        metrics=scalars,
        threshold=threshold,
        tokenizer=None if data.tokenizer is None else data.tokenizer.to_text(),
        languages=data.languages,
        training_data=f"{Path(config.data).name}, {len(data)} {data.samples}, sha256 {plan.data_hash[:16]}",
        provenance=f"saccade train from {start}, seed {config.seed}, step {step} of {plan.total_steps}",
        library_version=__version__,
    )


def note_unreadable(progress: Progress, session: Session, unreadable: list[tuple[int, str]], table: RunTable) -> None:
    """Report a picture that cannot be decoded once, and count it, whichever process met it."""
    if not distributed.agree([bool(unreadable)], session.world)[0]:
        return
    for index, what in (entry for part in distributed.gather(unreadable, session.world) for entry in part):
        name = session.data.name(index)
        if name not in progress.unreadable:
            progress.unreadable[name] = what
            table.say(f"left out: {what}")
    if len(progress.unreadable) >= len(session.data):
        first = next(iter(progress.unreadable.values()))
        raise UserError(
            f"{session.config.data}: no training picture can be read; `saccade inspect` lists them all ({first})"
        )


def note_unmeasured(progress: Progress, session: Session, failed: list[str], table: RunTable) -> None:
    """Report a picture of the validation split that cannot be decoded once."""
    for what in failed:
        if what in progress.unmeasured:
            continue
        progress.unmeasured.append(what)
        if unmeasured(what) not in session.data.notes:  # which have been said
            table.say(f"note: {unmeasured(what)}")


def note_fault(
    progress: Progress, session: Session, folder: Path, step: int, result: StepResult, limit: int, table: RunTable
) -> None:
    """Write the samples of a step with a non-finite loss or gradient to `faults.jsonl`; stop after several in a row."""
    ids = [session.data.name(i) for i in result.indices]
    everywhere = [name for part in distributed.gather(ids, session.world) for name in part]
    loss = repr(result.loss)  # NaN and infinity are not JSON
    progress.faults.append({"step": step, "fault": result.fault, "loss": loss, "samples": everywhere})
    path = folder / "faults.jsonl"
    if session.world.is_main:
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in progress.faults).encode())
    table.say(f"step {step}: {result.fault} is not finite (loss {loss}); weights unchanged, samples in {path}")
    if progress.faults_in_row >= limit:
        raise UserError(
            f"{folder}: {limit} steps in a row with a non-finite {result.fault}. The samples are in {path}; if they "
            "are sound, lower --lr or use --precision float32. The last good state is kept"
        )


def restore(session: Session, folder: Path, ema: Ema | None, show: bool) -> Progress:
    """The newest checkpoint that is whole; a damaged one is passed over with a word, and the one before it used."""
    faults = []
    found = list_checkpoints(folder / "checkpoints")
    for path in found:
        try:
            return Progress(**load_checkpoint(path, session.model, session.optimizers, ema))
        except UserError as error:
            faults.append(str(error))
        except TypeError as error:
            faults.append(f"{path}: holds no progress of a run ({error})")
        if path != found[-1]:
            RunTable(1, 0, show=show).say(f"passed over: {faults[-1]}; the one before it is used")
    if faults:
        kept = f", with --weights {folder} to begin from its best model so far"
        kept = kept if (folder / "model.safetensors").is_file() else ""
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise UserError(f"{folder}: no checkpoint can be used, so start anew with another --out{kept}:{listed}")
    return Progress()


def announce(table: RunTable, session: Session, plan: Plan, first_step: int) -> None:
    config, data = session.config, session.data
    parameters = sum(p.numel() for p in session.model.parameters())
    table.say(
        f"{'continuing at step ' + str(first_step) + ': ' if first_step else ''}{config.model} "
        f"({parameters / 1e6:.1f} M parameters, {plan.precision}) on {data.about}; "
        f"{counted(plan.total_steps, 'step')} of {data.about_steps}; folder {config.out}"
    )
    for note in data.notes:
        table.say(f"note: {note}")


class Saver:
    """Decides when the state is due to be saved, and saves it."""

    def __init__(self, session: Session, folder: Path, ema: Ema | None, interval: float | None):
        self.session, self.folder, self.ema = session, folder / "checkpoints", ema
        self.given = interval
        self.began = self.last = time.monotonic()
        self.spent = 0.0
        self.cost = 0.0

    def due(self) -> bool:
        if not self.session.world.is_main:
            return False
        interval = max(60.0, self.cost / SAVING_SHARE) if self.given is None else self.given
        return time.monotonic() - self.last >= interval

    def cheap(self) -> bool:
        """May the state be saved at an epoch end within the share of time that saving may take? All processes agree."""
        used = self.spent + self.cost <= SAVING_SHARE * (time.monotonic() - self.began)
        return distributed.from_main(used, self.session.world)

    def save(self, progress: Progress) -> None:
        start = time.monotonic()
        session = self.session
        save_checkpoint(
            self.folder,
            progress.step,
            copy.deepcopy(progress.__dict__),
            session.model,
            session.optimizers,
            self.ema,
            session.world,
            session.sharded,
        )
        self.last = time.monotonic()
        self.cost = self.last - start
        self.spent += self.cost


def finish(
    session: Session,
    folder: Path,
    progress: Progress,
    writer: Events | None,
    *,
    finished: bool,
    signal_number: int | None,
) -> TrainResult:
    if writer is not None:
        writer.close()
    best = next((row for row in progress.rows if row["step"] == progress.best_step), {})
    metrics = {name.removeprefix("val_"): value for name, value in best.items() if name.startswith("val_")}
    left_out, uncounted = progress.unreadable, tuple(progress.unmeasured)
    return TrainResult(folder, finished, progress.step, metrics, left_out, uncounted, signal_number)
