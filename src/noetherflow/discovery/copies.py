"""Copies of a model in another precision, and what they return as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noetherflow.core.copies import copy_of
from noetherflow.core.inputs import ModelInputs
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap
from noetherflow.discovery.export import uncopyable, untraceable, without_caches
from noetherflow.discovery.outputs import floating_tensors
from noetherflow.errors import DataError

EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps", "norm_eps")
"""Attributes under which normalisation modules keep the constant that keeps them from dividing by zero."""


@dataclass(frozen=True, eq=False)
class ModelCopy:
    """A copy of a model in evaluation mode.

    Attributes:
        model: the copy.
        tensors: its parameters and buffers, by the original's canonical names.
    """

    model: nn.Module
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> ModelCopy:
        """Copy `model` with floating tensors in `dtype`.

        Raises:
            DataError: the model cannot be copied.
        """
        inner = unwrap(model)
        if (why := untraceable(inner) or uncopyable(inner)) is not None:
            raise DataError(why)
        own = {id(t): n for n, t in tensors_of(inner).items()}
        duplicate = without_caches(copy_of(inner).to(dtype).eval())
        copied = tensors_of(duplicate)
        return cls(duplicate, {name: copied[own[id(t)]] for name, t in tensors_of(model).items()})

    def copy_hooks(self, source: nn.Module) -> None:
        """Hooks on the original's parameters (`parameter.register_hook`) work on the copy's gradients too."""
        for name, tensor in tensors_of(source).items():
            for hook in (tensor._backward_hooks or {}).values():
                self.tensors[name].register_hook(hook)


def in_dtype(inputs: ModelInputs, dtype: torch.dtype) -> ModelInputs:
    """The same inputs with floating tensors in `dtype`."""
    return inputs.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def flat_outputs(model: nn.Module, inputs: ModelInputs) -> Tensor:
    """All floating outputs of a model, without a graph, in float64 as one vector."""
    with torch.no_grad():
        return torch.cat([y.double().reshape(-1) for y in floating_tensors(inputs.call(model))])


@dataclass(frozen=True, eq=False)
class EpsSetting:
    """The eps of one normalisation module: an attribute of it, and the value it has."""

    module: nn.Module
    name: str
    value: float


def eps_settings(model: nn.Module) -> tuple[EpsSetting, ...]:
    """The eps of every normalisation module of a model.

    Example:
        >>> [setting.value for setting in eps_settings(nn.Sequential(nn.LayerNorm(2), nn.ReLU()))]
        [1e-05]
    """
    return tuple(
        EpsSetting(module, name, getattr(module, name))
        for module in model.modules()
        for name in EPS_NAMES
        if isinstance(getattr(module, name, None), float)
    )


@contextmanager
def eps_scaled(settings: tuple[EpsSetting, ...], factor: float) -> Iterator[None]:
    """Inside the block every eps is `factor` times its value."""
    try:
        for setting in settings:
            setattr(setting.module, setting.name, factor * setting.value)
        yield
    finally:
        for setting in settings:
            setattr(setting.module, setting.name, setting.value)
