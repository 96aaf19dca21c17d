"""Ranks of torch.distributed: they go together, end together, and their sums are added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noetherflow.core.ranks import SAME_SYMMETRIES, ending_together, lost_ranks_named, refuse_other, told_by_all
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.packed import PackedTensors, packed
from noetherflow.moments.sums import Sums, Totals
from noetherflow.moments.target import Need
from noetherflow.symmetry.symmetry_set import SymmetrySet

T = TypeVar("T")


def ranks_of(model: nn.Module, process_group: Any) -> Any | None:
    """The process group to add over: the one given, the default one for a distributed model, else None.

    Raises DataError where this process is not in the group given.
    """
    if process_group is not None:
        if dist.get_rank(process_group) < 0:
            raise DataError(f"rank {dist.get_rank()} is not in the process_group given; call this on its ranks only")
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


def refuse_counting_twice(params: Mapping[str, Tensor], ranks: Any | None, sharded: bool) -> None:
    """Raises MomentError where ranks that share their samples, each with a part of a layer, would count each as own.

    Args:
        params: the model's parameters.
        ranks: the process group whose sums are added.
        sharded: `fully_shard` splits parameters over ranks with samples of their own, along one axis of the mesh.
    """
    if ranks is None:
        return
    from torch.distributed.tensor import DTensor

    adding = set(dist.get_process_group_ranks(ranks))
    for name, p in params.items():
        if isinstance(p, DTensor):
            split = [axis for axis, at in enumerate(p.placements) if not at.is_replicate()]
            beside = [dist.get_process_group_ranks(p.device_mesh.get_group(axis)) for axis in split]
            if sum(len(adding.intersection(members)) > 1 for members in beside) > sharded:
                raise MomentError(
                    f"{name} is split by tensor parallelism over ranks that share their samples, and adding over "
                    f"{len(adding)} ranks would count each sample several times: give process_group=, the ranks whose "
                    "batches differ (of a mesh with axes data and tensor: mesh['data'].get_group())"
                )


def in_step(batches: Iterable[Any], together: Any | None) -> Iterator[Any]:
    """The batches; for ranks that must go `together` (a sharded model's), the same number on each.

    Raises DataError on all ranks, instead of waiting for ever, as soon as only some of them have a batch left, and
    RankError on the others as soon as the batches of one of them raise.
    """
    if together is None:
        yield from batches
        return
    iterator, end, count = iter(batches), object(), 0
    while True:
        with ending_together(together):
            batch = next(iterator, end)
        having, ranks = sum(told_by_all(batch is not end, together)), dist.get_world_size(together)
        if having == 0:
            return
        if having < ranks:
            raise DataError(
                f"batch {count + 1}: {having} of {ranks} ranks have one, the others have no more; a model under "
                f"fully_shard needs the same number of batches on every rank: leave out all beyond {count}"
            )
        yield batch
        count += 1


def all_ranks(flag: bool, together: Any | None) -> bool:
    """Whether `flag` holds, for ranks that go `together` on every one of them, so that they go the same way."""
    return flag if together is None else all(told_by_all(flag, together))


def over_ranks(found: Iterable[T], together: Any | None) -> list[T]:
    """What any of the ranks that go `together` found, for they must go forward and backward equally often."""
    return list(found) if together is None else [x for part in told_by_all(list(found), together) for x in part]


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

    Raises RankError where ranks measure other symmetries or parameters, or where one of them ended.
    """
    wanted = {s.name: s.fingerprint() for s in syms}
    wanted |= {f"parameter {n}": f"{tuple(need.shape)} {need.dtype} {need.entries}" for n, need in needs.items()}
    refuse_other(wanted, process_group, "symmetries to measure", SAME_SYMMETRIES)
    last = max(max(each, default=-1) for each in told_by_all(list(groups), process_group))
    with lost_ranks_named():
        found = {k: _added_group(groups.get(k), syms, needs, process_group) for k in range(last + 1)}
        totals = _added_totals(totals, needs, process_group)
    return {k: group for k, group in found.items() if group.samples}, totals


def _added_totals(totals: Totals, needs: dict[str, Need], process_group: Any) -> Totals:
    """The totals over all ranks."""
    whole = Totals()
    for name, need in sorted(needs.items()):
        gradient = {name: _added(totals.gradient.get(name), need, process_group)}
        whole.plus(gradient, {name: _added(totals.squares.get(name), need, process_group)} if need.entries else {})
    return whole


def _added_group(mine: Sums | None, syms: SymmetrySet, needs: dict[str, Need], process_group: Any) -> Sums:
    """One group over all ranks."""
    own, added = mine or Sums.zeros(syms, needs), Sums.zeros(syms, needs)
    gradient, squares = PackedTensors(own.packed_gradient), PackedTensors(own.packed_squares)
    for name, need in sorted(needs.items()):
        added.packed_gradient[name] = packed(_added(gradient.get(name), need, process_group))
        if need.entries:
            added.packed_squares[name] = packed(_added(squares.get(name), need, process_group))
    for symmetry, legs in sorted(added.second.items()):
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
