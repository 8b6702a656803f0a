import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchvision.ops import box_iou

from saccade.errors import UserError
from saccade.metrics.detection import DetectionMetric
from saccade.metrics.detection_report import DetectionReport

FIGURES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


@dataclass
class Picture:
    """What `DetectionMetric.update` takes, but for the number."""

    boxes: Any
    scores: Any
    labels: Any
    truth_boxes: Any
    truth_labels: Any
    crowd: Any
    area: Any = None


def evaluate(pictures: Iterable[Picture], classes: int | list[str] = 3) -> DetectionReport:
    metric = DetectionMetric(classes if isinstance(classes, list) else [f"class {i}" for i in range(classes)])
    for index, picture in enumerate(pictures):
        update(metric, index, picture)
    return metric.compute()


def update(metric: DetectionMetric, index: int, p: Picture) -> None:
    metric.update(index, p.boxes, p.scores, p.labels, p.truth_boxes, p.truth_labels, p.crowd, p.area)


def by_hand(
    detections: Sequence[tuple[Sequence[float], float, int]],
    truths: Sequence[tuple[Sequence[float], int]],
    crowd: Sequence[bool] = (),
) -> Picture:
    """Of (box, score, label) and (box, label)."""
    return Picture(
        np.array([box for box, _, _ in detections], float).reshape(-1, 4),
        np.array([score for _, score, _ in detections], float),
        np.array([label for _, _, label in detections], int),
        np.array([box for box, _ in truths], float).reshape(-1, 4),
        np.array([label for _, label in truths], int),
        np.array(crowd or [False] * len(truths), bool),
    )


def random_pictures(
    seed: int, pictures: int = 40, classes: int = 5, most: int = 40, levels: int = 12, largest: float = 300
) -> list[Picture]:
    """Boxes of all sizes, some found well, some badly, some twice; few levels of scores, so that many are equal."""
    random = np.random.default_rng(seed)
    result = []
    for _ in range(pictures):
        m = random.integers(0, 9)
        centre, size = random.uniform(0, 500, (m, 2)), np.exp(random.uniform(np.log(6), np.log(largest), (m, 2)))
        truth = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
        labels = random.integers(0, classes - 1, m)  # the last class is predicted, but never there
        n = random.integers(0, most)
        chosen = random.integers(0, m, n) if m else np.zeros(0, int)
        noise = random.choice([0.02, 0.1, 0.4], (len(chosen), 1)) * random.normal(size=(len(chosen), 4))
        boxes = truth[chosen] + noise * np.tile(size[chosen], 2)
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
        found = np.where(random.random(len(chosen)) < 0.8, labels[chosen], random.integers(0, classes, len(chosen)))
        score = random.integers(1, levels, len(chosen)) / levels
        # objects are smaller than their boxes, as COCO's areas of segments are
        area = np.prod(size, axis=1) * random.uniform(0.5, 1, m)
        result.append(
            Picture(
                torch.tensor(boxes, dtype=torch.float32), torch.tensor(score, dtype=torch.float32),
                torch.tensor(found), torch.tensor(truth, dtype=torch.float32), torch.tensor(labels),
                torch.tensor(random.random(m) < 0.15), torch.tensor(area),
            )
        )  # fmt: skip
    return result


