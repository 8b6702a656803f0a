"""Which weights these are, in 64 letters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor
from torch import uint8 as byte


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), dtypes, shapes and bytes: the same for the same values, however they are stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(byte).numpy().data)
    return digest.hexdigest()
