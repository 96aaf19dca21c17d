"""Curves over steps: forecasts, forecasts against training, and what a ledger has seen, on given axes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from noetherflow.core.progress import telling
from noetherflow.equilibrium.comparison import Comparison
from noetherflow.equilibrium.flow import Flow
from noetherflow.equilibrium.forecast import Forecast
from noetherflow.errors import require
from noetherflow.monitor.books import CAUSES
from noetherflow.monitor.rundata import strides_of
from noetherflow.report import style
from noetherflow.report.labels import chart_labels
from noetherflow.report.words import CAUSE_COLOURS, CAUSE_NAMES

HORIZON, FARTHEST = 3.0, 1_000_000
"""Forecasts that are drawn without being asked for run to this many median relaxation times, and no
farther than so many steps."""
SURE, POINTS, FEW_POINTS = 300, 31, 11
"""Forecasts of more coordinates are drawn without standard errors, each of which takes a forecast per group of samples,
and at few points in place of many."""
SPARSE = 16
"""Forecasts at fewer steps are drawn as dots with a curve through them."""


def _numbers(axis: Any) -> None:
    """Few round ticks on an axis of counts: 2k, 10M."""
    ticker: Any = require("matplotlib.ticker", "report")
    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def drawn_forecast(flow: Flow) -> Forecast:
    """The forecast that pictures show: with standard errors up to `SURE` coordinates."""
    with telling(f"forecasting {_coordinates(flow):,} coordinates for a picture"):
        return flow.forecast(horizon(flow), errors=_coordinates(flow) <= SURE)


def _coordinates(flow: Flow) -> int:
    return sum(r.charge.numel() for r in flow.details)


def horizon(flow: Flow) -> list[int]:
    """Steps of a forecast worth drawing: up to `HORIZON` median relaxation times, fewer of them for large models."""
    own = [r.relaxation_steps[r.finite].flatten().numpy() for r in flow.details]
    known = np.concatenate(own) if own else np.zeros(0)
    end = int(min(HORIZON * np.median(known), FARTHEST)) if known.size else 10_000
    points = POINTS if _coordinates(flow) <= SURE else FEW_POINTS
    return sorted({int(k) for k in np.linspace(0, max(end, 10), points)})


def _norms(values: Tensor) -> np.ndarray:
    return np.asarray(values.flatten(1).norm(dim=1))


def _norm_error(values: Tensor, errors: Tensor) -> np.ndarray:
    """Standard error of the norm over independent coordinates, to first order."""
    v, e = values.flatten(1), errors.flatten(1)
    return np.asarray((v * e).norm(dim=1) / v.norm(dim=1).clamp_min(1e-300))


def forecast(ax: Any, found: Forecast, most: int) -> None:
    """The norms of the `most` charges that change most; steps that are not valid are shaded."""
    names = _largest({n: float((c[-1] - c[0]).norm()) for n, c in found.charges.items()}, most)
    for name, label, colour in zip(names, chart_labels(names), style.CYCLE * 3, strict=False):
        charge = found.charges[name]
        curve = _norms(charge)
        sparse = len(found.steps) < SPARSE
        ax.plot(found.steps, curve, "o" if sparse else "-", ms=3.5, color=colour, label=label)
        if sparse:
            ax.plot(*_smooth(found.steps, curve), color=colour, lw=1.2)
        if name in found.errors:
            spread = 2 * _norm_error(charge, found.errors[name])
            (at, low), (_, high) = (_smooth(found.steps, curve + sign * spread) for sign in (-1, 1))
            ax.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)
    if not all(found.valid):
        until = found.regime.horizon if found.regime.constant else found.steps[0]
        ax.axvspan(until, found.steps[-1], color=style.MUTED, alpha=0.14, lw=0, label="not valid")
    _numbers(ax.xaxis)
    ax.set(xlabel="steps after the measurement", ylabel="norm of the charge", ylim=(0, None))
    sure = "band: 2 s.e." if found.errors else "without standard errors"
    ax.set_title(f"Forecast charges ({sure})")
    style.legend_on_top(ax)


def _smooth(steps: Sequence[int], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A dense curve through a few points that turns nowhere but at them."""
    from scipy.interpolate import PchipInterpolator

    if not 2 < len(steps) < SPARSE:
        return np.asarray(steps), values
    at = np.linspace(steps[0], steps[-1], 200)
    return at, np.asarray(PchipInterpolator(steps, values)(at))


