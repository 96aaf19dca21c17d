"""The losses of the steps from one recorded step to the next, as a few numbers that a row of the log carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class NotedLosses:
    """What the losses of some steps were.

    Attributes:
        steps: how many were noted.
        mean: of them.
        spread: their standard deviation.
        lowest, highest: of them.

    Example:
        >>> NotedLosses.of([1.0, torch.tensor(3.0)])
        NotedLosses(steps=2, mean=2.0, spread=1.0, lowest=1.0, highest=3.0)
    """

    steps: int
    mean: float
    spread: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, losses: Sequence[float | Tensor]) -> NotedLosses:
        """Of at least one loss; those on a device come to the host in one transfer."""
        there = [x.reshape(()) for x in losses if isinstance(x, Tensor)]
        alike = len({(t.device, t.dtype) for t in there}) == 1
        numbers = torch.stack(there).double().tolist() if alike else [float(t) for t in there]
        values = np.array([float(x) for x in losses if not isinstance(x, Tensor)] + numbers)
        with np.errstate(invalid="ignore", over="ignore"):
            return cls(len(values), *(float(f(values)) for f in (np.mean, np.std, np.min, np.max)))

    def line(self) -> dict[str, Any]:
        """As it stands in a row."""
        return asdict(self)


COLUMNS = tuple(f.name for f in fields(NotedLosses))
"""The columns that an array of these has, `[T, 5]`."""


def noted_row(row: dict[str, Any]) -> list[float]:
    """The columns of one row of a log: those of its `losses`, else its own loss; NaN where it has none."""
    told = row.get("losses")
    if isinstance(told, dict):
        return [np.nan if told.get(name) is None else float(told[name]) for name in COLUMNS]
    loss = row.get("loss")
    return [1.0, loss, 0.0, loss, loss] if loss is not None else [np.nan] * len(COLUMNS)
