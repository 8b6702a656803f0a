"""Detectors of ours beside transformers' of the same form: time of a training step and of a forward pass.

    python -m benchmarks.speed_detectors --json benchmarks/results/speed_detectors.json
    python -m benchmarks.speed_detectors --only detr --modes train --seconds 60

Both models of a line run on the same random pictures and things in one process, turn by turn, as in
`benchmarks.speed_backbones`. A training step is forward, matching, the loss of every layer of the decoder and backward,
with dropout, without an optimizer, which would be the same for both. A forward pass is in evaluation, without
gradients. Both are in float32, unless `--precision`, or `--our-precision` for ours alone, says otherwise: `saccade
train` takes bfloat16 on processors that multiply in it.

`ratio` is the median over the rounds of ours / theirs: below 1, ours is faster; `low` and `high` are its quartiles.
`processor` is the median of the same of the seconds that processors worked for the process, which other programs
lengthen much less; it does not show threads that wait. On a machine that others use, `OMP_WAIT_POLICY=PASSIVE` before
the command keeps the threads of both models from waiting for each other by turning round.

`train` trains all, in both; `train as published` all but the first stage of the ResNet and what is before it, in both.
transformers' ResNet is timm's, which it builds by default.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.speed_backbones import compared, in_precision, named

CLASSES = 91
THINGS = (9, 0, 7, 3)  # in the pictures of a batch, again and again
PUBLISHED = "train as published"
FROZEN = (
    "backbone.stem.", "backbone.stages.0.",
    "model.backbone.model.conv1.", "model.backbone.model.bn1.", "model.backbone.model.layer1.",
)  # fmt: skip

COLUMNS = {
    "name": "", "ours_ms": ".1f", "rival_ms": ".1f", "ratio": ".3f", "low": ".3f", "high": ".3f", "processor": ".3f",
    "rounds": "d", "others_cores": ".2f",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model of ours, and transformers' of the same form."""

    model: str
    rival: Callable[[], nn.Module]


def detr() -> nn.Module:
    """With the losses of all layers, which ours always has."""
    from transformers import DetrConfig, DetrForObjectDetection

    backbone = {"use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": False}
    config = DetrConfig.from_dict({**backbone, "auxiliary_loss": True, "num_labels": CLASSES})
    return DetrForObjectDetection(config)


def deformable_detr(name: str) -> Callable[[], nn.Module]:
    """As `saccade verify` builds it: with the losses of all layers, and heads of its own for each where boxes are
    refined. transformers has no loss of proposals, which ours computes beside the others."""

    def build() -> nn.Module:
        from saccade.models import model_row
        from saccade.weights.formats.deformable_detr import FORMATS
        from saccade.weights.formats.reference import FileNamed

        peer = FORMATS[0].peer
        assert peer is not None
        model = peer.build(model_row(name), CLASSES, {})
        assert isinstance(model, FileNamed)
        return model.inner

    return build


DEFORMABLE = [f"deformable_detr_resnet50{variant}" for variant in ("", "_refine", "_two_stage")]
CASES: dict[str, Case] = {
    "detr_resnet50": Case("detr_resnet50", detr),
    **{name: Case(name, deformable_detr(name)) for name in DEFORMABLE},
}


def ours(name: str, size: int) -> nn.Module:
    from saccade.config import NetworkConfig
    from saccade.models import build_network, model_row

    return build_network(model_row(name).changed(NetworkConfig(), size), CLASSES)


def batch_of(pictures: int, size: int) -> tuple[Tensor, Any]:
    """Pictures, and things in the form of ours."""
    from saccade.models.detector import BoxTargets

    torch.manual_seed(0)
    counts = torch.tensor([THINGS[b % len(THINGS)] for b in range(pictures)])
    M = int(counts.sum())
    sides = 0.05 + 0.4 * torch.rand(M, 2)
    centres = sides / 2 + (1 - sides) * torch.rand(M, 2)
    picture = torch.repeat_interleave(torch.arange(pictures), counts)
    targets = BoxTargets(torch.cat((centres, sides), dim=1), torch.randint(CLASSES, (M,)), picture)
    return torch.randn(pictures, 3, size, size), targets


