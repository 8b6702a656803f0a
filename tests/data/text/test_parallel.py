"""Parallel text in every form it comes in, whole and broken: what is wrong is said with its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from saccade.data.text.lines import parting
from saccade.data.text.splits import find_pairs, holds_text, open_pairs, open_text_splits, read_texts
from saccade.errors import UserError

WORDS = ["the", "dog", "runs", "over", "a", "green", "field", "and", "two", "men", "look", "at", "him", "from", "their"]


def text(count: int, seed: int = 0) -> list[str]:
    """Sentences of very different lengths, as real ones are."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 24))) for _ in range(count)]


def translated(lines: list[str]) -> list[str]:
    return [" ".join(f"{word}en" for word in line.split()) for line in lines]


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parallel(folder: Path, suffix: str = "") -> Path:
    for name, count in (("train", 50), ("val", 10), ("test_2016_flickr", 7)):
        lines = text(count, count)
        write(folder / f"{name}.en{suffix}", lines)
        write(folder / f"{name}.de{suffix}", translated(lines))
    return folder


def tsv(folder: Path) -> Path:
    for name, count in (("train", 50), ("dev", 10), ("test_2016_flickr", 7)):
        lines = text(count, count)
        rows = [f"{one}\t{other}" for one, other in zip(lines, translated(lines), strict=True)]
        write(folder / f"{name}.tsv", ["en\tde", *rows] if name != "dev" else ["source\ttarget", *rows])
    (folder / "dev.tsv").write_text((folder / "dev.tsv").read_text().replace("source\ttarget", "en\tde"))
    return folder


def jsonl(folder: Path) -> Path:
    for name, count in (("train", 50), ("valid", 10), ("test_2016_flickr", 7)):
        lines = text(count, count)
        pairs = zip(lines, translated(lines), strict=True)
        write(folder / f"{name}.jsonl", [json.dumps({"translation": {"en": a, "de": b}}) for a, b in pairs])
    return folder


@pytest.mark.parametrize("make", [parallel, lambda folder: parallel(folder, ".gz"), tsv, jsonl])
def test_formats_say_the_same(make, tmp_path: Path) -> None:
    folder = make(tmp_path / "text")
    assert holds_text(folder)
    splits = open_text_splits(folder)
    assert (len(splits.train), len(splits.val)) == (50, 10)
    assert splits.train.languages == ("en", "de")
    assert splits.train.sources[3] == text(50, 50)[3]
    assert splits.train.targets[3] == translated(text(50, 50))[3]
    assert len(open_pairs(folder, "test")) == len(open_pairs(folder, "test_2016_flickr")) == 7
    assert len(open_pairs(folder, None)) == 10
    with pytest.raises(UserError, match="no split 'train2'; did you mean train"):
        open_pairs(folder, "train2")


def test_direction(tmp_path: Path) -> None:
    folder = parallel(tmp_path / "corpus.de-en")
    assert open_text_splits(folder).train.languages == ("de", "en")
    assert open_text_splits(folder, source="en").train.languages == ("en", "de")
    write(folder / "train.fr", text(50))
    with pytest.raises(UserError, match="de, en, fr.*say which"):
        open_text_splits(folder)
    assert open_text_splits(folder, source="en", target="de").train.languages == ("en", "de")
    with pytest.raises(UserError, match="no text in 'it'"):
        open_text_splits(folder, source="it")


@pytest.mark.parametrize(("folder", "file"), [("talks.de-en", "train"), ("talks", "talks.de-en"), ("de-en", "all")])
def test_direction_of_tables(folder: str, file: str, tmp_path: Path) -> None:
    lines = text(20)
    rows = [f"{one}\t{other}" for one, other in zip(lines, translated(lines), strict=True)]
    table = write(tmp_path / folder / f"{file}.tsv", ["en\tde", *rows])
    for path in (table, table.parent):
        assert open_text_splits(path).train.languages == ("de", "en")
        assert open_text_splits(path, source="en").train.languages == ("en", "de")


def test_a_stray_column_is_the_fault_of_its_row(tmp_path: Path) -> None:
    lines = [json.dumps({"en": one, "de": other}) for one, other in zip(text(20), translated(text(20)), strict=True)]
    file = write(tmp_path / "train.jsonl", [*lines[:8], '{"en": "x", "fr": "y"}', *lines[8:]])
    with pytest.raises(UserError, match=r"train.jsonl:9: has no text in 'de'"):
        open_text_splits(file)
    with pytest.raises(UserError, match=r"train.jsonl:1: has no text in 'fr'"):
        open_text_splits(file, source="en", target="fr")


