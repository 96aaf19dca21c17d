"""Ranks of torch.distributed: sums added over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noetherflow.errors import DataError, MomentError
from noetherflow.moments.packed import PackedTensors, packed
from noetherflow.moments.sums import Sums, Totals
from noetherflow.moments.target import Need
from noetherflow.symmetry.symmetry_set import SymmetrySet

T = TypeVar("T")


def ranks_of(model: nn.Module, process_group: Any) -> Any | None:
    """The process group to add over: the one given, the default one for a distributed model, else None."""
    if process_group is not None:
        return process_group
    if not (dist.is_available() and dist.is_initialized()):
        return None
    distributed = isinstance(model, nn.parallel.DistributedDataParallel) or is_sharded(model)
    return dist.group.WORLD if distributed else None


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` wraps the model or a part: its forward and backward then wait for all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules())


def in_step(batches: Iterable[Any], model: nn.Module, process_group: Any) -> Iterator[Any]:
    """The batches; of a sharded model, whose ranks must go together, with the same number on every rank.

    Raises DataError on all ranks, instead of waiting for ever, as soon as only some of them have a batch left.
    """
    if not is_sharded(model):
        yield from batches
        return
    iterator, end, count = iter(batches), object(), 0
    while True:
        batch = next(iterator, end)
        having, ranks = _total(batch is not end, model, process_group), dist.get_world_size(process_group)
        if having == 0:
            return
        if having < ranks:
            raise DataError(
                f"batch {count + 1}: {having} of {ranks} ranks have one, the others have no more; a model under "
                f"fully_shard needs the same number of batches on every rank: leave out all beyond {count}"
            )
        yield batch
        count += 1


def all_ranks(flag: bool, model: nn.Module) -> bool:
    """Whether `flag` holds, of a sharded model on every rank, for ranks must go the same way."""
    if not is_sharded(model):
        return flag
    return _total(flag, model, None) == dist.get_world_size()


def over_ranks(found: Iterable[T], model: nn.Module) -> list[T]:
    """What any rank of a sharded model found, for they must go forward and backward equally often."""
    if not is_sharded(model):
        return list(found)
    each: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(each, list(found))
    return [x for part in each for x in part]


def _total(flag: bool, model: nn.Module, process_group: Any) -> int:
    """On how many ranks `flag` holds."""
    total = torch.tensor(int(flag), device=next(model.parameters()).device)
    dist.all_reduce(total, dist.ReduceOp.SUM, process_group)
    return int(total)


def refuse_sharded(params: Mapping[str, Tensor], why: str) -> None:
    """Raises MomentError naming the parameters that `fully_shard` holds, of which autograd never sees the whole."""
    if not dist.is_available():
        return
    from torch.distributed.tensor import DTensor

    sharded = [n for n, p in params.items() if isinstance(p, DTensor)]
    if sharded:
        raise MomentError(
            f"{sharded} are sharded by fully_shard, and {why}; "
            "leave the modules that hold them unsharded, or measure with DistributedDataParallel or one process"
        )


def added_over_ranks(
    groups: dict[int, Sums], totals: Totals, syms: SymmetrySet, needs: dict[str, Need], process_group: Any
) -> tuple[dict[int, Sums], Totals]:
    """The same groups and the totals summed over all ranks; a rank may hold other groups, or none.

    Groups are settled: of each the packed gradients are unpacked one by one, added and packed again.
    """
    device = next(iter(needs.values())).device
    last = torch.tensor(max(groups, default=-1), device=device)
    dist.all_reduce(last, dist.ReduceOp.MAX, process_group)
    found: dict[int, Sums] = {}
    for k in range(int(last) + 1):
        added = _added_group(groups.get(k), syms, needs, process_group)
        if added.samples:
            found[k] = added
    whole = Totals()
    for name, need in needs.items():
        gradient = {name: _added(totals.gradient.get(name), need, process_group)}
        whole.plus(gradient, {name: _added(totals.squares.get(name), need, process_group)} if need.entries else {})
    return found, whole


def _added_group(mine: Sums | None, syms: SymmetrySet, needs: dict[str, Need], process_group: Any) -> Sums:
    """One group over all ranks."""
    own, added = mine or Sums.zeros(syms, needs), Sums.zeros(syms, needs)
    gradient, squares = PackedTensors(own.packed_gradient), PackedTensors(own.packed_squares)
    for name, need in needs.items():
        added.packed_gradient[name] = packed(_added(gradient.get(name), need, process_group))
        if need.entries:
            added.packed_squares[name] = packed(_added(squares.get(name), need, process_group))
    for symmetry, legs in added.second.items():
        for leg, part in zip(legs, own.second[symmetry], strict=True):
            leg.copy_(part)
            dist.all_reduce(leg, dist.ReduceOp.SUM, process_group)
    device = next(iter(needs.values())).device
    counts = torch.tensor([own.samples, own.loss], dtype=torch.float64, device=device)
    dist.all_reduce(counts, dist.ReduceOp.SUM, process_group)
    added.samples, added.loss = int(counts[0]), float(counts[1])
    return added


def _added(mine: Tensor | None, need: Need, process_group: Any) -> Tensor:
    """The sum over ranks of one parameter's sums; a rank may have none."""
    total = need.zeros() if mine is None else mine.clone()
    dist.all_reduce(total, dist.ReduceOp.SUM, process_group)
    return total
