"""The model file: whole or refused, and never executed."""

from __future__ import annotations

import json
import os
import pickle
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saccade import UserError
from saccade.backbones import backbone_row
from saccade.config import NetworkConfig, PreprocessingConfig, RunConfig, build_config
from saccade.layers.positions import resize_positions
from saccade.weights import model_file
from saccade.weights.load import described_network, initial_network, load_network
from saccade.weights.model_file import ModelCard, find_model, load_model_file, save_model, write_atomically

CARD = ModelCard(
    task="classify",
    model="vit_micro",
    architecture=backbone_row("vit_micro").changed(NetworkConfig(registers=2), 16).to_dict(),
    class_names=("ant", "bee", "cat"),
    preprocessing=PreprocessingConfig(image_size=16, stride=4, mean=(0.1, 0.2, 0.3)),
    metrics={"top1": 0.75, "loss": 1 / 3},
    training_data="insects, 3 pictures",
    licence="CC0",
    provenance="made by a test",
    library_version="0.1.0",
)


def weights_of(card: ModelCard) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return described_network(card).state_dict()


def write(path: Path, weights: dict[str, Tensor], values: Any = None) -> Path:
    """A safetensors file with this description, right or wrong."""
    metadata = None if values is None else {"saccade": values if isinstance(values, str) else json.dumps(values)}
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return weights_of(CARD)


@pytest.fixture
def path(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    save_model(tmp_path / "model.safetensors", weights, CARD)
    return tmp_path / "model.safetensors"


def refused(path: Path, *parts: str) -> str:
    """The file is refused with a message that names it and has all these parts."""
    with pytest.raises(UserError) as caught:
        load_network(path)
    message = str(caught.value)
    assert str(path) in message
    assert all(part in message for part in parts), message
    return message


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vit_micro", "cct_nano"])
def test_round_trip(model: str, tmp_path: Path) -> None:
    card = replace(CARD, model=model, preprocessing=PreprocessingConfig(image_size=16, stride=2))
    saved = weights_of(card)
    saved["head.bias"][:2] = torch.tensor([torch.finfo(torch.float32).tiny / 8, -0.0])
    path = tmp_path / "model.safetensors"
    save_model(path, saved, card)
    loaded, read = load_model_file(path)
    assert read == card
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    network, _ = load_network(path)
    assert not network.training
    first = path.read_bytes()
    save_model(path, network.state_dict(), read)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_saving_takes_tensors_as_they_are(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Also ones that are slices of others or lie in memory in another order."""
    strided = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    save_model(tmp_path / "model.safetensors", strided, CARD)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_two_writers_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits until the first is done, and what is there is always whole."""
    path, seen = tmp_path / "a.json", []
    sync = os.fsync
    second = threading.Thread(target=write_atomically, args=(path, b"second"))

    def slow(descriptor: int) -> None:
        if not seen:
            seen.append("first")
            second.start()
            second.join(0.3)
            assert second.is_alive() and not path.exists()
        sync(descriptor)

    monkeypatch.setattr(model_file.os, "fsync", slow)
    (tmp_path / ".a.json.tmp").write_bytes(b"left by one that was killed, and longer than what comes")
    write_atomically(path, b"first")
    second.join()
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["a.json"]


def test_new_file_that_has_appeared_meanwhile(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sync = tmp_path / "model.safetensors", os.fsync

    def slow(descriptor: int) -> None:
        path.write_text("precious")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(model_file.os, "fsync", slow)
        with pytest.raises(UserError, match=r"model\.safetensors: exists already, and nothing is written over"):
            save_model(path, weights, CARD, new=True)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["model.safetensors"]
    save_model(path, weights, CARD)
    assert load_model_file(path)[1] == CARD, "a run replaces its own"


def test_description_is_readable_by_others(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["saccade"])
    assert values["format"] == 1
    assert values["class_names"] == ["ant", "bee", "cat"] and values["licence"] == "CC0"
    assert values["preprocessing"]["mean"] == [0.1, 0.2, 0.3] and values["architecture"]["registers"] == 2


def test_run_folder_names_its_model(path: Path) -> None:
    assert find_model(path.parent) == path
    assert load_network(str(path.parent))[1] == CARD


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model.safetensors .no run"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has not reached its first evaluation"):
        find_model(tmp_path)
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    with pytest.raises(UserError, match="the run had one; bring it back, or train anew"):
        find_model(tmp_path)
    with pytest.raises(UserError, match="no such model file or run folder"):
        find_model(tmp_path / "nothing")


# --- files that are no model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_truncated(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "truncated or not a .safetensors file")


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 100, b"just some text\n" * 20, b"\x89PNG\r\n" + b"0" * 40])
def test_other_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused(path, "truncated or not a .safetensors file")


