"""Weights of others: read whole, or refused with what is wrong; nothing in a file is ever executed."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import struct
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from saccade import UserError
from saccade.config import PreprocessingConfig
from saccade.weights.hub import hub_name, weight_files
from saccade.weights.model_file import ModelCard, save_model
from saccade.weights.source import UNKNOWN_LICENCE, open_weights
from saccade.weights.unwrap import unwrap


def state(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 4, generator=generator) for name in names or ("embed.weight", "blocks.0.weight")}


def refused(source: str | Path, *parts: str, branch: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(source, branch=branch)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    return str(caught.value)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin", "w.pth.tar", "old.pth"])
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=name != "old.pth")
    raw = open_weights(path)
    assert equal(raw.tensors, state())
    assert raw.config == {} and raw.preprocessor == {} and raw.notes == () and raw.licence == UNKNOWN_LICENCE
    assert name in raw.origin and "sha256" in raw.origin and str(tmp_path) not in raw.origin


def test_npz_of_the_vit_authors(tmp_path: Path) -> None:
    arrays = {"Transformer/encoder_norm/scale": np.arange(3, dtype=np.float32), "head/bias": np.float32(2.0)}
    np.savez(tmp_path / "w.npz", **arrays)
    raw = open_weights(tmp_path / "w.npz")
    assert raw.tensors["Transformer/encoder_norm/scale"].tolist() == [0, 1, 2]
    assert raw.tensors["head/bias"].shape == ()


def test_npz_with_optimizer_and_bfloat16(tmp_path: Path) -> None:
    half = torch.tensor([1.5, -2.0, 0.375]).bfloat16()
    inside = half.view(torch.int16).numpy().view("V2")
    np.savez_compressed(tmp_path / "w.npz", **{"params/head/bias": inside, "opt/mu/head/bias": np.ones(3, ">f4")})
    raw = open_weights(tmp_path / "w.npz")
    assert raw.tensors.keys() == {"head/bias"} and torch.equal(raw.tensors["head/bias"], half.float())
    assert any("1 arrays outside params/" in note for note in raw.notes)
    assert any("1 tensor in bfloat16, read with the same values in float32" in note for note in raw.notes)


def test_half_precision_keeps_its_values(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(50).half(),
        "b": torch.randn(50).bfloat16(),
        "c": torch.randn(50).half(),
        "d": torch.tensor([1.0 + 2.0**-40], dtype=torch.float64),
        "e": torch.arange(3),
        "f": torch.randn(5),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    raw = open_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(raw.tensors[name].to(tensors[name].dtype), tensors[name]) for name in "abcef")
    assert {str(raw.tensors[name].dtype) for name in "abcdf"} == {"torch.float32"}
    assert raw.tensors["e"].dtype == torch.int64
    assert sorted(raw.notes) == [
        "1 tensor in bfloat16, read with the same values in float32",
        "1 tensor in float64, read rounded to float32",
        "2 tensors in float16, read with the same values in float32",
    ]


def test_what_trainers_put_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, numbers of NumPy and paths are in the checkpoints of DINO, DeiT and Swin; they become stand-ins."""
    settings = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", ModuleType("yacs.config"))
    monkeypatch.setattr(sys.modules["yacs.config"], "CfgNode", settings, raising=False)
    checkpoint = {
        "model": state(),
        "config": settings(data=settings(batch_size=8)),
        "args": argparse.Namespace(lr=1e-3, output=Path("x")),
        "max_accuracy": np.float64(81.2),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 300,
    }
    torch.save(checkpoint, tmp_path / "w.pth")
    raw = open_weights(tmp_path / "w.pth")
    assert equal(raw.tensors, state())
    assert raw.notes == (
        "of the checkpoint, 'model' is taken; left aside: config, args, max_accuracy, optimizer, epoch",
    )


