"""Which device a process has. No device is needed for it: torch is told what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saccade import UserError
from saccade.config import RunConfig
from saccade.engine import device as devices
from saccade.engine import distributed
from saccade.engine import train as engine
from saccade.engine.device import choose_device, choose_precision
from saccade.engine.distributed import World


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_a_device_of_its_own(name: str) -> None:
    assert [choose_device(name, World(rank, 4, rank % 2, 2)).index for rank in range(4)] == [0, 1, 0, 1]
    assert choose_device(name).type == "cuda" and choose_device("cuda:1").index == 1
    assert choose_device("cpu", World(1, 3, 1, 3)).type == "cpu"
    with pytest.raises(UserError, match=f"--device {name}: 3 processes are on this machine, and 2 CUDA devices"):
        choose_device(name, World(0, 3, 0, 3))
    with pytest.raises(UserError, match="cuda:1: one device for 2 processes; use --device cuda"):
        choose_device("cuda:1", World(1, 2, 1, 2))


@pytest.mark.usefixtures("two_gpus")
def test_the_device_of_a_process_is_current(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    def set_device(device: Any) -> None:
        raise Enough(str(device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    devices.make_current(torch.device("cpu"))
    settings = config(device="cuda")
    with pytest.raises(Enough, match="cuda:1"):
        engine.open_session(settings, World(1, 2, 1, 2))


def test_processes_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.start() == World(5, 1, 1, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert distributed.start().local_size == 2


@pytest.mark.parametrize(
    "instructions",
    [(), ("_is_avx512_bf16_supported",), ("_is_amx_tile_supported", "_is_avx512_bf16_supported")],
    ids=str,
)
def test_bfloat16_where_the_processor_multiplies_in_it(
    instructions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu, learns=True) == (torch.bfloat16 if instructions else torch.float32)
    assert choose_precision("auto", cpu) == torch.float32  # the same answers on all processors
    assert choose_precision("float32", cpu) == torch.float32 and choose_precision("bfloat16", cpu) == torch.bfloat16
    assert choose_precision("auto", torch.device("meta"), learns=True) == torch.float32
