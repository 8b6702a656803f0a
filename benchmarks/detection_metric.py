"""Average precision of boxes: ours beside pycocotools and faster-coco-eval, on the same detections in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.detection_metric --json benchmarks/results/detection_metric.json

The detections are made up: some objects are found well, some badly, some twice, and the rest is noise of low scores, as
of a detector that always answers with 100 boxes. `prepare_s` is what each needs to take arrays in (ours `update`,
theirs dictionaries and an index), `evaluate_s` the rest. Ours also finds thresholds, curves and mistakes, which they
do not. Seconds are those of the processor, on one core, so that other programs count less. `difference` is the largest
one of the twelve figures to those of pycocotools.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report

COLUMNS = {
    "name": "", "prepare_s": ".2f", "evaluate_s": ".2f", "total_s": ".2f", "ap": ".4f", "difference": ".1e",
    "others_cores": ".2f",
}  # fmt: skip
FIGURES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


class Picture(NamedTuple):
    boxes: np.ndarray  # (n, 4) left, top, right, bottom
    scores: np.ndarray
    labels: np.ndarray
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


def make_pictures(count: int, detections: int, classes: int, seed: int = 0) -> list[Picture]:
    """About seven objects each, of few of the classes in a picture, frequent classes more often than rare ones."""
    random = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, classes + 1)
    frequency /= frequency.sum()
    pictures = []
    for _ in range(count):
        m = random.poisson(7)
        there = random.choice(classes, 3, p=frequency)
        labels = random.choice(there, m)
        centre, size = random.uniform(0, 640, (m, 2)), np.exp(random.normal(4.2, 0.9, (m, 2)))
        truth = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
        n = min(detections, 5 * m)
        chosen = random.integers(0, max(m, 1), n)
        boxes = truth[chosen] + random.exponential(0.08, (n, 1)) * random.normal(size=(n, 4)) * np.tile(size[chosen], 2)
        found = np.where(random.random(n) < 0.85, labels[chosen], random.choice(classes, n, p=frequency))
        first = np.zeros(n, bool)
        first[np.unique(chosen, return_index=True)[1]] = True
        scores = np.where(first, random.beta(4, 2, n), random.beta(1, 8, n))
        rest = detections - n
        corner, sides = random.uniform(0, 600, (rest, 2)), np.exp(random.normal(4.2, 0.9, (rest, 2)))
        boxes = np.concatenate([boxes, np.concatenate([corner, corner + sides], axis=1)])
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
        pictures.append(
            Picture(
                boxes.astype(np.float32),
                np.concatenate([scores, random.beta(1, 20, rest)]).astype(np.float32),
                np.concatenate([found, random.choice(there, rest)]),
                truth.astype(np.float32), labels, random.random(m) < 0.01, size.prod(axis=1) * 0.7,
            )
        )  # fmt: skip
    return pictures


def ours(pictures: list[Picture], classes: int) -> report.Row:
    from saccade.metrics.detection import DetectionMetric

    start = time.process_time()
    metric = DetectionMetric([str(k) for k in range(classes)])
    for index, p in enumerate(pictures):
        metric.update(index, *p)
    prepared = time.process_time()
    found = metric.compute()
    return timed("saccade", start, prepared, [getattr(found, figure) for figure in FIGURES])


def peer(name: str, coco: Any, evaluation: Any, pictures: list[Picture], classes: int) -> report.Row:
    """Both have the interface of pycocotools."""
    start = time.process_time()
    truths, found = [], []
    for index, p in enumerate(pictures):
        for box, label, crowd, area in zip(
            sides(p.truth_boxes), p.truth_labels.tolist(), p.crowd.tolist(), p.area.tolist(), strict=True
        ):
            truths.append(
                {"id": len(truths) + 1, "image_id": index, "category_id": label, "bbox": box, "area": area,
                 "iscrowd": int(crowd)}
            )  # fmt: skip
        for box, score, label in zip(sides(p.boxes), p.scores.tolist(), p.labels.tolist(), strict=True):
            found.append({"image_id": index, "category_id": label, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = {
            "images": [{"id": index} for index in range(len(pictures))],
            "categories": [{"id": k} for k in range(classes)],
            "annotations": truths,
        }
        truth.createIndex()
        results = truth.loadRes(found)
        prepared = time.process_time()
        run = evaluation(truth, results, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return timed(name, start, prepared, run.stats[:12].tolist())


def sides(boxes: np.ndarray) -> list[list[float]]:
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def timed(name: str, start: float, prepared: float, figures: list[float]) -> report.Row:
    now = time.process_time()
    row = {"evaluator": name, "prepare_s": prepared - start, "evaluate_s": now - prepared, "total_s": now - start}
    return row | {"ap": figures[0], "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="per picture")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--json", type=Path, help="file that results are merged into, by name")
    arguments = parser.parse_args()

    import faster_coco_eval
    import pycocotools.coco
    import pycocotools.cocoeval

    pictures = make_pictures(arguments.pictures, arguments.detections, arguments.classes)
    rows = []
    for evaluator in ("saccade", "pycocotools", "faster-coco-eval"):
        load = report.Load()
        if evaluator == "saccade":
            row = ours(pictures, arguments.classes)
        else:
            coco, evaluation = (
                (pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval)
                if evaluator == "pycocotools"
                else (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
            )
            row = peer(evaluator, coco, evaluation, pictures, arguments.classes)
        row["others_cores"] = load.others()
        row["name"] = f"{evaluator} {arguments.pictures} x {arguments.detections}, {arguments.classes} classes"
        row["versions"] = report.versions(("numpy", "pycocotools", "faster-coco-eval"))
        rows.append(row)
    truth = np.array(next(row["figures"] for row in rows if row["evaluator"] == "pycocotools"))
    for row in rows:
        row["difference"] = float(np.abs(np.array(row["figures"]) - truth).max())
    if arguments.json:
        report.merge(arguments.json, rows)
    print(report.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