def peer_figures(pictures: list[Picture], classes: int) -> list[float | None]:
    """The twelve figures of pycocotools."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def sides(box: torch.Tensor) -> list[float]:
        left, top, right, bottom = box.double().tolist()
        return [left, top, right - left, bottom - top]

    truths, found = [], []
    for index, p in enumerate(pictures):
        for box, label, crowd, area in zip(p.truth_boxes, p.truth_labels, p.crowd, p.area, strict=True):
            row = {"image_id": index, "category_id": int(label), "iscrowd": int(crowd), "area": float(area)}
            truths.append({"id": len(truths) + 1, "bbox": sides(box), **row})
        for box, score, label in zip(p.boxes, p.scores, p.labels, strict=True):
            found.append({"image_id": index, "category_id": int(label), "bbox": sides(box), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = {
            "images": [{"id": index} for index in range(len(pictures))],
            "categories": [{"id": k} for k in range(classes)],
            "annotations": truths,
        }
        truth.createIndex()
        peer = COCOeval(truth, truth.loadRes(found), "bbox")
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    return [None if value == -1 else float(value) for value in peer.stats]


CASES = {
    "usual": {},
    "few levels of scores": {"levels": 3},
    "more than a hundred of a class": {"pictures": 6, "classes": 2, "most": 400},
    "small ones only": {"largest": 20},
    "one class": {"classes": 2},
    "many classes": {"classes": 60},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pycocotools(name, seed):
    pictures = random_pictures(seed, **CASES[name])
    classes = CASES[name].get("classes", 5)
    report = evaluate(pictures, classes)
    assert [getattr(report, figure) for figure in FIGURES] == pytest.approx(peer_figures(pictures, classes), abs=1e-9)
    assert report.crowds > 0 and report.classes[-1].ap is None
    assert name != "small ones only" or report.ap_large is None


def test_boxes_that_overlap_equally_are_taken_as_pycocotools_does():
    """Whole numbers: the same box twice, and overlaps of exactly 0.5."""
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(60):
        m, n = random.integers(1, 7), random.integers(1, 12)
        corners, sizes = random.integers(0, 3, (m + n, 2)) * 10, random.integers(1, 4, (m + n, 2)) * 10
        boxes = torch.tensor(np.concatenate([corners, corners + sizes], axis=1), dtype=torch.float32)
        area = torch.tensor(random.choice([100.0, 1024.0, 1500.0, 9216.0], m))  # on the borders of the sizes
        scores, crowd = torch.tensor(random.integers(1, 5, n) / 5), torch.tensor(random.random(m) < 0.2)
        pictures.append(Picture(boxes[m:], scores, np.zeros(n), boxes[:m], np.zeros(m), crowd, area))
    report = evaluate(pictures, 1)
    assert [getattr(report, figure) for figure in FIGURES] == pytest.approx(peer_figures(pictures, 1), abs=1e-9)


@pytest.mark.parametrize("processes", [1, 3])
def test_does_not_depend_on_order_or_processes(processes):
    pictures = random_pictures(3)
    whole = evaluate(pictures, 5).to_dict()
    parts = [DetectionMetric(whole["class_names"]) for _ in range(processes + 1)]  # the last one sees nothing
    for i, index in enumerate(np.random.default_rng(0).permutation(len(pictures))):
        update(parts[i % processes], int(index), pictures[index])
    merged = DetectionMetric(whole["class_names"])
    for part in parts:
        merged.merge(part.state())
    assert merged.compute().to_dict() == whole  # to the last bit
    with pytest.raises(AssertionError, match="twice"):
        merged.merge(parts[0].state())
    with pytest.raises(AssertionError, match="twice"):
        update(merged, 0, pictures[0])


def test_order_within_a_picture_does_not_matter_where_scores_differ():
    pictures = random_pictures(4, levels=10**6)
    shuffled = []
    for p in pictures:
        n, m = torch.randperm(len(p.scores)), torch.randperm(len(p.truth_labels))
        shuffled.append(
            Picture(p.boxes[n], p.scores[n], p.labels[n], p.truth_boxes[m], p.truth_labels[m], p.crowd[m], p.area[m])
        )
    assert evaluate(shuffled, 5).to_dict() == evaluate(pictures, 5).to_dict()


def test_all_found_is_one_and_nothing_is_lost():
    pictures = [p for p in random_pictures(5, classes=4) if len(p.crowd)]
    for p in pictures:
        p.crowd[:] = False
        p.boxes, p.labels, p.scores = p.truth_boxes, p.truth_labels, torch.full((len(p.crowd),), 0.7)
    report = evaluate(pictures, 4)
    assert [getattr(report, figure) for figure in FIGURES if figure not in ("ar1",)] == pytest.approx([1.0] * 11)
    assert (report.f1, report.precision, report.recall) == (1, 1, 1)
    assert report.threshold == pytest.approx(0.7)
    assert all((kind.ap50, kind.shown, kind.count) == (0, 0, 0) for kind in report.errors)
    assert report.confusions == () and report.objects == report.detections
    assert np.nanmin(report.curves) == pytest.approx(1) and np.isnan(report.curves[3]).all()


BOX, AWAY = [10, 10, 50, 50], [100, 100, 150, 160]
HALF_AWAY = [100, 100, 150, 124]  # IoU 0.4 with AWAY


@pytest.mark.parametrize(
    ("kind", "sure", "extra", "before", "gain", "gain_of_missed"),
    [
        ("class", 0.8, (AWAY, 0.9, 0), 0.25, 0.75, 0),  # the object is found at last, and class 0 has a mistake less
        ("box", 0.8, (HALF_AWAY, 0.9, 1), 0.5, 0.5, 0),
        ("both", 0.8, (HALF_AWAY, 0.9, 0), 0.25, 0.25, 0.25),
        ("background", 0.8, ([300, 300, 350, 350], 0.9, 0), 0.25, 0.25, 0.25),
        ("duplicate", 0.8, ([11, 10, 50, 50], 0.7, 0), 0.5, 0, 0.5),  # less sure than the right one: costs nothing
    ],
)
def test_every_kind_of_mistake_is_told(kind, sure, extra, before, gain, gain_of_missed):
    """An object of class 0 is found, one of class 1 is not, and there is one false positive."""
    report = evaluate([by_hand([(BOX, sure, 0), extra], [(BOX, 0), (AWAY, 1)])], 2)
    errors = {one.name: one for one in report.errors}
    # what a wrong class or box was meant for is not missed
    expected = {kind: 1} if kind in ("class", "box") else {kind: 1, "missed": 1}
    assert {name: one.count for name, one in errors.items() if one.count} == expected
    assert report.ap50 == pytest.approx(before)
    assert errors[kind].ap50 == pytest.approx(gain)
    # without the object that was missed nothing is asked of class 1
    assert errors["missed"].ap50 == pytest.approx(gain_of_missed)


def test_of_several_wrong_boxes_for_one_object_the_surest_is_mended():
    wrong = [(HALF_AWAY, 0.9, 0), ([100, 100, 150, 125], 0.8, 0), ([100, 100, 150, 126], 0.7, 0)]
    report = evaluate([by_hand(wrong, [(AWAY, 0), (BOX, 0)])], 1)
    errors = {one.name: one for one in report.errors}
    assert errors["box"].count == 3 and errors["missed"].count == 1
    assert errors["box"].ap50 == pytest.approx(51 / 101)  # one of two objects is found, nothing is wrong


def test_a_wrong_class_on_an_object_that_was_found_is_left_out():
    report = evaluate([by_hand([(BOX, 0.9, 1), (BOX, 0.5, 0)], [(BOX, 0), (AWAY, 1)])], 2)
    assert report.errors[0].count == 1 and report.errors[0].ap50 == 0
    assert [(pair.truth, pair.prediction, pair.count) for pair in report.confusions] == [("class 0", "class 1", 1)]


def brute_force(p: Picture) -> tuple[list[str], list[int], set[int]]:
    """At IoU 0.5, without crowds: each detection's mistake, the object that it was meant for, and what was found."""
    n, m = len(p.scores), len(p.truth_labels)
    iou = box_iou(p.boxes.double(), p.truth_boxes.double()).tolist()
    same = (p.labels[:, None] == p.truth_labels).tolist()
    kinds, targets, found = ["right"] * n, [-1] * n, set()
    for d in sorted(range(n), key=lambda d: -float(p.scores[d])):
        hits = [t for t in range(m) if same[d][t] and iou[d][t] >= 0.5 and t not in found]
        if hits:
            found.add(max(hits, key=lambda t: iou[d][t]))
            continue
        own = max(((iou[d][t], t) for t in range(m) if same[d][t]), default=(0, -1))
        other = max(((iou[d][t], t) for t in range(m) if not same[d][t]), default=(0, -1))
        if 0.1 <= own[0] < 0.5:
            kinds[d], targets[d] = "box", own[1]
        elif other[0] >= 0.5:
            kinds[d], targets[d] = "class", other[1]
        elif own[0] >= 0.5:
            kinds[d] = "duplicate"
        else:
            kinds[d] = "background" if max(own[0], other[0]) < 0.1 else "both"
    return kinds, targets, found


