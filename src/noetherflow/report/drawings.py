"""Charts with a line per symmetry: each function draws one of them on given axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.equilibrium.charge_flow import ChargeFlow, norm_of, signed_sum
from noetherflow.equilibrium.regime import Regime
from noetherflow.equilibrium.result import Equilibrium, Settled
from noetherflow.errors import require
from noetherflow.moments.result import GradientMoments, trace
from noetherflow.report import style
from noetherflow.report.labels import chart_labels, more_legs

FLOOR = 1e-16
"""Imbalances below are rounding, and drawn here."""
LEGEND_LINES = 2.4
"""Lines of a chart that its legend takes."""
FEW_DOTS = 4
"""A line with so few dots has large ones."""
MOST_PERCENT = 500.0
"""Bars of drifts end here; beyond, the number is written."""

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
    legend = ax.legend(loc="lower center", ncols=2, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2)
    legend.set(zorder=6, frame_on=True)
    legend.get_frame().set(facecolor="white", edgecolor="none", alpha=1)


def in_words(ax: Any, text: str, title: str = "Nothing to draw", width: int = 62) -> None:
    """Words in place of a picture that would be empty, in lines of `width` characters."""
    ax.set_axis_off()
    ax.set_title(title)
    lines = [textwrap.fill(line, width, subsequent_indent="   ") for line in text.splitlines()]
    ax.text(0.0, 1.0, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=9)


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
    cut = False
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
            ax.annotate(f"sum {total:,.0f} %", (side * MOST_PERCENT, y), (-6 * side, 0), textcoords="offset points",
                        fontsize=7, weight="bold", color="white", zorder=5, va="center",
                        ha="right" if side > 0 else "left")  # fmt: skip
        cut = cut or max(ends[1], -ends[-1]) > MOST_PERCENT
    if regime is not None and not regime.constant:
        low, high = ax.get_xlim()
        ax.axvspan(low, high, color=style.MUTED, alpha=0.3, lw=0, zorder=3, label="not valid")
        ax.set_xlim(low, high)
    for _, label, colour in DRIFT_PARTS:
        ax.barh([0], [0], color=colour, label=label)
    ax.plot([], [], "|", color=style.THEORY, ms=9, mew=2, label="sum")
    ax.axvline(0, color=style.THEORY, lw=0.8)
    label = "change of the charge per 1,000 steps, % of its norm"
    _lines(ax, [row.name for row in rows], f"{label} (bars end at {MOST_PERCENT:g})" if cut else label)
    ax.set_title("What moves the charges")
    _legend(ax)


def times(ax: Any, rows: Sequence[ChargeFlow]) -> None:
    """The relaxation time of each symmetry: median dot, and a line from its fastest to its slowest coordinate."""
    known = []
    for y, row in enumerate(rows):
        own = row.relaxation_steps[row.finite].numpy()
        if not own.size:
            ax.annotate(
                _unsettled(row), (0.02, y), xycoords=("axes fraction", "data"), fontsize=8, va="center", color=style.GD,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
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


def farthest(equilibrium: Equilibrium, most: int) -> list[Settled]:
    """The `most` symmetries with a finite equilibrium that are farthest from it."""
    finite = [s for s in equilibrium if bool(s.finite.any())]
    return sorted(finite, key=lambda s: -float(s.imbalance_now[s.finite].max()))[:most]


def not_shown(equilibrium: Equilibrium) -> str:
    """Which symmetries `farthest` leaves out, as a line below a chart; "" where there are none."""
    names = chart_labels([s.name for s in equilibrium])
    out = [name for name, s in zip(names, equilibrium, strict=True) if not bool(s.finite.any())]
    more = f" and {len(out) - 3} more" if len(out) > 3 else ""
    return f"without equilibrium, not shown: {', '.join(out[:3])}{more}" if out else ""


def in_order(settled: Sequence[Settled], names: Sequence[str]) -> list[Settled]:
    """The same, in the order in which another panel lists its symmetries; those that it does not list come last."""
    place = {name: i for i, name in enumerate(names)}
    return sorted(settled, key=lambda s: place.get(s.name, len(place)))


def imbalances(ax: Any, settled: Sequence[Settled], after: Sequence[Settled] | None = None, left_out: str = "") -> None:
    """Per symmetry the imbalance of every coordinate now as dots; with `after`, those measured after the move. Below,
    a line on what is `left_out`.
    """
    for y, row in enumerate(settled):
        _dots(ax, row.imbalance_now[row.finite], y, style.GD)
    for y, row in enumerate(after or ()):
        _dots(ax, row.imbalance_now[row.finite], y, style.SGD)
    blocks = ", or block of a matrix symmetry" if any(row.charge_now.ndim == 3 for row in settled) else ""
    label = f"imbalance of each coordinate{blocks} (0: at equilibrium)"
    below = "\n".join(text for text in (label, left_out) if text)
    _lines(ax, [row.name for row in settled], below, 0 if after is None else LEGEND_LINES)
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
    x, large = values.numpy(), len(values) <= FEW_DOTS
    jitter = 0.22 * np.sin(7.0 * np.arange(len(x)))
    ax.plot(x, y + jitter, "o", color=colour, ms=5 if large else 3.5, alpha=0.9 if large else alpha, mew=0)


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
