"""The task of detection with a detector that knows the truth, and one that finds rectangles by their colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from saccade.backbones.resnet import RESNET
from saccade.config import AugmentConfig, DataConfig, PreprocessingConfig, RunConfig
from saccade.data.box_transforms import FitTransform
from saccade.data.decode import Picture
from saccade.data.framing import Things
from saccade.data.loader import eval_batches, measure_sizes, train_batches
from saccade.data.sample import Sample
from saccade.data.source import Boxes, BoxSource
from saccade.engine.distributed import World
from saccade.engine.evaluate import Normalise, PictureInputs, evaluate_batches
from saccade.engine.predict import Model
from saccade.engine.step import shares_of
from saccade.errors import UserError
from saccade.layers.boxes import to_centres
from saccade.models.detector import BoxTargets, DetectionOutputs, DetectorRow, LayerOutputs
from saccade.predictions import Detections
from saccade.tasks.detection import DetectionTask, collate_eval, collate_train, heat_over, lay_out
from saccade.weights.model_file import ModelCard

NAMES = ("red", "N/A", "green", "blue")
COLOURS = {0: (230, 20, 20), 2: (20, 220, 20), 3: (20, 20, 230)}
PREPROCESSING = PreprocessingConfig(image_size=160, stride=16)
GREY = (124, 116, 104)


@dataclass(frozen=True, kw_only=True)
class FakeRow(DetectorRow):
    family: ClassVar[str] = "fake"
    queries: int = 6
    backbone: Any = RESNET["resnet18"]

    @property
    def about(self) -> str:
        return "none"


def task_of(loss: str, names: tuple[str, ...] = NAMES, **changes: Any) -> DetectionTask:
    config = RunConfig(data="", preprocessing=PREPROCESSING, augment=AugmentConfig(policy="none"))
    return DetectionTask(names, config, FakeRow(loss=loss, **changes))


TASKS = {"detr": task_of("detr"), "deformable_detr": task_of("deformable_detr")}


class ByColour(nn.Module):
    """A query per class, in the order of the classes: where there is most of its colour, if there is any."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.config = FakeRow(loss=loss)
        self.normalise = Normalise(PREPROCESSING, torch.device("cpu"))
        self.nothing = loss == "detr"

    def forward(self, images: torch.Tensor, targets: Any = None) -> DetectionOutputs:
        return self.with_maps(images)[0]

    def with_maps(self, images: torch.Tensor) -> tuple[DetectionOutputs, torch.Tensor]:
        pixels = images / self.normalise.scale + self.normalise.mean
        B, _, H, W = images.shape
        logits = torch.full((B, len(NAMES), len(NAMES) + self.nothing), -9.0)
        boxes = torch.full((B, len(NAMES), 4), 0.5)
        maps = torch.zeros(B, len(NAMES), H // 16, W // 16)
        if self.nothing:
            logits[..., -1] = 0.0
        for b in range(B):
            for k, colour in COLOURS.items():
                near = (pixels[b] - torch.tensor(colour)[:, None, None]).abs().amax(0) < 60
                if near.any():
                    y, x = torch.nonzero(near, as_tuple=True)
                    corners = torch.stack([x.min() / W, y.min() / H, (x.max() + 1) / W, (y.max() + 1) / H])
                    boxes[b, k] = to_centres(corners)
                    logits[b, k, k] = 5.0 - 0.5 * k
                    maps[b, k] = nn.functional.adaptive_avg_pool2d(near[None].float(), (H // 16, W // 16))[0]
        return DetectionOutputs((LayerOutputs(logits, boxes),)), maps


SIZES = [(200, 260), (400, 300), (150, 150), (90, 400), (333, 222), (200, 260)]


def rectangles(size: tuple[int, int], seed: int) -> tuple[Image.Image, list[tuple[list[int], int]]]:
    """At most one thing of each colour, side by side; the last picture is empty."""
    random, (h, w) = np.random.default_rng(seed), size
    image, things = Image.new("RGB", (w, h), GREY), []
    for place, k in enumerate(COLOURS):
        if seed == len(SIZES) - 1 or random.random() < 0.2:
            continue
        left, top = place * w // 3 + int(random.integers(1, 5)), int(random.integers(0, h // 5))
        box = [left, top, left + w // 4, top + int(random.integers(h // 2, 3 * h // 4))]
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=COLOURS[k])
        things.append((box, k))
    return image, things


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BoxSource:
    folder = tmp_path_factory.mktemp("rectangles")
    files, boxes, labels, starts = [], [], [], [0]
    for seed, size in enumerate(SIZES):
        image, things = rectangles(size, seed)
        image.save(folder / f"{seed}.png")
        files.append(str(folder / f"{seed}.png"))
        boxes += [box for box, _ in things]
        labels += [k for _, k in things]
        starts.append(len(boxes))
    corners = np.array(boxes, np.float32)
    area = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    return BoxSource(
        name="val", path=folder, class_names=NAMES, files=tuple(files), starts=np.array(starts), boxes=corners,
        labels=np.array(labels, np.int64), crowd=np.zeros(len(boxes), np.bool_), area=area,
    )  # fmt: skip


def batches(source: BoxSource, task: DetectionTask, batch_size: int = 4):
    return eval_batches(
        source, measure_sizes(source, DataConfig()), task.eval_transform, task.eval_collate,
        preprocessing=PREPROCESSING, data=DataConfig(), batch_size=batch_size,
    )  # fmt: skip


def outputs_of_truth(task: DetectionTask, targets, queries: int = 6) -> DetectionOutputs:
    """What a perfect detector would say, in shares of what the tensors show."""
    B, K = len(targets.truths), len(NAMES)
    logits = torch.full((B, queries, K + task.against_nothing), -12.0)
    if task.against_nothing:
        logits[..., -1] = 12.0
    boxes = torch.full((B, queries, 4), 0.5)
    for b, (truth, region) in enumerate(zip(targets.truths, targets.regions, strict=True)):
        things = np.flatnonzero(~truth.crowd)
        sides = (region[2:] - region[:2]).repeat(2)
        shares = (torch.from_numpy(truth.boxes[things]) - region[:2].repeat(2)) / sides
        boxes[b, : len(things)] = to_centres(shares)
        if task.against_nothing:
            logits[b, : len(things), -1] = -12.0
        logits[b, torch.arange(len(things)), torch.from_numpy(truth.labels[things])] = 12.0
    return DetectionOutputs((LayerOutputs(logits, boxes),))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_truth_has_a_precision_of_one(source, task, batch_size):
    metric = task.metric()
    for batch in batches(source, task, batch_size):
        task.update(metric, outputs_of_truth(task, batch.targets), batch.targets)
    report = metric.compute()
    assert report.ap == report.ap50 == report.f1 == 1.0 and report.objects == len(source.boxes)
    scalars = task.scalars(report)
    assert {"ap", "ap50", "ap75", "f1", "threshold"} <= set(scalars) and scalars[task.best] == 1.0
    threshold = task.threshold(report)
    assert threshold is not None and 0.01 < threshold <= 1  # between what is there and what is not


@pytest.mark.parametrize("loss", TASKS)
def test_found_again_through_the_engine(source, loss):
    """From files to tensors to boxes in the files' pixels: a rectangle is off by less than a pixel of the tensor."""
    task, network = TASKS[loss], ByColour(loss)
    inputs = PictureInputs(Normalise(PREPROCESSING, torch.device("cpu")))
    report = evaluate_batches(
        network, batches(source, task), task, inputs, torch.device("cpu"), torch.float32, World()
    )
    assert report.ap50 == report.ap75 == 1.0 and report.ap > 0.9 and report.f1 == 1.0


def model(loss: str, threshold: float | None = None) -> Model:
    card = ModelCard("detect", "fake", {}, NAMES, PREPROCESSING, threshold=threshold)
    return Model(ByColour(loss), card, torch.device("cpu"), torch.float32)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("loss", TASKS)
def test_predictions_are_in_pixels_of_the_pictures(source, loss):
    found = model(loss).predict([Path(file) for file in source.files])
    assert len(found) == len(SIZES) and len(found[-1]) == 0
    for i, one in enumerate(found):
        truth = source.target(i)
        assert isinstance(one, Detections) and one.size == SIZES[i] and one.source == source.files[i]
        order = np.argsort(one.classes)  # as the truth is ordered
        assert one.classes[order].tolist() == truth.labels.tolist()
        assert one.labels == tuple(NAMES[k] for k in one.classes)
        assert np.all(np.diff(one.scores) <= 0) and one.maps is None
        scale = max(SIZES[i]) / 128
        assert not len(truth) or np.abs(one.boxes[order] - truth.boxes).max() < 1.2 * scale
        assert one.picture is not None and one.picture().size == SIZES[i][::-1]


def test_thresholds(source):
    file = Path(source.files[3])
    every = model("deformable_detr").predict(file, threshold=0)[0]
    assert len(every) == 12  # four queries, of three classes that are shown
    assert set(every.classes.tolist()) == {0, 2, 3} and "N/A" not in every.labels
    usual = model("deformable_detr").predict(file)[0]
    assert 0 < len(usual) < 4 and usual.scores.min() >= 0.5
    own = model("deformable_detr", threshold=float(usual.scores[0])).predict(file)[0]
    assert len(own) == 1 and own.scores[0] == usual.scores[0]  # what scores just that is kept


@pytest.mark.parametrize("loss", TASKS)
def test_explanations_lie_where_the_things_are(source, loss, tmp_path):
    """Also in pictures with padding: a map covers the picture alone."""
    for one in model(loss).predict([Path(file) for file in source.files], attention=True):
        assert one.maps is not None and len(one.maps) == len(one)
        for heat, box in zip(one.maps, one.boxes, strict=True):
            h, w = heat.shape
            y, x = np.unravel_index(heat.argmax(), heat.shape)
            assert heat.max() == pytest.approx(1) and heat.min() >= 0
            across, down = one.size[1] / w, one.size[0] / h
            assert box[0] - across <= (x + 0.5) * across <= box[2] + across
            assert box[1] - down <= (y + 0.5) * down <= box[3] + down
        assert one.save(tmp_path / "card.png").exists()


def test_a_padded_map_is_cut_to_the_picture():
    picture = Picture.from_image(Image.new("RGB", (100, 50)))
    sample = FitTransform(PREPROCESSING)(picture, None, 0, (160, 160))
    assert sample.region is not None and sample.region[3] > 80  # padded below
    heat = np.zeros((1, 10, 10), np.float32)
    heat[0, 2, 7] = 4.0
    heat[0, 9, 9] = 100.0  # in the padding
    cut = heat_over(heat, sample, picture)
    assert cut.shape[2] == 10 and cut.shape[1] in (5, 6) and cut.max() == 1
    assert np.unravel_index(cut[0].argmax(), cut[0].shape)[1] == 7


def test_two_ways_to_score():
    logits = torch.tensor([[[2.0, 9.0, 1.0, 0.0, 0.5], [0.0, 0.0, 3.0, 0.0, 4.0]]])
    scores, labels, queries = TASKS["detr"].choose(logits)
    shares = logits.softmax(-1)
    assert labels.tolist() == [[2, 0]] and queries.tolist() == [[1, 0]]  # "N/A" is not taken
    assert torch.allclose(scores, torch.stack([shares[0, 1, 2], shares[0, 0, 0]])[None])
    scores, labels, queries = TASKS["deformable_detr"].choose(logits[..., :4])
    assert scores.shape == (1, 8) and labels[0, :3].tolist() == [2, 0, 2] and queries[0, :3].tolist() == [1, 0, 0]
    assert torch.allclose(scores[0, 0], torch.tensor(3.0).sigmoid())
    many = task_of("deformable_detr", tuple("abcdefgh"))
    assert many.choose(torch.zeros(2, 100, 8))[0].shape == (2, 300)


def test_boxes_are_cut_at_the_pictures_edge_and_none_is_in_the_padding():
    task = TASKS["deformable_detr"]
    picture = Picture.from_image(Image.new("RGB", (100, 50)))
    regions, sizes = lay_out([FitTransform(PREPROCESSING)(picture, None, 0, (160, 160))])
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.2], [0.5, 0.95, 0.2, 0.05], [0.5, 0.5, 3.0, 3.0]]])
    logits = torch.full((1, 3, 4), -9.0)
    logits[..., 0] = torch.tensor([3.0, 2.0, 1.0])
    found = task.find(DetectionOutputs((LayerOutputs(logits, boxes),)), regions, sizes)[0]
    sure = found.scores > 0.5
    assert found.queries[sure].tolist() == [0, 2]
    assert found.boxes[sure][0, :2].tolist() == [0, 0] and found.boxes[sure][1].tolist() == [0, 0, 100, 50]


