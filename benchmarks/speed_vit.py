"""A training step and inference of plain ViTs: ours beside timm's of the same configuration, turn by turn.

    python -m benchmarks.speed_vit --json benchmarks/results/speed_vit.json
    python -m benchmarks.speed_vit --models vit_tiny --batches 1,16 --modes train --seconds 5

Both run on the same random pictures in one process: ours, timm's, timm's, ours, and so on, so that a drift of the
machine's speed meets both. `ratio` is the median over the pairs of ours / timm's: below 1, ours is faster. `low` and
`high` are the quartiles of that ratio. `activations` is the memory of the tensors that autograd keeps for the backward
pass: each storage once, parameters not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report

CLASSES, IMAGE_SIZE = 1000, 224
PEERS = {"vit_tiny": "vit_tiny_patch16_224", "vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}

COLUMNS = {
    "name": "", "ours_ms": ".1f", "timm_ms": ".1f", "ratio": ".3f", "low": ".3f", "high": ".3f", "pairs": "d",
    "ours_activations_mb": ".1f", "timm_activations_mb": ".1f", "others_cores": ".2f",
}  # fmt: skip


class OnlyLogits(nn.Module):
    """Ours answers with a dataclass; the loss and the timing are then the same for both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def build_ours(name: str) -> nn.Module:
    from saccade.backbones import build_backbone
    from saccade.models.classifier import Classifier

    return OnlyLogits(Classifier(build_backbone(name, image_size=IMAGE_SIZE), CLASSES))


def build_peer(name: str) -> nn.Module:
    import timm

    return timm.create_model(PEERS[name], num_classes=CLASSES)


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    model.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return model(images)

    return run


MODES = {"train": training_step, "infer": inference}


def activations(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward."""
    kept: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    pictures = images.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters and place != pictures:
            kept[place] = tensor  # held, so that its address is not given to another tensor meanwhile
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images), labels)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return total


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], peer: Callable[[], object], seconds: float, least: int) -> dict[str, Any]:
    """Pairs of timings in turned order, for `seconds` and at least `least` pairs, after two of each unmeasured."""
    for run in (ours, peer, ours, peer):
        run()
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < least or time.perf_counter() - start < seconds:
        if len(pairs) % 2:
            second = seconds_of(peer)
            first = seconds_of(ours)
        else:
            first = seconds_of(ours)
            second = seconds_of(peer)
        pairs.append((first, second))
    low, ratio, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    ours_ms, timm_ms = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "ours_ms": ours_ms, "timm_ms": timm_ms,
        "ratio": ratio, "low": low, "high": high, "pairs": len(pairs),
    }  # fmt: skip


def measure(name: str, batch: int, mode: str, seconds: float, least: int) -> report.Row:
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(CLASSES, (batch,))
    ours, peer = build_ours(name), build_peer(name)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, peer)]
    # timm's class token has a position of its own, which adds nothing to the token that is learned anyway
    if not 0.999 < sizes[0] / sizes[1] < 1.001:
        raise SystemExit(f"{name}: not the same configuration, ours has {sizes[0]} parameters and timm's {sizes[1]}")
    load = report.Load()
    row = {"name": f"{name} {mode} {batch}", "model": name, "batch": batch, "mode": mode, "parameters": sizes[0]}
    row |= compare(MODES[mode](ours, images, labels), MODES[mode](peer, images, labels), seconds, least)
    row["others_cores"] = load.others()
    if mode == "train":
        row["ours_activations_mb"] = activations(ours, images, labels) / 2**20
        row["timm_activations_mb"] = activations(peer, images, labels) / 2**20
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_tiny,vit_small", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--modes", default="train,infer")
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring, per line of the table")
    parser.add_argument("--least", type=int, default=5, help="pairs per line, however long they take")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.models.split(","):
        for mode in arguments.modes.split(","):
            for batch in map(int, arguments.batches.split(",")):
                row = measure(name, batch, mode, arguments.seconds, arguments.least)
                row |= {"threads": arguments.threads, "versions": report.versions(("torch", "timm"))}
                rows.append(row)
                print(f"{row['name']}: ratio {row['ratio']:.3f}", flush=True)
                if arguments.json:
                    report.merge(arguments.json, [row])
    print(report.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
