"""A model of texts in use: order, empty and too long texts, streams, explanations, the command."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import saccade
from saccade.cli import main
from saccade.config import NetworkConfig, PreprocessingConfig
from saccade.data.text.splits import open_pairs
from saccade.engine.translate import TextModel, relevance
from saccade.errors import UserError
from saccade.models import build_network, model_row
from saccade.models.transformer import TransformerRow
from saccade.models.translator import TranslationOutputs, Translator, TranslatorRow
from saccade.predictions.translation import Translation, words
from saccade.recipes import resolve
from saccade.tokenizer import learn_tokenizer
from saccade.weights.load import load_network
from saccade.weights.model_file import ModelCard, save_model

TEXT = ["A dog runs here.", "A cat sleeps outside.", "Ein Hund rennt hier.", "Eine Katze schläft draußen."]


def make_model(path: Path, name: str = "transformer_tiny", **changes: Any) -> Path:
    """Random weights, with a tokenizer of their own."""
    tokenizer = learn_tokenizer(TEXT, 90)
    row = model_row(name)
    assert isinstance(row, TranslatorRow)
    row = replace(row, **{"width": 16, "vocabulary": tokenizer.size, "max_length": 24, **changes})
    torch.manual_seed(0)
    network = build_network(row, 0)
    assert isinstance(network, Translator)
    card = ModelCard("translate", name, row.to_dict(), (), PreprocessingConfig(), tokenizer=tokenizer.to_text())
    save_model(path, network.state_dict(), card)
    return path


@pytest.fixture(scope="module", params=["transformer_tiny", "lstm", "gru_attention"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    changes = {"heads": 2, "hidden": 24, "encoder_depth": 1} if request.param == "transformer_tiny" else {}
    return make_model(folder / f"{request.param}.safetensors", request.param, **changes)


@pytest.fixture(scope="module")
def model(file: Path) -> TextModel:
    return saccade.load(str(file), device="cpu")


def test_order_and_batches_change_nothing(model: TextModel) -> None:
    texts = ["A dog runs here.", "", "A cat.", "A cat sleeps outside and a dog runs here.", "dog"]
    together = model.translate(texts, batch_size=2)
    assert [each.source for each in together] == texts
    assert together[1].text == "" and together[1].score is None
    for text, result in zip(texts, together, strict=True):
        alone = model.translate(text)[0]
        assert alone.text == result.text
        assert alone.score == pytest.approx(result.score, abs=1e-4)


def test_a_text_that_is_too_long_is_cut_and_said(model: TextModel) -> None:
    (result,) = model.translate("dog " * 60)
    assert result.note.startswith("cut after 24 of")
    assert model.translate("dog")[0].note == ""


def test_stream_is_the_likeliest_translation(model: TextModel) -> None:
    pieces = list(model.stream("A dog runs here."))
    assert "".join(pieces) == model.translate("A dog runs here.", temperature=1.0, top_k=1)[0].text
    assert list(model.stream("")) == []


def test_drawn_translations_depend_on_the_seed(model: TextModel) -> None:
    def drawn(seed: int) -> list[str]:
        return [each.text for each in model.translate(TEXT, temperature=1.5, seed=seed)]

    assert drawn(1) == drawn(1) != drawn(2)
    many = [each.text for each in model.translate(["A dog."] * 12, temperature=1.5, batch_size=4)]
    assert len({*many}) > 6, "each text draws tokens of its own"
    again = [each.text for each in model.translate(["A dog."] * 12, temperature=1.5, batch_size=1)]
    assert again == many, "and the same ones in any batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams 0: is to be a whole number from 1 to 64"),
        ({"beams": 65}, "beams 65: is to be"),
        ({"length_penalty": -1.0}, "length_penalty -1.0: is to be"),
        ({"temperature": 0.0}, "temperature 0.0: is to be above 0"),
        ({"temperature": math.nan}, "temperature nan: is to be above 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k 0: is to be"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p 1.5: is to be"),
        ({"seed": -1}, "seed -1: is to be"),
        ({"top_k": 5}, "top_k 5: is for translations that are drawn; give a temperature"),
        ({"seed": 3}, "seed 3: is for translations that are drawn; give a temperature"),
        ({"temperature": 1.0, "beams": 2}, "beams 2: is for a search; leave it out, or the temperature"),
        ({"temperature": 1.0, "length_penalty": 1.0}, "length_penalty 1.0: is for a search"),
        ({"beams": 2.5}, "beams 2.5: is to be a whole number"),
        ({"beams": "2"}, "beams '2': is to be a whole number"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k 2.5: is to be a whole number"),
        ({"batch_size": -1}, "batch_size -1: is to be a whole number above 0"),
        ({"batch_size": 0}, "batch_size 0: is to be"),
    ],
)
def test_impossible_searches_are_refused(model: TextModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model.translate("A dog.", **options)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([5], "text 0: is 5, which is no text; give a str, or a list of them"),
        (["a", None], "text 1: is None, which is no text; give a str"),
        (None, "texts: is None, which is no text; give a str"),
        (b"a dog", "text 0: is 97, which"),
    ],
)
def test_what_is_no_text_is_refused(model: TextModel, texts: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model.translate(texts)


@pytest.mark.parametrize("temperature", [1e-60, 1e-42, 1e-12, 1e300])
def test_extreme_temperatures(model: TextModel, temperature: float) -> None:
    found = model.translate(TEXT, temperature=temperature)
    assert len(found) == len(TEXT)
    if temperature < 1:
        assert [each.text for each in found] == [each.text for each in model.translate(TEXT, beams=1)]


def test_unknown_characters_are_said(model: TextModel) -> None:
    (result,) = model.translate("犬 A dog 犬.")
    assert re.fullmatch(r"2 of \d+ tokens are unknown to the model: 犬", result.note)
    with pytest.warns(UserWarning, match="'犬': 1 of . tokens is unknown to the model: 犬"):
        list(model.stream("犬"))
    (long,) = model.translate("dog " * 60 + "猫")
    assert "cut after 24 of" in long.note and "unknown to the model: 猫" in long.note


def test_several_lines_are_said(model: TextModel) -> None:
    one, two = model.translate(["A dog runs.\n", "A dog runs.\nTwo men play."])
    assert one.note == "" and two.note.startswith("its line ends are taken for spaces; a line is a text of its own")


def test_one_text_alone_is_no_list_of_texts(model: TextModel) -> None:
    assert len(model.tokenizer.encode(["A dog."])) == 1
    with pytest.raises(UserError, match="'A dog.': is one text; give a list of them"):
        model.tokenizer.encode("A dog.")


def test_predict_is_translate(model: TextModel) -> None:
    assert [each.text for each in model.predict(TEXT)] == [each.text for each in model.translate(TEXT)]


def test_evaluation_of_a_model_for_very_short_texts(tmp_path: Path) -> None:
    for language, line in (("en", "A dog runs."), ("de", "Ein Hund.")):
        (tmp_path / f"val.{language}").write_text(f"{line}\n")
    for most in (2, 3):
        path = make_model(tmp_path / f"{most}.safetensors", heads=2, hidden=24, encoder_depth=1, max_length=most)
        notes: list[str] = []
        report = TextModel.load(path, device="cpu").evaluate(open_pairs(tmp_path, None), beams=1, notes=notes)
        assert report.texts == 1 and report.tokens == most and report.written <= most and len(notes) == 1


def test_stream_warns_of_a_text_that_is_cut(model: TextModel) -> None:
    with pytest.warns(UserWarning, match="cut after 24 of"):
        list(model.stream("dog " * 60))


def test_explanations(model: TextModel, tmp_path: Path) -> None:
    (result,) = model.translate("A dog runs here.", explained=True)
    T, S = len(result.tokens), len(result.source_tokens)
    assert "".join(result.source_tokens) == " A dog runs here.■" and result.tokens[-1] == "■"
    assert result.relevance is not None and result.relevance.shape == (T, S)
    np.testing.assert_allclose(result.relevance.sum(axis=1), 1, rtol=1e-4)
    assert (result.alignment is None) == (model.card.model == "lstm")
    if result.alignment is not None:
        assert result.alignment.shape == (T, S)
        np.testing.assert_allclose(result.alignment.sum(axis=1), 1, rtol=1e-4)
    picture = result.save(tmp_path)
    assert Image.open(picture).size[0] > 300
    data = json.loads(picture.with_suffix(".json").read_text())
    assert np.asarray(data["relevance"]).shape == (T, S) and data["translation"] == result.text
    assert result.save(tmp_path) != picture
    with pytest.raises(UserError, match="nothing to draw"):
        model.translate("A dog.")[0].save(tmp_path)


def test_words_of_several_tokens() -> None:
    assert words((" Two", " skate", "board", "ers", " ", "⁇", " do", "n", "'", "t", ".", "■")) == [(1, 3), (6, 7)]
    assert words(()) == [] and words((" snow", "man")) == [(0, 1)]


def test_a_picture_says_how_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def keep(figure: Figure, *given: Any, **how: Any) -> None:
        figure.draw_without_rendering()
        said.extend(text.get_text() for text in figure.findobj(Text))
        drawn(figure, *given, **how)

    drawn = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    long = Translation(
        "A snowman ⁇ " + "x " * 90, "Ein Schneemann", source_tokens=(" snow", "man", " ", "⁇") * 20 + ("■",),
        tokens=(" Schnee", "mann", "■"), relevance=np.full((3, 81), 1 / 81),
    )  # fmt: skip
    with Image.open(long.save(tmp_path / "a.png")) as picture:
        assert picture.size[0] < 4000
    text = " ".join(" ".join(said).split())
    assert "A snowman ⁇" in text and "→ Ein Schneemann" in text and "…" in text
    assert "white 0, darkest 0.04" in text and "a line joins the tokens of one word" in text
    assert "⁇ a token that the model does not know; ␣ a space" in text
    assert "only the first 60 tokens of either side are drawn" in text
    assert "■ is the end" in text


def test_what_is_taken_from_all_alike_is_drawn_pale(tmp_path: Path) -> None:
    even = np.full((8, 8), 1 / 8)
    result = Translation("a", "b", source_tokens=("x",) * 8, tokens=("y",) * 8, alignment=even, relevance=np.eye(8))
    drawn = np.asarray(Image.open(result.save(tmp_path / "a.png")).convert("L"))
    height, width = drawn.shape
    assert drawn[int(0.7 * height), int(0.25 * width)] > 150
    assert drawn[:, width // 2 :].min() < 60


def test_relevance_sees_what_is_copied() -> None:
    """Of a model that can only say the first word of its text again, that word alone is relevant."""

    class Copying(torch.nn.Module):
        def embed_source(self, source: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(source, 9).float()

        def hidden(self, source: torch.Tensor, inputs: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
            return embedded[:, :1].expand(-1, inputs.shape[1], -1)

        def outputs(self, hidden: torch.Tensor) -> TranslationOutputs:
            return TranslationOutputs(3 * hidden, torch.eye(9))

    table = relevance(Copying(), torch.tensor([[4, 5, 6]]), torch.tensor([[1, 4]]), [4, 4])  # pyright: ignore
    np.testing.assert_allclose(table, [[1, 0, 0], [1, 0, 0]], atol=1e-6)


def test_in_low_precision(model: TextModel) -> None:
    """As in an evaluation during training on an accelerator with bfloat16."""
    source = torch.tensor([[5, 6, 7, 2]])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model.network.begin(source).advance(torch.tensor([[1]]))
        expected = model.network(source, torch.tensor([[1]])).logits
    torch.testing.assert_close(logits.float(), expected.float(), atol=0.1, rtol=0.1)


def test_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_text("A dog runs.\n\nA cat sleeps.\n")
    assert main(["predict", str(file), "--input", str(tmp_path / "lines.txt"), "--device=cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["predict", str(file), "A dog runs.", "--json", "--device=cpu", "--save", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    (facts,) = json.loads(shown.out)
    assert facts["source"] == "A dog runs." and Path(facts["picture"]).exists()
    assert f"the picture is {facts['picture']}" in shown.err
    assert main(["predict", str(file), f"--input={tmp_path / 'lines.txt'}", f"--save={tmp_path / 'out'}"]) == 0
    assert f"2 pictures are in {tmp_path / 'out'}" in capsys.readouterr().err
    assert {"0001-A-dog-runs.png", "0003-A-cat-sleeps.png"} <= {each.name for each in (tmp_path / "out").iterdir()}
    for arguments, message in (
        (["predict", file], "nothing given"),
        (["predict", file, "A dog.", "--input", tmp_path / "lines.txt"], "give one of both"),
        (["predict", file, " "], "nothing to translate"),
        (["predict", file, "A dog.", "--coco", "x.json"], "is for pictures"),
        (["predict", file, "--input", tmp_path / "none.txt"], "none.txt: does not exist"),
        (["predict", file, tmp_path / "lines.txt"], "is a file, and texts are translated as they stand"),
        (["predict", file, "A dog.", "--stream", "--beams=2", "--json"], "does not go with --beams, --json"),
        (["predict", file, "A dog.", "--temperature=-1"], "temperature -1.0: is to be above 0"),
        (["embed", file, tmp_path, "--out", tmp_path / "v.npz"], "translates texts"),
    ):
        assert main([str(each) for each in arguments]) == 2
        assert message in capsys.readouterr().err


def test_command_draws_streams_and_says_what_did_not_end(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = "--device=cpu"
    assert main(["predict", str(file), "A dog runs.", "--temperature=1", "--top-k=1", device]) == 0
    drawn = capsys.readouterr()
    assert main(["predict", str(file), "A dog runs.", "dog " * 60, "--stream", device]) == 0
    streamed = capsys.readouterr()
    assert streamed.out.splitlines()[0] == drawn.out.splitlines()[0] and len(streamed.out.splitlines()) == 2
    assert "cut after 24 of" in streamed.err
    (result,) = TextModel.load(file, device="cpu").translate("A dog runs.", temperature=1.0, top_k=1)
    assert ("note: 1 translation did not end, and was cut off" in drawn.err) == result.cut
    outputs = []
    for flags in (["--seed=1"], ["--seed=1"], ["--seed=2"], ["--seed=2", "--top-p=0.01"]):
        assert main(["predict", str(file), "A dog runs.", "--temperature=1.5", device, *flags]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and len({*outputs}) == 3


def test_evaluate(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for language, lines in (("en", TEXT[:2]), ("de", TEXT[2:])):
        (tmp_path / f"test_small.{language}").write_text("\n".join(lines) + "\n")
    report = saccade.evaluate(str(file), str(tmp_path), split="test", device="cpu")
    assert report.texts == 2 and "tok:13a" in report.bleu_signature and "nc:6" in report.chrf_signature
    assert report.perplexity == pytest.approx(np.exp(report.loss)) and report.tokens_per_second > 0
    arguments = ["evaluate", str(file), str(tmp_path), "--beams=2", "--device=cpu", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "2 beams" in capsys.readouterr().out
    assert main([*arguments[:3], "--beams=100", "--device=cpu"]) == 2
    assert "beams 100: is to be a whole number from 1 to 64" in capsys.readouterr().err
    assert main([*arguments[:3], "--length-penalty=0.5", "--text.source=de", "--device=cpu"]) == 0
    assert "4 beams, length penalty 0.5" in (shown := capsys.readouterr().out) and TEXT[2] in shown
    lines = (tmp_path / "out" / "translations.tsv").read_text().splitlines()
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "out", "holds the report of before (metrics.json); choose another folder"),
        (tmp_path / "file", f"{tmp_path / 'file'} is a file; choose another folder for the report"),
        (tmp_path / "file" / "inside", f"{tmp_path / 'file'} is a file; choose another folder for the report"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("saccade.api.evaluate", None)  # refused before the work
            assert main([*arguments[:-1], str(out)]) == 2
        assert message in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(lines) == 3 and json.loads((tmp_path / "out" / "metrics.json").read_text())["texts"] == 2


def test_evaluation_knows_its_languages(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that translates from German is not given English, though that is what data without a name mean."""
    for language, lines in (("en", TEXT[:2]), ("de", TEXT[2:])):
        (tmp_path / f"train.{language}").write_text("\n".join(lines) + "\n")

    def first(model: Path, **options: Any) -> str:
        return saccade.evaluate(str(model), str(tmp_path), device="cpu", **options).examples[0].source

    assert first(file) == TEXT[0] and first(file, languages=("de", None)) == TEXT[2]
    network, card = load_network(file)
    german = tmp_path / "german.safetensors"
    save_model(german, network.state_dict(), replace(card, languages=("de", "en")))
    assert load_network(german)[1].languages == ("de", "en")
    assert first(german) == TEXT[2] and first(german, languages=("en", "de")) == TEXT[0]
    settings = resolve({"data": str(tmp_path), "weights": str(german), "out": "x"})
    assert (settings.text.source, settings.text.target) == ("de", "en")
    swedish = tmp_path / "swedish.safetensors"
    save_model(swedish, network.state_dict(), replace(card, languages=("sv", "en")))
    assert first(swedish) == TEXT[0]
    assert resolve({"data": str(tmp_path), "weights": str(swedish), "out": "x"}).text.source is None


