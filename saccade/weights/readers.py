"""Tensors from one file that may be hostile: nothing in it is executed, and sizes are checked before they are used."""

from __future__ import annotations

import lzma
import math
import re
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from saccade.errors import UserError
from saccade.weights.model_file import read_safetensors

Kind = Literal["safetensors", "zip pickle", "pickle", "npz"]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")
LONGEST_RATIO = 100  # of what a compressed archive unpacks to; weights are noise and hardly shrink
# What zipfile, its decompressors and NumPy raise of archives that are damaged, encrypted or made to confuse.
DAMAGED = (
    OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
LFS = b"version https://git-lfs"


class StandIn:
    """Takes the place of an object that a training script stored beside the weights. It keeps and does nothing."""

    def __init__(self, *values: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# Found in checkpoints of the original repositories. Not one of these is imported or called: what a file says of them
# goes to the stand-in (or an ordinary dictionary), and is thrown away. Anything else is refused.
HARMLESS: tuple[tuple[Any, str], ...] = (
    (StandIn, "argparse.Namespace"),
    (StandIn, "numpy.dtype"),
    (StandIn, "numpy.core.multiarray.scalar"),
    (StandIn, "numpy._core.multiarray.scalar"),
    (StandIn, "pathlib.PosixPath"),
    (StandIn, "pathlib.WindowsPath"),
    (OrderedDict, "yacs.config.CfgNode"),
)


def read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file of weights holds, as nested dictionaries of tensors, and the metadata of a `.safetensors` file."""
    kind = kind_of(path)
    if kind == "safetensors":
        return read_safetensors(path)
    return (_read_npz(path) if kind == "npz" else _read_pickle(path, kind)), {}


def kind_of(path: Path) -> Kind:
    """By what is in the file, because suffixes say little: `.bin` and `.pt` are used for anything."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        members = zipfile.ZipFile(path).namelist() if start.startswith(b"PK\x03\x04") else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}); get or copy it anew") from None
    if start.startswith(LFS):
        raise UserError(f"{path}: a pointer of Git LFS, not the weights; fetch them with `git lfs pull`")
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in members):
        return "zip pickle"
    if members and all(name.endswith(".npy") for name in members):
        return "npz"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if start.lstrip()[:1] == b"<":
        raise UserError(f"{path}: a web page, not weights; the download went wrong, perhaps for want of a login")
    raise UserError(
        f"{path}: truncated, or no file of weights; those are .safetensors, .pth and the like of PyTorch, and .npz"
    )


# --- pickles ---------------------------------------------------------------------------------------------------------


def _read_pickle(path: Path, kind: Kind) -> Any:
    if kind == "zip pickle":
        _check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(HARMLESS)):
            warnings.simplefilter("ignore")  # of other pickle protocols; what cannot be read is an error
            # a mapped file cannot be made to allocate more than it holds
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip pickle")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle can raise anything, and nothing here is ours to debug
        raise UserError(_refusal(path, str(error))) from None
    _check_claims(path, values, path.stat().st_size)
    return values


def _refusal(path: Path, text: str) -> str:
    found = re.search(r"GLOBAL (\S+)", text) or re.search(r"unrecognized function (.*)", text)
    advice = (
        "Nothing was executed. If you trust it, load it where it was made and save the weights alone: "
        "torch.save(model.state_dict(), 'weights.pth')"
    )
    if found:
        return f"{path}: holds more than weights (a pickled {found[1].rstrip('.')}), or is truncated. {advice}"
    if "TorchScript" in text:
        return f"{path}: holds a program (TorchScript), not only weights. {advice}"
    what = (text.strip().splitlines() or ["no message"])[0].split(". ")[0]
    if "weights" in what.lower():  # torch's own advice is to turn the check off
        return f"{path}: holds more than weights, or is damaged. {advice}"
    return f"{path}: truncated, damaged or no file of PyTorch ({what[:200]}); get or copy it anew"


def _check_archive(path: Path) -> None:
    """torch stores without compression; an archive that unpacks to more than itself was made to exhaust the memory."""
    with zipfile.ZipFile(path) as archive:
        packed = [each.filename for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
        total = sum(each.file_size for each in archive.infolist())
    if packed or total > path.stat().st_size:
        raise UserError(f"{path}: a compressed archive, which torch does not write; save the weights anew")


def _check_claims(path: Path, values: Any, size: int) -> None:
    """No tensor is larger than the file it is from. Such a one repeats a few numbers over absurd lengths."""
    for name, tensor in _tensors(values):
        if tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path}: claims {name} {tuple(tensor.shape)}, which is more than the whole file; damaged")


def _tensors(values: Any, prefix: str = "", depth: int = 0) -> list[tuple[str, Tensor]]:
    if isinstance(values, Tensor):
        return [(prefix, values)]
    if not isinstance(values, Mapping) or depth > 8:
        return []
    return [
        pair
        for name, value in cast(Mapping[Any, Any], values).items()
        for pair in _tensors(value, f"{prefix}.{name}" if prefix else str(name), depth + 1)
    ]


# --- NumPy -----------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an archive, as the authors of the Vision Transformer publish them."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(path, archive, member)
            if sum(each.file_size for each in archive.infolist()) > LONGEST_RATIO * path.stat().st_size:
                raise UserError(f"{path}: unpacks to over {LONGEST_RATIO} times its size; no weights do")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _to_tensor(path, name, arrays[name]) for name in arrays.files}
    except UserError:
        raise
    except DAMAGED as e:
        raise UserError(f"{path}: truncated or damaged ({e}); get or copy it anew") from None


def _check_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """That the shape which an array claims is the one it has bytes for, before NumPy makes room for it."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise UserError(f"{path}: {member.filename} is in a form of NumPy's that weights never have")
        shape, _, dtype = header(file)
        if dtype.hasobject:
            raise UserError(f"{path}: {member.filename} holds pickled objects, which can hold code; it was not read")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise UserError(f"{path}: {member.filename} claims the shape {shape}, which it has not; damaged")


def _to_tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.fields is None:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)  # NumPy has no name for bfloat16
    if array.dtype.kind not in "fiub":
        raise UserError(f"{path}: {name} holds {array.dtype}, not numbers")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))  # (also of no dimension)
