"""Every fault of parallel text is found, counted once and said with its place; sound text raises no alarm."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

import saccade
from saccade.cli import main
from saccade.data.inspect import inspect_data
from saccade.data.text.inspect import TextReport
from saccade.data.text.splits import open_text_splits
from saccade.errors import UserError

NOUNS = ("dog", "man", "woman", "child", "bird", "horse", "player", "worker", "girl", "boy")
PLACES = ("in the snow", "at the beach near the water", "on a street", "by an old house with a red door", "inside")


def sentences(count: int, word: str) -> list[str]:
    return [f"A {NOUNS[i % 10]} {word} {PLACES[i // 10 % 5]} {i}." for i in range(count)]


def german(lines: list[str]) -> list[str]:
    return [line.replace("A ", "Ein ").replace("the", "dem").replace(" a ", " einem ") for line in lines]


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def make(folder: Path, suffix: str = "") -> Path:
    for name, count in (("train", 60), ("val", 12), ("test", 10)):
        write(folder / f"{name}.en{suffix}", sentences(count, f"of {name} runs"))
        write(folder / f"{name}.de{suffix}", german(sentences(count, f"of {name} runs")))
    return folder


def change(path: Path, line: int, text: str) -> None:
    """Lines are counted from 1."""
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    write(path, lines)


def report_on(path: Path, val: Path | None = None) -> TextReport:
    found = inspect_data(path, val)
    assert isinstance(found, TextReport)
    return found


def rendered(report: TextReport) -> str:
    file = io.StringIO()
    report.render(Console(file=file, width=100))
    return file.getvalue()


def as_table(folder: Path, kind: str) -> Path:
    sides = [(folder / f"train.{side}").read_text().splitlines() for side in ("en", "de")]
    pairs = list(zip(*sides, strict=True))
    if kind == "tsv":
        return write(folder / "table" / "train.tsv", ["en\tde", *("\t".join(pair) for pair in pairs)])
    return write(folder / "table" / "train.jsonl", [json.dumps({"en": en, "de": de}) for en, de in pairs])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_sound_text_raises_no_alarm(suffix: str, tmp_path: Path) -> None:
    report = report_on(make(tmp_path, suffix))
    assert report.ok and report.hints == [] and report.problems == []
    assert repr(report) == f"<Report on {tmp_path}: parallel text, 82 pairs, 0 problems>"
    found = report.to_dict()
    json.dumps(found)
    assert [(split["name"], split["pairs"]) for split in found["splits"]] == [("train", 60), ("val", 12), ("test", 10)]
    shown = rendered(report)
    assert "parallel text (en-de)" in shown and "nothing is wrong" in shown and "\x1b" not in shown


def test_lengths(tmp_path: Path) -> None:
    write(tmp_path / "train.en", ["a" * 10, "a " * 5, "a " * 10, "b"])
    write(tmp_path / "train.de", ["a" * 20, "a " * 10, "a " * 20, "bb"])
    (split,) = report_on(tmp_path).splits
    assert split.lengths["en"].characters == (1, 1, 9, 10, 19) and split.lengths["de"].words == (1, 1, 1, 10, 20)
    assert split.ratio == pytest.approx(2.0, rel=0.06)


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_tables(kind: str, tmp_path: Path) -> None:
    table = as_table(make(tmp_path), kind)
    for path in (table, table.parent):
        (split,) = report_on(path).splits
        assert (split.pairs, split.languages) == (60, ("en", "de"))
    # a table without words for its columns, of three: refused, not guessed
    table = write(tmp_path / "bad" / "train.tsv", ["7\tOne.\tEins.", "8\tTwo.\tZwei."])
    assert [p.kind for p in report_on(table).problems] == ["columns", "columns"]


def test_every_planted_fault_is_found_once(tmp_path: Path) -> None:
    folder = make(tmp_path)
    change(folder / "train.de", 7, "  ")
    change(folder / "val.en", 3, "")
    for line in (9, 10):
        change(folder / f"train.{'en' if line == 9 else 'de'}", line, "")
    change(folder / "train.de", 9, "")
    change(folder / "train.en", 10, "")
    change(folder / "train.de", 20, "@@")
    change(folder / "train.de", 21, (folder / "train.en").read_text().splitlines()[20])
    for side in ("en", "de"):
        lines = (folder / f"train.{side}").read_text().splitlines()
        change(folder / f"train.{side}", 31, f"{lines[29]} ")  # the same again, but for a space
        change(folder / f"test.{side}", 4, lines[39])  # learnt from, too
    change(folder / "test.en", 5, (folder / "train.en").read_text().splitlines()[40])  # with another translation
    report = report_on(folder)
    assert Counter(problem.kind for problem in report.problems) == {"empty_side": 2, "leak": 1}
    where = {Path(problem.where).name: problem.what for problem in report.problems}
    assert where.keys() == {"train.de:7", "val.en:3", "train.en:40"}
    assert "no text in de beside 'A player" in where["train.de:7"] and "translate it" in where["train.de:7"]
    assert "in train and test: the same pair as" in where["train.en:40"] and "test.en:4" in where["train.en:40"]
    train = report.splits[0]
    assert train.pairs == 60 - 3
    assert [Path(place).name for place in (*train.outliers, *train.copies)] == ["train.en:20", "train.en:21"]
    assert [[Path(place).name for place in group] for group in train.repeated] == [["train.en:30", "train.en:31"]]
    hints = "\n".join(report.hints)
    assert "beside '@@'" in hints and "same text on both sides" in hints and "train: 1 pair occurs again" in hints
    assert "1 text is in train and test with different translations" in hints and "test.en:5" in hints
    assert any("2 empty lines on both sides are left out" in note for note in report.notes)
    shown = rendered(report)
    assert all(str(problem) in shown for problem in report.problems) and "3 problems" in shown
    # none of it keeps a run from starting
    assert len(open_text_splits(folder).train) == 57


def test_a_split_that_is_a_copy_is_one_fault(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for side in ("en", "de"):
        write(folder / f"val.{side}", (folder / f"train.{side}").read_text().splitlines()[:12])
    report = report_on(folder)
    assert len(report.problems) == 12 and report.to_dict()["faults"] == 1
    assert "leak: 1" in rendered(report) and "the same 11 times more" in rendered(report)


def test_val_from_elsewhere(tmp_path: Path) -> None:
    train, other = make(tmp_path / "a"), make(tmp_path / "b")
    report = report_on(train, other)
    assert [split.name for split in report.splits] == ["train", "val"] and report.ok
    report = report_on(train, write(other / "only" / "all.tsv", ["en\tde", *_pairs(train)[:3]]))
    assert [problem.kind for problem in report.problems] == ["leak"] * 3


def _pairs(folder: Path) -> list[str]:
    sides = [(folder / f"train.{side}").read_text().splitlines() for side in ("en", "de")]
    return ["\t".join(pair) for pair in zip(*sides, strict=True)]


def test_what_cannot_be_read_is_reported(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "train.de").write_bytes("Grün\n".encode("latin1"))
    write(folder / "val.de", (folder / "val.de").read_text().splitlines()[1:])
    (folder / "test.de").unlink()
    report = report_on(folder)
    assert {problem.kind for problem in report.problems} == {"encoding", "different_lengths", "one_sided"}
    assert report.splits == [] and "3 problems" in rendered(report)
    parts = next(problem for problem in report.problems if problem.kind == "different_lengths")
    assert "val.de has 1 line fewer than val.en (12 and 11)" in parts.what


def test_several_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path)
    for name in ("train", "val", "test"):
        write(folder / f"{name}.fr", (folder / f"{name}.de").read_text().splitlines())
    assert main(["inspect", str(folder)]) == 2
    assert "text in de, en, fr; say which by --text.source and --text.target" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--text.source=fr", "--text.target", "en"]) == 0
    assert "parallel text (fr-en)" in capsys.readouterr().out


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path)
    assert main(["inspect", str(folder)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    change(folder / "train.de", 7, "")
    assert main(["inspect", str(folder), "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] is False and values["task"] == "translate" and values["problems"][0]["kind"] == "empty_side"
    assert repr(saccade.inspect(str(folder), source="de")).endswith("parallel text, 81 pairs, 1 problem>")


@pytest.mark.parametrize("name", ["", "pairs.csv"], ids=["folder", "file"])
def test_a_csv_of_texts(name: str, tmp_path: Path) -> None:
    write(tmp_path / "pairs.csv", ["en,de", '"A dog, and","Ein Hund"'])
    (problem,) = inspect_data(tmp_path / name).problems
    assert "pairs.csv" in str(problem) and "texts and their translations go into .tsv" in problem.what
    write(tmp_path / "pairs.csv", ["name,kind", "a,b"])
    assert "go into .tsv" not in str(inspect_data(tmp_path / name).problems[0])


def test_an_empty_folder_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_text("")
    (tmp_path / "train.de").write_text("")
    report = report_on(tmp_path)
    assert [problem.kind for problem in report.problems] == ["empty"] and report.splits == []
    with pytest.raises(UserError, match="does not exist"):
        inspect_data(tmp_path / "nowhere")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="--text.target de: is for texts"):
        inspect_data(tmp_path / "pictures", languages=(None, "de"))


def test_real_data() -> None:
    folder = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "multi30k"
    if not folder.exists():
        pytest.skip("../shared/data/multi30k is absent")
    report = report_on(folder)
    assert report.ok and [split.pairs for split in report.splits] == [28129, 986, 1000]
    assert [Path(place).name for place in report.splits[0].outliers] == ["train.en.gz:15745", "train.en.gz:15898"]


def test_what_no_model_could_learn_from(tmp_path: Path) -> None:
    folder = make(tmp_path)
    change(folder / "train.en", 5, "word " * 10_000)
    change(folder / "train.de", 5, "Wort " * 10_000)
    change(folder / "train.de", 9, "Ein \0 Hund")
    write(folder / "val.de", (folder / "val.en").read_text().splitlines())
    report = report_on(folder)
    assert [(problem.kind, Path(problem.where).name) for problem in report.problems] == [
        ("nul_byte", "train.de:9"), ("untranslated", folder.name),
    ]  # fmt: skip
    assert "12 of 12 pairs have the same text on both sides" in report.problems[1].what
    (hint,) = (hint for hint in report.hints if "words on a side" in hint)
    assert "1 pair has more than 128" in hint and "train.en:5" in hint
    splits = open_text_splits(folder)
    assert len(splits.train) == 60, "they keep nobody from training"
    assert any("1 line holds a NUL byte" in note and "train.de:9" in note for note in splits.notes)
