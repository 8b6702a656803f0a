"""Top-1 after a fixed wall-clock budget, from scratch, on two cores: ours and timm's models, one after the other.

    python -m benchmarks.small_data --data flowers --json benchmarks/results/small_data_flowers.json
    python -m benchmarks.small_data --data objects32 --only resnet18_32,saccade_auto

The peers get timm's standard training transforms (without AutoAugment), AdamW 1e-3 with weight decay 0.05, batch 64,
float32 and a cosine over the elapsed share of the budget, so that the learning rate always ends at zero just as time
is up. The budget covers data loading and training, not the evaluation at the end. Ours gets what its users get:
`saccade.train(data, minutes=...)`, whose budget also covers measuring its own speed and evaluating on the way.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from benchmarks import report

OURS = "saccade_auto"
WARMUP = 0.05  # of the budget


@dataclass(frozen=True)
class Peer:
    model: str
    image_size: int
    options: dict[str, Any]
    workers: int  # the fastest of 0, 1 and 2 on two cores, measured with --measure-workers


PEERS = {
    "flowers": {
        "vit_tiny_128": Peer("vit_tiny_patch16_224", 128, {"img_size": 128}, 2),
        "efficientvit_b0_128": Peer("efficientvit_b0", 128, {}, 0),
        "resnet18_128": Peer("resnet18", 128, {}, 0),
        "resnet18_64": Peer("resnet18", 64, {}, 0),
        "levit_128s_224": Peer("levit_128s", 224, {}, 2),
    },
    "objects32": {
        "vit_tiny_p4_32": Peer("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 4}, 1),
        "resnet18_32": Peer("resnet18", 32, {}, 2),
    },
}

COLUMNS = {
    "name": "", "top1": ".1f", "seconds": ".0f", "steps": "d", "epochs": ".1f", "images_per_second": ".0f",
    "parameters": ",d", "image_size": "d", "workers": "d", "others_cores": ".2f",
}  # fmt: skip


class MemoryImages(Dataset[tuple[Tensor, int]]):
    """Shards of `.jpg` and `.cls`, decoded once: the peers then spend no time on reading and decoding."""

    def __init__(self, shards: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform
        images: dict[str, Image.Image] = {}
        labels: dict[str, int] = {}
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file is None:
                        continue
                    key, extension = f"{shard.name}/{member.name.partition('.')[0]}", Path(member.name).suffix
                    if extension == ".jpg":
                        images[key] = Image.open(io.BytesIO(file.read())).convert("RGB")
                    elif extension == ".cls":
                        labels[key] = int(file.read())
        self.samples = [(images[key], labels[key]) for key in sorted(images)]
        self.classes = sorted(set(labels.values()))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        return self.transform(image), label


def open_split(root: Path, data: str, split: str, image_size: int) -> MemoryImages | ImageFolder:
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform((3, image_size, image_size), is_training=split == "train")
    if data == "flowers":
        return ImageFolder(str(root / data / split), transform)
    return MemoryImages(sorted((root / data).glob(f"{split}-*.tar")), transform)


def forever(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def build(peer: Peer, classes: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(peer.model, num_classes=classes, **peer.options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05)


def open_loader(data: Dataset[Any], workers: int, seed: int) -> DataLoader[Any]:
    return DataLoader(
        data, 64, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def learning_rate(share: float, highest: float = 1e-3) -> float:
    if share < WARMUP:
        return highest * share / WARMUP
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


@torch.no_grad()
def top1(model: nn.Module, data: Dataset[Any]) -> float:
    model.eval()
    right, count = 0, 0
    for images, labels in DataLoader(data, 64):
        right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return 100 * right / count


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], budget: float) -> int:
    """Trains for `budget` seconds, the start of the loader's workers included. Returns the number of steps."""
    model.train()
    steps, start = 0, time.perf_counter()
    for images, labels in forever(loader):
        elapsed = time.perf_counter() - start
        if elapsed >= budget:
            break
        step(model, optimizer, images, labels, learning_rate(elapsed / budget))
        steps += 1
    return steps


