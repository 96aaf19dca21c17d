"""The torch objects inside the wrappers that training frameworks put around them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from noetherflow.errors import DataError


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module whose parameter names the symmetries use: without DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside wrappers that keep it as `.optimizer` (accelerate, Lightning)."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        if not hasattr(optimizer, "optimizer"):
            raise DataError(f"expected a torch optimiser, got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer
