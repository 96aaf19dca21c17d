"""Processes of torch.distributed tell each other what they have, and end together where one of them fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from noetherflow.errors import RankError

T = TypeVar("T")


@contextmanager
def ending_together(ranks: Any | None) -> Iterator[None]:
    """All ranks run the block, and an error on one of them, which the others would wait for, ends it on all.

    Within the block ranks may wait for each other in `told_by_all` only. `ranks`: their process group, None for a
    process on its own.

    Raises RankError, which names the ranks that failed, on those that did not.
    """
    if ranks is None:
        yield
        return
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        _gathered(_Failure(f"{type(error).__name__}: {error}"), ranks)
        raise
    told_by_all(None, ranks)


def told_by_all(mine: T, ranks: Any) -> list[T]:
    """What every rank of the group gives, in their order.

    Raises RankError where one of them failed in `ending_together`, ended, or did not come in time.
    """
    told = _gathered(mine, ranks)
    failed = [f"rank {_rank(k, ranks)} stopped with {x.why}" for k, x in enumerate(told) if isinstance(x, _Failure)]
    if failed:
        raise RankError(f"no rank has a result: {'; '.join(failed)}")
    return told


@dataclass(frozen=True)
class _Failure:
    """What a rank gives in place of its part."""

    why: str


def _gathered(mine: Any, ranks: Any) -> list[Any]:
    each: list[Any] = [None] * dist.get_world_size(ranks)
    with lost_ranks_named():
        dist.all_gather_object(each, mine, group=ranks)
    return each


def _rank(k: int, ranks: Any) -> int:
    """The number, in the whole job, of the rank in a group's place `k`."""
    return k if ranks is dist.group.WORLD else dist.get_global_rank(ranks, k)


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Raises RankError in place of the backend's own error where another rank ended, or did not come in time."""
    try:
        yield
    except RuntimeError as cause:
        backend = isinstance(cause, dist.DistError) or "gloo" in str(cause) or "NCCL" in str(cause)
        if not backend:
            raise
        raise RankError(
            f"another rank ended or did not come within the process group's timeout ({cause}); its own output says why"
        ) from cause


def refuse_other(held: Mapping[str, str], ranks: Any, what: str, remedy: str) -> None:
    """Raises RankError on every rank where one of them holds something else than the first.

    Args:
        held: what this rank holds, by name; numbers are added only between ranks that hold the same.
        ranks: the process group.
        what: the kind of thing, for the message.
        remedy: what to do, for the message.
    """
    first, *others = told_by_all(dict(held), ranks)
    for k, other in enumerate(others, 1):
        names = sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            pair = f"{_rank(0, ranks)} and {_rank(k, ranks)}"
            raise RankError(f"ranks {pair} have other {what}: they differ in {names[:4]}{more}; {remedy}")


SAME_SYMMETRIES = "find them on one rank and send them to all (SymmetrySet.to_json, SymmetrySet.from_json)"