def test_columns_that_name_no_languages_are_noted(tmp_path: Path) -> None:
    rows = [f"{one}\t{other}" for one, other in zip(text(20), translated(text(20)), strict=True)]
    splits = open_text_splits(write(tmp_path / "all.tsv", rows))
    assert splits.train.languages == ("source", "target")
    assert any("name no languages, and the first is translated into the second" in note for note in splits.notes)


@pytest.mark.parametrize(("header", "why"), [("en\tde", "from English"), ("de\ten", "from English"),
                                             ("fr\tde", "the first of both")])  # fmt: skip
def test_the_reason_for_a_direction_is_said(header: str, why: str, tmp_path: Path) -> None:
    rows = [f"{one}\t{other}" for one, other in zip(text(20), translated(text(20)), strict=True)]
    splits = open_text_splits(write(tmp_path / "talks" / "all.tsv", [header, *rows]))
    assert splits.train.languages == (("en", "de") if "en" in header else ("fr", "de"))
    assert any(f"({why};" in note for note in splits.notes)


def test_held_out_part_is_seeded_and_apart(tmp_path: Path) -> None:
    lines = [f"{i} {line}" for i, line in enumerate(text(40))]
    file = write(tmp_path / "pairs.tsv", [f"{one}\t{one} too" for one in lines])
    splits = open_text_splits(file, val_fraction=0.25, seed=3)
    assert len(splits.val) == 10 and not {*splits.train.sources} & {*splits.val.sources}
    assert splits.val.sources == open_text_splits(file, val_fraction=0.25, seed=3).val.sources
    assert splits.val.sources != open_text_splits(file, val_fraction=0.25, seed=4).val.sources
    assert splits.train.id(0).startswith(f"{file}:")


@pytest.mark.parametrize("missing", [5, 60, 195])
def test_different_numbers_of_lines(missing: int, tmp_path: Path) -> None:
    """The place is found by the lengths alone, within a few lines."""
    lines = text(200)
    other = translated(lines)
    gone = other[:missing] + other[missing + 1 :]
    assert abs(parting(lines, gone) - missing) <= 3
    write(tmp_path / "train.en", lines)
    write(tmp_path / "train.de", gone)
    with pytest.raises(UserError, match=r"train\.de has 1 line fewer than train\.en \(200 and 199\)"):
        open_text_splits(tmp_path)


def test_cut_file_is_said_to_be_cut(tmp_path: Path) -> None:
    lines = text(200)
    write(tmp_path / "train.en", lines)
    write(tmp_path / "train.de", translated(lines)[:150])
    with pytest.raises(UserError, match="agree to the end of the shorter one"):
        open_text_splits(tmp_path)


def test_all_faults_at_once(tmp_path: Path) -> None:
    folder = parallel(tmp_path / "text")
    (folder / "train.de").write_bytes(b"eins\nzwei\n" + "schön\n".encode("latin1"))
    (folder / "val.de").unlink()
    (folder / "test_2016_flickr.de").write_text("\n" * 7)
    found = find_pairs(folder)
    assert {(problem.kind, Path(problem.where).name) for problem in found.problems} == {
        ("encoding", "train.de:3"),
        ("one_sided", "val.en"),
        ("empty", "test_2016_flickr.en"),
    }
    with pytest.raises(UserError, match="(?s)things are wrong.*train.de:3: not UTF-8.*val.en: its de side is missing"):
        open_text_splits(folder)


def test_one_sided(tmp_path: Path) -> None:
    write(tmp_path / "train.en", text(20))
    with pytest.raises(UserError, match=r"train\.en: only one side \(en\)"):
        open_text_splits(tmp_path)


def test_empty_lines_are_left_out_and_said(tmp_path: Path) -> None:
    lines = text(20)
    other = translated(lines)
    other[4] = "  "
    lines[7] = other[7] = ""
    write(tmp_path / "train.en", lines)
    write(tmp_path / "train.de", other)
    splits = open_text_splits(tmp_path)
    assert len(splits.train) + len(splits.val) == 18
    assert any("1 pair with an empty side is left out" in note and "train.de:5" in note for note in splits.notes)
    assert any("1 empty line on both sides is left out" in note for note in splits.notes)


