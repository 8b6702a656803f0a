"""One step of the optimizer: all of it happens, or nothing."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saccade.engine import distributed
from saccade.engine.device import autocast
from saccade.engine.run_data import AnyBatch
from saccade.errors import UserError
from saccade.layers.convolution import normalised_as_known
from saccade.models.translator import Translator
from saccade.tasks.processes import mean_over_processes

if TYPE_CHECKING:
    from saccade.engine.train import Session


@dataclass
class StepResult:
    loss: float
    grad_norm: float
    fault: str
    amount: int  # of what speed is counted in
    indices: list[int]
    unreadable: list[tuple[int, str]]


def shares_of(session: Session, group: list[AnyBatch]) -> list[float]:
    """What each batch of a step counts: as many of what is learnt from as it holds, in all processes."""
    if len(group) == 1:
        return [1.0]
    things = [session.task.things(batch.targets) for batch in group]
    if None not in things:  # losses are divided by them, or by one where there are none
        counts = [mean_over_processes(count or 0, session.device).item() for count in things]
        return [max(1.0, count) / max(1.0, sum(counts)) for count in counts]
    amounts = [mean_over_processes(session.data.amount(batch), session.device).item() for batch in group]
    total = sum(amounts)
    # without any readable picture all count alike, as a single batch of that kind counts wholly
    return [amount / total if total else 1 / len(group) for amount in amounts]


def _forward(session: Session, batch: AnyBatch) -> Any:
    try:
        return session.task.forward(session.network, session.data.inputs(batch), batch.targets)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        small = "normalises over a batch, and this one is a single value in a channel"
        raise UserError(f"--model {session.config.model}: {small}; use a larger --batch-size or --image-size") from None


def _normalised(session: Session, batch: AnyBatch) -> AbstractContextManager[None]:
    """Where of several pictures one at most can be read, there are no statistics of a batch: the running ones serve.

    A batch that was meant to be of one picture is an error of the settings.
    """
    left = len(batch.indices)
    return normalised_as_known(session.model) if left <= 1 < left + len(batch.unreadable) else nullcontext()


def train_step(session: Session, batches: Iterator[AnyBatch], step: int) -> StepResult:
    """One optimizer step over `accumulate` batches. With a fault, nothing has changed afterwards."""
    config, device = session.config, session.device
    accumulate = config.optimizer.accumulate
    group = [next(batches) for _ in range(accumulate)]
    seed_everything(config.seed, 1 + step, session.world.rank)
    buffers = [buffer.clone() for buffer in session.model.buffers()]
    session.network.train()
    if config.train_part == "head":
        assert not isinstance(session.model, Translator)  # it has no head
        session.model.backbone.eval()  # a frozen backbone's statistics stay, too
    loss_sum, fault, grad_norm = 0.0, "", math.nan
    for batch, share in zip(group, shares_of(session, group), strict=True):
        batch = batch.to(device)
        with _normalised(session, batch):
            with autocast(device, session.precision):
                outputs = _forward(session, batch)
            losses = session.task.losses(outputs, batch.targets)
            loss = torch.stack(list(losses.values())).sum() * share
            loss_sum += loss.item()
            finite = not distributed.agree([not math.isfinite(loss_sum)], session.world)[0]
            if not finite:
                fault = "loss"
                break
            loss.backward()
    if not fault:
        parameters = [p for p in session.model.parameters() if p.grad is not None]
        limit = math.inf if config.optimizer.clip_norm is None else config.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # pyright: ignore
        fault = "" if math.isfinite(grad_norm) else "gradient"
    if fault:
        for buffer, kept in zip(session.model.buffers(), buffers, strict=True):
            buffer.copy_(kept)
    else:
        for optimizer in session.optimizers:
            optimizer.step()
        if session.sharded:  # as DDP does it: else each process goes on with statistics of its own, which no save holds
            distributed.same_buffers(session.model, session.world)
    for optimizer in session.optimizers:
        optimizer.zero_grad(set_to_none=True)
    indices = [int(i) for batch in group for i in batch.indices]
    unreadable = [entry for batch in group for entry in batch.unreadable]
    mean_loss = distributed.mean(loss_sum, session.world)
    amount = sum(session.data.amount(batch) for batch in group)
    return StepResult(mean_loss, grad_norm, fault, amount, indices, unreadable)


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Dropout and stochastic depth of a step depend on nothing but the seed, the step and the process."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little") >> 1
    torch.manual_seed(number)
    random.seed(number)
