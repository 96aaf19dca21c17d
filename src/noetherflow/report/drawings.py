"""What the pictures of results consist of: each function draws one thing on given axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core.progress import telling
from noetherflow.equilibrium.charge_flow import ChargeFlow, norm_of, signed_sum
from noetherflow.equilibrium.comparison import Comparison
from noetherflow.equilibrium.flow import Flow
from noetherflow.equilibrium.forecast import Forecast
from noetherflow.equilibrium.regime import Regime
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.errors import require
from noetherflow.moments.result import GradientMoments, trace
from noetherflow.monitor.books import CAUSES
from noetherflow.monitor.rundata import strides_of
from noetherflow.report import style
from noetherflow.report.labels import chart_labels, more_legs
from noetherflow.report.words import CAUSE_COLOURS, CAUSE_NAMES

FLOOR = 1e-16
"""Imbalances below are rounding, and drawn here."""
LEGEND_LINES = 2.4
"""Lines of a chart that its legend takes."""
MOST_PERCENT = 500.0
"""Bars of drifts end here; beyond, the number is written."""
HORIZON, FARTHEST = 3.0, 1_000_000
"""Forecasts that are drawn without being asked for run to this many median relaxation times, and no
farther than so many steps."""
SURE, POINTS, FEW_POINTS = 300, 31, 11
"""Forecasts of more coordinates are drawn without standard errors, each of which takes a forecast per group of samples,
and at few points in place of many."""
SPARSE = 16
"""Forecasts at fewer steps are drawn as dots with a curve through them."""

DRIFT_PARTS = (
    ("decay", "weight decay", style.GD),
    ("noise", "gradient noise", style.SDE),
    ("step_size", "step along the mean", style.ACCENT),
)
"""Fields of a `ChargeFlow`, what they are called, and their colours."""


def _lines(ax: Any, names: Sequence[str], xlabel: str, room: float = LEGEND_LINES) -> None:
    """One horizontal line per name, the first on top, and below them room for a legend that covers no line."""
    ax.set_yticks(range(len(names)), chart_labels(names), fontsize=8)
    ax.set_ylim(max(len(names), 3) - 0.4 + room, -0.6)
    ax.set_xlabel("\n".join(text for text in (xlabel, more_legs(names)) if text))


def _legend(ax: Any) -> None:
    """A legend in the room that `_lines` leaves."""
    ax.legend(loc="lower center", ncols=2, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2)


def in_words(ax: Any, text: str, title: str = "Nothing to draw", width: int = 62) -> None:
    """Words in place of a picture that would be empty, in lines of `width` characters."""
    ax.set_axis_off()
    ax.set_title(title)
    lines = [textwrap.fill(line, width, subsequent_indent="   ") for line in text.splitlines()]
    ax.text(0.0, 1.0, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=9)


def _numbers(axis: Any) -> None:
    """Few round ticks on an axis of counts: 2k, 10M."""
    ticker: Any = require("matplotlib.ticker", "report")
    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def _log(axis: Any, values: Iterable[float]) -> None:
    """Logarithmic where the values span more than a factor of 20."""
    known = [v for v in values if v > 0 and math.isfinite(v)]
    if known and max(known) > 20 * min(known):
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")


@dataclass(frozen=True)
class Sides:
    """The mean squared gradient on the two sides of a symmetry with standard errors; a side without legs is 0."""

    name: str
    plus: float
    minus: float
    plus_error: float
    minus_error: float


def sides_of(moments: GradientMoments, most: int) -> list[Sides]:
    """The sides of the `most` symmetries with the largest ratio between them."""
    found = []
    for name, legs in moments.second.items():
        labels = moments.legs.get(name, ("+",) * len(legs))
        values = [_by_side(labels, group.second[name]) for group in (moments, *moments.groups)]
        (plus, minus), groups = values[0], np.array(values[1:])
        errors = groups.std(0, ddof=1) / math.sqrt(len(groups)) if len(groups) > 1 else np.zeros(2)
        found.append(Sides(name, plus, minus, float(errors[0]), float(errors[1])))
    return sorted(found, key=lambda s: -abs(math.log((s.plus or FLOOR) / (s.minus or FLOOR))))[:most]


def _by_side(labels: Sequence[str], legs: Sequence[Tensor]) -> tuple[float, float]:
    traces = [(label[:1], float(trace(leg))) for label, leg in zip(labels, legs, strict=True)]
    return sum(v for sign, v in traces if sign != "-"), sum(v for sign, v in traces if sign == "-")


def sides(ax: Any, rows: Sequence[Sides]) -> None:
    """Two dots per symmetry, joined: the gradient noise that pulls on the + side and on the - side."""
    for y, row in enumerate(rows):
        pair = [v for v in (row.plus, row.minus) if v > 0]
        ax.plot([min(pair, default=1), max(pair, default=1)], [y, y], color=style.MUTED, lw=1, zorder=1)
        for value, error, colour in ((row.plus, row.plus_error, style.SGD), (row.minus, row.minus_error, style.GD)):
            if value > 0:
                ax.errorbar(value, y, xerr=2 * error, fmt="o", color=colour, ms=5, capsize=2, zorder=2)
    for colour, label in ((style.SGD, "+ side"), (style.GD, "− side")):
        ax.plot([], [], "o", color=colour, label=label)
    _lines(ax, [row.name for row in rows], "mean squared per-sample gradient (bars: 2 s.e.)")
    _log(ax.xaxis, [v for row in rows for v in (row.plus, row.minus)])
    ax.set_title("Gradient noise on both sides of each symmetry")
    _legend(ax)


def fastest(details: Sequence[ChargeFlow], most: int) -> list[ChargeFlow]:
    """The `most` flows with the largest drift for their charge."""
    return sorted(details, key=lambda r: -norm_of(r.drift) / (norm_of(r.charge) or 1.0))[:most]


def drifts(ax: Any, rows: Sequence[ChargeFlow], regime: Regime | None = None) -> None:
    """Signed bars per symmetry: how weight decay, noise and step size change its charge, in percent of its norm.

    Bars end at `MOST_PERCENT`, where the number is written; with a `regime` whose drift is not valid all is greyed.
    """
    for y, row in enumerate(rows):
        ends, scale = {1: 0.0, -1: 0.0}, 1e5 / (norm_of(row.charge) or 1.0)
        for field, _, colour in DRIFT_PARTS:
            width = scale * signed_sum(getattr(row, field))
            side = 1 if width >= 0 else -1
            start, end = np.clip([ends[side], ends[side] + width], -MOST_PERCENT, MOST_PERCENT)
            ax.barh(y, end - start, left=start, color=colour, height=0.6)
            ends[side] += width
        total = sum(ends.values())
        ax.plot(np.clip(total, -MOST_PERCENT, MOST_PERCENT), y, "|", color=style.THEORY, ms=11, mew=2)
        if abs(total) > MOST_PERCENT:
            side = 1 if total > 0 else -1
            ax.annotate(f"{total:,.0f} %", (ends[-side], y), (-8 * side, 0), textcoords="offset points", fontsize=7,
                        va="center", ha="right" if side > 0 else "left")  # fmt: skip
    if regime is not None and not regime.constant:
        ax.axvspan(*ax.get_xlim(), color=style.MUTED, alpha=0.3, lw=0, zorder=3, label="not valid")
    for _, label, colour in DRIFT_PARTS:
        ax.barh([0], [0], color=colour, label=label)
    ax.plot([], [], "|", color=style.THEORY, ms=9, mew=2, label="sum")
    ax.axvline(0, color=style.THEORY, lw=0.8)
    _lines(ax, [row.name for row in rows], "change of the charge per 1,000 steps, % of its norm")
    ax.set_title("What moves the charges")
    _legend(ax)


def times(ax: Any, rows: Sequence[ChargeFlow]) -> None:
    """The relaxation time of each symmetry: median dot, and a line from its fastest to its slowest coordinate."""
    known = []
    for y, row in enumerate(rows):
        own = row.relaxation_steps[row.finite].numpy()
        if not own.size:
            ax.annotate(
                _unsettled(row), (0.02, y), xycoords=("axes fraction", "data"), fontsize=8, va="center", color=style.GD
            )
            continue
        ax.plot([own.min(), own.max()], [y, y], color=style.SGD, lw=3, alpha=0.35, solid_capstyle="round")
        ax.plot(np.median(own), y, "o", color=style.SGD, ms=5)
        known += [float(own.min()), float(own.max())]
    _log(ax.xaxis, known)
    _lines(ax, [row.name for row in rows], "steps until a deviation is down to 37 %")
    if not known:
        ax.set_xticks([])
    ax.set_title("How long each takes (dot: median)")


def _unsettled(row: ChargeFlow) -> str:
    """Why a symmetry has no relaxation time: for general_linear one direction without equilibrium is enough."""
    return "never settles" if row.charge.ndim == 1 else "not in every direction"


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
    names = sorted(found.charges, key=lambda n: -float((found.charges[n][-1] - found.charges[n][0]).norm()))[:most]
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
    ax.legend(loc="best")


def _smooth(steps: Sequence[int], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A dense curve through a few points that turns nowhere but at them."""
    from scipy.interpolate import PchipInterpolator

    if not 2 < len(steps) < SPARSE:
        return np.asarray(steps), values
    at = np.linspace(steps[0], steps[-1], 200)
    return at, np.asarray(PchipInterpolator(steps, values)(at))