def run_peer(name: str, root: Path, data: str, minutes: float, seed: int) -> report.Row:
    peer = PEERS[data][name]
    train = open_split(root, data, "train", peer.image_size)
    val = open_split(root, data, "val", peer.image_size)
    model, optimizer = build(peer, len(train.classes), seed)
    load, start = report.Load(), time.perf_counter()
    steps = fit(model, optimizer, open_loader(train, peer.workers, seed), minutes * 60)
    seconds, others = time.perf_counter() - start, load.others()
    return {
        "name": name, "top1": top1(model, val), "seconds": seconds, "steps": steps,
        "epochs": steps * 64 / len(train), "images_per_second": steps * 64 / seconds,
        "parameters": sum(p.numel() for p in model.parameters()), "image_size": peer.image_size,
        "workers": peer.workers, "others_cores": others,
    }  # fmt: skip


def run_ours(root: Path, data: str, minutes: float) -> report.Row:
    import saccade
    from saccade.config import load_config

    path = root / data
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        load, start = report.Load(), time.perf_counter()
        result = saccade.train(str(path), minutes=minutes, out=out)
        seconds, others = time.perf_counter() - start, load.others()
        kept = 100 * saccade.evaluate(out, str(path / "val" if (path / "val").is_dir() else path)).top1
        with open(Path(out) / "metrics.csv", newline="") as file:
            last = 100 * float(list(csv.DictReader(file))[-1]["val_top1"])  # as for the peers: the end of the run
        parameters = sum(p.numel() for p in saccade.load(out).network.parameters())
        config = load_config(Path(out) / "config.json")
    seen = result.steps * config.batch_size * config.optimizer.accumulate
    return {
        "name": OURS, "top1": last, "kept_top1": kept, "seconds": seconds, "steps": result.steps,
        "epochs": seen / len(open_split(root, data, "train", 32)), "images_per_second": seen / seconds,
        "parameters": parameters, "image_size": config.preprocessing.image_size, "workers": config.workers,
        "others_cores": others, "model": config.model,
    }  # fmt: skip


def measure_workers(name: str, root: Path, data: str, seed: int, seconds: float = 10) -> None:
    """Prints training images per second for 0, 1 and 2 workers, without the first steps (start of the workers)."""
    peer = PEERS[data][name]
    train = open_split(root, data, "train", peer.image_size)
    for workers in (0, 1, 2):
        model, optimizer = build(peer, len(train.classes), seed)
        start, steps = time.perf_counter(), -5
        for images, labels in forever(open_loader(train, workers, seed)):
            if steps == 0:
                start = time.perf_counter()
            if steps > 0 and time.perf_counter() - start > seconds:
                break
            step(model, optimizer, images, labels, 1e-4)
            steps += 1
        print(f"{name}: {workers} workers, {64 * steps / (time.perf_counter() - start):.1f} images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=PEERS, required=True)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", help="names, separated by commas; `peers` stands for all but ours")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    parser.add_argument("--measure-workers", action="store_true", help="only print the speed with 0, 1 and 2 workers")
    arguments = parser.parse_args()

    runs = {name: partial(run_peer, name, data=arguments.data, seed=arguments.seed) for name in PEERS[arguments.data]}
    runs[OURS] = partial(run_ours, data=arguments.data)
    names = list(runs)
    if arguments.only:
        parts = arguments.only.split(",")
        names = [name for part in parts for name in (PEERS[arguments.data] if part == "peers" else [part])]
    if unknown := [name for name in names if name not in runs]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(runs)}")

    torch.set_num_threads(arguments.threads)
    if arguments.measure_workers:
        for name in names:
            if name != OURS:
                measure_workers(name, arguments.root, arguments.data, arguments.seed)
        return
    rows: dict[str, report.Row] = {}
    for name in names:
        row = runs[name](root=arguments.root, minutes=arguments.minutes)
        row |= {"minutes": arguments.minutes, "threads": arguments.threads, "seed": arguments.seed}
        row["versions"] = report.versions()
        rows[name] = row
        if arguments.json:
            rows = report.merge(arguments.json, [row])
        print(f"{name}: {row['top1']:.1f} % top-1 after {row['seconds']:.0f} s", flush=True)
    print(report.table(sorted(rows.values(), key=lambda row: row["top1"]), COLUMNS))


if __name__ == "__main__":
    main()
