"""An optimiser under the schedule that somebody gave: its settings at the largest rate, and the course of the rates."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np

from noetherflow.core.held import peak_rate
from noetherflow.core.optimizers import Settings, check_settings
from noetherflow.core.schedule import CONSTANT, RateCourse, Schedule, rates_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.errors import DataError


def at_peak(optimizer: Any, schedule: Schedule | None, steps: int) -> tuple[Any, RateCourse]:
    """The optimiser, or its settings, at the largest learning rates of the schedule; and how these go.

    Args:
        optimizer: a torch optimiser, which stays as it is, or settings.
        schedule: of its rates, None for a constant one. One rate for all groups is that of the first; others keep their
            ratio to it.
        steps: how many are to come.

    Returns:
        A copy of the optimiser with other rates in its groups (or other settings), and the course of the group with
        the most entries.

    Raises:
        DataError: a schedule of another optimiser, or one that `rates_of` refuses.
    """
    if schedule is None:
        return optimizer, CONSTANT
    rates = rates_of(schedule, steps)
    if not hasattr(optimizer, "param_groups"):
        return _settings_at(optimizer, float(rates[:, 0].max())), RateCourse.of(rates[:, 0])
    inner = unwrap_optimizer(optimizer)
    groups, number = inner.param_groups, rates.shape[1]
    if number not in (1, len(groups)):
        raise DataError(f"schedule is of {number} parameter groups, the optimiser has {len(groups)}: it is another's")
    own = [peak_rate(group) for group in groups]
    alike = [rates[:, 0].max() * (lr / own[0] if own[0] > 0 else 1.0) for lr in own]
    peaks = rates.max(0) if number == len(groups) else np.array(alike)
    out = copy.copy(inner)
    plain = [{k: v for k, v in group.items() if k != "initial_lr"} for group in groups]
    out.param_groups = [group | {"lr": float(lr)} for group, lr in zip(plain, peaks, strict=True)]
    largest = int(np.argmax([sum(p.numel() for p in g["params"]) for g in groups])) if number > 1 else 0
    return out, RateCourse.of(rates[:, largest])


def _settings_at(settings: Settings, lr: float) -> Settings:
    """The same settings at another learning rate, groups in their ratio to it."""
    check_settings(settings)
    ratio = lr / settings.lr
    return replace(settings, lr=lr, groups=tuple(replace(g, lr=g.lr * ratio) for g in settings.groups))


def planned_warmup(warmup: int | None, course: RateCourse) -> int | None:
    """The steps of warmup planned, by themselves or in the schedule.

    Raises:
        DataError: the two differ.
    """
    if warmup is not None and course.known and warmup != course.warmup:
        raise DataError(
            f"warmup={warmup:,}, but the schedule has a warmup of {course.warmup:,} steps: give one of them"
        )
    return course.warmup if course.known else warmup
