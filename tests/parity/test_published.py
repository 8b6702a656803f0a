"""What our table says of timm's weights is what timm says, and they fit the models that they stand beside."""

from __future__ import annotations

import pytest
import torch

from saccade.backbones import BACKBONES
from saccade.weights.published import PUBLISHED
from saccade.weights.recognition import recognise

timm = pytest.importorskip("timm")

OF_TIMM = [(model, each) for model, several in PUBLISHED.items() for each in several if each.dialect == "timm"]


@pytest.mark.parametrize(("model", "published"), OF_TIMM, ids=lambda value: getattr(value, "name", value))
def test_licence_and_form(model: str, published: object) -> None:
    name = published.name.removeprefix("timm/")  # type: ignore[attr-defined]
    given = timm.get_pretrained_cfg(name)
    assert given is not None and given.hf_hub_id == f"timm/{name}" and not given.hf_hub_filename
    assert given.license == published.licence  # type: ignore[attr-defined]
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    config = {
        "architecture": name.split(".")[0],
        "num_classes": given.num_classes,
        "pretrained_cfg": given.to_dict(),
    }
    row = recognise(name, shapes, config).row(shapes, config)
    assert row.is_like(BACKBONES[model]), f"{row}\n{BACKBONES[model]}"
    rows = recognise(name, shapes, config).rules(row, given.num_classes)
    assert {each for rule in rows for each in rule.theirs} <= set(shapes)