@pytest.mark.parametrize("size", [1, 2])
def test_batches_of_an_evaluation_change_nothing(file: Path, tmp_path: Path, size: int) -> None:
    for language, lines in (("en", TEXT[:2]), ("de", TEXT[2:])):
        (tmp_path / f"val.{language}").write_text("\n".join(lines) + "\n")
    pairs, model = open_pairs(tmp_path, None), TextModel.load(file, device="cpu")
    report, usual = model.evaluate(pairs, batch_size=size), model.evaluate(pairs)
    assert report.bleu == usual.bleu and report.loss == pytest.approx(usual.loss)


def test_loss_of_an_evaluation_is_of_every_token_alike(model: TextModel, tmp_path: Path) -> None:
    for language, lines in (("en", TEXT[:2]), ("de", TEXT[2:])):
        (tmp_path / f"val.{language}").write_text("\n".join(lines) + "\n")
    pairs = open_pairs(tmp_path, None)
    report = model.evaluate(pairs, beams=1)
    total, count = 0.0, 0
    for text, wanted in zip(pairs.sources, pairs.targets, strict=True):
        source = torch.tensor(model.tokenizer.encode([text]))
        target = torch.tensor(model.tokenizer.encode([wanted], target=True)[0])
        inputs = torch.tensor([[1, *target[:-1].tolist()]])
        with torch.no_grad():
            logits = model.network(source, inputs).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += len(target)
    assert report.tokens == count and report.loss == pytest.approx(total / count, rel=1e-5)


