import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from saccade.errors import UserError
from saccade.metrics.classification import ClassificationMetric, ClassificationReport


def random_batch(count: int, classes: int, seed: int = 0, skill: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=random)
    logits = torch.randn(count, classes, generator=random)
    logits[torch.arange(count), labels] += skill
    return logits.softmax(dim=1), labels


def evaluate(probabilities: torch.Tensor, labels: torch.Tensor, names: list[str] | None = None) -> ClassificationReport:
    metric = ClassificationMetric(names or [f"class {i}" for i in range(probabilities.shape[1])])
    metric.update(probabilities, labels)
    return metric.compute()


def rendered(report: ClassificationReport, width: int = 80) -> str:
    text = io.StringIO()
    report.render(Console(file=text, width=width))
    return text.getvalue()


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_equals_sklearn(classes):
    sk = pytest.importorskip("sklearn.metrics")
    probabilities, labels = random_batch(500, classes)
    labels[labels == 1] = 0  # a class without pictures
    probabilities[:, -1] = 0  # one that is never predicted
    probabilities = (probabilities + 1e-4) / (probabilities + 1e-4).sum(dim=1, keepdim=True)
    report = evaluate(probabilities, labels)
    predicted = probabilities.argmax(dim=1)
    every = list(range(classes))
    per_class = sk.precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    macro = sk.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    ours = np.array([(one.precision, one.recall, one.f1, one.support) for one in report.classes]).T

    np.testing.assert_allclose(ours, np.array(per_class), atol=1e-12)
    np.testing.assert_allclose((report.precision, report.recall, report.f1), macro[:3], atol=1e-12)
    np.testing.assert_array_equal(report.confusion, sk.confusion_matrix(labels, predicted, labels=every))
    assert report.count == 500
    assert report.top1 == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-12)
    exact = probabilities.double() / probabilities.double().sum(dim=1, keepdim=True)
    assert report.loss == pytest.approx(sk.log_loss(labels, exact, labels=every), abs=1e-6)
    if classes > 5:
        top5 = sk.top_k_accuracy_score(labels, probabilities, k=5, labels=every)
        assert report.top5 == pytest.approx(top5, abs=1e-12)
    else:
        assert report.top5 is None


def test_calibration_error_is_the_mean_gap_over_fifteen_bins():
    probabilities, labels = random_batch(1000, 7)
    report = evaluate(probabilities, labels)
    confidence, predicted = (value.numpy() for value in probabilities.double().max(dim=1))
    right, edges, expected = predicted == labels.numpy(), np.linspace(0, 1, 16), 0.0
    for lower, upper in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert report.calibration_error == pytest.approx(expected, abs=1e-8)
    assert len(report.bins) == 15 and sum(one.count for one in report.bins) == 1000


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not():
    sure = torch.eye(3)
    assert evaluate(sure, torch.arange(3)).calibration_error == 0
    wrong = evaluate(sure, torch.tensor([1, 2, 0]))
    assert wrong.calibration_error == 1 and wrong.top1 == 0 and np.isfinite(wrong.loss)
    assert wrong.bins[-1].count == 3


@pytest.mark.parametrize("size", [1, 7, 64])
def test_does_not_depend_on_batches_order_or_processes(size):
    probabilities, labels = random_batch(200, 9)
    whole = evaluate(probabilities, labels).to_dict()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    processes = [ClassificationMetric(whole["class_names"]) for _ in range(3)]
    for i, part in enumerate(order.split(size)):
        processes[i % 3].update(probabilities[part], labels[part])
    merged = ClassificationMetric(whole["class_names"])
    for process in processes:
        merged.merge(process.state())
    assert merged.compute().to_dict() == whole  # to the last bit


def test_equal_probabilities_earn_no_luck():
    report = evaluate(torch.full((20, 20), 0.05), torch.arange(20))
    assert report.top1 == 1 / 20 and report.top5 == 5 / 20


def test_many_classes_stay_small():
    probabilities, labels = random_batch(50, 21_000, skill=12.0)
    metric = ClassificationMetric([f"synset {i}" for i in range(21_000)])
    metric.update(probabilities, labels)
    assert len(metric.state()["pairs"]) <= 50
    report = metric.compute()
    assert report.to_dict()["confusion"] is None and sum(row[2] for row in report.to_dict()["confusion_pairs"]) == 50
    assert len(rendered(report).splitlines()) < 60


def test_most_confused_pairs_come_first():
    predicted = torch.tensor([1, 1, 1, 0, 2, 0])
    truth = torch.tensor([0, 0, 1, 0, 1, 2])
    confused = evaluate(torch.eye(3)[predicted], truth, ["a", "b", "c"]).most_confused(2)
    assert (confused[0].truth, confused[0].prediction, confused[0].count) == ("a", "b", 2)
    assert confused[0].share == pytest.approx(2 / 3)
    assert (confused[1].truth, confused[1].prediction) == ("c", "a")  # one of one, before one of two


def test_what_is_wrong_is_said():
    metric = ClassificationMetric(["a", "b"])
    with pytest.raises(UserError, match="nothing to evaluate"):
        metric.compute()
    with pytest.raises(UserError, match="not finite"):
        metric.update(torch.tensor([[float("nan"), 1.0]]), torch.tensor([0]))
    with pytest.raises(UserError, match=r"labels \[2\] do not belong to the 2 classes"):
        metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([2]))
    metric.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert metric.state()["pairs"].shape == (0, 3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind):
    probabilities, labels = random_batch(50, 4)
    assert evaluate(probabilities.to(kind), labels).loss == pytest.approx(
        evaluate(probabilities, labels).loss, rel=0.02
    )


def test_table_names_every_class_or_the_worst_and_the_best():
    names = ["[red]odd[/red] name", "a very long name of a class that does not fit into a column of a table", "$x$"]
    probabilities, labels = random_batch(60, 3)
    text = rendered(evaluate(probabilities, labels, names))
    assert "[red]odd[/red] name" in text and "a very long name" in text and "top-1" in text and "top-5" not in text
    assert all(len(line) <= 80 for line in text.splitlines())

    many = rendered(evaluate(*random_batch(400, 100)))
    assert "(80 more)" in many and len(many.splitlines()) < 45


@pytest.mark.parametrize("classes", [2, 35, 201])
def test_saves_json_and_pictures(tmp_path, classes):
    report = evaluate(*random_batch(300, classes))
    folder = report.save(tmp_path / "new" / "folder")
    read = json.loads((folder / "metrics.json").read_text())
    assert read == report.to_dict() and len(read["class_names"]) == classes
    for name in ("confusion.png", "calibration.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300


@pytest.mark.filterwarnings("error")
def test_saves_pictures_without_any_mistake_and_with_odd_names(tmp_path):
    labels = torch.arange(201)
    report = evaluate(torch.eye(201), labels)
    assert report.most_confused(5) == []
    report.save(tmp_path / "right")
    evaluate(torch.eye(2), torch.arange(2), ["$5 note ひま", "x" * 200]).save(tmp_path / "odd")
    with Image.open(tmp_path / "odd" / "confusion.png") as picture:
        assert picture.width < 1500