def comparison(ax: Any, found: Comparison, most: int) -> None:
    """Forecast as lines with bands, measured charges as dots."""
    moved = {n: abs(found.of(n)[-1].measured - found.of(n)[0].measured) for n in found.names}
    names = sorted(moved, key=lambda n: -moved[n])[:most]
    for name, label, colour in zip(names, chart_labels(names), style.CYCLE * 3, strict=False):
        own = found.of(name)
        steps, curve = [c.step for c in own], np.array([c.forecast for c in own])
        spread = 2 * np.nan_to_num(np.array([c.error for c in own]))
        ax.plot(*_smooth(steps, curve), color=colour, label=label)
        (at, low), (_, high) = (_smooth(steps, curve + sign * spread) for sign in (-1, 1))
        ax.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.plot(steps, [c.measured for c in own], "o", color=colour, ms=4)
    ax.plot([], [], "o", color=style.THEORY, ms=4, label="training")
    if found.not_valid:
        first, last = found.not_valid[0], max(c.step for c in found.charges)
        ax.axvspan(max((c.step for c in found.charges if c.step < first), default=first), last, color=style.MUTED,
                   alpha=0.14, lw=0, label="forecast not valid")  # fmt: skip
    _numbers(ax.xaxis)
    reasons = [textwrap.fill(text, 100) for text in found.validity()]
    ax.set_xlabel("\n".join(["steps after the measurement", *reasons]), fontsize=7 if reasons else None)
    ax.set_ylabel("charge, summed over coordinates")
    ax.set_title("One measurement (lines) against training (dots)")
    ax.legend(loc="best")