def test_tokenizer_of_another_model(file: Path, tmp_path: Path) -> None:
    network, card = load_network(file)
    for tokenizer, message in (
        (learn_tokenizer(TEXT + ["xyz & qvw ! 123"], 300).to_text(), "not of one model"),
        (None, "holds no tokenizer"),
        ("{}", "its tokenizer is damaged"),
    ):
        save_model(tmp_path / "m.safetensors", network.state_dict(), replace(card, tokenizer=tokenizer))
        with pytest.raises(UserError, match=message):
            TextModel.load(tmp_path / "m.safetensors")


def test_a_limit_is_that_of_the_text_alone(tmp_path: Path) -> None:
    """Translations that do not end stop where they would without neighbours."""
    path = make_model(tmp_path / "model.safetensors", heads=2, hidden=24, encoder_depth=1, max_length=400)
    model = saccade.load(str(path), device="cpu")
    texts = ["dog", "A dog runs here. " * 12]
    together = model.translate(texts, beams=1)
    assert [each.text for each in together] == [model.translate(text, beams=1)[0].text for text in texts]
    assert any(each.cut for each in together), "all ended by themselves, which proves nothing"


def test_explanations_of_both_formats_keep_their_data(model: TextModel, tmp_path: Path) -> None:
    (found,) = model.translate("A dog runs here.", explained=True)
    (other,) = model.translate("A cat.", explained=True)
    found.save(tmp_path / "x.png")
    other.save(tmp_path / "x.jpg")
    kept = [json.loads((tmp_path / name).read_text())["source"] for name in ("x.json", "x.jpg.json")]
    assert kept == ["A dog runs here.", "A cat."]


def test_steering_tokens_in_a_text(file: Path, tmp_path: Path) -> None:
    assert main(["predict", str(file), "Use <s> and </s>.", "--save", str(tmp_path / "out"), "--device=cpu"]) == 0
    assert main(["predict", str(file), "Г" * 150 + ". Что это?", "--device=cpu"]) == 0


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("transformer_tiny", "mlp", "gelu_tanh"),
        ("transformer_tiny", "mlp", "swiglu"),
        ("vit_tiny", "mlp", "relu"),
        ("vit_tiny", "mlp", "silu"),
        ("gru", "attention", "full"),
    ],
)  # fmt: skip
def test_settings_that_a_model_file_could_not_hold_are_refused(name: str, setting: str, value: str) -> None:
    with pytest.raises(UserError, match=f"network.{setting} {value}: .*family"):
        model_row(name).changed(NetworkConfig.model_validate({setting: value}))


@pytest.mark.parametrize("mlp", ["relu", "gelu", "silu"])
def test_every_kind_of_network_that_a_translator_takes_can_be_asked_for(mlp: str) -> None:
    row = model_row("transformer_tiny").changed(NetworkConfig.model_validate({"mlp": mlp}))
    assert isinstance(row, TransformerRow) and row.mlp == mlp
