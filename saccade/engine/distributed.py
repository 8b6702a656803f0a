"""Many processes under torchrun: start, wrap, agree. With one process everything here does nothing."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from saccade.errors import UserError


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Join the process group that torchrun describes, or stand alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, local_size)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return world


def finish(world: World, together: bool) -> None:
    """Leave the process group; `together`, once all are here, unless one of them failed.

    gloo's threads free the tensors of the last collective after it has returned. One that does so while the interpreter
    ends aborts the process. A group that nobody holds any longer waits for its threads, so holders in cycles (the
    shards of FSDP) are freed first; where something holds it still, the barrier, whose tensors Python never sees, has
    taken the place of the last collective.
    """
    if world.size > 1 and dist.is_initialized():
        if together:
            dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def wrap(model: nn.Module, blocks: Iterable[nn.Module], strategy: str, device: torch.device, world: World) -> nn.Module:
    """The model for the forward pass: DDP, sharded in place by FSDP2, or as it is."""
    if world.size == 1:
        return model
    if strategy == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # shards are of rows; kernels may lie channels last
        mesh = init_device_mesh(device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
            if hasattr(block, "merging"):  # called in the place of `forward` where tokens are merged
                register_fsdp_forward_method(block, "merging")
        # by default the outermost part keeps its whole weights after a forward without a backward, such as an
        # evaluation, and the next step would compute with them whatever has been put in their place
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def agree(flags: list[bool], world: World) -> list[bool]:
    """Each flag is true everywhere where it is true in any process."""
    if world.size == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor]


def mean(value: float, world: World) -> float:
    if world.size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor) / world.size


def gather(value: Any, world: World) -> list[Any]:
    """Every process's value, in the order of ranks, in every process."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any, world: World) -> Any:
    """The main process's value in every process."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def same_buffers(model: nn.Module, world: World) -> None:
    """Give every process the main process's buffers (statistics of batch normalisation)."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def check_batch_size(batch_size: int, world: World) -> None:
    if batch_size % world.size:
        raise UserError(f"--batch-size {batch_size}: must be a multiple of the {world.size} processes that share it")


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
