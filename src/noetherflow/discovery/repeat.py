"""Running a model again and again from the same state: same random draws, same buffers, same attributes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, Tensor, type(None))
"""Kinds of attributes that a forward may replace and that are put back."""


@contextmanager
def same_draws(seed: int, devices: tuple[int, ...] = ()) -> Iterator[None]:
    """Inside the block random numbers of torch, numpy and Python start from `seed`; afterwards they go on as before.

    Args:
        seed: any integer; equal seeds give equal draws.
        devices: indices of the CUDA devices that the model uses.

    Example:
        >>> with same_draws(1):
        ...     first = torch.rand(2)
        >>> with same_draws(1):
        ...     torch.equal(torch.rand(2), first)
        True
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices, enabled=True):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@dataclass(frozen=True, eq=False)
class ModuleState:
    """The attributes of one module at one time: all their names, and the values of plain ones."""

    module: nn.Module
    names: frozenset[str]
    values: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ModelState:
    """What a forward may change besides its result, as it was when the state was taken.

    Attributes:
        buffers: each buffer with a copy of its values.
        modules: the attributes of each module (numbers, text, tensors).
        generators: each random generator that a module keeps, with its state.
    """

    buffers: tuple[tuple[Tensor, Tensor], ...]
    modules: tuple[ModuleState, ...]
    generators: tuple[tuple[torch.Generator, Tensor], ...]

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """The present state of every module inside `model`."""
        held = [(module, vars(module)) for module in model.modules()]
        return cls(
            tuple((buffer, buffer.detach().clone()) for buffer in model.buffers()),
            tuple(
                ModuleState(m, frozenset(own), {n: v for n, v in own.items() if isinstance(v, PLAIN)})
                for m, own in held
            ),
            tuple((v, v.get_state()) for _, own in held for v in own.values() if isinstance(v, torch.Generator)),
        )

    def restore(self) -> None:
        """Put everything back, training flags included, and drop attributes that came since."""
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        for state in self.modules:
            own = vars(state.module)
            for name in own.keys() - state.names:
                del own[name]
            own.update(state.values)
        for generator, state_bytes in self.generators:
            generator.set_state(state_bytes)