def test_separators_inside_lines_split_nothing(tmp_path: Path) -> None:
    write(tmp_path / "train.en", ["one\u2028two\x85three", "next"] * 3)
    write(tmp_path / "train.de", ["eins", "weiter\r"] * 3)
    splits = open_text_splits(tmp_path)
    assert "one\u2028two\x85three" in splits.train.sources + splits.val.sources
    assert "weiter" in splits.train.targets + splits.val.targets


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("train.tsv", ["a\tb", "only one"], r"train\.tsv:2: 1 column where 2"),
        ("train.jsonl", ['{"en": "a", "de": "b"}', "{"], r"train\.jsonl:2: not valid JSON"),
        ("train.jsonl", ['{"en": "a", "de": "b"}', '{"en": "a"}'], r"train\.jsonl:2: has no text in 'de'"),
        ("train.jsonl", ['{"en": "a", "de": "b"}', "[1]"], r"train\.jsonl:2: not a table"),
        ("train.jsonl", ['{"en": "a"}', '{"en": "a", "de": "b"}'], r"train\.jsonl:1: has no text in 'de'"),
        ("train.tsv", ["en\tde", "a\tb\tc"], r"train\.tsv:2: 3 columns where 2 are expected$"),
        ("train.tsv", ["7\tA dog.\tEin Hund.", "9\ta\tb"], r"train\.tsv:2: 3 columns where 2 .*say which is which"),
        ("train.tsv", ["A dog.\tEin Hund.", "a\tb\tc"], r"train\.tsv:2: 3 columns where 2 .*say which is which"),
        ("train.tsv", ["en\tde\tfr", "a\tb\tc"], "text in en, de, fr; say which by --text.source"),
    ],
)
def test_faulty_tables(name: str, lines: list[str], message: str, tmp_path: Path) -> None:
    write(tmp_path / name, lines)
    with pytest.raises(UserError, match=message):
        open_text_splits(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("en\tde\tnote", "{en}\t{de}\tsaid"),
        ("number\tde\ten", "7\t{de}\t{en}"),
        ("Source\tTarget", "{en}\t{de}"),
        ("id \t src\ttgt", "7\t{en}\t{de}"),
    ],
)
def test_columns_are_found_by_their_names(header: str, row: str, tmp_path: Path) -> None:
    lines = text(6)
    rows = [row.format(en=en, de=de) for en, de in zip(lines, translated(lines), strict=True)]
    pairs = find_pairs(write(tmp_path / "train.tsv", [header, *rows])).splits["train"]
    assert pairs.sources == tuple(lines) and pairs.targets == tuple(translated(lines))


def test_other_encodings(tmp_path: Path) -> None:
    for name, encoding in (("train.en", "utf-16"), ("train.de", "latin1")):
        (tmp_path / name).write_bytes("grün\n".encode(encoding))
    found = {Path(problem.where).name: problem.what for problem in find_pairs(tmp_path).problems}
    assert "iconv -f utf-16" in found["train.en:1"] and "iconv -f latin1" in found["train.de:1"]


def test_damaged_gzip(tmp_path: Path) -> None:
    folder = parallel(tmp_path, ".gz")
    whole = (folder / "train.de.gz").read_bytes()
    (folder / "train.de.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train\.de\.gz: cannot be read"):
        open_text_splits(folder)


