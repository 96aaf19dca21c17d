"""Copies of a model that share nothing with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noetherflow.core.unwrap import unwrap


def attributes_with_graph(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors with an autograd graph that a model keeps as plain attributes, maybe inside lists or dicts.

    Args:
        model: any module. A feature map that a forward left behind (`self.features = h`) is such a tensor.

    Yields:
        The module that holds it, the name of the attribute, and the tensor.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for tensor in pytree.tree_leaves(value):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    yield module, name, tensor


def copy_of(model: nn.Module, replaced: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model; tensors with a graph that a forward left in attributes are copied without the graph.

    Args:
        model: a module, wrapped or not (`unwrap`).
        replaced: what to put in place of some objects of the model, by the `id` of the object, instead of copies.

    Returns:
        The copy of the module inside the wrappers.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> net.seen = net(torch.ones(1, 2))  # `copy.deepcopy(net)` raises
        >>> copy_of(net).seen.requires_grad
        False
    """
    inner = unwrap(model)
    memo = dict(replaced or {})
    for _, _, tensor in attributes_with_graph(inner):
        memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(inner, memo)
