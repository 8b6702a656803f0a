"""Training does what it says: it learns, its steps are the right ones, its figures are those of the kept model."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import saccade
from saccade.backbones import build_backbone
from saccade.config import NetworkConfig, OptimizerConfig, RunConfig, ScheduleConfig, load_config
from saccade.data.sample import Batch
from saccade.engine import train as engine
from saccade.engine.distributed import World
from saccade.engine.ema import Ema
from saccade.engine.muon import Muon
from saccade.engine.optimizers import build_optimizers, decays, lr_share, set_lr
from saccade.engine.plan import affordable_evaluations, load_plan
from saccade.models.classifier import Classifier
from saccade.weights.load import load_network

Build = Callable[..., RunConfig]
PLAIN = {
    "crop_scale": [1.0, 1.0], "crop_aspect": [1.0, 1.0], "hflip": 0.0, "policy": "none", "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip


def open_session(config: RunConfig) -> engine.Session:
    return engine.open_session(config, World())


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vit_micro", "cct_nano"])
def test_overfits_one_batch(model: str, config: Build, tmp_path: Path) -> None:
    """Pictures of noise that differ in nothing but the noise: they can only be learnt by heart."""
    for k in range(12):
        folder = tmp_path / "noise" / ("train", "val")[k % 2] / f"class {k // 2 % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(k // 2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{k}.png")  # each picture is in both splits
    settings = config(
        data=str(tmp_path / "noise"), model=model, steps=80, evaluations=1, batch_size=6, augment=PLAIN,
        loss={"label_smoothing": 0.0}, ema={"decay": None}, network={"drop_path": 0.0},
    )  # fmt: skip
    result = engine.train(settings, show=False)
    assert result.metrics["top1"] == 1.0
    assert result.metrics["loss"] < 0.02


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kept_model_has_the_recorded_metrics(config: Build, precision: str) -> None:
    """However it learnt: what is measured on the way is in the precision of its answers."""
    settings = config(model="cct_nano", steps=20, evaluations=5, lr=3e-4, precision=precision)
    result = engine.train(settings, show=False)
    report = saccade.evaluate(settings.out, str(Path(settings.data) / "val"), batch_size=8, device="cpu")
    scalars = {"loss": report.loss, "top1": report.top1}
    assert scalars == pytest.approx({name: result.metrics[name] for name in scalars}, rel=1e-6, abs=1e-6)
    with open(Path(settings.out) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(float(row["step"])) for row in rows] == [4, 8, 12, 16, 20]
    best = max(float(row["val_top1"]) for row in rows)
    assert result.metrics["top1"] == best == load_network(settings.out)[1].metrics["top1"]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_muon_multiplies_in_the_precision_of_the_run(config: Build, precision: torch.dtype) -> None:
    """That of its plan, where it is continued on another processor."""
    settings = config(model="vit_micro", optimizer={"name": "muon"}, precision=str(precision).removeprefix("torch."))
    session = open_session(settings)
    assert [each.precision for each in session.optimizers if isinstance(each, Muon)] == [precision]
    session.learn_in(torch.float32)
    assert {each.precision for each in session.optimizers if isinstance(each, Muon)} == {torch.float32}
    assert session.precision == torch.float32


def test_run_folder(config: Build) -> None:
    settings = config(steps=4)
    engine.train(settings, show=False)
    folder = Path(settings.out)
    assert load_config(folder / "config.json") == settings
    card = load_network(folder)[1]
    assert card.class_names == ("blue", "green", "red") and card.preprocessing == settings.preprocessing
    assert "24 pictures" in card.training_data and "step" in card.provenance
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "val/top1", "val/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


# --- the length of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vit_micro", "cct_nano"])
def test_measuring_leaves_no_trace(model: str, config: Build) -> None:
    session = open_session(config(model=model, steps=None, minutes=0.1))
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    assert min(engine.steps_within(session, 6.0, time.monotonic(), show=False)) >= 1
    assert all(torch.equal(value, before[name]) for name, value in session.model.state_dict().items())
    assert not any(optimizer.state for optimizer in session.optimizers)
    assert all(parameter.grad is None for parameter in session.model.parameters())


@pytest.mark.slow
def test_minutes_are_steps(config: Build, tmp_path: Path) -> None:
    """A run of so many minutes ends about then, and is the run of the number of steps that was measured."""
    budget = 0.2
    start = time.monotonic()
    timed = config(model="cct_nano", steps=None, minutes=budget, out=str(tmp_path / "timed"))
    result = engine.train(timed, show=False)
    elapsed = time.monotonic() - start
    assert result.finished
    assert 0.25 * 60 * budget < elapsed < 2.5 * 60 * budget
    counted = config(model="cct_nano", steps=result.steps, out=str(tmp_path / "counted"))
    engine.train(counted, show=False)
    for name in ("model.safetensors", "metrics.csv"):
        assert (tmp_path / "timed" / name).read_bytes() == (tmp_path / "counted" / name).read_bytes()


def test_evaluations_take_a_small_share_of_the_minutes(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert affordable_evaluations(None, 120, 6) == 2 and affordable_evaluations(None, 1800, 6) == 10
    assert affordable_evaluations(None, 1, 6) == 1 and affordable_evaluations(7, 1, 6) == 7
    evaluate = engine.evaluate

    def slow(*values: Any) -> Any:
        time.sleep(0.2)
        return evaluate(*values)

    monkeypatch.setattr(engine, "evaluate", slow)
    settings = config(steps=None, minutes=0.1, evaluations=None)
    result = engine.train(settings, show=False)
    plan = json.loads((result.folder / "plan.json").read_text())
    assert 1 <= plan["evaluations"] <= 4, "of 0.2 s in 6 s"
    assert len((result.folder / "metrics.csv").read_text().splitlines()) == 1 + plan["evaluations"]


def test_evaluations_of_an_older_plan(config: Build) -> None:
    """One that does not say how many there are goes on with those of the settings."""
    result = engine.train(config(steps=6, evaluations=3), show=False)
    path = result.folder / "plan.json"
    values = json.loads(path.read_text())
    assert values.pop("evaluations") == 3
    path.write_text(json.dumps(values))
    world = World()
    assert load_plan(result.folder, Path("x"), values["data_hash"], world, 3).evaluate_at == {2, 4, 6}
    assert config(evaluations=None).evaluations is None


def test_epochs_are_steps(config: Build) -> None:
    assert engine.train(config(steps=None, epochs=2), show=False).steps == 6


# --- a step ----------------------------------------------------------------------------------------------------------


def gradients(config: RunConfig, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Those of one step over these batches, as the optimizer sees them."""
    session = open_session(config)
    found: dict[str, torch.Tensor] = {}

    def keep() -> None:
        found.update({name: p.grad.clone() for name, p in session.model.named_parameters() if p.grad is not None})

    (optimizer,) = session.optimizers
    optimizer.step = keep  # pyright: ignore[reportAttributeAccessIssue]
    engine.train_step(session, iter(batches), 0)
    return found


