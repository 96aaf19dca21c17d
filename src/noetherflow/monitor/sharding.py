"""Sharded parameters (FSDP2): local parts of inner products, and their sum over the processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor."""
    return type(tensor) not in PLAIN and hasattr(tensor, "to_local")


def local(tensor: Any, whole: bool) -> Tensor:
    """A plain tensor: the local shard when only totals over the whole parameter are needed, else the gathered one."""
    if not is_sharded(tensor):
        return tensor
    return tensor.to_local() if whole else tensor.full_tensor()


def share(tensor: Any, whole: bool) -> float:
    """The weight of this process's value in a sum over all processes."""
    world = torch.distributed.get_world_size()
    if not is_sharded(tensor) or not whole:
        return 1.0 / world
    copies = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        copies *= size if placement.is_replicate() else 1
    return 1.0 / copies


def distributed_rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


def from_first_rank(value: int) -> int:
    """The first process's value, on all of them."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
