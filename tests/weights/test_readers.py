"""Files of weights: read whole, or refused with what is wrong; nothing in a file is ever executed."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saccade import UserError
from saccade.config import PreprocessingConfig
from saccade.weights.model_file import ModelCard, save_model
from saccade.weights.source import UNKNOWN_LICENCE, open_weights


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
        np.savez(path, a=tensors["a"].numpy(), b=tensors["b"].numpy(), c=tensors["c"].numpy())
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


def test_npz_that_says_it_is_encrypted(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3, np.float32))
    data = bytearray((tmp_path / "w.npz").read_bytes())
    data[data.index(b"PK\x03\x04") + 6] |= 1  # the flags, in the member's own header
    data[data.index(b"PK\x01\x02") + 8] |= 1  # and in the list of members
    (tmp_path / "w.npz").write_bytes(data)
    refused(tmp_path / "w.npz", "w.npz: truncated or damaged", "encrypted")


@pytest.mark.parametrize("how", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_npz_with_a_damaged_stream(tmp_path: Path, how: int) -> None:
    array = io.BytesIO()
    np.save(array, np.random.default_rng(0).random(2000))
    with zipfile.ZipFile(tmp_path / "w.npz", "w", how) as archive:
        archive.writestr("a.npy", array.getvalue())
    sound = (tmp_path / "w.npz").read_bytes()
    assert open_weights(tmp_path / "w.npz").tensors["a"].shape == (2000,)
    start = sound.index(b"a.npy") + 5 + 9  # behind the properties of LZMA, some of which nobody reads
    for place in range(start, start + 20):
        (tmp_path / "w.npz").write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
        refused(tmp_path / "w.npz", "w.npz: ")


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
