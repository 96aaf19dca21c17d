"""The learning rates of the steps of a run, from whatever says them, and what their course means for slow changes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from noetherflow.errors import DataError

Schedule = LRScheduler | Callable[[int], float] | Sequence[float]
"""A torch scheduler that is stepped after every optimiser step, the rate as a function of the step, or all rates."""
SAME = 1e-6
"""Share by which two learning rates may differ and count as the same."""
BEGINS = 5e-4
"""Share by which the second increment of a warmup may differ from the first: a decay that begins at once bends it."""
PIECES = 500
"""Stretches of steps in each of which a course of learning rates is taken as its mean."""


def rates_of(schedule: Any, steps: int, first: int = 0) -> np.ndarray:
    """The learning rates of so many steps to come.

    Args:
        schedule: a torch scheduler, whose rates go on from where it stands; it and its optimiser stay as they are. Or a
            function from the number of the step in the run to the rate. Or the rates of all steps of the run.
        steps: how many are to come.
        first: the number of the first of them in the run.

    Returns:
        `[steps, groups]` of a scheduler, `[steps, 1]` of the others.

    Raises:
        DataError: a schedule that depends on the loss, ends before the steps do, or has rates that are none.

    Example:
        >>> rates_of(lambda step: 0.1 / (1 + step), 3, first=1).ravel().round(3).tolist()
        [0.05, 0.033, 0.025]
    """
    inner = getattr(schedule, "scheduler", schedule)
    if isinstance(inner, ReduceLROnPlateau):
        raise DataError(
            "schedule: the rates of ReduceLROnPlateau depend on losses to come; give rates as a function of the step"
        )
    if isinstance(inner, LRScheduler):
        rates = _stepped(inner, steps)
    elif callable(schedule):
        rates = np.array([[_number(schedule(k), k)] for k in range(first, first + steps)])
    elif isinstance(schedule, Sequence | np.ndarray | torch.Tensor) and not isinstance(schedule, str):
        if len(schedule) != first + steps:
            told = f"schedule has {len(schedule):,} learning rates, the run {first + steps:,} steps"
            raise DataError(f"{told}: give one rate for each step of the run, and steps=... of it")
        rates = np.array([[_number(rate, k)] for k, rate in enumerate(schedule)][first:])
    else:
        raise DataError(
            "schedule must be a torch LRScheduler, a function from the step to the learning rate, or the learning "
            f"rates of all steps, got {schedule!r:.80}"
        )
    if not (np.isfinite(rates).all() and (rates >= 0).all() and rates.size and rates.max() > 0):
        raise DataError("schedule: learning rates must be finite, not negative, and not all zero")
    return rates


def _number(value: Any, step: int) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as cause:
        raise DataError(f"schedule: the learning rate of step {step:,} must be a number, got {value!r:.80}") from cause


def _stepped(scheduler: LRScheduler, steps: int) -> np.ndarray:
    """The rates of a copy that is stepped along, on an optimiser that has copies of the groups and no weights."""
    idle = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    groups = scheduler.optimizer.param_groups
    idle.param_groups = [{**copy.deepcopy({k: v for k, v in g.items() if k != "params"}), "params": []} for g in groups]
    again = copy.deepcopy(scheduler, {id(scheduler.optimizer): idle})
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(steps):
            rates.append([float(group["lr"]) for group in idle.param_groups])
            if k < steps - 1:
                try:
                    again.step()
                except ValueError as cause:
                    told = f"the schedule {type(scheduler).__name__} ends after {k + 1:,} steps of {steps:,}"
                    raise DataError(f"{told}: give steps={k + 1}") from cause
    return np.array(rates)


@dataclass(frozen=True, eq=False)
class RateCourse:
    """The learning rates of the steps of a run as shares of the largest one, all 1 where they are constant.

    Attributes:
        shares: of each step, between 0 and 1; empty for a constant rate. `[steps]`.
        warmup: steps of its warmup, 0 without one; None where the rates are not known.
    """

    shares: np.ndarray
    warmup: int | None

    @classmethod
    def of(cls, rates: np.ndarray) -> RateCourse:
        """From the learning rates of all steps, `[steps]`.

        Example:
            >>> course = RateCourse.of(np.array([0.25, 0.5, 0.75, 1.0, 1.0, 0.5]))
            >>> course.warmup, round(course.mean, 3)
            (4, 0.667)
        """
        return cls(rates / rates.max(), warmup_of(rates))

    @property
    def known(self) -> bool:
        """Whether somebody gave a schedule."""
        return len(self.shares) > 0

    @property
    def mean(self) -> float:
        """The mean share: a sum over all steps of what is in proportion to the rate, over that at the largest one."""
        return float(self.shares.mean()) if self.known else 1.0

    @property
    def mean_square(self) -> float:
        """The same of what is in proportion to the square of the rate, as what gradient noise adds per step."""
        return float((self.shares**2).mean()) if self.known else 1.0

    @property
    def linear_warmup(self) -> float:
        """The linear warmup whose steps let noise act as much as those up to the largest rate, `3 sum s^2`."""
        return 3 * float((self.shares[: int(np.argmax(self.shares))] ** 2).sum()) if self.known else math.nan

    def pieces(self, steps: float) -> Iterator[tuple[float, float, float]]:
        """Stretches of the first `steps` steps: how long each is, its mean share and its mean squared share."""
        if not self.known:
            yield steps, 1.0, 1.0
            return
        whole = self.shares[: max(1, math.ceil(min(steps, len(self.shares))))]
        for part in np.array_split(whole, min(PIECES, len(whole))):
            yield float(len(part)), float(part.mean()), float((part**2).mean())
        if steps > len(self.shares):
            yield steps - len(self.shares), float(self.shares[-1]), float(self.shares[-1] ** 2)

    def kept(self, decay: float, steps: float) -> tuple[float, float]:
        """What so many steps leave of a square, and gather of what noise adds.

        Args:
            decay: the share of it that weight decay takes in a step at the largest rate.
            steps: how many.

        Returns:
            The share of the first square that is left, and the number of steps at the largest rate without decay whose
            noise would have added as much.
        """
        left, gathered = 1.0, 0.0
        for number, share, square in self.pieces(steps):
            rate = decay * share
            stays = math.exp(-rate * number)
            gathered = gathered * stays + square * (number if rate == 0 else (1 - stays) / rate)
            left *= stays
        return left, gathered


CONSTANT = RateCourse(np.zeros(0), None)
"""A learning rate that stays as it is."""


def warmup_of(rates: np.ndarray) -> int:
    """How many steps the learning rate rises over from the start of a run to its largest value; 0 where it does not.

    The number of the first step at the largest rate, counted from 0; one more where the first step already has one
    increment, as in `min(1, (step + 1) / W)`: both that and `min(1, step / W)` are a warmup of `W` steps.

    Args:
        rates: of all steps of the run. `[steps]`.

    Example:
        >>> warmup_of(np.minimum(1, (np.arange(90) + 1) / 50)), warmup_of(np.minimum(1, np.arange(90) / 50))
        (50, 50)
    """
    peak = int(np.argmax(rates >= rates.max() * (1 - SAME)))
    return warmup_to(peak, float(rates[0]), float(rates[min(1, len(rates) - 1)]))


def warmup_to(peak: int, first: float, second: float) -> int:
    """The same from the step at which the largest rate is reached and the rates of the first two steps."""
    return peak + 1 if peak > 0 and abs(second - 2 * first) < BEGINS * first else peak
