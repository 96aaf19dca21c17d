"""The torch objects inside the wrappers that training frameworks put around them: the one place that knows wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from noetherflow.errors import DataError

INNER = ("_original_module", "_orig_mod")
"""Submodules under which Lightning Fabric and `torch.compile` keep the module they wrap."""
WRAPPING = frozenset({*INNER, "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Parts of a parameter's name that a wrapper somewhere inside the model puts there."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module whose parameter names the symmetries use.

    Args:
        model: a module, maybe inside DistributedDataParallel, DataParallel, `torch.compile`, Lightning Fabric or what
            `accelerator.prepare` returns, in any order and number.

    Returns:
        The innermost module; the model itself where nothing wraps it.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(torch.compile(net))) is net
        True
    """
    while not isinstance(model, torch.jit.ScriptModule):
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
            continue
        inside = next((m for name in INNER if (m := model._modules.get(name)) is not None), None)
        if inside is None:
            break
        model = inside
    return model


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers inside the model add.

    Example:
        >>> plain_name("blocks.0._orig_mod.weight")
        'blocks.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPING)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside wrappers that keep it as `.optimizer` (accelerate, Lightning).

    Raises:
        DataError: there is no torch optimiser inside.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        if not hasattr(optimizer, "optimizer"):
            raise DataError(f"expected a torch optimiser, got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer
