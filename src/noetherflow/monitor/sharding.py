"""Sharded parameters (FSDP2): local parts of inner products, and their sum over the processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.tensors import gathered

PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "to_local")


def local(tensor: Any, whole: bool) -> Tensor:
    """A plain tensor: the local shard when only totals over the whole parameter are needed, else the gathered one."""
    return tensor.to_local() if whole and is_sharded(tensor) else gathered(tensor)


def laid_as(tensor: Any, parameter: Any) -> Any:
    """A gradient on the shards of its parameter; tensor parallelism may leave partial sums of it on every rank."""
    if not is_sharded(parameter) or tensor.placements == parameter.placements:
        return tensor
    return tensor.redistribute(parameter.device_mesh, parameter.placements)


def share(tensor: Any, whole: bool) -> float:
    """The weight of this process's value in a sum over all processes: one over how many hold the same entries."""
    world = torch.distributed.get_world_size()
    if not is_sharded(tensor) or not whole:
        return 1.0 / world
    shards = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        shards *= 1 if placement.is_replicate() else size
    return shards / world


def ranks_of(tensors: Iterable[Any]) -> Any | None:
    """The process group that writes one ledger together, None where no tensor is sharded."""
    return torch.distributed.group.WORLD if any(map(is_sharded, tensors)) else None


def distributed_rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0