def mend(p: Picture, kind: str) -> Picture:
    """The picture without the mistakes of one kind; of those that cannot be put right the detection is left out."""
    kinds, targets, found = brute_force(p)
    boxes, labels, keep = p.boxes.clone(), p.labels.clone(), [one != kind for one in kinds]
    for t in set(targets) - found - {-1}:
        meant = [d for d, one in enumerate(kinds) if one == kind and targets[d] == t]
        if meant:
            surest = max(meant, key=lambda d: float(p.scores[d]))
            boxes[surest], labels[surest], keep[surest] = p.truth_boxes[t], p.truth_labels[t], True
    asked = [kind != "missed" or t in found or t in targets for t in range(len(p.truth_labels))]
    return Picture(
        boxes[keep], p.scores[keep], labels[keep], p.truth_boxes[asked], p.truth_labels[asked], p.crowd[asked]
    )


def without_crowds(seed: int, levels: int = 10**6, pictures: int = 60) -> list[Picture]:
    result = random_pictures(seed, pictures, levels=levels)
    for p in result:
        p.crowd[:] = False
        p.area = None
    return result


@pytest.mark.parametrize("seed", [0, 1])
def test_mistakes_and_what_they_cost_equal_brute_force(seed):
    pictures = without_crowds(seed)
    report = evaluate(pictures, 5)
    counts = Counter()
    for p in pictures:
        kinds, targets, found = brute_force(p)
        counts.update(kinds)
        counts["missed"] += len(set(range(len(p.truth_labels))) - found - set(targets))
    assert report.ap50 is not None
    for kind in report.errors:
        assert kind.count == counts[kind.name] > 0
        mended = evaluate([mend(p, kind.name) for p in pictures], 5)
        assert mended.ap50 is not None and kind.ap50 == pytest.approx(mended.ap50 - report.ap50, abs=1e-9)
        assert kind.ap50 > 0