def our_step(model: Any, images: Tensor, targets: Any) -> Callable[[], object]:
    from saccade.config import RunConfig
    from saccade.tasks.detection import LOSSES

    loss = LOSSES[model.config.loss](model.config, RunConfig(data=""))
    model.train()

    def step() -> None:
        model.zero_grad()
        torch.stack(list(loss(model(images, targets), targets).values())).sum().backward()

    return step


def their_step(model: Any, images: Tensor, targets: Any) -> Callable[[], object]:
    from saccade.weights.formats.detection_loss import labels_of

    labels = labels_of(targets, len(images))
    model.train()

    def step() -> None:
        model.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()

    return step


def forward_pass(model: nn.Module, images: Tensor) -> Callable[[], object]:
    model.eval()

    def run() -> Any:
        with torch.no_grad():
            return model(images)

    return run


@dataclass(frozen=True)
class Seconds:
    wall: float
    processor: float


def in_turn(runs: Sequence[Callable[[], object]], seconds: float, least: int) -> list[list[Seconds]]:
    """Of each, in rounds of turned order, after two unmeasured; each element has one list per run."""
    for run in [*runs, *runs]:
        run()
    times: list[list[Seconds]] = [[] for _ in runs]
    order = list(range(len(runs)))
    start = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - start < seconds:
        for i in order:
            wall, processor = time.perf_counter(), time.process_time()
            runs[i]()
            times[i].append(Seconds(time.perf_counter() - wall, time.process_time() - processor))
        order.reverse()
    return times


def measure(case: str, mode: str, arguments: argparse.Namespace) -> report.Row:
    chosen = CASES[case]
    own, rival = ours(chosen.model, arguments.size), chosen.rival()
    size, expected = (sum(p.numel() for p in model.parameters()) for model in (own, rival))
    if abs(size / expected - 1) > 0.002:
        raise SystemExit(f"{case}: not the same form, ours has {size} parameters and transformers' {expected}")
    for name, parameter in [*own.named_parameters(), *rival.named_parameters()]:
        parameter.requires_grad_(mode != PUBLISHED or not name.startswith(FROZEN))
    learnt, expected = (sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (own, rival))
    if abs(learnt / expected - 1) > 0.002:
        raise SystemExit(f"{case}: ours trains {learnt} parameters, transformers' {expected}")
    images, targets = batch_of(arguments.batch, arguments.size)
    if mode == "forward":
        runs = [forward_pass(own, images), forward_pass(rival, images)]
    else:
        runs = [our_step(own, images, targets), their_step(rival, images, targets)]
    precisions = [arguments.our_precision or arguments.precision, arguments.precision]
    runs = [in_precision(run, precision) for run, precision in zip(runs, precisions, strict=True)]
    load = report.Load()
    own_times, rival_times = in_turn(runs, arguments.seconds, arguments.least)
    pairs = zip(own_times, rival_times, strict=True)
    row = {
        "name": f"{case} / transformers, {mode}, batch {arguments.batch}, {arguments.size} px",
        "case": case, "mode": mode, "batch": arguments.batch, "size": arguments.size,
        "others_cores": load.others(), "threads": arguments.threads,
        "versions": report.versions(("torch", "timm", "transformers")),
        "processor": statistics.median(a.processor / b.processor for a, b in pairs),
    } | compared(*([each.wall for each in times] for times in (own_times, rival_times)))  # fmt: skip
    own, theirs = precisions
    return named(row, own if own == theirs else f"{own} / {theirs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"names, or parts of names, of {', '.join(CASES)}")
    parser.add_argument("--modes", default=f"train,{PUBLISHED},forward")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=480, help="pixels of a side")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, per mode")
    parser.add_argument("--least", type=int, default=5, help="rounds, however long they take")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    for flag, who, default in (("--precision", "both", "float32"), ("--our-precision", "ours alone", None)):
        parser.add_argument(flag, choices=("float32", "bfloat16"), default=default, help=f"of {who}")
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = [part for part in arguments.only.split(",") if part]
    chosen = [case for case in CASES if not wanted or any(part in case for part in wanted)]
    if not chosen:
        raise SystemExit(f"--only {arguments.only}: none of {', '.join(CASES)}")
    rows: list[report.Row] = []
    for case in chosen:
        for mode in arguments.modes.split(","):
            rows.append(measure(case, mode, arguments))
            if arguments.json:
                report.merge(arguments.json, rows[-1:])
            print(f"{rows[-1]['name']}: ratio {rows[-1]['ratio']:.3f}", flush=True)
    print(report.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