class Payload:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "torch, old", *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_pickle_with_code_is_not_executed(path: Path, tmp_path: Path, form: str | int) -> None:
    created = tmp_path / "created"
    if isinstance(form, int):
        path.write_bytes(pickle.dumps({"head.weight": Payload(created)}, protocol=form))
    else:
        torch.save({"head.weight": Payload(created)}, path, _use_new_zipfile_serialization=form == "torch")
    message = refused(path)
    assert not created.exists()
    if form not in (0, 1):
        assert "a pickle" in message and "not executed" in message
    if isinstance(form, int):
        pickle.loads(path.read_bytes())
    else:
        with open(path, "rb") as file:
            torch.load(file, weights_only=False)
    assert created.exists(), "the payload would have worked"


def test_archive_is_no_model(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.txt", "none")
    refused(path)


def test_sound_file_that_begins_like_a_pickle(path: Path, weights: dict[str, Tensor]) -> None:
    """A header of 0x..0280 bytes begins with a pickle's first two; the length of a description decides."""
    for length in range(0, 70_000, 8):
        save_model(path, weights, replace(CARD, provenance="x" * length))
        start = path.read_bytes()[:2]
        if start in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            break
        # jump near the next such length at once
        missing = (0x0280 - int.from_bytes(start, "little")) % 0x10000
        save_model(path, weights, replace(CARD, provenance="x" * (length + missing)))
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert load_network(path)[1].class_names == CARD.class_names


def test_unreadable(tmp_path: Path) -> None:
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(UserError):
        load_network(loop)


# --- descriptions ----------------------------------------------------------------------------------------------------


def test_without_description(path: Path, weights: dict[str, Tensor]) -> None:
    refused(write(path, weights), "model.safetensors")


def good() -> dict[str, Any]:
    return json.loads(json.dumps({"format": 1, **CARD.to_dict()}))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in good().items() if key != name}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a table"),
        ("[" * 100_000, "not valid JSON"),
        ({**good(), "threshold": 10**400}, "incomplete or wrong"),
        ({**good(), "metrics": {"top1": 10**400}}, "incomplete or wrong"),
        (without("class_names"), "class_names"),
        (without("model"), "model"),
        ({**good(), "class_names": 3}, "incomplete or wrong"),
        ({**good(), "metrics": {"top1": "high"}}, "incomplete or wrong"),
        ({**good(), "metrics": []}, "incomplete or wrong"),
        ({**good(), "preprocessing": {"image_size": 16, "colour": "grey"}}, "colour"),
        ({**good(), "preprocessing": {"image_size": 10**9}}, "image_size"),
        ({**good(), "architecture": {**good()["architecture"], "dim": "os.system"}}, "dim"),
        ({**good(), "architecture": {**good()["architecture"], "code": "os.system"}}, "code"),
        ({**good(), "architecture": [1]}, "incomplete or wrong"),
        (without("architecture"), "architecture"),
        ({**good(), "format": 2}, "newer saccade"),
        ({**good(), "signature": "abc"}, "newer saccade (signature)"),
    ],
)
def test_wrong_description(path: Path, weights: dict[str, Tensor], values: Any, part: str) -> None:
    refused(write(path, weights, values), part)


@pytest.mark.parametrize("name", ["vitt", "os.path", "../vit", "torch.nn.Linear", "", 3, None, ["vit"]])
def test_unknown_architecture(path: Path, weights: dict[str, Tensor], name: Any) -> None:
    architecture = {**good()["architecture"], "family": name}
    written = write(path, weights, {**good(), "architecture": architecture})
    refused(written, f"the family {name!r}", "this saccade knows")


def test_absurd_architecture_takes_no_memory(path: Path, weights: dict[str, Tensor]) -> None:
    described = good()["architecture"]
    refused(write(path, weights, {**good(), "architecture": {**described, "dim": 99_968}}), "faults")
    for name in ("dim", "depth"):  # of blocks on no device there is no end, either
        values = {**good(), "architecture": {**described, name: 10**9}}
        refused(write(path, weights, values), f"claims {name} = 1000000000", "cannot be; damaged")


# --- weights that do not fit -----------------------------------------------------------------------------------------