def changes(ax: Any, found: Forecast, measured: Mapping[str, Tensor]) -> None:
    """Measured against forecast change of every coordinate over all steps.

    Args:
        ax: where to draw.
        found: the forecast.
        measured: charges in training by symmetry at the forecast's steps, `[len(steps), *symmetry.shape]`.
    """
    for (name, charges), colour in zip(found.charges.items(), style.CYCLE * 9, strict=False):
        change = (charges[-1] - charges[0]).flatten().numpy()
        seen = (measured[name][len(found.steps) - 1] - measured[name][0]).flatten().numpy()
        ax.plot(change, seen, "o", color=colour, ms=3.5, alpha=0.7)
    ends = [*ax.get_xlim(), *ax.get_ylim()]
    ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color=style.MUTED, lw=1, zorder=0)
    ax.set(xlabel="forecast change of charge", ylabel="measured change of charge")
    ax.set_title(f"Every coordinate after {found.steps[-1]:,} steps")


def farthest(equilibrium: Equilibrium, most: int) -> list[Settled]:
    """The `most` symmetries with a finite equilibrium that are farthest from it."""
    finite = [s for s in equilibrium if bool(s.finite.any())]
    return sorted(finite, key=lambda s: -float(s.imbalance_now[s.finite].max()))[:most]


def in_order(settled: Sequence[Settled], names: Sequence[str]) -> list[Settled]:
    """The same, in the order in which another panel lists its symmetries; those that it does not list come last."""
    place = {name: i for i, name in enumerate(names)}
    return sorted(settled, key=lambda s: place.get(s.name, len(place)))