def test_mistakes_at_the_threshold_are_those_of_what_is_kept():
    pictures = random_pictures(6, pictures=60)
    report = evaluate(pictures, 5)
    assert report.threshold is not None
    kept = []
    for p in pictures:
        k = p.scores >= report.threshold
        kept.append(Picture(p.boxes[k], p.scores[k], p.labels[k], p.truth_boxes, p.truth_labels, p.crowd, p.area))
    again = evaluate(kept, 5)
    assert [kind.shown for kind in report.errors] == [kind.count for kind in again.errors]
    assert sum(kind.shown for kind in report.errors) < sum(kind.count for kind in report.errors)
    assert sum(pair.count for pair in report.confusions) == report.errors[0].shown > 0
    assert report.confusions == again.confusions and all(pair.truth != pair.prediction for pair in report.confusions)


@pytest.mark.parametrize("threshold", [0.3, 0.99])
def test_at_a_threshold_that_was_chosen_before(threshold):
    """As the model will be used: nothing but what scores as much counts, whatever were best here."""
    pictures = without_crowds(9, 10**6, pictures=20)
    metric = DetectionMetric([f"class {i}" for i in range(5)], threshold)
    kept = []
    for index, p in enumerate(pictures):
        update(metric, index, p)
        k = p.scores >= threshold
        kept.append(Picture(p.boxes[k], p.scores[k], p.labels[k], p.truth_boxes, p.truth_labels, p.crowd, p.area))
    report, free = metric.compute(), evaluate(pictures, 5)
    hits = sum(brute_force(p)[0].count("right") for p in kept)
    shown, objects = sum(len(p.scores) for p in kept), sum(len(p.truth_labels) for p in pictures)
    assert report.threshold == threshold and report.known and not free.known
    assert (report.precision, report.recall) == pytest.approx((hits / shown, hits / objects))
    assert report.f1 == pytest.approx(2 * hits / (shown + objects)) and report.f1 < report.best_f1
    assert (report.best_f1, report.best_threshold) == (free.f1, free.threshold)
    assert (report.ap, report.ap50) == (free.ap, free.ap50)
    assert [kind.shown for kind in report.errors] == [kind.count for kind in evaluate(kept, 5).errors]
    for mine, best in zip(report.classes, free.classes, strict=True):
        assert mine.threshold == threshold and (mine.best_f1, mine.best_threshold) == (best.f1, best.threshold)
        assert mine.f1 <= mine.best_f1
    assert "at the model's threshold" in rendered(report) and "best threshold here" in rendered(report)
    assert "model's" not in rendered(free)