def test_pictures_are_no_text(tmp_path: Path) -> None:
    write(tmp_path / "table.jsonl", ['{"path": "a.jpg", "label": "cat"}'])
    assert not holds_text(tmp_path) and not holds_text(tmp_path / "table.jsonl") and not holds_text(tmp_path / "none")
    with pytest.raises(UserError, match="holds no parallel text"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("beside", ["xml", "txt", "png"])
def test_annotations_beside_pictures_are_no_languages(beside: str, tmp_path: Path) -> None:
    for name in "ab":
        for suffix in ("jpg", beside):
            (tmp_path / f"{name}.{suffix}").write_bytes(b"x")
    assert not holds_text(tmp_path)
    parallel(tmp_path)
    assert holds_text(tmp_path) and find_pairs(tmp_path).splits["train"].languages == ("en", "de")


def test_real_data() -> None:
    folder = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "multi30k"
    if not folder.exists():
        pytest.skip("../shared/data/multi30k is absent")
    splits = open_text_splits(folder)
    assert (len(splits.train), len(splits.val), len(open_pairs(folder, "test_2016_flickr"))) == (28129, 986, 1000)
    assert splits.train.languages == ("en", "de")


def test_nothing_is_measured_on_what_is_learnt(tmp_path: Path) -> None:
    """Even where the only split is called val."""
    lines = [f"{i} {line}" for i, line in enumerate(text(40))]
    splits = open_text_splits(write(tmp_path / "val.tsv", [f"{one}\t{one} too" for one in lines]))
    assert len(splits.val) == 8 and not {*splits.train.sources} & {*splits.val.sources}


@pytest.mark.parametrize("names", [("val.en", "dev.en"), ("train.jsonl", "train.tsv")], ids=str)
def test_a_split_that_is_there_twice(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        if name.endswith(".en"):
            write(tmp_path / name, text(8))
            write(tmp_path / name.replace(".en", ".de"), text(8))
        else:
            lines = [f"{one}\t{one}" if name.endswith("tsv") else json.dumps({"en": one, "de": one}) for one in text(8)]
            write(tmp_path / name, lines)
    (problem,) = (each for each in find_pairs(tmp_path).problems if each.kind == "split_twice")
    assert problem.refuses and names[0] in problem.where + problem.what and names[1] in problem.where + problem.what


def test_a_table_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("[" * 100_000 + "\n")
    assert not holds_text(tmp_path)


GOOD = [json.dumps({"en": f"A dog {i}", "de": f"Ein Hund {i}"}) for i in range(20)]
ROWS = [f"A dog {i}\tEin Hund {i}" for i in range(20)]


@pytest.mark.parametrize("beside", [True, False], ids=["val", "alone"])
@pytest.mark.parametrize(
    ("name", "first", "message"),
    [
        ("train.jsonl", b'{"en": "A dog", "de": null}', "train.jsonl:1: has no text in 'de'"),
        ("train.jsonl", b'{"en": "A dog", "de"', "train.jsonl:1: not valid JSON"),
        ("train.jsonl", b'{"en": "sch\xf6n", "de": "a"}', "train.jsonl:1: not UTF-8"),
        ("train.tsv", b"sch\xf6n\tbeautiful", "train.tsv:1: not UTF-8"),
        ("train.tsv", b"no tab", "train.tsv:1: 1 column where 2"),
        ("corpus.tsv", b"no tab", "corpus.tsv:1: 1 column where 2"),
    ],
)
def test_a_table_is_known_whatever_its_first_line(
    name: str, first: bytes, message: str, beside: bool, tmp_path: Path
) -> None:
    """Else it would be passed over in silence, and what it is to be measured on would be learnt from."""
    rows = ROWS if name.endswith("tsv") else GOOD
    (tmp_path / name).write_bytes(first + b"\n" + "".join(f"{row}\n" for row in rows).encode())
    if beside:
        write(tmp_path / f"val{Path(name).suffix}", rows[:5])
    assert holds_text(tmp_path) and holds_text(tmp_path / name)
    with pytest.raises(UserError, match=message):
        open_text_splits(tmp_path)
    with pytest.raises(UserError, match=message):
        open_text_splits(tmp_path / name)


def test_a_table_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ["{"] * 20)
    write(tmp_path / "val.jsonl", GOOD[:5])
    with pytest.raises(UserError, match="train.jsonl:1: not valid JSON"):
        open_text_splits(tmp_path)
    (tmp_path / "train.jsonl").write_bytes("\n".join(GOOD).encode("utf-16"))
    with pytest.raises(UserError, match="train.jsonl:1: not UTF-8.*utf-16"):
        open_text_splits(tmp_path)
    write(tmp_path / "train.jsonl", ['{"path": "a.jpg", "label": "cat"}'])
    with pytest.raises(UserError, match="train.jsonl: is no table of texts.*rename"):
        open_text_splits(tmp_path)


def test_blank_lines_in_front_of_a_header(tmp_path: Path) -> None:
    pairs = find_pairs(write(tmp_path / "train.tsv", ["", " ", "de\ten", *ROWS])).splits["train"]
    assert pairs.languages == ("en", "de") and len(pairs) == 20 and pairs.id(0).endswith(":4")
    write(tmp_path / "val.tsv", ["de\ten", *ROWS[:5]])
    assert len(open_text_splits(tmp_path).train) == 20
    write(tmp_path / "train.jsonl", ["", *GOOD])
    assert holds_text(tmp_path / "train.jsonl") and len(find_pairs(tmp_path / "train.jsonl").splits["train"]) == 20


def test_tables_of_pictures_by_the_names_of_their_columns(tmp_path: Path) -> None:
    assert not holds_text(write(tmp_path / "a.tsv", ["filename\tclass", "a.jpg\tcat"]))
    assert not holds_text(write(tmp_path / "a.jsonl", ['{"image_path": "a.jpg", "class": "cat"}']))


@pytest.mark.parametrize("name", ["test", "dev", "test_2016"])
def test_what_is_to_be_measured_on_is_not_learnt_from(name: str, tmp_path: Path) -> None:
    """Unless the file itself is given."""
    file = write(tmp_path / "table" / f"{name}.tsv", ["en\tde", *ROWS])
    with pytest.raises(UserError, match=r"its only split is (test|val).*rename it to train.*, or give .*\.tsv itself"):
        open_text_splits(tmp_path / "table")
    splits = open_text_splits(file)
    assert (len(splits.train), len(splits.val)) == (16, 4)
    for side in ("en", "de"):
        write(tmp_path / "files" / f"{name}.{side}", text(20))
    with pytest.raises(UserError, match=r"its only split is (test|val).*rename it to train\.\*$"):
        open_text_splits(tmp_path / "files")


def test_tables_beside_parallel_files_are_read(tmp_path: Path) -> None:
    lines = text(20)
    for side in ("en", "de"):
        write(tmp_path / f"train.{side}", lines)
    write(tmp_path / "val.tsv", ROWS[:5])
    write(tmp_path / "translations.tsv", ["source\ttranslation\treference", "a\tb\tc"])
    splits = open_text_splits(tmp_path)
    assert (len(splits.train), len(splits.val)) == (20, 5) and splits.val.languages == ("en", "de")
    assert any("translations.tsv: left out" in note for note in splits.notes)
    assert open_text_splits(tmp_path, source="en").val.languages == ("en", "de")
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match="train.jsonl: is the split 'train', as .*train.en is"):
        open_text_splits(tmp_path)