def imbalances(ax: Any, settled: Sequence[Settled], after: Sequence[Settled] | None = None) -> None:
    """Per symmetry the imbalance of every coordinate now as dots; with `after`, those measured after the move."""
    for y, row in enumerate(settled):
        _dots(ax, row.imbalance_now[row.finite], y, style.GD)
    for y, row in enumerate(after or ()):
        _dots(ax, row.imbalance_now[row.finite], y, style.SGD)
    _lines(
        ax,
        [row.name for row in settled],
        "imbalance of each coordinate (0: at equilibrium)",
        0 if after is None else LEGEND_LINES,
    )
    ax.set_xlim(-0.03, 1.03)
    ax.set_title("How far from equilibrium")
    if after is not None:
        for colour, label in ((style.GD, "before"), (style.SGD, "after the move, measured again")):
            ax.plot([], [], "o", color=colour, label=label)
        ax.legend(loc="lower center", ncols=2)


def spectra(ax: Any, rows: Sequence[Settled]) -> None:
    """Per symmetry what the squared norm of the + side has over that of the − side, coordinate by coordinate (in the
    directions of its eigenvectors for general_linear): now, and after the move as far as it settles.
    """
    for y, row in enumerate(rows):
        _dots(ax, _spectrum(row.charge_now), y - 0.14, style.GD, 0.9)
        _dots(ax, _spectrum(row.charge), y + 0.14, style.SGD, 0.9)
    ax.axvline(0, color=style.MUTED, lw=1)
    _lines(ax, [row.name for row in rows], "squared norm of the + side less that of the − side, each direction")
    for colour, label in ((style.GD, "now"), (style.SGD, "moved as far as it settles")):
        ax.plot([], [], "o", color=colour, label=label)
    ax.set_title("How unequal the two sides are")
    _legend(ax)


def _spectrum(charge: Tensor) -> Tensor:
    """The charge's coordinates, of matrices the eigenvalues."""
    return torch.linalg.eigvalsh(charge).flatten() if charge.ndim == 3 else charge.flatten()


def without_equilibrium(equilibrium: Equilibrium) -> str:
    """Why there is nothing to draw where no symmetry has a finite equilibrium."""
    own = [f"{label}: {s.reason or s.classification}" for label, s in _labelled(equilibrium)]
    return "\n".join(["No symmetry has a finite equilibrium:", *own])


def _labelled(equilibrium: Equilibrium) -> list[tuple[str, Settled]]:
    settled = list(equilibrium)[:12]
    return list(zip(chart_labels([s.name for s in settled]), settled, strict=True))


def _dots(ax: Any, values: Tensor, y: float, colour: str, alpha: float = 0.55) -> None:
    """A thin cloud of dots on one line."""
    x = values.numpy()
    jitter = 0.22 * np.sin(7.0 * np.arange(len(x)))
    ax.plot(x, y + jitter, "o", color=colour, ms=3.5, alpha=alpha, mew=0)


def factors(ax: Any, settled: Sequence[Settled]) -> None:
    """Per symmetry the factors by which the move stretches its coordinates or directions."""
    values: list[float] = []
    for y, row in enumerate(settled):
        e = row.element[row.finite]
        spectrum = e if row.element.ndim == 1 else torch.linalg.svdvals(e).flatten()
        _dots(ax, spectrum, y, style.OTHER)
        values += spectrum.tolist()
    ax.axvline(1, color=style.MUTED, lw=1)
    _lines(ax, [row.name for row in settled], "factor of the + side; the − side takes its inverse", 0)
    ax.set_xscale("log", base=2)
    ticker: Any = require("matplotlib.ticker", "report")
    ax.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: f"×{value:g}" if value >= 1 else f"÷{1 / value:g}")
    )
    if values:
        low, high = min(values), max(values)
        ax.set_xlim(min(low, 0.5) / 1.1, max(high, 2) * 1.1)
    ax.set_title("How far the move goes")


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
    ax.plot(shown.steps, shown.charge - shown.charge[0], color=style.THEORY, lw=2.2, label="change of the charge")
    for cause, values in sorted(shown.causes.items(), key=lambda item: -abs(item[1][-1]))[:4]:
        start = np.concatenate([[0.0], values[:-1]])
        ax.plot(shown.steps, start, color=CAUSE_COLOURS[cause], label=CAUSE_NAMES[cause])
    _numbers(ax.xaxis)
    ax.set(xlabel="step", ylabel="change since the first recorded step")
    sampled = "" if (shown.strides == 1).all() else "\nentries of a recorded step count for all up to the next"
    ax.set_title(f"{shown.family}, steps {int(shown.steps[0]):,} to {int(shown.steps[-1]):,}{sampled}")
    ax.legend(loc="best")