def comparison(ax: Any, found: Comparison, most: int) -> None:
    """How far charges have moved since the first compared step: forecast as lines with bands, measured as dots."""
    moved = {n: abs(found.of(n)[-1].measured - found.of(n)[0].measured) for n in found.names}
    names = _largest(moved, most)
    for name, label, colour in zip(names, chart_labels(names), style.CYCLE * 3, strict=False):
        own = found.of(name)
        start = own[0].measured
        steps, curve = [c.step for c in own], np.array([c.forecast - start for c in own])
        spread = 2 * np.nan_to_num(np.array([c.error for c in own]))
        ax.plot(*_smooth(steps, curve), color=colour, label=label)
        (at, low), (_, high) = (_smooth(steps, curve + sign * spread) for sign in (-1, 1))
        ax.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.plot(steps, [c.measured - start for c in own], "o", color=colour, ms=4)
    ax.plot([], [], "o", color=style.THEORY, ms=4, label="training")
    if found.not_valid:
        first, last = found.not_valid[0], max(c.step for c in found.charges)
        ax.axvspan(max((c.step for c in found.charges if c.step < first), default=first), last, color=style.MUTED,
                   alpha=0.14, lw=0, label="forecast not valid")  # fmt: skip
    _numbers(ax.xaxis)
    ax.set(xlabel="steps after the measurement", ylabel="change of the charge, summed")
    ax.set_title("One measurement (lines) against training (dots)")
    width = int(14.5 * ax.figure.get_figwidth())
    _below(ax, [textwrap.fill(text, width) for text in found.validity()])
    style.legend_on_top(ax)


def _largest(moved: Mapping[str, float], most: int) -> list[str]:
    """The `most` names that moved farthest, in the order given, so that a symmetry has one colour in all pictures."""
    chosen = sorted(moved, key=lambda name: -moved[name])[:most]
    return [name for name in moved if name in chosen]


def _below(ax: Any, reasons: Sequence[str]) -> None:
    """Small lines under the label of the x axis, for which the figure grows."""
    if reasons:
        lines = sum(len(text.splitlines()) for text in reasons)
        ax.figure.set_figheight(ax.figure.get_figheight() + 0.13 * lines)
        ax.annotate("\n".join(reasons), (0.5, 0), (0, -4), xycoords=ax.xaxis.label, textcoords="offset points",
                    fontsize=7, ha="center", va="top", annotation_clip=False)  # fmt: skip


def changes(ax: Any, found: Forecast, measured: Mapping[str, Tensor]) -> None:
    """Measured against forecast change of every coordinate over all steps.

    Args:
        ax: where to draw.
        found: the forecast.
        measured: charges in training by symmetry at the forecast's steps, `[len(steps), *symmetry.shape]`.
    """
    for (name, charges), label, colour in zip(found.charges.items(), chart_labels(list(found.charges)), style.CYCLE * 9,
                                              strict=False):  # fmt: skip
        change = (charges[-1] - charges[0]).flatten().numpy()
        seen = (measured[name][len(found.steps) - 1] - measured[name][0]).flatten().numpy()
        ax.plot(change, seen, "o", color=colour, ms=3.5, alpha=0.7, label=label)
    ends = [*ax.get_xlim(), *ax.get_ylim()]
    ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color=style.MUTED, lw=1, zorder=0)
    ax.set(xlabel="forecast change of charge", ylabel="measured change of charge")
    ax.set_title(f"Every coordinate after {found.steps[-1]:,} steps")
    if len(found.charges) <= len(style.CYCLE):
        style.legend_on_top(ax)


@dataclass(frozen=True, eq=False)
class Course:
    """The charge of one family over recorded steps, and what each cause has added so far.

    Where not every step is recorded, each recorded one counts for the `strides` up to the next, so that the causes add
    up to the change but for what differs in between.
    """

    family: str
    steps: np.ndarray
    charge: np.ndarray
    causes: dict[str, np.ndarray]
    strides: np.ndarray


def courses_of(records: Sequence[dict[str, Any]], most: int) -> list[Course]:
    """The `most` families whose charge changed most for its norm."""
    found: list[tuple[float, Course]] = []
    for family in dict.fromkeys(row["family"] for row in records):
        own = [row for row in records if row["family"] == family]
        charge = np.array([row["charge"] for row in own])
        steps = np.array([row["step"] for row in own])
        strides = strides_of(steps)
        sums = {c: np.nancumsum(strides * np.array([row[c] for row in own], dtype=float)) for c in CAUSES}
        scale = float(np.nanmax([row["norm"] for row in own])) or 1.0
        causes = {c: v for c, v in sums.items() if np.abs(v).max() > 1e-9 * scale}
        course = Course(family, steps, charge, causes, strides)
        found.append((float(np.ptp(np.nan_to_num(charge))) / scale, course))
    return [course for _, course in sorted(found, key=lambda pair: -pair[0])[:most]]


def course(ax: Any, shown: Course) -> None:
    """What a charge has changed by since the first recorded step, and the causes that add up to it."""
    change = shown.charge - shown.charge[0]
    ax.plot(shown.steps, change, color=style.THEORY, lw=1.4, label="change of the charge", zorder=3)
    for cause, values in sorted(shown.causes.items(), key=lambda item: -abs(item[1][-1]))[:4]:
        start = np.concatenate([[0.0], values[:-1]])
        ax.plot(shown.steps, start, color=CAUSE_COLOURS[cause], label=CAUSE_NAMES[cause], lw=3.2, alpha=0.75)
    _numbers(ax.xaxis)
    ax.set(xlabel="step", ylabel="change since the first recorded step")
    sampled = "" if (shown.strides == 1).all() else "\nentries of a recorded step count for all up to the next"
    ax.set_title(f"{shown.family}, steps {int(shown.steps[0]):,} to {int(shown.steps[-1]):,}{sampled}")
    style.legend_on_top(ax)
