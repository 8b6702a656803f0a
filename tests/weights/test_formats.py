"""What a dialect has no words for is refused by one error of its own; all else is written whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from saccade.backbones import build_backbone
from saccade.backbones.base import Row
from saccade.config import PreprocessingConfig
from saccade.errors import UserError
from saccade.models import BACKBONES, DETECTORS, TRANSLATORS, build_network
from saccade.models.detector import DetectorRow
from saccade.models.transformer import TransformerRow
from saccade.models.translator import TranslatorRow
from saccade.tokenizer import learn_tokenizer
from saccade.verification.subject import open_subject
from saccade.weights.export import convert
from saccade.weights.formats import FORMATS
from saccade.weights.formats.table import Format, NoWords
from saccade.weights.model_file import ModelCard, save_model

# one of each form; the others of the tables differ in figures
FORMS = (
    "vit_tiny", "vit_micro", "cct_nano", "clip_base_32", "deit_tiny", "deit3_small", "dinov2_small_registers",
    "dinov3_small", "siglip_base", "swin_tiny", "swinv2_tiny", "resnet50", "efficientvit_b0", "efficientformer_l1",
    "levit_128s", "detr_resnet50", "deformable_detr_resnet50_two_stage", "lw_detr_tiny", "rf_detr_nano",
    "transformer_tiny",
)  # fmt: skip
QUICK = ("vit_micro", "siglip_base", "resnet50", "transformer_tiny")


USUAL = PreprocessingConfig()


def row_of(name: str) -> Row:
    row = {**BACKBONES, **DETECTORS, **TRANSLATORS}[name]
    return replace(row, vocabulary=50) if isinstance(row, TranslatorRow) else row


def choices(kind: Any) -> list[Any]:
    """The values of a field that can be counted."""
    if kind is bool:
        return [False, True]
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return [value for inner in get_args(kind) for value in choices(inner)]
    return [None] if kind is type(None) else []


def variants(row: Row) -> Iterator[Row]:
    """The row, and the row with each other value of each field."""
    yield row
    hints = get_type_hints(type(row))
    for field in fields(row):
        value = getattr(row, field.name)
        others = variants(value) if isinstance(value, Row) else choices(hints[field.name])
        yield from (replace(row, **{field.name: other}) for other in others if other != value)


def expressed(form: Format, row: Row, classes: int) -> set[str] | None:
    """The names of ours that the dialect writes; none where it has no words."""
    try:
        form.write_config(row, classes)
        return {rule.ours for rule in form.rules(row, classes)}
    except NoWords:
        return None


def names(row: Row, classes: int) -> set[str] | None:
    """The tensors of the network; none where there can be no such network."""
    try:
        with torch.device("meta"):
            return {*build_network(row, classes).state_dict()}
    except (ValueError, RuntimeError, ZeroDivisionError):
        return None


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in FORMS]
)
def test_a_dialect_writes_all_of_a_model_or_refuses(name: str) -> None:
    row = row_of(name)
    forms = [form for form in FORMATS if form.family == row.family]
    assert forms
    for each in variants(row):
        classes = 0 if isinstance(row, TranslatorRow) else 7
        whole = names(each, classes)
        if whole is not None:
            for form in forms:
                written = expressed(form, each, classes)
                assert written in (None, whole), f"{form.name}: {each}"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_row_of_the_tables_is_written_or_refused(form: Format) -> None:
    for row in (*BACKBONES.values(), *DETECTORS.values(), *TRANSLATORS.values()):
        if row.family == form.family:
            expressed(form, row, 7)
            if not isinstance(row, DetectorRow):
                expressed(form, row, 0)


def test_the_command_says_what_has_no_words(tmp_path: Path) -> None:
    row = BACKBONES["cct_nano"]
    weights = {f"backbone.{name}": tensor for name, tensor in build_backbone(row).state_dict().items()}
    card = ModelCard(task="embed", model="cct_nano", architecture=row.to_dict(), class_names=(), preprocessing=USUAL)
    save_model(tmp_path / "cct.safetensors", weights, card)
    for to in ("timm", "hf"):
        with pytest.raises(UserError, match=r"cct.safetensors: cannot be written as \w+ vit: .*pools by sequence"):
            convert(tmp_path / "cct.safetensors", tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


def test_a_learnt_tokenizer_has_no_words(tmp_path: Path) -> None:
    tokenizer = learn_tokenizer(["a few words", "und ihre Wörter"], 64)
    row = replace(TRANSLATORS["marian_base"], width=16, vocabulary=tokenizer.size, pad=0, begin=1, end=2)
    assert isinstance(row, TransformerRow)
    row = replace(row, heads=2, hidden=16, encoder_depth=1, decoder_depth=1)
    card = ModelCard("translate", "m", row.to_dict(), (), preprocessing=USUAL, tokenizer=tokenizer.to_text())
    save_model(tmp_path / "m.safetensors", build_network(row, 0).state_dict(), card)
    with pytest.raises(UserError, match="m.safetensors: .*has learnt its own"):
        convert(tmp_path / "m.safetensors", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_other_faults_of_a_table_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that stumbles is our fault, and must not look like a dialect that lacks words."""
    row = BACKBONES["vit_micro"]
    network = build_network(row, 3)
    names = ("a", "b", "c")
    card = ModelCard("classify", "vit_micro", architecture=row.to_dict(), class_names=names, preprocessing=USUAL)
    save_model(tmp_path / "m.safetensors", network.state_dict(), card)

    def stumbling(row: Row, classes: int) -> dict[str, Any]:
        return {"width": {}[row]}

    broken = tuple(replace(form, write_config=stumbling) for form in FORMATS)
    monkeypatch.setattr("saccade.weights.export.FORMATS", broken)
    monkeypatch.setattr("saccade.verification.subject.FORMATS", broken)
    with pytest.raises(KeyError):
        convert(tmp_path / "m.safetensors", tmp_path / "out", to="timm")
    with pytest.raises(KeyError):
        open_subject(str(tmp_path / "m.safetensors"))
