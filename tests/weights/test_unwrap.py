"""The state of the network out of its wrappers: chosen by rule, and all that is left aside is said."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from saccade import UserError
from saccade.weights import unwrap as unwrap_module
from saccade.weights.unwrap import unwrap


def state(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 4, generator=generator) for name in names or ("embed.weight", "blocks.0.weight")}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


INNER = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.bias")


def prefixed(prefix: str, *names: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state(*(names or INNER)).items()}


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "teacher", "model_ema", "student"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "_orig_mod.", "module._orig_mod.", "module.backbone."])
def test_wrappers_of_every_kind(key: str, prefix: str) -> None:
    assert equal(unwrap({key: prefixed(prefix)}, "w")[0], state(*INNER))
    assert equal(unwrap({"state": 1, "model": {key: prefixed(prefix)}}, "w")[0], state(*INNER))


def test_compiled_blocks() -> None:
    names = [name.replace("blocks.0.", "blocks.0._orig_mod.") for name in INNER]
    assert unwrap(dict(zip(names, state(*INNER).values(), strict=True)), "w")[0].keys() == set(INNER)


def test_dino_checkpoint_gives_the_teacher() -> None:
    head = ("head.mlp.0.weight", "head.mlp.0.bias", "head.last_layer.weight_g", "head.last_layer.weight_v")
    checkpoint = {
        "student": prefixed("module.backbone.") | prefixed("module.", *head),
        "teacher": {**{k: v + 1 for k, v in prefixed("backbone.").items()}, **state(*head)},
        "optimizer": {"state": {}},
        "epoch": 100,
    }
    tensors, notes = unwrap(checkpoint, "w")
    assert equal(tensors, {name: tensor + 1 for name, tensor in state(*INNER).items()})
    assert notes == [
        "of the checkpoint, 'teacher' is taken; left aside: student, optimizer, epoch (--branch takes another)",
        "left aside, being of use only in training: head.mlp, head.last_layer",
    ]
    tensors, notes = unwrap(checkpoint, "w", branch="student")
    assert equal(tensors, state(*INNER)) and "'student' is taken" in notes[0]


def test_dinov2_heads() -> None:
    values = prefixed("backbone.") | state("dino_head.mlp.0.weight", "ibot_head.last_layer.weight_v")
    tensors, notes = unwrap({"teacher": values}, "w")
    assert tensors.keys() == set(INNER) and "dino_head.mlp, ibot_head.last_layer" in notes[-1]


def test_averaged_weights_come_first() -> None:
    checkpoint = {"model": prefixed(""), "model_ema": {k: 2 * v for k, v in prefixed("").items()}}
    assert equal(unwrap(checkpoint, "w")[0], checkpoint["model_ema"])
    assert equal(unwrap(checkpoint, "w", branch="model")[0], checkpoint["model"])


def test_unknown_branch() -> None:
    with pytest.raises(UserError, match=r"no part 'studnt'.*did you mean student; its parts are student"):
        unwrap({"student": state()}, "w", branch="studnt")
    with pytest.raises(UserError, match="it has no parts"):
        unwrap(state(), "w", branch="teacher")


@pytest.mark.parametrize("head", ["head", "fc", "classifier", "linear"])
def test_linear_probe(head: str) -> None:
    values = prefixed("encoder.") | state(f"{head}.weight", f"{head}.bias")
    assert unwrap(values, "w")[0].keys() == {*INNER, "head.weight", "head.bias"}


@pytest.mark.parametrize(
    "others",
    [
        ("decode_head.conv.weight",),
        ("head.mlp.0.weight", "neck.weight"),
        ("embeddings.cls_token", "layernorm.weight"),
        ("fc.weight", "classifier.weight"),
    ],
)
def test_ambiguous_prefixes_stay(others: tuple[str, ...]) -> None:
    for prefix in ("backbone.", "encoder."):
        values = prefixed(prefix) | state(*others)
        assert equal(unwrap(values, "w")[0], values)


def test_known_names_keep_their_prefix() -> None:
    values = prefixed("backbone.")
    assert equal(unwrap(values, "w", known=lambda shapes: "backbone.norm.bias" in shapes)[0], values)
    assert "norm.bias" in unwrap(values, "w", known=lambda shapes: "norm.bias" in shapes)[0]


def test_left_aside_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, notes = unwrap(OrderedDict(state(), version=3, names=["a"]), "w")
    assert equal(tensors, state()) and notes == ["left aside, being no weights: version, names"]
    monkeypatch.setattr(unwrap_module, "MOST", 10)
    with pytest.raises(UserError, match="11 tensors are more than any model here has"):
        unwrap(state(*map(str, range(11))), "w")
