"""Bad texts and bad models of texts: an error names the file and what to do, and nothing is written."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saccade
from saccade.cli import main
from saccade.cli_texts import arriving_lines
from saccade.config import PreprocessingConfig, RunConfig, TextConfig
from saccade.engine.distributed import World
from saccade.engine.text_data import TextData
from saccade.engine.translate import TextModel
from saccade.errors import UserError
from saccade.models import build_network
from saccade.models.transformer import TransformerRow
from saccade.recipes import resolve
from saccade.tokenizer import learn_tokenizer
from saccade.weights.export import convert
from saccade.weights.load import load_weights
from saccade.weights.model_file import ModelCard, read_metadata, save_model

WHO = ("dog", "cat", "man", "girl")
ENGLISH = [f"A {who} runs {where} {i}." for i, who in enumerate(WHO) for where in ("here", "in")]
GERMAN = [line.replace("A ", "Ein ").replace("runs", "rennt").replace("here", "hier") for line in ENGLISH]


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = learn_tokenizer([*ENGLISH, *GERMAN], 90)
    row = TransformerRow(
        width=16, heads=2, hidden=16, encoder_depth=1, decoder_depth=1, max_length=24, vocabulary=tokenizer.size
    )
    torch.manual_seed(0)
    card = ModelCard("translate", "m", row.to_dict(), (), PreprocessingConfig(), tokenizer=tokenizer.to_text())
    path = tmp_path_factory.mktemp("models") / "m.safetensors"
    save_model(path, build_network(row, 0).state_dict(), card)
    return path


def _replace(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def _lines(name: str, lines: list[str]) -> Callable[[Path], None]:
    return _replace(name, "".join(f"{line}\n" for line in lines).encode())


def _without(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def _empty(folder: Path) -> None:
    for side in ("en", "de"):
        (folder / f"train.{side}").write_text("")


def _table(name: str, lines: list[str]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        _without("train.en", "train.de", "val.en", "val.de")(folder)
        write(folder / name, lines)

    return spoil


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {  # what is done, the place, what to do
    "a line fewer": (_lines("train.de", GERMAN[1:]), "train.de has 1 line fewer", "what is missing belongs"),
    "latin": (_replace("train.de", "ein\nschön\n".encode("latin1")), "train.de:2", "iconv -f latin1"),
    "utf-16": (_replace("train.en", "\n".join(ENGLISH).encode("utf-16")), "train.en:1", "iconv -f utf-16"),
    "bytes": (_replace("train.en", bytes(range(256))), "train.en:2", "not UTF-8"),
    "nothing": (_empty, "train.en", "belong on the same line"),
    "blank": (_lines("train.de", [""] * len(ENGLISH)), "train.en", "belong on the same line"),
    "one side": (_without("train.de", "val.de"), "train.en", "belongs beside it, as train.de"),
    "one side of one": (_without("val.de"), "val.en", "add val.de or remove it"),
    "no tab": (_table("train.tsv", ["one\ttwo", "only"]), "train.tsv:2", "a tab between a text and its translation"),
    "half a character": (_table("train.jsonl", ['{"en": "a", "de": "b"}', r'{"en": "\ud800", "de": "b"}']),
                         "train.jsonl:2", "half of a character in 'en'"),
    "not text": (_without("train.en", "train.de", "val.en", "val.de"), "", "holds no parallel text"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("fault", FAULTS)
def test_data(
    fault: str, command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    spoil, place, remedy = FAULTS[fault]
    folder = tmp_path / "texts"
    for name, count in (("train", len(ENGLISH)), ("val", 3)):
        write(folder / f"{name}.en", ENGLISH[:count])
        write(folder / f"{name}.de", GERMAN[:count])
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "texts", "--task=translate", "--steps=1"]
    if command == "evaluate":
        arguments = ["evaluate", str(model), "texts"]
    assert main([*arguments, "--device=cpu"]) == 2
    shown = capsys.readouterr()
    assert f"texts/{place}" in shown.err or place in shown.err
    assert remedy in shown.err and "Traceback" not in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["texts"], "nothing is begun"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--input=absent.txt"], ["absent.txt: does not exist", "spelling"]),
        (["--input=folder"], ["folder: is a folder", "give a file"]),
        (["--input=latin.txt"], ["latin.txt:1: not UTF-8", "iconv"]),
        (["--input=empty.txt"], ["empty.txt: is empty"]),
        (["-"], ["for the lines of standard input, use --input -"]),
        ([""], ["is empty"]),
        ([], ["nothing given"]),
        (["\udcff and more"], [r"\udcff", "is not UTF-8", "--input FILE"]),
        (["A dog.", "--save=empty.txt"], ["empty.txt"]),
    ],
)
def test_what_cannot_be_translated(
    arguments: list[str], parts: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes("schön\n".encode("latin1"))
    (tmp_path / "empty.txt").write_text("")
    assert main(["predict", str(model), *arguments, "--device=cpu"]) == 2
    shown = capsys.readouterr()
    assert all(part in shown.err for part in parts) and "Traceback" not in shown.err
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "empty.txt").read_text() == ""


def test_what_is_odd_is_translated(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["☃ 你好 🎉", "", "A dog\u2028runs\x85here.", "\u200b", "a\0b", "A dog " * 40]
    write(tmp_path / "odd.txt", lines)
    arguments = ["--input", str(tmp_path / "odd.txt"), "--beams=1", "--json", "--device=cpu"]
    assert main(["predict", str(model), *arguments]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert len(found) == len(lines) and found[1]["translation"] == ""
    assert "odd.txt, line 6: 'A dog A dog" in shown.err and "cut after 24 of 81 tokens" in shown.err
    assert "odd.txt, line 1: '☃ 你好 🎉': 4 of 7 tokens are unknown to the model: ☃ 你 好 🎉\n" in shown.err
    half = TextModel.load(model, device="cpu").translate("a dog \ud800")  # Python's strings may hold that
    assert len(half) == 1


def test_standard_input(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(data: bytes, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = main(["predict", str(model), "--input", "-", "--device=cpu", *flags])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    lines = [ENGLISH[0], "", ENGLISH[1]]
    write(tmp_path / "lines.txt", lines)
    assert main(["predict", str(model), f"--input={tmp_path / 'lines.txt'}", "--device=cpu"]) == 0
    expected = capsys.readouterr().out
    assert len(expected.splitlines()) == 3
    assert found("\r\n".join(lines).encode("utf-8-sig"))[:2] == (0, expected)
    assert len(found("\n".join(lines).encode(), "--stream")[1].splitlines()) == 3
    assert len(found(b"A dog.\n" * 3, "--temperature=1")[1].splitlines()) == 3
    assert "is for a search" in found(b"A dog.", "--temperature=1", "--beams=2")[2]
    assert found(b"\n\n")[:2] == (0, "\n\n")
    assert "standard input: is empty" in found(b"")[2]
    assert "standard input, line 2: not UTF-8 (byte 0xf6)" in found("A dog.\nschön".encode("latin1"))[2]
    assert "standard input, line 2: 'A dog A dog" in found(b"A dog.\n" + b"A dog " * 40)[2]


def test_lines_arrive_as_they_are_written() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as stream:
        lines = arriving_lines(stream)
        os.write(writing, b"one\ntwo\nthr")
        assert next(lines) == ["one", "two"]
        os.write(writing, b"ee\nfour")
        assert next(lines) == ["three"]
        os.close(writing)
        assert list(lines) == [["four"]]


def test_of_many_notes_the_first_are_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "lines.txt", ["☃"] * 14)
    assert main(["predict", str(model), f"--input={tmp_path / 'lines.txt'}", "--device=cpu"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "did not end" not in line]
    assert len(notes) == 11 and notes[-1] == "note: the like of 4 texts more"


def test_blank_lines_stay_blank(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    assert main(["predict", str(model), f"--input={tmp_path / 'blank.txt'}", "--device=cpu"]) == 0
    assert capsys.readouterr().out == "\n\n"


# --- the model file --------------------------------------------------------------------------------------------------


def _card(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda card: card.update(changes)


def _row(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda card: card["architecture"].update(changes)


def _vocabulary(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def spoil(card: dict[str, Any]) -> None:
        values = json.loads(card["tokenizer"])
        change(values["tokenizer"]["model"])
        card["tokenizer"] = json.dumps(values)

    return spoil


def _fewer(model: dict[str, Any]) -> None:
    model["vocab"], model["merges"] = dict(list(model["vocab"].items())[:30]), []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_card(tokenizer=None), "holds no tokenizer.*get the file anew"),
        (_card(tokenizer="junk"), "tokenizer is damaged.*get the file anew"),
        (_vocabulary(_fewer), "tokenizer has 30 tokens, its weights know .*not of one model"),
        (_vocabulary(lambda model: model["vocab"].update(more=500)), "not numbered one after the other"),
        (_row(max_length=10**9), "max_length 1000000000 is not from 2"),
        (_row(max_length=-5), "max_length -5 is not from 2"),
        (_row(begin=9999), "begin 9999 is none of"),
        (_row(end=-1), "end -1 is none of"),
        (_row(begin=5), "start is 1 to the tokenizer and 5 to the weights"),
        (_row(pad=5), "padding is 0 to the tokenizer and 5 to the weights"),
        (_row(width=-16), "describes a model that cannot be built"),
        (_row(heads=0), "describes a model that cannot be built"),
        (_row(vocabulary=5), "the weights do not fit"),
    ],
)
def test_model_file(spoil: Callable[[dict[str, Any]], None], message: str, model: Path, tmp_path: Path) -> None:
    metadata = read_metadata(model)
    assert metadata is not None
    card = json.loads(metadata["saccade"])
    spoil(card)
    save_file(load_file(model), tmp_path / "m.safetensors", {**metadata, "saccade": json.dumps(card)})
    with pytest.raises(UserError, match=f"^[^:]*m.safetensors: (?!.*m.safetensors).*{message}"):
        TextModel.load(tmp_path / "m.safetensors", device="cpu")


def test_what_no_other_library_has_is_not_promised(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written for timm, which has no such model$"):
        convert(model, tmp_path / "out", to="timm")
    with pytest.raises(UserError, match="cannot be written as huggingface transformer: Marian normalises after"):
        convert(model, tmp_path / "out", to="hf")


def test_weights_that_are_no_numbers(model: Path, tmp_path: Path) -> None:
    loaded = load_weights(model)
    loaded.weights["embeddings"][3, 2] = float("nan")
    save_model(tmp_path / "m.safetensors", loaded.weights, loaded.card)
    with pytest.raises(UserError, match="m.safetensors: embeddings holds? NaN or infinity"):
        TextModel.load(tmp_path / "m.safetensors", device="cpu")
    # they may also come from a description
    row = replace(loaded.row, norm_eps=-100.0)  # pyright: ignore[reportCallIssue]
    loaded.weights["embeddings"][3, 2] = 0
    save_model(tmp_path / "eps.safetensors", loaded.weights, replace(loaded.card, architecture=row.to_dict()))
    broken = TextModel.load(tmp_path / "eps.safetensors", device="cpu")
    for temperature in (None, 1.0):
        with pytest.raises(UserError, match="scores are no numbers"):
            broken.translate("A dog.", temperature=temperature)


# --- runs ------------------------------------------------------------------------------------------------------------


def config_of(folder: Path, **text: Any) -> RunConfig:
    return RunConfig(data=str(folder), task="translate", text=TextConfig(vocabulary=90, **text))


def make(folder: Path) -> Path:
    for name, count in (("train", len(ENGLISH)), ("val", 3)):
        write(folder / f"{name}.en", ENGLISH[:count])
        write(folder / f"{name}.de", GERMAN[:count])
    return folder


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "cannot be read"), (b"", "is damaged"), (b"{}", "is damaged")]
)
def test_a_run_s_tokenizer(content: bytes, message: str, tmp_path: Path) -> None:
    make(tmp_path / "texts")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=f"run/tokenizer.json: .*{message}"):
        TextData(config_of(tmp_path / "texts"), World(), torch.device("cpu"), tmp_path / "run")


def test_what_is_cut_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path)
    write(folder / "val.en", [ENGLISH[0], " ".join(ENGLISH), ENGLISH[2]])
    data = TextData(config_of(folder, max_length=30), World(), torch.device("cpu"), None)
    (note,) = [note for note in data.notes if "cut there" in note]
    assert "1 pair for validation of more than 30 tokens is cut there" in note and "val.en:2" in note
    assert int(data.val_pairs.lengths.max()) == 30
    assert main(["evaluate", str(model), str(folder), "--beams=1", "--device=cpu"]) == 0
    assert "1 pair of more than 24 tokens" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="val.en:2"):
        saccade.evaluate(str(model), str(folder), beams=1, device="cpu")


def test_the_only_split_is_named(tmp_path: Path) -> None:
    write(tmp_path / "corpus.en", ENGLISH)
    write(tmp_path / "corpus.de", GERMAN)
    data = TextData(config_of(tmp_path), World(), torch.device("cpu"), None)
    assert any("its only split, corpus, is learnt from" in note for note in data.notes)


def test_one_language_for_both(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both en; name two languages"):
        TextData(config_of(make(tmp_path), source="en", target="en"), World(), torch.device("cpu"), None)


# --- from weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_en_de(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run writes it: with the languages that it translates."""
    loaded = load_weights(model)
    card = replace(loaded.card, languages=("en", "de"), model="transformer_tiny")
    path = tmp_path_factory.mktemp("models") / "en-de.safetensors"
    save_model(path, loaded.weights, card)
    return path


