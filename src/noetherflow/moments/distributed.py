"""Ranks of torch.distributed: data parallel wrappers unwrapped, sums added over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from noetherflow.moments.target import Need, Sums
from noetherflow.symmetry_set import SymmetrySet


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, else the model itself (also under FSDP2's `fully_shard`)."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def ranks_of(model: nn.Module, process_group: Any) -> Any | None:
    """The process group to add over: the one given, the default one for a distributed model, else None."""
    if process_group is not None:
        return process_group
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule

    distributed = isinstance(model, nn.parallel.DistributedDataParallel | FSDPModule)
    return dist.group.WORLD if distributed else None


def added_over_ranks(
    groups: dict[int, Sums], syms: SymmetrySet, needs: dict[str, Need], process_group: Any
) -> dict[int, Sums]:
    """The same groups summed over all ranks; a rank may hold other groups, or none."""
    device = next(iter(needs.values())).device
    last = torch.tensor(max(groups, default=-1), device=device)
    dist.all_reduce(last, dist.ReduceOp.MAX, process_group)
    total: dict[int, Sums] = {}
    for k in range(int(last) + 1):
        added = Sums.zeros(syms, needs)
        if k in groups:
            added.plus(groups[k])
        counts = torch.tensor([added.samples, added.loss], dtype=torch.float64, device=device)
        legs = [leg for legs in added.second.values() for leg in legs]
        for tensor in (counts, *added.gradient.values(), *added.squares.values(), *legs):
            dist.all_reduce(tensor, dist.ReduceOp.SUM, process_group)
        added.samples, added.loss = int(counts[0]), float(counts[1])
        if added.samples:
            total[k] = added
    return total
