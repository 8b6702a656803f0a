"""A run on texts: it learns, is exact when killed and resumed, and keeps what it needs in its model file."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saccade
from saccade.config import RunConfig, ScheduleConfig, merge
from saccade.data.text.batches import TextTargets
from saccade.decoding import Hypothesis
from saccade.engine import step
from saccade.engine import train as engine
from saccade.engine.distributed import World
from saccade.engine.optimizers import lr_share
from saccade.errors import UserError
from saccade.models import model_row
from saccade.models.translator import TranslationOutputs, Translator
from saccade.recipes import resolve
from saccade.tasks.translation import Answer, TranslationTask
from saccade.tokenizer import learn_tokenizer
from saccade.weights.load import load_network
from saccade.weights.model_file import save_model

NAMES = {"dog": "Hund", "cat": "Katze", "man": "Mann", "bird": "Vogel"}
DOES = {"runs": "rennt", "sleeps": "schläft", "sings": "singt", "falls": "fällt"}
WHERE = {"here": "hier", "there": "dort", "outside": "draußen"}
SETTINGS: dict[str, Any] = {
    "model": "transformer_tiny", "device": "cpu", "precision": "float32", "ema": {"decay": None},
    "text": {"vocabulary": 120, "batch_tokens": 128, "max_length": 24}, "network": {"dropout": 0.0},
}  # fmt: skip


def make_texts(folder: Path) -> Path:
    """All sentences of a small grammar; every fifth is for validation."""
    pairs = [
        (f"A {name} {verb} {place}.", f"{DOES[verb].capitalize()} {WHERE[place]} ein {NAMES[name]}.")
        for name in NAMES for verb in DOES for place in WHERE
    ]  # fmt: skip
    order = np.random.default_rng(0).permutation(len(pairs))
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in (("train", order[10:]), ("val", order[:10])):
        for side, language in enumerate(("en", "de")):
            lines = "".join(f"{pairs[i][side]}\n" for i in chosen)
            (folder / f"{split}.{language}").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


def config(texts: Path, out: Path, **changes: Any) -> RunConfig:
    values = {"data": str(texts), "out": str(out), "steps": 6, "evaluations": 1, **SETTINGS}
    return resolve(merge(values, changes))


@pytest.mark.parametrize("model", ["transformer_tiny", "lstm_attention"])
def test_overfits_what_it_sees(model: str, tmp_path: Path) -> None:
    """The validation texts are among those that are learnt."""
    folder = make_texts(tmp_path / "texts")
    for language in ("en", "de"):
        lines = (folder / f"train.{language}").read_text().splitlines()[:12]
        for split in ("train", "val"):
            (folder / f"{split}.{language}").write_text("\n".join(lines))
    more = {"lr": 2e-3, "schedule": {"shape": "cosine"}, "loss": {"label_smoothing": 0.0}}
    settings = config(folder, tmp_path / "run", model=model, steps=45, evaluations=1, **more)
    result = engine.train(settings, show=False)
    assert result.metrics["bleu"] > 95 and result.metrics["chrf"] > 95, result.metrics
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))
    report = saccade.evaluate(str(tmp_path / "run"), str(folder), beams=1, device="cpu")
    assert report.cut == 0 == result.metrics["cut"], "a limit for those that have yet to learn when to end"
    assert report.bleu == pytest.approx(result.metrics["bleu"])


def test_what_never_ends_is_cut_early_while_it_learns(texts: Path, tmp_path: Path) -> None:
    session = engine.open_session(config(texts, tmp_path / "run"), World())
    task, network = session.task, session.model
    assert isinstance(task, TranslationTask) and isinstance(network, Translator)
    source = next(session.data.eval_batches()).source
    lengths = (source != network.config.pad).sum(dim=1).tolist()
    assert len({*lengths}) > 1 and task.longest(max(lengths)) < 2 * max(lengths)
    found = task.translate(network.eval(), source)
    assert [len(each.tokens) for each in found] == [task.longest(length) - 1 for length in lengths]
    assert all(each.cut for each in found)
    report = engine.evaluate(session)  # as `--minutes` measures it: no later one writes more
    assert report.cut == report.texts == 10 and task.scalars(report)["cut"] == 1


def test_speed_is_that_of_learning(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of the translations a second, without the time of evaluations."""
    learn, evaluate = engine.train_step, engine.evaluate
    tokens, seconds, speeds = [], [], []

    def timed_step(*values: Any) -> Any:
        start = time.monotonic()
        result = learn(*values)
        seconds.append(time.monotonic() - start)
        tokens.append(result.amount)
        return result

    def slower_evaluation(*values: Any) -> Any:
        time.sleep(1.0)
        return evaluate(*values)

    monkeypatch.setattr(engine, "train_step", timed_step)
    monkeypatch.setattr(engine, "evaluate", slower_evaluation)
    monkeypatch.setattr(engine.RunTable, "step", lambda self, step, loss, speed: speeds.append(speed))
    engine.train(config(texts, tmp_path / "run", steps=4, evaluations=4), show=False)
    assert speeds[-1] == pytest.approx(sum(tokens) / sum(seconds), rel=0.05)