class Payload:
    """Unpickled carelessly, this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["zip", "old", "plain", "npz"])
def test_payload_is_not_executed(tmp_path: Path, how: str) -> None:
    target, path = tmp_path / "owned", tmp_path / f"w.{'npz' if how == 'npz' else 'pth'}"
    content = {**state(), "extra": Payload(target)}
    if how == "plain":
        path.write_bytes(pickle.dumps(content))
    elif how == "npz":
        np.savez(path, extra=np.array([content["extra"]], dtype=object))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = refused(path)
    assert not target.exists()
    assert "weights_only=False" not in message and "add_safe_globals" not in message, "torch's advice is to give in"
    if how in ("zip", "old"):
        assert "mkdir" in message and "Nothing was executed" in message and "torch.save(model.state_dict()" in message
    if how == "npz":
        assert "it was not read" in message


def test_a_stand_in_runs_nothing(tmp_path: Path) -> None:
    """A file can say `argparse.Namespace` and mean harm; its name leads to the stand-in, with whatever arguments."""
    target = tmp_path / "owned"
    text = f"__import__('os').mkdir({str(target)!r})"

    class Disguised(dict[str, Any]):
        def __reduce__(self) -> Any:
            return argparse.Namespace, (), {"__setstate__": text, "__class__": text}

    torch.save({**state(), "args": Disguised()}, tmp_path / "w.pth")
    assert equal(open_weights(tmp_path / "w.pth").tensors, state())
    assert not target.exists()


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "torch.nn.modules.linear.Linear", "Nothing was executed")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.pth", "w.npz"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    tensors = {name: torch.randn(30, 40) for name in "abc"}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name != "old.pth")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refused(path, str(path))
    assert "truncated" in message or "damaged" in message


def test_any_damaged_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Whatever the bytes, there are tensors or a UserError."""
    torch.save(state(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    sound = (tmp_path / "w.pth").read_bytes()
    random = np.random.default_rng(0)
    outcomes = set()
    for k in range(150):
        spoilt = bytearray(sound)
        spoilt[int(random.integers(len(spoilt)))] = int(random.integers(256))
        path = tmp_path / f"{k}.pth"
        path.write_bytes(spoilt)
        try:
            open_weights(path)
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_what_is_no_weights(tmp_path: Path) -> None:
    for name, content, part in (
        ("a.pth", b"<!DOCTYPE html><html>", "a web page"),
        ("b.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("c.bin", b"just text", "no file of weights"),
        ("d.pth", b"", "truncated"),
        ("e.npz", b"PK\x03\x04" + bytes(50), "truncated"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, part)
    refused(tmp_path / "f.pth", "no such file or folder")
    refused("weights/vit.pth", "no such file")  # and no name on the hub, though it looks like one
    torch.save({"epoch": 3, "args": {}}, tmp_path / "g.pth")
    refused(tmp_path / "g.pth", "no weights found; it holds 'epoch', 'args'")
    torch.save([torch.zeros(2)], tmp_path / "h.pth")
    refused(tmp_path / "h.pth", "holds list")


def test_own_models_are_told_apart(tmp_path: Path) -> None:
    card = ModelCard(
        task="classify", model="m", architecture={}, class_names=("a",), preprocessing=PreprocessingConfig()
    )
    save_model(tmp_path / "model.safetensors", state(), card)
    refused(tmp_path / "model.safetensors", "a model of saccade's own")
    refused(tmp_path, "a model of saccade's own")


# --- absurd sizes ----------------------------------------------------------------------------------------------------


def test_repeated_numbers_are_no_tensor(tmp_path: Path) -> None:
    """A view of one number repeated a million million times fits into a file of a kilobyte."""
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "claims a (1000000, 1000000)")


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(500_000)}, tmp_path / "sound.pth")
    with zipfile.ZipFile(tmp_path / "sound.pth") as old, zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), compress_type=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "w.pth").stat().st_size < 20_000
    refused(tmp_path / "w.pth", "compressed archive")


@pytest.mark.parametrize("shape", [(10**12,), (3, 5)])
def test_npz_that_lies_about_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(16))
    refused(tmp_path / "w.npz", "claims the shape")


def test_npz_bomb(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(2_000_000, np.float32))
    refused(tmp_path / "w.npz", "100 times its size")