def test_accumulated_halves_are_one_batch(config: Build) -> None:
    """Largest difference that was measured: 4e-8."""
    network = {"drop_path": 0.0}
    whole = config(network=network, optimizer={"clip_norm": None})
    halves = config(network=network, optimizer={"clip_norm": None, "accumulate": 2})
    batch = next(open_session(whole).data.train_batches(0, 1))
    parts = [
        replace(batch, images=batch.images[part], targets=batch.targets[part], indices=batch.indices[part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    one, two = gradients(whole, [batch]), gradients(halves, parts)
    assert set(one) == {name for name, _ in open_session(whole).model.named_parameters()}
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-6), name


def test_gradients_are_clipped(config: Build) -> None:
    batch = next(open_session(config()).data.train_batches(0, 1))
    free = gradients(config(optimizer={"clip_norm": None}), [batch])
    clipped = gradients(config(optimizer={"clip_norm": 0.1}), [batch])

    def norm(values: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([value.norm() for value in values.values()]).norm())

    assert norm(free) > 0.1 and norm(clipped) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("model", ["vit_micro", "cct_nano"])
def test_linear_probe_changes_the_head_alone(model: str, config: Build, tmp_path: Path) -> None:
    first = config(model=model, steps=4, out=str(tmp_path / "first"))
    engine.train(first, show=False)
    probe = config(model=model, steps=6, weights=first.out, train_part="head", out=str(tmp_path / "probe"))
    engine.train(probe, show=False)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "probe"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_runs_of_one_seed_are_one_run(config: Build, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        engine.train(config(seed=seed, steps=3, out=str(tmp_path / name)), show=False)
    one, two, three = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("one", "two", "three"))
    assert one == two and one != three


# --- optimizers ------------------------------------------------------------------------------------------------------


def classifier(model: str, **network: Any) -> Any:
    return Classifier(build_backbone(model, NetworkConfig(**network), 16), 2)


def groups_of(optimizers: list[torch.optim.Optimizer], model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The group of every parameter, by name; each is in exactly one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found
                found[names[parameter]] = {**group, "rule": type(optimizer).__name__}
    assert set(found) == set(names.values())
    return found


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layer_decay(name: str) -> None:
    model = classifier("vit_micro", registers=1)
    optimizers = build_optimizers(model, OptimizerConfig.model_validate({"name": name, "layer_decay": 0.5}))
    set_lr(optimizers, 0.1)
    groups = groups_of(optimizers, model)
    depth = len(model.backbone.blocks)
    expected = {"head.weight": 0, "backbone.norm.weight": 0, "backbone.patches.projection.weight": depth + 1,
                "backbone.class_token": depth + 1, "backbone.registers": depth + 1,
                "backbone.positions.table": depth + 1}  # fmt: skip
    expected |= {f"backbone.blocks.{i}.attention.qkv.weight": depth - i for i in range(depth)}
    expected = {name: below for name, below in expected.items() if name in groups}
    assert len(expected) >= 6
    for parameter, below in expected.items():
        assert groups[parameter]["lr"] == pytest.approx(0.1 * 0.5**below), parameter


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("model_name", ["vit_micro", "cct_nano"])
def test_weight_decay_is_for_matrices(name: str, model_name: str) -> None:
    model = classifier(model_name, registers=1, layer_scale=1e-4)
    config = OptimizerConfig.model_validate({"name": name, "weight_decay": 0.3})
    for parameter, group in groups_of(build_optimizers(model, config), model).items():
        exempt = parameter.endswith(("bias", "class_token", "registers", "positions.table", "scale"))
        exempt |= ".norm" in parameter or model.get_parameter(parameter).ndim == 1
        assert group["weight_decay"] == (0.0 if exempt else 0.3), parameter
        assert decays(parameter, model.get_parameter(parameter)) is not exempt


def test_muon_is_for_hidden_matrices() -> None:
    model = classifier("vit_micro")
    groups = groups_of(build_optimizers(model, OptimizerConfig(name="muon")), model)
    by_muon = {name for name, group in groups.items() if group["rule"] == "Muon"}
    matrices = {name for name, p in model.named_parameters() if name.startswith("backbone.blocks.") and p.ndim == 2}
    assert by_muon == matrices and matrices


def test_learning_rate_over_a_run() -> None:
    config = ScheduleConfig(warmup=0.1, final=0.2)
    shares = [lr_share(step, 100, config) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 11) and shares[9] == pytest.approx(10 / 11)
    assert shares[10] == 1.0 == max(shares)
    assert shares == sorted(shares[:11]) + sorted(shares[11:], reverse=True)
    assert lr_share(100, 100, config) == pytest.approx(0.2) and shares[99] == pytest.approx(0.2, abs=1e-3)
    assert lr_share(55, 100, config) == pytest.approx(0.6), "half way down"
    assert lr_share(0, 1, ScheduleConfig(warmup=0.0)) == 1.0
    for warmup in (0.0, 0.05, 0.99):
        assert all(0 < lr_share(step, 3, ScheduleConfig(warmup=warmup)) <= 1 for step in range(3))


def test_average_of_weights() -> None:
    linear, norm = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(linear, norm)
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        linear.weight.fill_(1.0)
    ema, expected = Ema(model, 0.5), 1.0
    for step in range(20):
        with torch.no_grad():
            linear.weight.fill_(float(step))
            norm.num_batches_tracked.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.allclose(ema.average["0.weight"], torch.full((2, 2), expected))
        assert ema.average["1.num_batches_tracked"] == step, "counts are copied, not averaged"
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(linear.weight, ema.average["0.weight"])
        raise KeyError
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert not math.isclose(expected, 19.0)


# --- batch mates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vit_micro", "cct_nano"])
def test_logits_do_not_depend_on_batch_mates(model: str) -> None:
    """Largest difference that was measured: 2e-7."""
    network = classifier(model).eval()
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = network(images).logits
        alone = torch.cat([network(image[None]).logits for image in images])
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["vit_micro", "cct_nano"])
def test_buckets_give_what_single_pictures_give(model: str, config: Build) -> None:
    """Pictures of three shapes at once, in the order given."""
    settings = config(model=model, steps=1)
    engine.train(settings, show=False)
    loaded = saccade.load(settings.out, device="cpu", precision="float32")
    files = sorted(Path(settings.data, "val").rglob("*.png"))
    assert len({Image.open(file).size for file in files}) == 3
    together = loaded.predict(files)
    assert [result.source for result in together] == [str(file) for file in files]
    for file, result in zip(files, together, strict=True):
        (alone,) = loaded.predict(file)
        assert result.probabilities is not None and alone.probabilities is not None
        assert np.allclose(result.probabilities, alone.probabilities, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batches(runner: Any, pictures: Path, tmp_path: Path) -> None:
    """Without what each process draws for itself (stochastic depth), and without mixing, which pairs its own pictures.

    Largest difference that was measured: 1.0e-6, where each weight has moved by up to 6e-4.
    """
    flags = ["--model=vit_micro", "--image-size=16", "--steps=6", "--batch-size=8", "--lr=1e-4", "--device=cpu",
             "--precision=float32", "--optimizer.name=adamw", "--network.drop-path=0", "--augment.mixup=0",
             "--augment.cutmix=0"]  # fmt: skip
    for world in (1, 2):
        ended = runner.run(
            ["train", pictures, *flags, "--out", tmp_path / str(world)], scratch=tmp_path / "scratch", world=world
        )
        assert ended.code == 0, ended.output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    largest = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert largest < 5e-6, largest
    losses = []
    for name in ("1", "2"):
        with open(tmp_path / name / "metrics.csv") as file:
            losses.append([float(row["train_loss"]) for row in csv.DictReader(file)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_one_value_in_a_channel_cannot_be_normalised(pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 1, "preprocessing": {"image_size": 32}, "steps": 1, "device": "cpu"}
    with pytest.raises(saccade.UserError, match="resnet18: normalises over a batch.*larger --batch-size"):
        saccade.train(str(pictures), model="resnet18", out=str(tmp_path / "run"), show=False, **settings)
