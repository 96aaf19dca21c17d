"""Tensors that wait on the disk, or for a move, until something is computed with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LateSource(Protocol):
    """Where the value of a tensor comes from. It is fetched anew whenever it is asked for, and never kept."""

    def read(self) -> Tensor:
        """The value in memory of its own, which the caller may change."""

    def view(self) -> Tensor:
        """The value to look at: mapped from the disk where possible."""


class WaitingTensor(Tensor):
    """A tensor of known shape and dtype whose value is fetched by every operation on it, and forgotten after it.

    So nested dictionaries of tensors larger than memory can be walked through. Results are ordinary tensors. It cannot
    be written in place, since nobody would see the change.

    Attributes:
        source: where its value comes from; one source in several waiting tensors says that they share memory.
    """

    source: LateSource

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, source: LateSource) -> WaitingTensor:
        out: WaitingTensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        out.source = source
        return out

    def __init__(self, *args: Any) -> None:
        """All is done when it is made."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write to a tensor that waits on the disk; take a copy, own_copy(tensor)")
        values, options = tree_map_only(WaitingTensor, lambda t: t.source.view(), (tuple(args), dict(kwargs or {})))
        return func(*values, **options)


def own_copy(tensor: Tensor) -> Tensor:
    """The value of a tensor, waiting or not, in memory of its own."""
    return tensor.source.read() if isinstance(tensor, WaitingTensor) else tensor.detach().clone()


def looked_at(tensor: Tensor) -> Tensor:
    """The value of a tensor, waiting or not, to look at."""
    return tensor.source.view() if isinstance(tensor, WaitingTensor) else tensor


def memory_of(tensor: Tensor) -> object:
    """What is equal for tensors that begin at the same place in memory or on the disk."""
    return tensor.source if isinstance(tensor, WaitingTensor) else tensor.data_ptr()


def replace_tensors(node: Any, new: Callable[[Tensor], Tensor]) -> None:
    """Replace the plain tensors in dictionaries and lists, however nested, in place; parameters and subclasses stay."""
    entries = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if type(node) is list else []
    for key, value in entries:
        if type(value) is Tensor:
            node[key] = new(value)
        else:
            replace_tensors(value, new)
        if isinstance(value, tuple):
            for inside in value:
                replace_tensors(inside, new)
