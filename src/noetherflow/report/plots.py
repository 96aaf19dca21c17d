"""`nf.plot(result)`: one picture per kind of result; `result.plot()` calls it.

`DRAWINGS` maps a class to the function that draws it. The functions take the result and return `(figure, axes)`; what
they draw with stands in `drawings.py` and takes axes, so that pages and other figures use it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from noetherflow.analysis import Analysis
from noetherflow.core.shown import Shown
from noetherflow.equilibrium.comparison import Comparison
from noetherflow.equilibrium.flow import Flow
from noetherflow.equilibrium.forecast import Forecast
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import DataError, require
from noetherflow.moments.result import GradientMoments
from noetherflow.monitor.ledger import Ledger
from noetherflow.report import curves, drawings, style
from noetherflow.report.labels import chart_labels
from noetherflow.report.network_map import NetworkMap, draw_map, network_map
from noetherflow.symmetry.symmetry_set import SymmetrySet

ROW = 0.26
"""Height in inches of one line of a chart with a line per symmetry."""


def plot(result: Shown, **options: Any) -> tuple[Any, Any]:
    """Draw a result of the library in the common style.

    A `SymmetrySet` becomes a map of the network, `GradientMoments` the two sides of every symmetry, a `Flow` its drifts
    and times, a `Forecast` its charges, a `Comparison` forecast against training, an `Equilibrium` what moves how far,
    a `Ledger` the charges and what moved them, an `Analysis` four of these.

    Args:
        result: what the library returned.
        **options: of the function of that kind in this module: `collapse` of `plot_symmetries`, `most` of the others.

    Returns:
        The matplotlib figure, and its axes: one, or an array of them. The figure is pyplot's, so a notebook shows it.

    Raises:
        DataError: nothing is known about how to draw such a result.
        MissingExtraError: without matplotlib.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> figure, axes = nf.plot(nf.find_symmetries(net, torch.randn(2, 3)))
        >>> axes.get_xlabel()
        '1 symmetry, a column each'
    """
    for kind, draw in DRAWINGS.items():
        if isinstance(result, kind):
            with style.context():
                figure, axes = draw(result, **options)
                style.fit(figure)
                return figure, axes
    kinds = ", ".join(k.__name__ for k in DRAWINGS)
    raise DataError(f"nf.plot draws {kinds}; got {type(result).__name__}, whose rows to_frame() gives")


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    pyplot: Any = require("matplotlib.pyplot", "report")
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def height_of(lines: int) -> float:
    """The height in inches of a chart with so many lines and a legend."""
    return min(1.3 + ROW * (max(lines, 3) + drawings.LEGEND_LINES), 14.0)


def plot_symmetries(syms: SymmetrySet, *, collapse: bool | None = None) -> tuple[Any, Any]:
    """Modules from input to output against symmetries: which layers share which.

    Args:
        syms: what was found.
        collapse: draw blocks that repeat once, with their number; None does so for more than 36 modules.
    """
    chart: NetworkMap = network_map(syms, collapse)
    labels = 0.07 * max(map(len, chart_labels(chart.modules)), default=0)
    width = 1.7 + labels + max(0.2 * len(chart.columns), 3.0)
    figure, axes = _figure(1, min(width, 15.0), height_of(len(chart.modules)) + 0.5)
    draw_map(axes[0], chart)
    return figure, axes[0]


def plot_moments(moments: GradientMoments, *, most: int = 30) -> tuple[Any, Any]:
    """The mean squared gradient on the + and the - side of the `most` symmetries that are least in balance."""
    sides = drawings.sides_of(moments, most)
    figure, axes = _figure(1, 6.8, height_of(len(sides)))
    drawings.sides(axes[0], sides)
    return figure, axes[0]


def plot_flow(flow: Flow, *, most: int = 30) -> tuple[Any, Any]:
    """The drift of the `most` charges that drift most, by cause, and how long each takes to settle."""
    rows = drawings.fastest(flow.details, most)
    figure, axes = _figure(2, 10.5, height_of(len(rows)))
    drawings.drifts(axes[0], rows, flow.regime)
    drawings.times(axes[1], rows)
    axes[1].tick_params(labelleft=False)
    return figure, axes


def plot_forecast(forecast: Forecast, *, most: int = 8) -> tuple[Any, Any]:
    """The norm of the `most` charges that change most, with bands of two standard errors."""
    figure, axes = _figure(1, 6.8, 4.0)
    curves.forecast(axes[0], forecast, most)
    return figure, axes[0]


def plot_comparison(comparison: Comparison, *, most: int = 8) -> tuple[Any, Any]:
    """Forecast as lines, training as dots, for the `most` charges that changed most."""
    figure, axes = _figure(1, 6.8, 4.0)
    curves.comparison(axes[0], comparison, most)
    return figure, axes[0]


def plot_equilibrium(equilibrium: Equilibrium, *, most: int = 30) -> tuple[Any, Any]:
    """The imbalance of the `most` symmetries farthest from equilibrium now and after the move, and how far it goes."""
    settled = drawings.farthest(equilibrium, most)
    figure, axes = _figure(2, 10.5, height_of(len(settled)))
    if not settled:
        shown = [s for s in equilibrium if s.charge_now.numel()][:most]
        drawings.spectra(axes[0], shown)
        drawings.in_words(axes[1], drawings.without_equilibrium(equilibrium), "Why they do not settle")
        return figure, axes
    drawings.imbalances(axes[0], settled, left_out=drawings.not_shown(equilibrium))
    drawings.factors(axes[1], settled)
    axes[1].tick_params(labelleft=False)
    return figure, axes


def plot_ledger(ledger: Ledger, *, most: int = 4) -> tuple[Any, Any]:
    """The charge of each of the `most` families that moved most, and what its causes have added up to."""
    known = ledger.log_path is not None or ledger.dropped == 0
    courses = curves.courses_of(ledger.records(since=0) if known else ledger.records(), most)
    figure, axes = _figure(max(len(courses), 1), 5.2 * max(len(courses), 1), 3.8)
    for ax, course in zip(axes, courses, strict=False):
        curves.course(ax, course)
    return figure, axes


def plot_analysis(analysis: Analysis, *, most: int = 12) -> tuple[Any, Any]:
    """Four pictures of one analysis: where the charges drift, how long they take, their imbalance, their forecast."""
    pyplot: Any = require("matplotlib.pyplot", "report")
    rows, order = drawings.fastest(analysis.flow.details, most), drawings.fastest(analysis.flow.details, 10**6)
    settled = drawings.in_order(drawings.farthest(analysis.equilibrium, most), [row.name for row in order])
    height = height_of(max(len(rows), len(settled)))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 2 * max(height, 3.2)), layout="constrained")
    drawings.drifts(axes[0, 0], rows, analysis.flow.regime)
    drawings.times(axes[0, 1], rows)
    axes[0, 1].tick_params(labelleft=False)
    if settled:
        drawings.imbalances(axes[1, 0], settled, left_out=drawings.not_shown(analysis.equilibrium))
    else:
        drawings.spectra(axes[1, 0], list(analysis.equilibrium)[:most])
    curves.forecast(axes[1, 1], curves.drawn_forecast(analysis.flow), most=8)
    return figure, axes


DRAWINGS: dict[type[Shown], Callable[..., tuple[Any, Any]]] = {
    SymmetrySet: plot_symmetries,
    GradientMoments: plot_moments,
    Flow: plot_flow,
    Forecast: plot_forecast,
    Comparison: plot_comparison,
    Equilibrium: plot_equilibrium,
    Ledger: plot_ledger,
    Analysis: plot_analysis,
}
"""Who draws what."""
