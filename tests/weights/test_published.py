"""The table of published weights: complete, well-formed, and of models that exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saccade.models import BACKBONES, DETECTORS, TRANSLATORS, build_network, model_row
from saccade.models.detector import DetectorRow
from saccade.models.translator import TranslatorRow
from saccade.weights.formats import FORMATS
from saccade.weights.formats.table import write_state
from saccade.weights.hub import hub_name
from saccade.weights.published import PUBLISHED
from saccade.weights.recognition import recognise

ENTRIES = [(model, each) for model, several in PUBLISHED.items() for each in several]


def test_every_model_exists() -> None:
    assert set(PUBLISHED) <= {*BACKBONES, *DETECTORS, *TRANSLATORS}
    assert all(PUBLISHED.values())


def test_every_family_but_our_own_has_weights() -> None:
    assert {BACKBONES[model].family for model in PUBLISHED if model in BACKBONES} == {
        row.family for row in BACKBONES.values()
    }


def test_every_entry_is_whole() -> None:
    for model, each in ENTRIES:
        assert hub_name(each.name) == (each.name, None), each
        assert each.licence.strip() and each.training_data.strip(), each
        assert each.name.startswith("timm/") == (each.dialect == "timm"), each
        families = {form.family for form in FORMATS if form.dialect == each.dialect}
        assert model_row(model).family in families, f"{each} is in a dialect that {model} does not have"
    assert len({each.name for _, each in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("model", [model for model, each in ENTRIES if each.dialect == "huggingface"])
def test_form_in_the_dialect_of_hugging_face(model: str) -> None:
    """Written in that dialect, our model is read back as the same model. (For timm's, the parity tests ask timm.)"""
    row = model_row(model)
    if isinstance(row, TranslatorRow):
        row = replace(row, vocabulary=50)
    classes = 91 if isinstance(row, DetectorRow) else 0
    form = next(form for form in FORMATS if (form.dialect, form.family) == ("huggingface", row.family))
    with torch.device("meta"):
        ours = build_network(row, classes).state_dict()
        theirs = write_state(ours, form.rules(row, classes))
    shapes, config = {name: tuple(tensor.shape) for name, tensor in theirs.items()}, form.write_config(row, classes)
    found = recognise(model, shapes, config)
    assert (found.dialect, found.family) == ("huggingface", row.family)
    assert found.row(shapes, config).is_like(row) and found.classes(shapes, config) == classes


@pytest.mark.parametrize(
    ("part", "licence"),
    [
        ("dinov3", "dinov3-license"),
        ("timm/swin", "mit"),
        ("augreg", "apache-2.0"),
        ("facebook/dinov2", "apache-2.0"),
        (".mae", "cc-by-nc-4.0"),
        (".tv_in1k", "bsd-3-clause"),
        ("opus-mt-en-de", "cc-by-4.0"),
        ("opus-mt-en-fr", "apache-2.0"),
        ("opus-mt-tc-big", "cc-by-4.0"),
        ("openai/clip", "mit (of the code; the page of the weights states none)"),
    ],
)
def test_licences(part: str, licence: str) -> None:
    found = {each.licence for _, each in ENTRIES if part in each.name}
    assert found == {licence}
