"""The command: its exit codes, its messages, and never a traceback."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import saccade
from saccade.cli import COMMANDS, SHORT, main
from saccade.config import RunConfig
from saccade.flags import CHOSEN, spread
from saccade.models import DETECTOR_FAMILIES
from saccade.recipes import RECIPES
from saccade.recipes.detect import of_family
from saccade.recipes.summary import DataSummary

TINY = ["--model=vit_micro", "--image-size=16", "--batch-size=8", "--device=cpu", "--precision=float32"]
CLASSES = ("blue", "green", "red")


def make_pictures(root: Path, classes: tuple[str, ...] = CLASSES, train: int = 4, val: int = 2) -> Path:
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                values = np.random.default_rng(10 * k + i).integers(0, 120, (20, 24, 3), dtype=np.uint8)
                values[..., k % 3] += 100
                Image.fromarray(values).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "colours"
    assert main(["train", str(pictures), *TINY, "--steps=20", "--lr=1e-3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        answer = capsys.readouterr()
        assert "Traceback" not in answer.out + answer.err
        if code == 2:
            assert answer.err.startswith("saccade: error: ")
        return code, answer.out, answer.err

    return call


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [name for name, *_ in COMMANDS])
def test_help(run: Callable[..., Any], command: str) -> None:
    code, out, err = run(command, "--help")
    assert code == 0 and err == "" and f"usage: saccade {command}" in out
    assert "None" not in out and "==SUPPRESS==" not in out
    if command == "train":
        assert "--optimizer.beta1" in out and "(default 0.9)" in out and "--resume" in out


def test_help_promises_no_default_that_a_recipe_replaces(run: Callable[..., Any]) -> None:
    def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]

    summaries = [
        DataSummary(task, samples, 3, side, side, seconds)
        for task in ("classify", "detect", "translate")
        for samples in (200, 2_000_000)
        for side in (32, 640)
        for seconds in (None, 600.0)
    ]
    chosen = {path for recipe in RECIPES.values() for summary in summaries for path, _ in leaves(recipe(summary))}
    families = {*DETECTOR_FAMILIES, "glance"}
    chosen |= {path for name in families for trained in (0, 1) for path, _ in leaves(of_family(name, bool(trained)))}
    with_default = dict(leaves(RunConfig(data="").model_dump()))
    assert {path for path in chosen if with_default[path] is not None} <= CHOSEN <= chosen
    out = " ".join(run("train", "--help")[1].split())
    entries = out.partition("what is asked most: ")[2]
    for path in CHOSEN:
        flag = "--" + path.replace("_", "-")
        entry = re.split(r" --[a-z]", entries.partition(f"{flag} ")[2])[0]
        assert "(default: from the recipe)" in entry and "(default 0" not in entry, flag


def test_short_flags_are_keywords_in_python() -> None:
    parser = argparse.ArgumentParser()
    next(add for name, add, _ in COMMANDS if name == "train")(parser)
    flags = [flag.removeprefix("--").replace("-", "_") for action in parser._actions for flag in action.option_strings]
    keywords = {flag for flag in flags if "." not in flag} - {"_h", "help", "json", "resume"}
    assert "image_size" in keywords and keywords >= set(SHORT)
    for keyword in keywords:
        assert spread({keyword: 1}).keys() <= RunConfig.model_fields.keys(), keyword
    for name in ("evaluate", "embed", "verify", "inspect"):
        parser = argparse.ArgumentParser()
        next(add for command, add, _ in COMMANDS if command == name)(parser)
        flags = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
        given = {flag.replace("-", "_") for flag in flags if "." not in flag} - {"_h", "help", "json", "out"}
        assert given <= inspect.signature(getattr(saccade, name)).parameters.keys(), name


def test_short_names_of_inner_settings_from_python(pictures: Path, tmp_path: Path) -> None:
    short = {"model": "vit_micro", "steps": 1, "evaluations": 1, "batch_size": 8, "device": "cpu", "image_size": 16}
    result = saccade.train(str(pictures), **short, preprocessing={"max_aspect": 1.5}, out=tmp_path / "run", show=False)
    kept = json.loads((result.folder / "config.json").read_text())["preprocessing"]
    assert (kept["image_size"], kept["max_aspect"]) == (16, 1.5)
    with pytest.raises(saccade.UserError, match=r"image_size is 16, and preprocessing\.image_size is 32"):
        saccade.train(str(pictures), image_size=16, preprocessing={"image_size": 32})
    with pytest.raises(saccade.UserError, match=r"preprocessing\.image_size: Input should be .* not 'large'"):
        saccade.train(str(pictures), image_size="large")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train-part=head"], "--train-part head: only what follows the backbone learns"),
        (["--recipe=linear_probe"], "--recipe linear_probe: only what follows the backbone learns"),
        (["--recipe=fine_tune"], "--recipe fine_tune: begins from weights"),
        (["--recipe=detect"], "--recipe detect: is not for data like"),
    ],
)
def test_what_needs_weights_is_refused_without(
    pictures: Path, run: Callable[..., Any], flags: list[str], said: str
) -> None:
    code, _, err = run("train", pictures, *flags, "--steps=1", "--device=cpu")
    assert code == 2 and said in err and ("--weights" in err or "use small_from_scratch" in err)


def test_settings_of_texts_are_refused_for_pictures(pictures: Path, run: Callable[..., Any]) -> None:
    code, _, err = run("train", pictures, "--text.max-length=9", "--decoding.beams=2", "--steps=1", "--device=cpu")
    assert code == 2 and "--text.max-length, --decoding.beams: are for texts" in err and "leave them out" in err


def test_help_lists_every_command(run: Callable[..., Any]) -> None:
    for arguments in ((), ("--help",)):
        code, out, _ = run(*arguments)
        assert code in (0, 2) and all(name in out for name, *_ in COMMANDS) or code == 2
    assert run("--version")[1] == f"saccade {saccade.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian", "photos"], ["unknown command 'trian'", "did you mean train", "commands: demo"]),
        (["--epochs", "3"], ["--help shows"]),
        (["train"], ["no data given"]),
        (["train", "photos", "more"], ["unknown argument more"]),
        (["train", "photos", "--epoch", "3"], ["unknown flag --epoch", "--epochs"]),
        (["train", "photos", "--optimizer.wieght-decay", "0.1"], ["did you mean --optimizer.weight-decay"]),
        (["train", "photos", "--beam=2"], ["unknown flag --beam; did you mean --decoding.beams?"]),
        (["train", "photos", "--text.batch-tokens=4", "--lr=-1"],
         ["saccade: error: 2 faults:\n", "  --text.batch-tokens: Input should be", "  --lr: Input"]),
        (["train", "photos", "--weight-decay=0.1"], ["--weight-decay", "did you mean", "--optimizer.weight-decay"]),
        (["train", "photos", "--batch-size"], ["--batch-size", "expected one argument"]),
        (["train", "photos", "--epochs", "1", "--minutes", "1"], ["give one of epochs, minutes, not several"]),
        (["train", "photos", "--epochs=1", "--minutes=1", "--steps=2"], ["give one of epochs, minutes, steps"]),
        (["train", "photos", "--optimizer.name=sgd"], ["optimizer.name", "'adamw' or 'muon'", "not 'sgd'"]),
        (["train", "photos", "--lr=nan"], ["lr: "]),
        (["train", "photos", "--lr=0"], ["lr: ", "greater than 0"]),
        (["train", "photos", "--augment.crop-scale=0.2"], ["--augment.crop-scale"]),
        (["evaluate"], ["model", "data"]),
        (["evaluate", "run"], ["data"]),
        (["evaluate", "run", "data", "--spilt=val"], ["unknown flag --spilt", "--split"]),
        (["predict", "run"], ["PICTURE"]),
        (["predict", "run", "a.jpg", "--batch-size=0"], ["'0' is not a whole number above 0"]),
        (["inspect"], ["data"]),
        (["models", "--task=fly"], ["--task", "fly"]),
        (["demo", "--minutes=soon"], ["minutes", "soon"]),
    ],
)
def test_wrong_words(run: Callable[..., Any], arguments: list[str], parts: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert all(part in err for part in parts), err


def test_all_faults_at_once(run: Callable[..., Any]) -> None:
    wrong = ["--epochz=3", "--bogus", "--lr=fast", "--workers=-1", "--optimizer.beta1=2", "--augment.mixpu=1"]
    code, _, err = run("train", "photos", *wrong)
    assert code == 2
    for part in (
        "unknown flag --epochz; did you mean --epochs",
        "unknown flag --bogus",
        "unknown flag --augment.mixpu; did you mean --augment.mixup",
        "lr: ",
        "not 'fast'",
        "workers: ",
        "optimizer.beta1: ",
    ):
        assert part in err, err
    assert err.count("\n  ") == 6, "a line each"


# --- train -----------------------------------------------------------------------------------------------------------


def test_unknown_model(run: Callable[..., Any], pictures: Path) -> None:
    code, _, err = run("train", pictures, "--model", "vit_tny")
    assert code == 2 and "unknown model 'vit_tny'; did you mean vit_tiny" in err and "saccade models" in err


def test_unknown_recipe(run: Callable[..., Any], pictures: Path) -> None:
    code, _, err = run("train", pictures, "--recipe", "finetune")
    assert code == 2 and "did you mean fine_tune" in err


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_path_that_is_not_there(run: Callable[..., Any], tmp_path: Path, command: str) -> None:
    (tmp_path / "flowers").mkdir()
    code, out, err = run(command, tmp_path / "flower")
    assert code == 2 and out == "" and "flower: does not exist; did you mean flowers?" in err


def test_empty_folder_and_one_class(run: Callable[..., Any], tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("train", "empty")[0] == 2
    shutil.copytree(pictures / "train" / "red", tmp_path / "one" / "red")
    code, _, err = run("train", "one")
    assert code == 2 and "at least two are needed" in err


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_device_that_is_not_there(run: Callable[..., Any], pictures: Path, device: str) -> None:
    code, _, err = run("train", pictures, *TINY, "--steps=1", f"--device={device}", "--out=run")
    assert code == 2 and "--device" in err


def test_out_that_is_a_file(run: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = run("train", pictures, *TINY, "--steps=1", "--out=file")
    assert code == 2 and "is a file" in err and (tmp_path / "file").read_text() == "mine"
    code, _, err = run("train", pictures, *TINY, "--steps=1", "--out=file/run")
    assert code == 2 and "file" in err


def test_train_refuses_what_is_for_boxes(run: Callable[..., Any], pictures: Path) -> None:
    code, _, err = run("train", pictures, *TINY, "--steps=1", "--augment.mosaic=0.5", "--augment.copy-paste=1")
    assert code == 2 and "augment.mosaic, augment.copy_paste: for detection" in err


def test_train_answers_with_json(run: Callable[..., Any], pictures: Path) -> None:
    code, out, err = run("train", pictures, *TINY, "--steps=2", "--json", "--out=run")
    facts = json.loads(out)
    assert code == 0 and facts["run"] == "run" and facts["finished"] is True and facts["steps"] == 2
    assert set(facts["metrics"]) >= {"top1", "loss"} and facts["left_out"] == {}
    assert "val_top1" in err, "progress is for people, on standard error"


def test_train_chooses_a_free_folder(run: Callable[..., Any], pictures: Path) -> None:
    for name in ("colours", "colours-2"):
        code, out, _ = run("train", pictures, *TINY, "--steps=1")
        assert code == 0 and f"saccade predict runs/{name} PICTURE" in out


def test_left_out_pictures_are_counted(run: Callable[..., Any], tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "mine")
    (data / "train" / "red" / "0.png").write_bytes(b"")
    code, out, err = run("train", data, *TINY, "--steps=3", "--out=run")
    assert code == 0 and "1 picture could not be read and was left out" in out and "left out: " in err


def test_resume_of_nothing(run: Callable[..., Any], pictures: Path) -> None:
    code, _, err = run("train", "--resume", "runs/none")
    assert code == 2 and "no such run" in err
    code, _, err = run("train", "--resume", pictures)
    assert code == 2 and "no such run" in err


def test_weights_that_are_not_there(run: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "modell").mkdir()
    code, _, err = run("train", pictures, "--weights", "model", "--steps=1")
    assert code == 2 and "model: no such file or folder; did you mean modell" in err
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04" + b"0" * 100)
    code, _, err = run("train", pictures, "--weights=weights.pt", "--steps=1")
    assert code == 2 and "weights.pt: truncated or damaged" in err
    (tmp_path / "weights").mkdir()
    code, _, err = run("train", pictures, "--weights=weights/of_mine", "--steps=1")
    assert code == 2 and "weights/of_mine: no such file or folder" in err and "hf-hub:weights/of_mine" in err


def test_a_run_that_is_refused_leaves_nothing(
    run: Callable[..., Any], trained: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = ["--weights", trained, "--model=resnet18", "--steps=1", "--image-size=32"]
    code, _, err = run("train", pictures, *settings, "--out", tmp_path / "refused")
    assert code == 2 and "not a resnet18" in err
    assert not (tmp_path / "refused").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run("train", pictures, *settings, "--out", tmp_path / "mine")[0] == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate(run: Callable[..., Any], trained: Path, pictures: Path, tmp_path: Path) -> None:
    code, out, err = run("evaluate", trained, pictures / "val", "--json", "--out=report", "--device=cpu")
    assert code == 0
    facts = json.loads(out)
    assert 0 <= facts["top1"] <= 1 and json.dumps(facts).count("green") >= 1
    saved = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert saved == {"of": {"model": str(trained), "data": str(pictures / "val"), "split": None}, **facts}
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"confusion.png", "calibration.png"}
    code, _, err = run("evaluate", "absent", pictures / "val", "--out=report")
    assert code == 2 and "report: holds the report of before (metrics.json); choose another folder" in err
    code, out, _ = run("evaluate", trained, pictures, "--split=val", "--device=cpu")
    assert code == 0 and "green" in out

def test_a_report_is_written_though_nobody_reads_on(trained: Path, pictures: Path, tmp_path: Path) -> None:
    """`saccade evaluate ... --out report | head -1`."""
    command = [sys.executable, "-m", "saccade", "evaluate", trained, pictures / "val", "--device=cpu", "--out=report"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.wait()
    assert {"metrics.json", "confusion.png", "calibration.png"} <= {path.name for path in tmp_path.glob("report/*")}



def test_evaluate_on_other_classes(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    other = make_pictures(tmp_path / "other", classes=("blue", "grean", "pink"), train=1)
    code, out, err = run("evaluate", trained, other / "val", "--json")
    assert code == 2 and out == ""
    assert "2 classes are unknown" in err and "grean, pink" in err and "blue, green, red" in err


def test_evaluate_on_some_of_the_classes(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    """Labels are matched by name, not by place: red is the third class here, and the second of these pictures."""
    some = make_pictures(tmp_path / "some", classes=("blue", "green", "red"), train=1)
    shutil.rmtree(some / "val" / "green")
    code, out, _ = run("evaluate", trained, some / "val", "--json", "--device=cpu")
    assert code == 0
    shutil.rmtree(some / "val" / "blue")
    code, out, _ = run("evaluate", trained, some / "val", "--json", "--device=cpu")
    assert code == 0 and json.loads(out)["top1"] >= 0


def test_evaluate_says_what_it_leaves_out(run: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "mine")
    (data / "val" / "red" / "0.png").write_bytes(b"words")
    code, out, err = run("evaluate", trained, data / "val", "--json", "--device=cpu")
    assert code == 0 and isinstance(json.loads(out), dict)
    assert err.count("left out: ") == 1 and "0.png" in err
    with pytest.warns(UserWarning, match="1 picture could not be read; the report is without"):
        saccade.evaluate(str(trained), str(data / "val"), device="cpu")


@pytest.mark.parametrize("arguments", [["nothing", "DATA"], ["MODEL", "nothing"], ["MODEL", "DATA", "--split=tset"]])
def test_evaluate_what_is_not_there(
    run: Callable[..., Any], trained: Path, pictures: Path, arguments: list[str]
) -> None:
    paths = {"MODEL": trained, "DATA": pictures}
    code, out, err = run("evaluate", *(paths.get(argument, argument) for argument in arguments))
    assert code == 2 and out == "" and ("nothing" in err or "tset" in err)


# --- predict ---------------------------------------------------------------------------------------------------------


def test_predict(run: Callable[..., Any], trained: Path, pictures: Path, tmp_path: Path) -> None:
    code, out, err = run("predict", trained, pictures / "val", "--json", "--save=out", "--device=cpu")
    found = json.loads(out)
    assert code == 0 and len(found) == 6
    assert all(Path(facts["picture"]).is_file() for facts in found)
    assert {facts["source"] for facts in found} == {str(path) for path in (pictures / "val").rglob("*.png")}
    assert len({facts["picture"] for facts in found}) == 6, "pictures of one name in several folders keep apart"


def test_predict_refuses_what_is_for_detections(run: Callable[..., Any], trained: Path, pictures: Path) -> None:
    code, _, err = run("predict", trained, pictures / "val" / "red", "--threshold=0.5")
    assert code == 2 and "leave the threshold out" in err
    (file := Path("ids.json")).write_text('{"images": [], "categories": [{"id": 1, "name": "red"}]}')
    code, _, err = run("predict", trained, pictures / "val" / "red", "--coco", file)
    assert code == 2 and "threshold" not in err and "is for detections" in err


def test_predict_prints_a_line_each(run: Callable[..., Any], trained: Path, pictures: Path) -> None:
    file = pictures / "val" / "red" / "0.png"
    code, out, err = run("predict", trained, file, file, "--device=cpu")
    assert code == 0 and err == "" and len(out.splitlines()) == 2 and out.count(str(file)) == 2


@pytest.mark.parametrize("as_json", [False, True])
def test_predict_goes_on_after_bad_files(
    run: Callable[..., Any], trained: Path, pictures: Path, tmp_path: Path, as_json: bool
) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    good = pictures / "val" / "red" / "0.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:300])
    bad = ["notes.txt", "empty.jpg", "cut.png"]
    code, out, err = run("predict", trained, good, *bad, good, "--device=cpu", *(["--json"] if as_json else []))
    assert code == 2
    assert len(json.loads(out) if as_json else out.splitlines()) == 2
    assert all(name in err for name in bad) and "3 pictures could not be read; the others are done" in err


def test_predict_names_missing_files(run: Callable[..., Any], trained: Path, pictures: Path, tmp_path: Path) -> None:
    good = pictures / "val" / "red" / "0.png"
    shutil.copy(good, tmp_path / "photo.png")
    code, out, err = run("predict", trained, "photo.png", "phoot.png", "lost.png", "--json", "--device=cpu")
    assert code == 2 and out == "" and "phoot.png: does not exist; did you mean photo.png?" in err
    assert "lost.png: does not exist" in err, "all of them at once, before any work"
    (tmp_path / "hollow").mkdir()
    code, out, err = run("predict", trained, "hollow", "--device=cpu")
    assert code == 2 and "hollow" in err


@pytest.mark.parametrize("what", ["text", "empty", "pickle", "folder", "missing"])
def test_predict_with_what_is_no_model(run: Callable[..., Any], pictures: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes({"text": b"words" * 9, "empty": b"", "pickle": b"PK\x03\x04" + b"0" * 99}[what])
    code, out, err = run("predict", path, pictures / "val" / "red" / "0.png", "--json")
    assert code == 2 and out == "" and "model.safetensors" in err


# --- inspect, models -------------------------------------------------------------------------------------------------


def test_inspect(run: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "mine")
    code, out, err = run("inspect", data, "--json")
    assert code in (0, 1) and isinstance(json.loads(out), dict)
    (data / "train" / "red" / "0.png").write_bytes(b"words")
    code, out, _ = run("inspect", data, "--json")
    assert code == 1 and "0.png" in out and isinstance(json.loads(out), dict)
    assert run("inspect", data)[0] == 1


def test_models(run: Callable[..., Any]) -> None:
    code, out, _ = run("models", "--json")
    assert code == 0 and {"vit_tiny", "cct_nano"} <= {model["name"] for model in json.loads(out)}
    code, out, _ = run("models")
    assert code == 0 and "vit_huge" in out


def test_interrupted_by_hand(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saccade.catalog.list_models", interrupt)
    code, out, err = run("models", "--json")
    assert code == 130 and out == "" and err == "stopped\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried"), OSError(28, "No space")])
def test_what_the_system_refuses(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("saccade.catalog.list_models", refuse)
    assert run("models", "--json")[0] == 2
