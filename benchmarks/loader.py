"""Pictures per second of decode + random resized crop + flip + batch: ours beside torchvision's transforms.v2.

    python benchmarks/loader.py                      # 128-pixel and 4-megapixel JPEGs, made in a temporary folder
    python benchmarks/loader.py --data FOLDER        # your own folder of classes
    python benchmarks/loader.py --workers 0 1 2 --json loader.json

Both read the same files, in one process, turn by turn; the ratio is the median over the turns. Our cache is off.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from saccade.config import AugmentConfig, DataConfig, PreprocessingConfig
from saccade.data.loader import measure_sizes, train_batches
from saccade.data.sources import open_source
from saccade.data.transforms import TrainTransform, collate_train


def make_photos(folder: Path, size: tuple[int, int], count: int, copies: int, seed: int = 0) -> None:
    """Smooth colours with fine texture, as JPEG of quality 90; each is written several times for longer epochs."""
    rng = np.random.default_rng(seed)
    h, w = size
    for k in range(count):
        colors = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse = colors.resize((w, h), Image.Resampling.BICUBIC)
        fine = rng.normal(0, 1, (h // 2 + 1, w // 2 + 1)).astype(np.float32) * 12
        texture = np.asarray(Image.fromarray(fine).resize((w, h), Image.Resampling.BILINEAR))
        pixels = np.clip(np.asarray(coarse, dtype=np.float32) + texture[..., None], 0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=90)
        for copy in range(copies):
            path = folder / f"class{k % 2}" / f"{k:05d}_{copy}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.getvalue())


def ours(folder: Path, image_size: int, batch_size: int, pictures: int, workers: int) -> float:
    source = open_source(folder)
    preprocessing = PreprocessingConfig(image_size=image_size, interpolation="bilinear")
    config = DataConfig(cache="off")
    sizes = measure_sizes(source, config)
    transform = TrainTransform(AugmentConfig(crop_scale=(0.08, 1.0), policy="none"), preprocessing)
    batches = train_batches(
        source,
        sizes,
        transform,
        functools.partial(collate_train, num_classes=len(source.class_names)),
        preprocessing=preprocessing,
        data=config,
        batch_size=batch_size,
        seed=0,
        workers=workers,
    )
    return speed(lambda: len(next(batches)), pictures)


def torchvisions(folder: Path, image_size: int, batch_size: int, pictures: int, workers: int) -> float:
    transform = v2.Compose(
        [v2.RandomResizedCrop(image_size, scale=(0.08, 1.0)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    loader = DataLoader(
        ImageFolder(str(folder), transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )

    def endless():
        while True:
            yield from loader

    batches = endless()
    return speed(lambda: len(next(batches)[0]), pictures)


def speed(step: Callable[[], int], pictures: int) -> float:
    """Pictures per second, after the batches that workers have read ahead while they started."""
    step()
    done, start = 0, time.perf_counter()
    while done < pictures:
        done += step()
    return done / (time.perf_counter() - start)


def compare(
    name: str, folder: Path, image_size: int, batch_size: int, pictures: int, workers: int, turns: int
) -> dict[str, Any]:
    mine: list[float] = []
    theirs: list[float] = []
    for turn in range(turns):
        for run, speeds in ((ours, mine), (torchvisions, theirs))[:: 1 if turn % 2 else -1]:
            speeds.append(run(folder, image_size, batch_size, pictures, workers))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    row = {
        "data": name,
        "workers": workers,
        "image_size": image_size,
        "ours": round(statistics.median(mine), 1),
        "torchvision": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
    }
    print(f"{name:<24} {workers:>7} {row['ours']:>12.1f} {row['torchvision']:>12.1f} {row['ratio']:>8.2f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of classes instead of made pictures")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--image-size", type=int, default=0, help="default: 128 for the small, 224 for the large")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a turn lasts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'pictures per second':<24} {'workers':>7} {'ours':>12} {'torchvision':>12} {'ratio':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        if args.data:
            sets = [(args.data.name, args.data, args.image_size or 224, 32)]
        else:
            made = Path(temporary)
            make_photos(made / "small", (128, 128), 256, copies=8)
            make_photos(made / "large", (1632, 2448), 16, copies=8)
            sets = [
                ("128 x 128", made / "small", args.image_size or 128, 64),
                ("2448 x 1632 (4 MP)", made / "large", args.image_size or 224, 8),
            ]
        for name, folder, image_size, batch_size in sets:
            for workers in args.workers:
                probe = torchvisions(folder, image_size, batch_size, batch_size * 2, 0)
                pictures = max(2 * batch_size, round(probe * args.seconds / batch_size) * batch_size)
                rows.append(compare(name, folder, image_size, batch_size, pictures, workers, args.turns))
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