def test_safetensors_that_lies_about_its_shape(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(tmp_path / "w.safetensors", "truncated or not a .safetensors file")


def test_old_pickle_that_claims_absurd_storage(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(77)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "w.pth").read_bytes()
    number = b"K" + bytes([77])  # BININT1 77
    assert number in data
    (tmp_path / "w.pth").write_bytes(data.replace(number, b"J" + struct.pack("<i", 2**31 - 1)))
    refused(tmp_path / "w.pth", "w.pth")


def test_strange_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse(), "b": torch.zeros(2)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "a is sparse")
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "complex")


# --- unwrapping ------------------------------------------------------------------------------------------------------

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


def test_left_aside_is_said() -> None:
    tensors, notes = unwrap(OrderedDict(state(), version=3, names=["a"]), "w")
    assert equal(tensors, state()) and notes == ["left aside, being no weights: version, names"]
    with pytest.raises(UserError, match="100001 tensors"):
        unwrap({str(k): torch.zeros(()) for k in range(100_001)}, "w")


# --- folders ---------------------------------------------------------------------------------------------------------

README = """---
license: apache-2.0
datasets:
- imagenet-1k
- "imagenet-21k"
---
# A model
license: not this one
"""


def make_folder(folder: Path, shards: int = 0, suffix: str = "safetensors") -> dict[str, Tensor]:
    """A folder in the hub's layout; returns all of its tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 224}))
    (folder / "README.md").write_text(README)
    tensors = {f"layer.{k}": torch.full((2, 3), float(k)) for k in range(6)}

    def write(part: dict[str, Tensor], name: str) -> None:
        if suffix == "safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)

    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if not shards:
        write(tensors, f"{stem}.{suffix}")
        return tensors
    placed = {}
    for k in range(shards):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == k}
        placed |= dict.fromkeys(part, file := f"{stem}-{k + 1:05d}-of-{shards:05d}.{suffix}")
        write(part, file)
    index = {"metadata": {"total_size": 144}, "weight_map": placed}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_folder(tmp_path: Path, shards: int, suffix: str) -> None:
    tensors = make_folder(tmp_path / "dinov2", shards, suffix)
    raw = open_weights(str(tmp_path / "dinov2"))
    assert equal(raw.tensors, tensors) and raw.notes == ()
    assert raw.config == {"model_type": "vit"} and raw.preprocessor == {"size": 224}
    assert raw.licence == "apache-2.0" and raw.training_data == "imagenet-1k, imagenet-21k"
    assert "dinov2" in raw.origin and str(tmp_path) not in raw.origin


def test_safetensors_before_pickles(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path)
    torch.save({"other": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert equal(open_weights(tmp_path).tensors, tensors)
    raw = open_weights(tmp_path / "pytorch_model.bin")  # but the one that is named is taken
    assert raw.tensors.keys() == {"other"} and raw.config == {"model_type": "vit"}


def test_a_file_of_another_name_does_not_take_the_config_beside_it(tmp_path: Path) -> None:
    make_folder(tmp_path)
    torch.save(state(), tmp_path / "vit.pth")
    assert open_weights(tmp_path / "vit.pth").config == {}


@pytest.mark.parametrize("index", [True, False])
def test_absent_and_half_downloaded_shards_are_all_listed(tmp_path: Path, index: bool) -> None:
    make_folder(tmp_path, 4)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    half = tmp_path / "model-00004-of-00004.safetensors"
    half.write_bytes(half.read_bytes()[:-10])
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    message = refused(
        tmp_path,
        "incomplete (3 faults)",
        "absent: model-00002-of-00004.safetensors",
        "absent: model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors: truncated",
    )
    assert message.count("\n") == 3


def test_shards_without_an_index(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, 3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert equal(open_weights(tmp_path).tensors, tensors)


def test_index_that_names_absent_keys(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["layer.7"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["layer.8"] = "model-00009-of-00009.safetensors"
    path.write_text(json.dumps(index))
    refused(tmp_path, "2 faults", "absent: model-00009", "model-00001-of-00002.safetensors: lacks layer.7")


def test_shard_that_holds_more_than_the_index_says(tmp_path: Path) -> None:
    tensors = make_folder(tmp_path, 2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["layer.3"], tensors["layer.3"]
    path.write_text(json.dumps(index))
    raw = open_weights(tmp_path)
    assert equal(raw.tensors, tensors) and "not in the index: layer.3" in raw.notes[0]


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", 5, None])
def test_index_that_leads_out_of_the_folder(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "hub").mkdir()
    save_file(state("secret"), tmp_path / "outside.safetensors")
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": shard}}))
    refused(tmp_path / "hub", "no file of its folder")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json", "anew")


def test_a_series_of_absurd_length(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model-00001-of-99999.safetensors")
    refused(tmp_path, "one of 99999 shards")


def test_damaged_config(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    refused(tmp_path, "config.json", "not valid JSON")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, "config.json", "not a table")


def test_folders_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, "holds no weights")
    (tmp_path / ".cache").mkdir()
    refused(tmp_path, "interrupted", "hf download")
    for name in ("a.pth", "b.pth"):
        torch.save(state(), tmp_path / name)
    refused(tmp_path, "several files of weights (a.pth, b.pth)")
    (tmp_path / "a.pth").rename(tmp_path / "training_args.bin")
    assert equal(open_weights(tmp_path).tensors, state())


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, cc-by-4.0]", "mit, cc-by-4.0"),
        ("license:\n- mit\n- bsd-3-clause\ntags:\n- x", "mit, bsd-3-clause"),
        (
            "license: other\nlicense_name: dinov3-license\nlicense_link: https://x.org/L",
            "dinov3-license https://x.org/L",
        ),
        ("license: other", "other"),
        ("tags:\n- license: mit", UNKNOWN_LICENCE),
        ("", UNKNOWN_LICENCE),
    ],
)
def test_licence_of_the_readme(tmp_path: Path, head: str, licence: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\ntext\n")
    assert open_weights(tmp_path).licence == licence


def test_licence_of_timm(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe no text")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": "cc-by-nc-4.0"}}))
    assert open_weights(tmp_path).licence == "cc-by-nc-4.0"


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("facebook/dinov2-small", ("facebook/dinov2-small", None)),
        ("timm/swin_tiny_patch4_window7_224.ms_in1k", ("timm/swin_tiny_patch4_window7_224.ms_in1k", None)),
        ("a/b@v1.0", ("a/b", "v1.0")),
        ("https://huggingface.co/a/b/", ("a/b", None)),
        ("hf-hub:a/b", ("a/b", None)),
        ("vit_base", None),
        ("../a", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("", None),
    ],
)
def test_hub_names(text: str, expected: Any) -> None:
    assert hub_name(text) == expected


def test_which_files_are_fetched() -> None:
    beside = ["README.md", "tf_model.h5", "training_args.bin", "onnx/model.safetensors"]
    assert weight_files(["pytorch_model.bin", "model.safetensors", *beside]) == ["model.safetensors"]
    assert weight_files(["pytorch_model.bin", *beside]) == ["pytorch_model.bin"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert weight_files([*shards, index, "pytorch_model.bin"]) == [index, *shards]
    assert weight_files(["w.npz", *beside]) == ["w.npz"]
    assert weight_files(["a.safetensors", "b.safetensors"]) == [] == weight_files(beside)


SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download takes. `repositories` maps a name to a folder, or to a refusal."""

    repositories: dict[str, Path | tuple[int, str]] = {}
    asked: list[str] = []

    def do_HEAD(self) -> None:  # noqa: N802, the base class calls it so
        self.answer()

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        api = path.startswith("/api/models/")
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        repository = self.repositories.get(name, (404, "RepoNotFound"))
        if isinstance(repository, tuple) and not (api and repository[1] == "GatedRepo"):
            return self.send(repository[0], b"", {"X-Error-Code": repository[1]})
        if api and "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", SHA, "v1"):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = repository if isinstance(repository, Path) else None
        files = [each.name for each in folder.iterdir()] if folder else ["model.safetensors", "config.json"]
        if api and "/tree/" in path:
            entries = [
                {"type": "file", "path": each, "size": (folder / each).stat().st_size if folder else 1, "oid": "0" * 40}
                for each in files
            ]
            return self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        if api:
            info = {"id": name, "sha": SHA, "siblings": [{"rfilename": each} for each in files]}
            return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if isinstance(repository, tuple):
            return self.send(repository[0], b"", {"X-Error-Code": repository[1]})
        data = (repository / path.rsplit("/", 1)[1]).read_bytes()
        return self.send(200, data, {"ETag": f'"{len(data):040x}"', "X-Repo-Commit": SHA})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A hub on this machine, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "asked", [])
    repository = tmp_path / "repository"
    tensors = make_folder(repository)
    torch.save({"other": torch.zeros(1)}, repository / "pytorch_model.bin")
    monkeypatch.setattr(
        Hub,
        "repositories",
        {
            "owner/model": repository,
            "owner/gated": (403, "GatedRepo"),
            "owner/private": (401, "RepoNotFound"),
            "owner/broken": (500, ""),
        },
    )
    yield SimpleNamespace(tensors=tensors, folder=repository, url=url, stop=server.shutdown, close=server.server_close)
    server.shutdown()
    server.server_close()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_network(hub: SimpleNamespace) -> None:
    hub.stop()
    hub.close()