def test_a_packed_file_beside_the_plain_one(tmp_path: Path) -> None:
    for side in ("en", "de"):
        write(tmp_path / f"train.{side}", text(20))
        write(tmp_path / f"train.{side}.gz", text(20))
    assert len(open_text_splits(tmp_path).train) == 16
    write(tmp_path / "train.de.gz", text(20, 1))
    with pytest.raises(UserError, match=r"train\.de: is another text than train\.de\.gz beside it; rename or remove"):
        open_text_splits(tmp_path)


def test_columns_that_name_no_languages(tmp_path: Path) -> None:
    """A model's languages, or those that are asked for, are theirs; messages name the file as it is called."""
    file = write(tmp_path / "train.tsv", ROWS)
    assert find_pairs(file).splits["train"].languages == ("source", "target")
    found = find_pairs(file, usual=("en", "de"))
    assert found.splits["train"].languages == ("en", "de") and "en is taken for the first" in found.notes[0]
    assert found.splits["train"].sources[0] == "A dog 0"
    assert find_pairs(file, "en", "fr").splits["train"].languages == ("en", "fr")
    with pytest.raises(UserError, match=r"train\.tsv: no text in 'fr'; .*a first line such as en and de"):
        find_pairs(file, "fr")
    write(file, ["id\ten\tde", "1\ta\tb"])
    with pytest.raises(UserError, match=r"train\.tsv: text in id, en, de"):
        find_pairs(file)


@pytest.mark.parametrize(("end", "count"), [("", 2), ("\n", 2), ("\n ", 3), ("\n\n", 3), ("\r\n", 2)])
def test_only_an_empty_rest_is_no_line(end: str, count: int, tmp_path: Path) -> None:
    """What a line's spaces are counted as must not hang on where it stands: the other side has that line."""
    (tmp_path / "text").write_bytes(f"one\ntwo{end}".encode())
    assert len(read_texts(tmp_path / "text")) == count
