"""Backbones of ours beside timm's and transformers' of the same form: time of a forward pass and of a training step,
and memory of the step.

    python -m benchmarks.speed_backbones --json benchmarks/results/speed_backbones.json
    python -m benchmarks.speed_backbones --only swin,resnet --batches 1 --modes train --seconds 2

All models of a line run on the same random pictures in one process, turn by turn: ours, timm's, transformers', then in
the reverse order, and so on, so that a drift of the machine's speed meets all of them. `ratio` is the median over the
rounds of ours / theirs: below 1, ours is faster; `low` and `high` are its quartiles. A training step is forward,
cross-entropy and backward, without an optimizer, which would be the same for all; a forward pass is in evaluation,
without gradients. Both are in float32, or under autocast for all models with `--precision bfloat16`. Random dropping of
branches is off in all models. What is not installed, and a family that does not exist, is passed over and said.

`peak` is how far a training step raises the memory of a process that has nothing else to do: the resident set at its
highest during the step, less what was resident before it. The kernel counts it, so that gradients, what autograd keeps,
workspaces and copies inside of kernels are all in it, which counting tensors would miss. Each model has a process of
its own, and has made two steps before, so that threads, code and caches of kernels are there already; its gradients are
then given back, and the mark of the highest is set anew (`/proc/self/clear_refs`; Linux only). The C library is told to
hand every block of 64 KiB or more back to the kernel when it is freed, and all it has just before: otherwise freed
memory that it holds on to would hide what the step needs. Two runs agree to about 1 %.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report

CLASSES, IMAGE_SIZE = 1000, 224
# tokens per block: https://arxiv.org/abs/2210.09461 merges 13 for this size, and 16 for those with more tokens to spare
MERGED = {"merging_13": (13, "constant"), "merging_13_decreasing": (13, "decreasing"),
          "merging_16_decreasing": (16, "decreasing")}  # fmt: skip

COLUMNS = {
    "name": "", "ours_ms": ".1f", "rival_ms": ".1f", "ratio": ".3f", "low": ".3f", "high": ".3f", "rounds": "d",
    "ours_peak_mb": ".1f", "rival_peak_mb": ".1f", "peak_ratio": ".3f", "others_cores": ".2f",
}  # fmt: skip

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """A model of ours, with changes of its settings, and what it is compared with."""

    model: str
    rivals: Mapping[str, Build]
    network: Mapping[str, Any] = field(default_factory=dict)
    spare: float = 0.001  # how far the numbers of parameters may be apart


class NotThere(Exception):
    """A family of ours, a setting or a package that does not exist here."""


class OnlyLogits(nn.Module):
    """Some answer with an object; the loss and the timing are then the same for all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.model(images)
        return outputs if isinstance(outputs, Tensor) else outputs.logits


def ours(name: str, network: Mapping[str, Any]) -> nn.Module:
    from saccade.backbones import BACKBONES, build_backbone
    from saccade.config import NetworkConfig
    from saccade.models.classifier import Classifier

    if name not in BACKBONES:
        raise NotThere(f"saccade has no {name}")
    if unknown := network.keys() - NetworkConfig.model_fields.keys():
        raise NotThere(f"saccade has no setting {', '.join(unknown)}")
    fixed = {"drop_path": 0.0} if "drop_path" in BACKBONES[name].to_dict() else {}
    backbone = build_backbone(name, NetworkConfig.model_validate(fixed | dict(network)), IMAGE_SIZE)
    return Classifier(backbone, CLASSES)


def in_timm(name: str, **arguments: Any) -> Build:
    def build() -> nn.Module:
        try:
            import timm
        except ModuleNotFoundError:
            raise NotThere("timm is not installed") from None
        return timm.create_model(name, num_classes=CLASSES, **arguments)

    return build


def in_transformers(kind: str, **arguments: Any) -> Build:
    """`kind` as in ViTConfig and ViTForImageClassification."""

    def build() -> nn.Module:
        try:
            import transformers
        except ModuleNotFoundError:
            raise NotThere("transformers is not installed") from None
        config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **arguments)
        return getattr(transformers, f"{kind}ForImageClassification")(config)

    return build


def vit_in_transformers(dim: int, heads: int) -> Build:
    return in_transformers("ViT", hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim)


CASES: dict[str, Case] = {
    "vit_tiny": Case(
        "vit_tiny", {"timm": in_timm("vit_tiny_patch16_224"), "transformers": vit_in_transformers(192, 3)}
    ),
    "vit_small": Case(
        "vit_small", {"timm": in_timm("vit_small_patch16_224"), "transformers": vit_in_transformers(384, 6)}
    ),
    "swin_tiny": Case(
        "swin_tiny",
        {
            "timm": in_timm("swin_tiny_patch4_window7_224", drop_path_rate=0.0),
            "transformers": in_transformers("Swin", drop_path_rate=0.0),
        },
    ),
    "efficientvit_b1": Case("efficientvit_b1", {"timm": in_timm("efficientvit_b1")}),
    "efficientformer_l1": Case(
        "efficientformer_l1",
        {"timm": in_timm("efficientformer_l1", drop_path_rate=0.0)},
        spare=0.05,  # its two classifiers, whose mean is the answer, are one of ours
    ),
    "resnet50": Case("resnet50", {"timm": in_timm("resnet50"), "transformers": in_transformers("ResNet")}),
    **{
        f"vit_small_{name}": Case(
            "vit_small",
            {"without merging": lambda: ours("vit_small", {})},
            {"merge_tokens": tokens, "merge_schedule": schedule},
        )
        for name, (tokens, schedule) in MERGED.items()
    },
}