def tuned(folder: Path, weights: Path, **changes: Any) -> RunConfig:
    return resolve({"data": str(folder), "weights": str(weights), "device": "cpu", "out": "run", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"vocabulary": 8000}}, "^--text.vocabulary: is for a tokenizer that is learnt, and .*has one"),
        ({"text": {"tokenizer": "bpe", "vocabulary": 99}}, "--text.vocabulary, --text.tokenizer: are for"),
        ({"text": {"max_length": 100}}, "--text.max-length 100: .*en-de.* takes 24 tokens at most; give no more"),
        ({"distributed": {"strategy": "fsdp"}}, "--distributed.strategy fsdp: translators are not sharded; use ddp"),
    ],
)
def test_what_could_not_take_effect_is_refused(
    changes: dict[str, Any], message: str, of_en_de: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        tuned(make(tmp_path), of_en_de, **changes)


def test_what_limits_the_length_is_named(of_en_de: Path, tmp_path: Path) -> None:
    folder = make(tmp_path)
    write(folder / "train.en", [*ENGLISH[:-1], " ".join(ENGLISH)])
    write(folder / "val.en", [ENGLISH[0], " ".join(ENGLISH), ENGLISH[2]])
    for most, limit in ((None, "en-de.safetensors takes no more)"), (20, "--text.max-length)")):
        config = tuned(folder, of_en_de, **({} if most is None else {"text": {"max_length": most}}))
        notes = TextData(config, World(), torch.device("cpu"), None).notes
        assert len([note for note in notes if note.endswith(limit)]) == 2, notes


def test_another_direction_is_said(of_en_de: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, said = make(tmp_path / "texts"), "the model translates en to de; this is de to en"
    for asked, count in (({}, 0), ({"text": {"source": "de"}}, 1)):
        data = TextData(tuned(folder, of_en_de, **asked), World(), torch.device("cpu"), None)
        assert data.notes.count(said) == count
    arguments = ["evaluate", str(of_en_de), str(folder), "--beams=1", "--device=cpu"]
    assert main(arguments) == 0
    assert "the model translates" not in capsys.readouterr().err
    assert main([*arguments, "--text.source=de"]) == 0
    assert said in capsys.readouterr().err
    with pytest.warns(UserWarning, match=said):
        saccade.evaluate(str(of_en_de), str(folder), beams=1, device="cpu", languages=("de", None))


def test_a_table_without_names_has_the_languages_of_the_model(of_en_de: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.tsv", [f"{one}\t{other}" for one, other in zip(ENGLISH, GERMAN, strict=True)])
    data = TextData(tuned(file, of_en_de), World(), torch.device("cpu"), None)
    assert data.languages == ("en", "de") and data.train.sources[0] in ENGLISH
    assert any("its columns name no languages; en is taken for the first" in note for note in data.notes)