def test_a_broken_model_is_said_to_be_broken(source):
    task = TASKS["deformable_detr"]
    batch = next(batches(source, task))
    outputs = outputs_of_truth(task, batch.targets)
    outputs.logits[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        task.update(task.metric(), outputs, batch.targets)


def things(boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> Things:
    return Things(np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64))


def test_training_batches():
    pixels = torch.zeros(3, 32, 64, dtype=torch.uint8)
    samples = [
        Sample(pixels, things([[0, 0, 64, 32], [16, 8, 32, 24]], [2, 0]), 5),
        Sample(pixels, things([], []), 6),
        Sample(pixels, things([[32, 0, 48, 32]], [3]), 7),
    ]
    batch = collate_train(samples, [(9, "broken")], (32, 64))
    targets = batch.targets
    assert batch.images.shape == (3, 3, 32, 64) and batch.indices.tolist() == [5, 6, 7]
    assert targets.boxes.dtype == torch.float32 and targets.labels.dtype == torch.int64
    assert targets.boxes.tolist() == [[0.5, 0.5, 1, 1], [0.375, 0.5, 0.25, 0.5], [0.625, 0.5, 0.25, 1]]
    assert targets.labels.tolist() == [2, 0, 3] and targets.picture.tolist() == [0, 0, 2]
    assert batch.unreadable == [(9, "broken")] and batch.to(torch.device("cpu")).targets.boxes.shape == (3, 4)

    empty = collate_train(samples[1:2], [], (32, 64))
    assert empty.targets.boxes.shape == (0, 4) and empty.targets.picture.shape == empty.targets.labels.shape == (0,)
    black = collate_train([], [(9, "broken")], (32, 64))
    assert black.images.shape == (1, 3, 32, 64) and not black.images.any() and len(black.indices) == 0
    assert black.targets.boxes.shape == (0, 4) and black.targets.picture.dtype == torch.int64


def test_evaluation_batches():
    task = TASKS["detr"]
    black = collate_eval([], [(9, "broken")], (32, 64))
    assert black.images.shape == (1, 3, 32, 64) and len(black.indices) == 0
    assert black.targets.regions.shape == (0, 4) and black.targets.sizes.shape == (0, 2)
    network = ByColour("detr")
    task.update(task.metric(), network(torch.zeros(1, 3, 32, 64)), black.targets)  # of nothing
    crowd = Boxes(
        np.array([[1, 2, 30, 40]], np.float32), np.array([2]), np.array([True]), np.array([700.0], np.float32)
    )
    picture = Picture.from_image(Image.new("RGB", (100, 50)))
    batch = collate_eval([FitTransform(PREPROCESSING)(picture, crowd, 4, (96, 160))], [], (96, 160)).to(
        torch.device("cpu")
    )
    assert batch.targets.indices == (4,) and batch.targets.truths[0].crowd.tolist() == [True]
    assert batch.targets.sizes.tolist() == [[100, 50]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_however_they_are_read(source, workers):
    augment = AugmentConfig(mosaic=0.5, copy_paste=0.5, mixup=1.0, mix_prob=0.5, color_jitter=0.2, strong_until=0.5)
    task = DetectionTask(NAMES, RunConfig(data="", preprocessing=PREPROCESSING, augment=augment), FakeRow(loss="detr"))
    broken = replace(source, files=(*source.files[:2], str(source.path / "absent.png"), *source.files[3:]))

    def read(workers: int, start: int) -> list:
        sizes = measure_sizes(broken, DataConfig())
        return list(
            train_batches(
                broken, sizes, task.train_transform, task.train_collate, preprocessing=PREPROCESSING,
                data=DataConfig(), batch_size=3, seed=1, start=start, stop=8, workers=workers,
            )  # fmt: skip
        )

    expected, got = read(0, 0)[3:], read(workers, 3)
    assert len(got) == 5
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)
        for name in ("boxes", "labels", "picture"):
            assert torch.equal(getattr(one.targets, name), getattr(other.targets, name))
        assert torch.isfinite(one.targets.boxes).all() and (one.targets.boxes[:, 2:] > 0).all()
        assert len(one.targets.picture) == 0 or int(one.targets.picture.max()) < len(one.images)


def test_real_pictures_and_the_whole_of_their_truth():
    """All boxes of real annotations are in the batches, and given back as they were."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "cells"
    if not folder.is_dir():
        pytest.skip("the real data in ../shared/data is not on this machine")
    found = json.loads((folder / "val.json").read_text())
    pictures = found["images"][:6]
    boxes = [[a["bbox"] for a in found["annotations"] if a["image_id"] == p["id"]] for p in pictures]
    corners = np.array([box for inside in boxes for box in inside], np.float32)
    corners[:, 2:] += corners[:, :2]
    source = BoxSource(
        name="val", path=folder, class_names=NAMES,
        files=tuple(str(folder / "images" / p["file_name"]) for p in pictures),
        starts=np.cumsum([0, *map(len, boxes)]), boxes=corners, labels=np.zeros(len(corners), np.int64),
        crowd=np.zeros(len(corners), np.bool_), area=(corners[:, 2:] - corners[:, :2]).prod(axis=1),
    )  # fmt: skip
    task = TASKS["detr"]
    metric = task.metric()
    for batch in batches(source, task):
        task.update(metric, outputs_of_truth(task, batch.targets, queries=40), batch.targets)
    report = metric.compute()
    assert report.ap == 1.0 and report.objects == len(corners) > 50


@pytest.mark.parametrize("counts", [(9, 1), (0, 3), (0, 0)])
def test_parts_of_a_step_count_by_their_things(counts: tuple[int, int]) -> None:
    """As if they were one batch, those without a thing included."""
    torch.manual_seed(0)
    task = TASKS["deformable_detr"]
    logits, boxes = torch.randn(2, 12, 4), torch.rand(2, 12, 4) * 0.4 + 0.3
    truth = torch.rand(sum(counts), 4) * 0.4 + 0.3
    labels = torch.randint(0, 2, (len(truth),)) * 2
    pictures = torch.tensor([0] * counts[0] + [1] * counts[1], dtype=torch.long)

    def targets(first: int, last: int) -> BoxTargets:
        here = (pictures >= first) & (pictures < last)
        return BoxTargets(truth[here], labels[here], pictures[here] - first)

    def loss(first: int, last: int) -> torch.Tensor:
        outputs = DetectionOutputs((LayerOutputs(logits[first:last], boxes[first:last]),))
        return torch.stack(list(task.losses(outputs, targets(first, last)).values())).sum()

    session: Any = SimpleNamespace(task=task, device=torch.device("cpu"))
    group: Any = [SimpleNamespace(targets=targets(i, i + 1)) for i in (0, 1)]
    one, two = shares_of(session, group)
    torch.testing.assert_close(one * loss(0, 1) + two * loss(1, 2), loss(0, 2))
