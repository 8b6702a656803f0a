"""Which device, and which precision is fast on it."""

from __future__ import annotations

import torch

from saccade.engine.distributed import World
from saccade.errors import UserError
from saccade.words import counted

ALONE = World()


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """`auto`: a CUDA device, else Apple's, else the CPU. A device that is not there is a UserError.

    Of several processes each has the CUDA device of its own number.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _own_device(name, world)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are here; use --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: not available on this machine; use --device cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and world.size > 1:
        if device.index is not None and world.local_size > 1:
            shared = f"one device for {world.local_size} processes"
            raise UserError(f"--device {name}: {shared}; use --device cuda, so that each has its own")
        return device if device.index is not None else _own_device(name, world)
    return device


def _own_device(name: str, world: World) -> torch.device:
    count = torch.cuda.device_count()
    if world.local_size > count:
        here = f"{world.local_size} processes are on this machine, and {counted(count, 'CUDA device')}"
        raise UserError(f"--device {name}: {here}; start as many with --nproc-per-node {count}, or use --device cpu")
    return torch.device("cuda", world.local_rank)


def make_current(device: torch.device) -> None:
    """FSDP, NCCL and pinned memory go by the current CUDA device, which is the first one unless somebody says so."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def choose_precision(name: str, device: torch.device, *, learns: bool = False) -> torch.dtype:
    """`auto`: bfloat16 on CUDA devices that multiply in it, and on such processors where a model learns; float32
    elsewhere, so that an answer does not hang on which processor gave it."""
    if name == "auto":
        low = (learns or device.type != "cpu") and multiplies_in_bfloat16(device)
        return torch.bfloat16 if low else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for that. Processors with AVX512-BF16 or AMX do: AMD's since Zen 4, Intel's Xeons
    since 2023. Others convert, which takes longer than float32 does.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