@pytest.mark.parametrize("levels", [4, 10**6])
def test_no_threshold_is_better_than_the_best(levels):
    pictures = without_crowds(7, levels, pictures=12)
    report = evaluate(pictures, 5)

    def outcome(threshold: float, label: int | None) -> tuple[float, float, float]:
        """F1, precision and recall of what is kept, matched anew."""
        hits = kept = total = 0
        for p in pictures:
            mine, theirs = (
                torch.ones(len(labels), dtype=torch.bool) if label is None else labels == label
                for labels in (p.labels, p.truth_labels)
            )
            mine &= p.scores.double() >= threshold
            part = by_hand([], [])
            part.boxes, part.scores, part.labels = p.boxes[mine], p.scores[mine], p.labels[mine]
            part.truth_boxes, part.truth_labels = p.truth_boxes[theirs], p.truth_labels[theirs]
            hits += brute_force(part)[0].count("right")
            kept += int(mine.sum())
            total += int(theirs.sum())
        return 2 * hits / (kept + total), hits / kept, hits / total

    for label, best in [(None, report), *enumerate(report.classes[:4])]:
        assert best.threshold is not None
        expected = best.f1, best.precision, best.recall
        assert outcome(best.threshold, label) == pytest.approx(expected)
        of_class = [
            float(score)
            for p in pictures
            for score, one in zip(p.scores, p.labels, strict=True)
            if label in (None, int(one))
        ]
        assert best.f1 == pytest.approx(max(outcome(score, label)[0] for score in set(of_class)))
        # half-way between two scores
        above, below = min(s for s in of_class if s >= best.threshold), max(s for s in of_class if s < best.threshold)
        assert best.threshold == pytest.approx((above + below) / 2)
    f1 = [outcome(threshold, None)[0] for threshold in (0.25, 0.5, 0.75)]
    np.testing.assert_allclose(report.sweep[2, [25, 50, 75]], f1)


def test_crowds_are_neither_right_nor_wrong():
    inside = ([10, 10, 30, 30], 0.9, 0)  # IoU with the crowd is its share inside: 1
    part = ([40, 40, 60, 60], 0.8, 0)  # a quarter inside: wrong, but nowhere near an object
    picture = by_hand([inside, inside, (BOX, 0.7, 0), part, (AWAY, 0.5, 0)], [(BOX, 0), (AWAY, 0)], [True, False])
    report = evaluate([picture], 1)
    assert (report.objects, report.crowds, report.detections) == (1, 1, 2)
    assert {kind.name: kind.count for kind in report.errors if kind.count} == {"background": 1}
    assert report.ap == pytest.approx(0.5) and (report.precision, report.recall) == (0.5, 1)
    # nor is a detection of another class meant for it
    report = evaluate([by_hand([(BOX, 0.9, 1)], [(BOX, 0)], [True])], 2)
    assert {kind.name: kind.count for kind in report.errors if kind.count} == {"background": 1}
    # a real object goes before the crowd that it lies in
    report = evaluate([by_hand([(BOX, 0.9, 0)], [([0, 0, 100, 100], 0), (BOX, 0)], [True, False])], 1)
    assert report.ap == 1


def test_a_detection_may_have_no_size():
    report = evaluate([by_hand([([20, 20, 20, 20], 0.9, 0), ([50, 50, 10, 10], 0.8, 0)], [(BOX, 0)])], 1)
    assert report.ap == 0 and report.detections == 2