def build_all(case: Case) -> dict[str, nn.Module]:
    """Ours first. Raises NotThere without ours; says which of the others are missing."""
    models: dict[str, nn.Module] = {"ours": OnlyLogits(ours(case.model, case.network))}
    for name, build in case.rivals.items():
        try:
            models[name] = OnlyLogits(build())
        except NotThere as reason:
            print(f"passed over: {name} of {case.model} ({reason})", flush=True)
    size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for name, count in size.items():
        # timm's class token of a ViT has a position of its own, which adds nothing to the token that is learned anyway
        if abs(size["ours"] / count - 1) > case.spare:
            raise SystemExit(f"{case.model}: not the same form, ours has {size['ours']} parameters and {name} {count}")
    return models


def batch_of(pictures: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(pictures, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(CLASSES, (pictures,))


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    model.train()

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    return step


def forward_pass(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(images)

    return run


MODES = {"forward": forward_pass, "train": training_step}


def in_precision(run: Callable[[], object], precision: str) -> Callable[[], object]:
    """Under autocast, unless it is float32."""

    def lower() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return lower if precision == "bfloat16" else run


def named(row: report.Row, precision: str) -> report.Row:
    suffix = "" if precision == "float32" else f", {precision}"
    return row | {"name": row["name"] + suffix, "precision": precision}


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: Sequence[Callable[[], object]], seconds: float, least: int) -> list[list[float]]:
    """Seconds of each, in rounds of turned order, after two unmeasured; each element has one list per run."""
    for run in [*runs, *runs]:
        run()
    times: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    start = time.perf_counter()
    while len(times[0]) < least or time.perf_counter() - start < seconds:
        for i in order:
            times[i].append(seconds_of(runs[i]))
        order.reverse()
    return times


def compared(ours_times: list[float], rival_times: list[float]) -> report.Row:
    low, ratio, high = statistics.quantiles([a / b for a, b in zip(ours_times, rival_times, strict=True)], n=4)
    return {
        "ours_ms": 1e3 * statistics.median(ours_times), "rival_ms": 1e3 * statistics.median(rival_times),
        "ratio": ratio, "low": low, "high": high, "rounds": len(ours_times),
    }  # fmt: skip


# --- memory ---------------------------------------------------------------------------------------------------------


def status_of_process(key: str) -> int:
    """Bytes of a line such as `VmRSS:   1234 kB`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def peak_of_step(case: str, who: str, pictures: int, precision: str) -> int:
    """To be called in a process of its own; see the top of this file."""
    chosen = CASES[case]
    model = OnlyLogits(ours(chosen.model, chosen.network) if who == "ours" else chosen.rivals[who]())
    step = in_precision(training_step(model, *batch_of(pictures)), precision)
    for _ in range(2):
        step()
    model.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_of_process("VmRSS")
    step()
    return status_of_process("VmHWM") - before


def peaks(case: str, names: Sequence[str], pictures: int, threads: int, precision: str) -> dict[str, float]:
    """Megabytes by name; empty where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for name in names:
        arguments = ["--peak", case, name, "--batches", str(pictures), "--threads", str(threads)]
        arguments += ["--precision", precision]
        command = [sys.executable, "-m", "benchmarks.speed_backbones", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = int(done.stdout.split()[-1]) / 2**20
    return found


# --- lines of the table ---------------------------------------------------------------------------------------------


def measure(case: str, mode: str, pictures: int, arguments: argparse.Namespace) -> list[report.Row]:
    """A row per rival."""
    models = build_all(CASES[case])
    images, labels = batch_of(pictures)
    load = report.Load()
    precision = arguments.precision
    runs = [in_precision(MODES[mode](model, images, labels), precision) for model in models.values()]
    times = dict(zip(models, in_turn(runs, arguments.seconds, arguments.least), strict=True))
    others = load.others()
    memory: dict[str, float] = {}
    if mode == "train" and not arguments.no_memory:
        memory = peaks(case, list(models), pictures, arguments.threads, precision)
    rows = []
    for rival in [name for name in models if name != "ours"]:
        row = {
            "name": f"{case} / {rival}, {mode}, batch {pictures}",
            "case": case, "rival": rival, "mode": mode, "batch": pictures,
            "others_cores": others, "threads": arguments.threads,
            "versions": report.versions(("torch", "timm", "transformers")),
        }  # fmt: skip
        row |= compared(times["ours"], times[rival])
        if memory:
            row |= {"ours_peak_mb": memory["ours"], "rival_peak_mb": memory[rival]}
            row["peak_ratio"] = memory["ours"] / memory[rival]
        rows.append(named(row, precision))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"names, or parts of names, of {', '.join(CASES)}")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--modes", default="forward,train")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, per mode and batch")
    parser.add_argument("--least", type=int, default=5, help="rounds, however long they take")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of all models")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # one model in a process of its own
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    if arguments.peak:
        case, who = arguments.peak
        print(peak_of_step(case, who, batches[0], arguments.precision))
        return

    wanted = [part for part in arguments.only.split(",") if part]
    chosen = [case for case in CASES if not wanted or any(part in case for part in wanted)]
    if not chosen:
        raise SystemExit(f"--only {arguments.only}: none of {', '.join(CASES)}")
    rows: list[report.Row] = []
    for case in chosen:
        try:
            for mode in arguments.modes.split(","):
                for pictures in batches:
                    found = measure(case, mode, pictures, arguments)
                    rows += found
                    for row in found:
                        print(f"{row['name']}: ratio {row['ratio']:.3f}", flush=True)
                    if arguments.json:
                        report.merge(arguments.json, found)
        except NotThere as reason:
            print(f"passed over: {case} ({reason})", flush=True)
    print(report.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