def test_few_steps_are_said_in_words_of_texts(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = engine.open_session(config(texts, tmp_path / "run", steps=None, minutes=0.01, epochs=None), World())
    engine.steps_within(session, 0.6, time.monotonic(), show=True)
    said = capsys.readouterr().err
    assert "a smaller --text.batch-tokens" in said and "image" not in said


def test_hardly_any_translation_is_longer_than_expected(texts: Path, tmp_path: Path) -> None:
    task = TranslationTask(learn_tokenizer(["a b c"], 64), config(texts, tmp_path), model_row("transformer_tiny"))
    task.most = 256
    assert [task.longest(length) for length in (8, 40, 400)] == [36, 100, 256]
    rng = np.random.default_rng(0)
    sources = rng.integers(5, 60, 20_000)
    lengths = np.stack((sources, np.maximum(3, np.rint(1.1 * sources + rng.normal(0, np.sqrt(sources))))), axis=1)
    lengths[0] = 3, 200  # two lines that do not belong together
    task.expect(lengths)
    over = [int(target) > task.longest(int(source)) for source, target in lengths]
    assert over[0] and np.mean(over) < 5e-4 and task.longest(40) < 85


def test_task_and_recipe_come_from_the_data(texts: Path, tmp_path: Path) -> None:
    settings = resolve({"data": str(texts), "out": str(tmp_path)})
    assert (settings.task, settings.recipe, settings.model) == ("translate", "translate", "transformer_tiny")
    assert settings.network.norm_first and settings.lr == 5e-3 and settings.epochs is not None
    assert settings.optimizer.name == "muon"
    wide = resolve({"data": str(texts), "out": str(tmp_path), "model": "gru_attention"})
    assert wide.network.norm_first is None and wide.lr == pytest.approx(1.5e-3) and wide.optimizer.name == "adamw"
    chosen = {"optimizer": {"name": "muon", "weight_decay": 0.1}}
    asked = resolve({"data": str(texts), "out": str(tmp_path), "model": "gru", **chosen}).optimizer
    assert (asked.name, asked.weight_decay, asked.beta2) == ("muon", 0.1, 0.98)
    assert resolve({"data": str(texts), "out": "x", "steps": 5}).epochs is None
    for changes, message in (
        ({"model": "vit_tiny"}, "does not translate"),
        ({"train_part": "head"}, "has no head"),
        ({"network": {"registers": 2}}, "no such setting"),
        ({"recipe": "linear_probe"}, "none for texts"),
        ({"text": {"source": "fr"}}, "no text in 'fr'"),
        ({"batch_size": 32}, "--batch-size 32: batches of texts are bounded by their tokens; use --text.batch-tokens"),
        ({"preprocessing": {"image_size": 64}}, "--preprocessing.image-size: is for pictures, and .* leave it out"),
        ({"augment": {"hflip": 0, "vflip": 1}}, "--augment.hflip, --augment.vflip: are for pictures"),
    ):
        with pytest.raises(UserError, match=message):
            resolve({"data": str(texts), "out": str(tmp_path), **changes})
    with pytest.raises(UserError, match="no pictures"):
        resolve({"data": str(texts), "task": "classify"})


def test_model_file_and_run_folder(texts: Path, tmp_path: Path) -> None:
    settings = config(texts, tmp_path / "run")
    engine.train(settings, show=False)
    network, card = load_network(settings.out)
    assert isinstance(network, Translator) and card.task == "translate" and card.class_names == ()
    assert card.tokenizer == (Path(settings.out) / "tokenizer.json").read_text()
    assert "42 pairs" not in card.training_data and "38 pairs" in card.training_data
    plan = json.loads((Path(settings.out) / "plan.json").read_text())
    assert plan["class_names"] == [] and plan["architecture"]["vocabulary"] == network.config.vocabulary


def test_fine_tuning_keeps_the_tokenizer(texts: Path, tmp_path: Path) -> None:
    engine.train(config(texts, tmp_path / "one"), show=False)
    values = {"data": str(texts), "out": str(tmp_path / "two"), "weights": str(tmp_path / "one"), "steps": 2,
              "evaluations": 1, "device": "cpu", "precision": "float32"}  # fmt: skip
    settings = resolve(values)
    assert settings.recipe == "translate_fine_tune" and settings.model == "transformer_tiny"
    engine.train(settings, show=False)
    assert load_network(settings.out)[1].tokenizer == load_network(tmp_path / "one")[1].tokenizer
    assert settings.text.max_length == 128 and settings.network.norm_first is None and settings.lr == 1e-4
    assert settings.optimizer.name == "adamw"
    network, card = load_network(tmp_path / "one")
    short = {**card.architecture, "max_length": 20}  # sines and cosines are computed: any number of places fits
    save_model(tmp_path / "short.safetensors", network.state_dict(), replace(card, architecture=short))
    assert resolve({**values, "weights": str(tmp_path / "short.safetensors")}).text.max_length == 20


def test_characters_that_the_weights_do_not_know_are_said(texts: Path, tmp_path: Path) -> None:
    engine.train(config(texts, tmp_path / "one"), show=False)
    folder = make_texts(tmp_path / "texts")
    with open(folder / "train.en", "a") as one, open(folder / "train.de", "a") as other:
        one.write("a dog 😀\na dog\n")
        other.write("ein 犬 Hund\nein Hund\n")
    settings = config(folder, tmp_path / "two").model_copy(update={"weights": str(tmp_path / "one")})
    (said,) = [note for note in engine.open_session(settings, World()).data.notes if "cannot learn" in note]
    assert "1 pair of 40 has characters" in said and ": 😀 犬 (" in said and "train.en:39" in said


def test_too_long_texts_are_left_out_and_said(texts: Path, tmp_path: Path) -> None:
    folder = make_texts(tmp_path / "texts")
    with open(folder / "train.en", "a") as one, open(folder / "train.de", "a") as other:
        one.write("dog " * 40 + "\n")
        other.write("Hund\n")
    session = engine.open_session(config(folder, tmp_path / "run"), World())
    assert len(session.data) == 38
    assert any("1 pair of more than 24 tokens is left out" in note and "train.en:39" in note
               for note in session.data.notes)  # fmt: skip
    with pytest.raises(UserError, match="every pair has more than 4 tokens on a side .--text.max-length.; allow more"):
        engine.open_session(config(folder, tmp_path / "run", text={"max_length": 4}), World())


def test_loss_is_cross_entropy_against_smoothed_targets(texts: Path, tmp_path: Path) -> None:
    tokenizer = learn_tokenizer(["a b c"], 64)
    row = model_row("transformer_tiny")
    task = TranslationTask(tokenizer, config(texts, tmp_path, loss={"label_smoothing": 0.2}), row)
    tokens = torch.tensor([[5, 6, 2], [7, 2, 0]])
    assert task.inputs(tokens).tolist() == [[1, 5, 6], [1, 7, 2]]
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([5, 6, 2, 7, 2])
    smooth = torch.full((5, 9), 0.2 / 9)
    smooth[torch.arange(5), wanted] += 0.8
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    for precision, rounding in ((None, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        losses = task.losses(TranslationOutputs(logits, torch.eye(9), precision=precision), TextTargets(tokens, 5))
        assert sum(losses.values()) == pytest.approx(float(expected), rel=rounding)


def test_each_token_counts_alike_in_all_processes(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes this one has two tokens and the other six: its share is half of what it would be alone."""
    task = TranslationTask(learn_tokenizer(["a b c"], 64), config(texts, tmp_path), model_row("transformer_tiny"))
    logits, targets = torch.randn(2, 9), TextTargets(torch.tensor([[5, 2]]), 2)
    outputs = TranslationOutputs(logits, torch.eye(9))
    alone = task.losses(outputs, targets)["cross_entropy"].item()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(6))
    assert task.losses(outputs, targets)["cross_entropy"].item() == pytest.approx(alone * 2 / 4)


def test_activation_checkpointing_is_refused_where_it_does_nothing(texts: Path, tmp_path: Path) -> None:
    assert config(texts, tmp_path, model="transformer_tiny", activation_checkpointing=True).activation_checkpointing
    with pytest.raises(UserError, match="--activation-checkpointing: gru_attention has no blocks"):
        config(texts, tmp_path, model="gru_attention", activation_checkpointing=True)


def test_losses_of_an_evaluation_are_summed_where_float64_exists(texts: Path, tmp_path: Path) -> None:
    task = TranslationTask(learn_tokenizer(["a b c"], 64), config(texts, tmp_path), model_row("transformer_tiny"))

    class OnAppleSilicon(torch.Tensor):
        """No float64 there."""

        def double(self, *_: Any, **__: Any) -> Any:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self, *_: Any, **__: Any) -> Any:
            return self.as_subclass(torch.Tensor)

    losses = torch.tensor([1.5]).as_subclass(OnAppleSilicon)
    metric = task.metric()
    answer = Answer(losses, [Hypothesis((), 0.0, False)], 0.0)
    targets = TextTargets(torch.tensor([[2]]), 1, indices=(0,), sources=("a",), references=("b",))
    task.update(metric, answer, targets)
    assert metric.compute().loss == pytest.approx(1.5)


def test_inverse_root_schedule() -> None:
    """https://arxiv.org/abs/1706.03762: up in a line, then with 1 / sqrt(step)."""
    schedule = ScheduleConfig(shape="inverse_sqrt", warmup=0.1)
    shares = [lr_share(step, 1000, schedule) for step in range(1000)]
    assert shares[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert max(shares) == shares[100] == 1.0
    assert shares[403] == pytest.approx(0.5, abs=1e-3) and shares[999] == pytest.approx(math.sqrt(101 / 1000))


@pytest.mark.parametrize("flags", [["--model=transformer_tiny"], ["--model=gru_attention", "--ema.decay=none"]])
def test_killed_and_resumed(flags: list[str], runner: Any, killing: Any, texts: Path, tmp_path: Path) -> None:
    common = [
        "--steps=8", "--checkpoint-seconds=0", "--evaluations=3", "--device=cpu", "--precision=float32",
        "--text.vocabulary=120", "--text.batch-tokens=96", "--network.dropout=0.2",
    ]  # fmt: skip
    scratch = tmp_path / "scratch"
    reference, run = tmp_path / "reference", tmp_path / "run"
    whole = runner.run(["train", texts, *common, *flags, "--out", reference], scratch=scratch)
    assert whole.code == 0, whole.output
    arguments = ["train", texts, *common, *flags, "--out", run]
    assert runner.run(arguments, scratch=scratch, kill_at="after step 2").code == -signal.SIGKILL
    ended = runner.run(["train", "--resume", run], scratch=scratch)
    assert ended.code == 0, ended.output
    assert "continuing at step 2" in ended.output
    assert killing.differences(run, reference) == []


@pytest.mark.slow
def test_two_processes(runner: Any, killing: Any, texts: Path, tmp_path: Path) -> None:
    flags = [
        "--steps=6", "--checkpoint-seconds=0", "--evaluations=2", "--device=cpu", "--precision=float32",
        "--text.vocabulary=120", "--text.batch-tokens=96", "--distributed.strategy=ddp",
    ]  # fmt: skip

    def run(*arguments: Any, **how: Any) -> Any:
        return runner.run(["train", *arguments], scratch=tmp_path / "scratch", world=2, **how)

    whole, stopped = tmp_path / "whole", tmp_path / "run"
    ended = run(texts, *flags, "--out", whole)
    assert ended.code == 0, ended.output
    assert run(texts, *flags, "--out", stopped, kill_at="after step 2", rank=1).code == -signal.SIGKILL
    ended = run("--resume", stopped)
    assert ended.code == 0, ended.output
    assert killing.differences(stopped, whole) == []
    refused = run(texts, *flags, "--distributed.strategy=fsdp", "--out", tmp_path / "sharded")
    assert refused.code == 2 and "translators are not sharded" in refused.output, refused.output


def test_other_data_is_refused(texts: Path, tmp_path: Path) -> None:
    folder = make_texts(tmp_path / "texts")
    settings = config(folder, tmp_path / "run")
    engine.train(settings, show=False)
    lines = (folder / "train.de").read_text().splitlines()
    (folder / "train.de").write_text("\n".join([*lines[:-1], "Etwas anderes."]) + "\n")
    with pytest.raises(UserError, match="is not the data that.*put it back, or start a new run.*--weights"):
        engine.train(settings, resume=True, show=False)


def test_accumulated_batches_count_every_token_alike(texts: Path, tmp_path: Path) -> None:
    session = engine.open_session(config(texts, tmp_path / "run", optimizer={"accumulate": 3}), World())
    group = [batch for batch, _ in zip(session.data.train_batches(0, 3), range(3), strict=True)]
    amounts = [batch.targets.count for batch in group]
    assert len({*amounts}) > 1
    assert step.shares_of(session, group) == pytest.approx([amount / sum(amounts) for amount in amounts])