EMPTY = by_hand([], [])
ONLY_FOUND, ONLY_TRUTH = by_hand([(BOX, 0.9, 0)], []), by_hand([], [(BOX, 1)])


@pytest.mark.parametrize(
    ("pictures", "ap", "wrong", "missed"),
    [
        ([EMPTY, EMPTY], None, 0, 0),
        ([ONLY_FOUND], None, 1, 0),
        ([ONLY_TRUTH], 0, 0, 1),
        ([ONLY_FOUND, EMPTY, ONLY_TRUTH], 0, 1, 1),
        ([by_hand([(BOX, 0.9, 0)], [(BOX, 0)], [True])], None, 0, 0),
    ],
    ids=["nothing", "no object", "no detection", "neither together", "only a crowd"],
)
@pytest.mark.filterwarnings("error")
def test_empty_pictures(pictures, ap, wrong, missed, tmp_path):
    report = evaluate(pictures, 3)
    assert (report.ap, report.ap50, report.ap75, report.ar100) == (ap, ap, ap, ap)
    assert report.threshold is None and report.f1 == 0
    assert report.scalars() == {"ap": 0, "ap50": 0, "ap75": 0, "f1": 0, "threshold": 0.5}
    counts = {kind.name: kind.count for kind in report.errors}
    assert counts == {"class": 0, "box": 0, "both": 0, "duplicate": 0, "background": wrong, "missed": missed}
    assert "none: no detection is right" in rendered(report)
    saved = json.loads((report.save(tmp_path) / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert saved == report.to_dict()


def rendered(report: DetectionReport, width: int = 80) -> str:
    text = io.StringIO()
    report.render(Console(file=text, width=width))
    return text.getvalue()


def test_what_is_wrong_is_said():
    metric = DetectionMetric(["a", "b"])
    with pytest.raises(UserError, match="nothing to evaluate"):
        metric.compute()
    for found in (([float("nan"), 0, 1, 1], 0.5, 0), (BOX, float("inf"), 0)):
        with pytest.raises(UserError, match="not finite"):
            update(metric, 0, by_hand([found], []))
    with pytest.raises(UserError, match=r"labels \[2\] do not belong to the 2 classes"):
        update(metric, 0, by_hand([], [(BOX, 2)]))
    assert metric.state()["pictures"].shape == (0, 3)  # nothing of what was refused is kept


def test_scalars_are_the_figures_of_the_report():
    report = evaluate(random_pictures(8), 5)
    values = (report.ap, report.ap50, report.ap75, report.f1, report.threshold)
    assert tuple(report.scalars().values()) == values and all(0 < value < 1 for value in report.scalars().values())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_any_kind_of_number(kind):
    picture = by_hand([(BOX, 0.5, 1)], [(BOX, 1)])
    picture.boxes, picture.scores = torch.tensor(picture.boxes, dtype=kind), torch.tensor(picture.scores, dtype=kind)
    assert evaluate([picture], 2).scalars() == {"ap": 1, "ap50": 1, "ap75": 1, "f1": 1, "threshold": 0.5}


def test_table_names_every_class_or_the_worst_and_the_best():
    names = ["[red]odd[/red] name", "a very long name of a class that does not fit into a column", "$x$", "d", "none"]
    text = rendered(evaluate(random_pictures(9), names))
    assert "[red]odd[/red] name" in text and "a very long name" in text and "AP50 lost" in text and "of all" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    many = rendered(evaluate(random_pictures(9, classes=60), 60))
    assert "(40 more)" in many and len(many.splitlines()) < 60


@pytest.mark.parametrize("classes", [2, 8, 250])
@pytest.mark.filterwarnings("error")
def test_saves_json_and_pictures(tmp_path, classes):
    report = evaluate(random_pictures(10, classes=classes), ["$5 note ひま", "x" * 200, *map(str, range(classes - 2))])
    folder = report.save(tmp_path / "new" / "folder")
    saved = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert saved == report.to_dict() and len(saved["class_names"]) == classes
    assert (saved["precision_recall"]["classes"] is None) == (classes > 200)
    for name in ("precision_recall.png", "errors.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300 and picture.width < 2600

