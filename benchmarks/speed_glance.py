"""Pictures a second of the smallest house detector, beside transformers' RT-DETR on a ResNet-18, with its AP.

    python -m benchmarks.speed_glance --model runs/cells --json benchmarks/results/speed_glance.json
    python -m benchmarks.speed_glance --name glance_nano --batches 1 --seconds 5     # random weights, no AP

Both in plain PyTorch in one process, turn by turn, each round in the order opposite to the one before. `network` is
from normalised square pictures to scores and boxes. `files` is all that a user waits for: JPEG files of `--data` are
read, decoded, brought to about that size (ours in the shape they have, RT-DETR's square, as its processor does),
normalised, and come out as boxes in their pixels, by `Model.predict` and by the processor of RT-DETR. `ratio` is the
median over the rounds of our time by theirs, `low` and `high` its quartiles. Neither model is fused or compiled. The
time of a pass hardly depends on what the weights are, so those of RT-DETR are random. AP is of ours on `test`, at the
size that is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import saccade
from benchmarks import report
from benchmarks.detection_peers import PEERS
from benchmarks.speed_backbones import compared, in_turn
from saccade.config import DataConfig, PreprocessingConfig
from saccade.data.loader import eval_batches, measure_sizes
from saccade.data.sources import open_source
from saccade.engine.device import autocast, choose_precision
from saccade.engine.distributed import World
from saccade.engine.evaluate import Normalise, PictureInputs, evaluate_batches
from saccade.engine.predict import Model
from saccade.models import build_network, model_row
from saccade.models.detector import Detector
from saccade.weights.model_file import ModelCard

CPU = torch.device("cpu")
RIVAL = "rtdetr"
THRESHOLD = 0.5  # of what a user sees

COLUMNS = {
    "name": "", "ours_per_second": ".1f", "rival_per_second": ".1f", "ratio": ".3f", "low": ".3f", "high": ".3f",
    "rounds": "d", "ap": ".3f", "ap50": ".3f", "others_cores": ".2f",
}  # fmt: skip


def open_ours(arguments: argparse.Namespace) -> Model:
    """The trained model, or one of that name with random weights."""
    if arguments.model:
        return saccade.load(arguments.model, device="cpu", precision=arguments.precision)
    row = model_row(arguments.name)
    size = PreprocessingConfig(image_size=arguments.image_size or 320, stride=row.stride)
    torch.manual_seed(0)
    network = build_network(row, 3)
    card = ModelCard("detect", arguments.name, row.to_dict(), ("a", "b", "c"), size, threshold=THRESHOLD)
    assert isinstance(network, Detector), f"{arguments.name} finds no boxes"
    return Model(network, card, CPU, choose_precision(arguments.precision, CPU))


def resized(model: Model, image_size: int | None) -> Model:
    """The same model for pictures of another size."""
    if image_size is None:
        return model
    preprocessing = model.preprocessing.model_copy(update={"image_size": image_size})
    return replace(model, card=replace(model.card, preprocessing=preprocessing))


def measure_ap(model: Model, data: str) -> report.Row:
    """At the size at which speed is measured, which need not be the one in the model's file."""
    source = open_source(Path(data), "test").with_classes(model.class_names)
    config, task = DataConfig(), model.task
    batches = eval_batches(
        source,
        measure_sizes(source, config),
        task.eval_transform,
        task.eval_collate,
        preprocessing=model.preprocessing,
        data=config,
        batch_size=8,
    )
    inputs = PictureInputs(Normalise(model.preprocessing, CPU))
    found = evaluate_batches(model.network, batches, task, inputs, CPU, model.precision, World())
    return {"ap": found.ap, "ap50": found.ap50, "ap75": found.ap75}


def networks(model: Model, rival: nn.Module, pictures: int, size: int) -> list[Callable[[], object]]:
    torch.manual_seed(0)
    images = torch.randn(pictures, 3, size, size)

    def ours() -> object:
        with torch.no_grad(), autocast(CPU, model.precision):
            return model.network(images)

    def theirs() -> object:
        with torch.no_grad(), autocast(CPU, model.precision):
            return rival(pixel_values=images)

    return [ours, theirs]


def whole_ways(model: Model, rival: nn.Module, files: list[Path], size: int) -> list[Callable[[], object]]:
    processor, square = PEERS[RIVAL].processor, {"height": size, "width": size}

    def ours() -> object:
        return model.predict(files, batch_size=len(files), threshold=THRESHOLD)

    def theirs() -> object:
        pictures = [Image.open(file).convert("RGB") for file in files]
        inputs = processor(images=pictures, size=square, return_tensors="pt")
        with torch.no_grad(), autocast(CPU, model.precision):
            outputs = rival(**inputs)
        shown = [(picture.height, picture.width) for picture in pictures]
        return processor.post_process_object_detection(outputs, threshold=THRESHOLD, target_sizes=shown)

    return [ours, theirs]


def test_files(data: str, count: int) -> list[Path]:
    source = open_source(Path(data), "test")
    return [Path(source.id(i)) for i in range(min(count, len(source)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model file or run folder, whose AP is measured beside its speed")
    parser.add_argument("--name", default="glance_nano", help="without --model: this one with random weights")
    parser.add_argument("--data", default="../shared/data/cells", help="pictures with boxes, with a split test")
    parser.add_argument("--image-size", type=int, help="of pictures; else the model's own")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, per line")
    parser.add_argument("--least", type=int, default=5, help="rounds, however long they take")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="float32", help="of both")
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = resized(open_ours(arguments), arguments.image_size)
    model.network.eval()
    size: int = model.preprocessing.image_size
    torch.manual_seed(0)
    rival = PEERS[RIVAL].build(len(model.class_names)).eval()
    scores = measure_ap(model, arguments.data) if arguments.model else {}
    rows: list[report.Row] = []
    for way in ("network", "files"):
        for pictures in [int(batch) for batch in arguments.batches.split(",")]:
            if way == "network":
                runs = networks(model, rival, pictures, size)
            else:
                files = test_files(arguments.data, pictures)
                pictures = len(files)
                runs = whole_ways(model, rival, files, size)
            load = report.Load()
            row = compared(*in_turn(runs, arguments.seconds, arguments.least))
            row = {
                "name": f"{model.card.model} / {PEERS[RIVAL].about}, {way}, {size} px, batch {pictures}",
                "ours_per_second": 1e3 * pictures / row["ours_ms"],
                "rival_per_second": 1e3 * pictures / row["rival_ms"],
                **row, **scores,
                "model": model.card.model, "way": way, "batch": pictures, "image_size": size,
                "parameters": sum(p.numel() for p in model.network.parameters()),
                "rival_parameters": sum(p.numel() for p in rival.parameters()),
                "precision": str(model.precision).removeprefix("torch."),
                "others_cores": load.others(), "threads": arguments.threads,
                "versions": report.versions(("torch", "torchvision", "transformers", "pillow")),
            }  # fmt: skip
            rows.append(row)
            print(f"{row['name']}: {row['ours_per_second']:.1f} pictures/s", flush=True)
            if arguments.json:
                report.merge(arguments.json, [row])
    print(report.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