def test_every_fault_of_the_weights_is_listed(path: Path, weights: dict[str, Tensor]) -> None:
    changed = dict(weights)
    del changed["backbone.blocks.0.norm1.weight"], changed["backbone.norm.bias"]
    changed["head.weight"] = torch.zeros(5, 128)
    changed["backbone.registers"] = torch.zeros(2, 64)
    changed["head.scale"] = torch.zeros(3)
    refused(
        write(path, changed, good()),
        "5 faults",
        "missing: backbone.blocks.0.norm1.weight (128,)",
        "missing: backbone.norm.bias (128,)",
        "shape: head.weight is (5, 128), the model has (3, 128)",
        "shape: backbone.registers is (2, 64), the model has (2, 128)",
        "unused: head.scale (3,)",
    )


def test_weights_of_another_model(path: Path) -> None:
    other = replace(CARD, architecture=backbone_row("cct_nano").to_dict())
    message = refused(write(path, weights_of(other), good()), "faults")
    assert "and " in message and " more" in message, "a long list is cut, and says so"


def test_names_and_head_that_differ(path: Path, weights: dict[str, Tensor]) -> None:
    refused(write(path, weights, {**good(), "class_names": ["a", "b"]}), "head.weight is (3, 128)", "(2, 128)")


# --- to start from ---------------------------------------------------------------------------------------------------


@pytest.fixture
def start(path: Path) -> Callable[..., RunConfig]:
    def build(**changes: Any) -> RunConfig:
        values = {
            "data": "none",
            "model": "vit_micro",
            "weights": str(path),
            "network": {"registers": 2},
            "preprocessing": {"image_size": 16, "stride": 4},
        }
        return build_config({**values, **changes})

    return build


def test_same_classes_keep_the_head(start: Callable[..., RunConfig], weights: dict[str, Tensor], path: Path) -> None:
    network, notes = initial_network(start(), CARD.class_names)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert len(notes) == 1 and str(path) in notes[0] and "CC0" in notes[0]


def test_other_classes_get_a_new_head(start: Callable[..., RunConfig], weights: dict[str, Tensor]) -> None:
    network, notes = initial_network(start(), ("ant", "bee", "cat", "dog"))
    state = network.state_dict()
    assert state["head.weight"].shape == (4, 128) and state["head.weight"].std() > 0
    assert all(torch.equal(state[name], weights[name]) for name in weights if not name.startswith("head."))
    assert "head for 3 other classes is left out; a new head for 4" in notes[1]
    network, notes = initial_network(start(), ("ant", "bee", "dog"))
    assert not torch.equal(network.state_dict()["head.weight"], weights["head.weight"])
    assert "a new head for 3" in notes[1]


def test_other_order_moves_the_rows(start: Callable[..., RunConfig], weights: dict[str, Tensor]) -> None:
    weights["head.bias"][:] = torch.tensor([1.0, 2.0, 3.0])
    save_model(Path(str(start().weights)), weights, CARD)
    network, _ = initial_network(start(), ("cat", "ant", "bee"))
    state = network.state_dict()
    assert torch.equal(state["head.weight"], weights["head.weight"][[2, 0, 1]])
    assert state["head.bias"].tolist() == [3.0, 1.0, 2.0]


def test_other_size_interpolates_positions(start: Callable[..., RunConfig], weights: dict[str, Tensor]) -> None:
    network, notes = initial_network(start(preprocessing={"image_size": 24, "stride": 4}), CARD.class_names)
    table = network.state_dict()["backbone.positions.table"]
    assert torch.equal(table, resize_positions(weights["backbone.positions.table"], (4, 4), (6, 6)))
    assert notes[1] == "positions interpolated from 4x4 to 6x6"


def test_other_model_is_refused(start: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="holds a vit_micro, not a cct_nano"):
        initial_network(start(model="cct_nano", network={}), CARD.class_names)


@pytest.mark.parametrize("order", [CARD.class_names, ("cat", "ant", "bee"), ("one", "two")])
def test_damaged_file_to_start_from(
    start: Callable[..., RunConfig], weights: dict[str, Tensor], path: Path, order: tuple[str, ...]
) -> None:
    """A missing head is a fault however the classes are."""
    write(path, {name: weights[name] for name in weights if not name.startswith("head.")}, good())
    with pytest.raises(UserError, match=r"missing: head\.weight"):
        initial_network(start(), order)


def test_file_to_start_from_that_is_not_there(start: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        initial_network(start(weights="nowhere"), CARD.class_names)