def test_hub_download(hub: SimpleNamespace) -> None:
    raw = open_weights("owner/model")
    assert equal(raw.tensors, hub.tensors) and raw.notes == ()
    assert raw.config == {"model_type": "vit"} and raw.preprocessor == {"size": 224} and raw.licence == "apache-2.0"
    assert raw.origin == f"huggingface.co/owner/model, revision {SHA}"
    assert not any("pytorch_model.bin" in each for each in Hub.asked), "only the files that are needed"
    assert equal(open_weights("owner/model@v1").tensors, hub.tensors)


@pytest.mark.parametrize("how", ["offline mode", "no network", "broken"])
def test_cache_serves_when_the_hub_does_not(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    open_weights("owner/model")
    if how == "offline mode":
        offline(monkeypatch)
    elif how == "no network":
        no_network(hub)
    else:
        monkeypatch.setitem(Hub.repositories, "owner/model", (500, ""))
    raw = open_weights("owner/model")
    assert equal(raw.tensors, hub.tensors) and raw.origin.endswith(SHA)
    assert bool(raw.notes) == (how != "offline mode"), "asked for, offline mode needs no word"


@pytest.mark.parametrize("how", ["offline mode", "no network", "broken"])
def test_advice_how_to_bring_the_files(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    name = "owner/broken" if how == "broken" else "owner/model"
    if how == "offline mode":
        offline(monkeypatch)
    elif how == "no network":
        no_network(hub)
    why = {
        "offline mode": "offline mode is on (HF_HUB_OFFLINE)",
        "no network": f"{hub.url} cannot be reached",
        "broken": "answers with an error (500)",
    }[how]
    message = refused(f"{name}@v1", why, f"hf download {name} --revision v1 --local-dir {name[6:]}", "give its path")
    assert "Traceback" not in message


def test_gated_repository_says_where_to_accept(hub: SimpleNamespace) -> None:
    refused("owner/gated", f"Accept them at {hub.url}/owner/gated", "hf auth login", "HF_TOKEN")


@pytest.mark.parametrize("name", ["owner/modl", "owner/private"])
def test_unknown_or_private_repository(hub: SimpleNamespace, name: str) -> None:
    refused(name, "no such repository", "private", "check the spelling")


def test_unknown_revision(hub: SimpleNamespace) -> None:
    refused("owner/model@nowhere", "no revision 'nowhere'")


def test_repository_without_weights_that_can_be_read(hub: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (hub.folder / name).unlink()
    (hub.folder / "tf_model.h5").write_bytes(b"x")
    refused("owner/model", "holds only tf_model.h5")
    for name in ("a.pth", "b.pth"):
        (hub.folder / name).write_bytes(b"x")
    refused("owner/model", "several files of weights (a.pth, b.pth)", "hf download owner/model a.pth")


def test_folder_on_disk_comes_before_the_hub(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub.folder.parent)
    shutil.copytree(hub.folder, hub.folder.parent / "owner" / "model")
    assert equal(open_weights("owner/model").tensors, hub.tensors) and Hub.asked == []


def test_names_that_are_almost_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("vit_small_patch16_224.augreg_in1k", "timm/vit_small_patch16_224.augreg_in1k")
    (tmp_path / "weights.pth").touch()
    refused("weihgts.pth", "did you mean weights.pth")
