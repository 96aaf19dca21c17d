"""Losses and learning rates of the steps from one recorded step to the next, as a few numbers in a row of the log."""

from __future__ import annotations

import math
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
        steps: how many were noted and are finite.
        mean: of them, NaN without any.
        spread: their standard deviation.
        lowest, highest: of them.
        highest_at: the step of the largest; NaN where it is not known.
        broken_at: the first step whose loss was not finite; NaN without one.

    Example:
        >>> found = NotedLosses.of([1.0, torch.tensor(3.0), float("nan")], [7, 8, 9])
        >>> found.mean, found.highest, found.highest_at, found.broken_at
        (2.0, 3.0, 8.0, 9.0)
    """

    steps: int
    mean: float
    spread: float
    lowest: float
    highest: float
    highest_at: float = math.nan
    broken_at: float = math.nan

    @classmethod
    def of(cls, losses: Sequence[float | Tensor], at: Sequence[int] = ()) -> NotedLosses:
        """Of at least one loss, `at` these steps; those on a device come to the host in one transfer."""
        there = [x.reshape(()) for x in losses if isinstance(x, Tensor)]
        alike = len({(t.device, t.dtype) for t in there}) == 1
        numbers = torch.stack(there).double().tolist() if alike else [float(t) for t in there]
        told = iter(numbers)
        values = np.array([next(told) if isinstance(x, Tensor) else float(x) for x in losses])
        steps = np.array(at if len(at) else [np.nan] * len(values), dtype=float)
        whole = np.isfinite(values)
        broken = math.nan if whole.all() else float(steps[int(np.argmin(whole))])
        if not whole.any():
            return cls(0, math.nan, math.nan, math.nan, math.nan, broken_at=broken)
        known = values[whole]
        with np.errstate(invalid="ignore", over="ignore"):
            mean, spread, lowest, highest = (float(f(known)) for f in (np.mean, np.std, np.min, np.max))
        return cls(len(known), mean, spread, lowest, highest, float(steps[whole][int(known.argmax())]), broken)

    def line(self) -> dict[str, Any]:
        """As it stands in a row."""
        return asdict(self)

    @property
    def known(self) -> bool:
        """Whether any loss was finite."""
        return self.steps > 0 and math.isfinite(self.mean)


@dataclass(frozen=True)
class NotedRates:
    """What the learning rates of some steps were.

    Attributes:
        steps: how many.
        mean: of them.
        highest: of them.
        highest_at: the first step at that.
        first: that of the first of them.

    Example:
        >>> NotedRates.of([0.1, 0.2, 0.2], last=9)
        NotedRates(steps=3, mean=0.16666666666666666, highest=0.2, highest_at=8, first=0.1)
    """

    steps: int
    mean: float
    highest: float
    highest_at: int
    first: float

    @classmethod
    def of(cls, rates: Sequence[float], last: int) -> NotedRates:
        """Of at least one step, each right before the next, to the `last`."""
        highest = max(rates)
        return cls(len(rates), sum(rates) / len(rates), highest, last - len(rates) + 1 + rates.index(highest), rates[0])

    def line(self) -> dict[str, Any]:
        """As it stands in a row."""
        return asdict(self)


RATES = tuple(f.name for f in fields(NotedRates))
"""The columns that an array of these has, `[T, 5]`."""


def rates_row(row: dict[str, Any]) -> list[float]:
    """The columns of one row of a log: those of its `rates`, else NaN."""
    told = row.get("rates")
    if not isinstance(told, dict):
        return [np.nan] * len(RATES)
    return [np.nan if told.get(name) is None else float(told[name]) for name in RATES]


COLUMNS = tuple(f.name for f in fields(NotedLosses))
"""The columns that an array of noted losses has, `[T, 7]`."""

BROKEN, HIGHEST_AT = COLUMNS.index("broken_at"), COLUMNS.index("highest_at")


def noted_row(row: dict[str, Any]) -> list[float]:
    """The columns of one row of a log: those of its `losses`, else its own loss; NaN where it has none."""
    told = row.get("losses")
    if isinstance(told, dict):
        return [np.nan if told.get(name) is None else float(told[name]) for name in COLUMNS]
    loss = row.get("loss")
    if loss is None:
        return [np.nan] * len(COLUMNS)
    return [1.0, loss, 0.0, loss, loss, float(row["step"]), np.nan]
