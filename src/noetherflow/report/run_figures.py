"""The interactive figures of a run's page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from noetherflow.diagnosis.losses import ToldLosses
from noetherflow.errors import require
from noetherflow.monitor.rundata import RunData
from noetherflow.report.labels import chart_labels
from noetherflow.report.style import CYCLE
from noetherflow.report.words import CAUSE_COLOURS, CAUSE_NAMES

POINTS = 1500
CELLS = 200_000
COLUMNS = 50
BINS = 100
SMOOTH = 50
"""Losses from which on their averages are drawn too."""
INK = "#1c2430"
"""The colour of text and of the main line; the page turns it light in dark mode."""


@dataclass(frozen=True)
class Quantity:
    """One choice of the heat map: what it is called, whether its logarithm is shown, and whether it has a sign."""

    title: str
    log: bool = False
    signed: bool = False


MAPS = {
    "distance": Quantity("distance to equilibrium |λ*|"),
    "steps": Quantity("steps to equilibrium (log₁₀)", log=True),
    "growth": Quantity("growth by step size and noise, per norm", signed=True),
    "norm": Quantity("norm θᵀ|A|θ (log₁₀)", log=True),
    "check": Quantity("violation of invariance (log₁₀)", log=True),
}


def charges_figure(data: RunData) -> Any:
    """Charge over steps and, below, the mean drift per step in bins, stacked by cause; buttons choose the family."""
    go: Any = require("plotly.graph_objects", "report")
    thin = thinned(len(data.steps))
    edges = np.unique(np.linspace(0, len(data.steps), min(BINS, len(data.steps)) + 1).astype(int))
    centres = [float(data.steps[a] + data.steps[b - 1] + data.stride[b - 1]) / 2 for a, b in itertools.pairwise(edges)]
    strides = data.stride
    widths = [float(strides[a:b].sum()) for a, b in itertools.pairwise(edges)]
    figure = go.Figure()
    owners: list[int] = []
    for i, _ in enumerate(data.families):
        line = {"color": INK, "width": 2}
        charge = data.family["charge"][thin, i]
        figure.add_trace(go.Scatter(x=data.steps[thin], y=charge, name="charge C", line=line, showlegend=False))
        owners.append(i)
        for name in data.causes(i):
            entry = data.family[name][:, i]
            means = [finite_mean(entry[a:b]) for a, b in itertools.pairwise(edges)]
            bar = go.Bar(
                x=centres,
                y=means,
                width=widths,
                name=CAUSE_NAMES[name],
                marker_color=CAUSE_COLOURS[name],
                yaxis="y2",
                legendrank=1,
            )
            figure.add_trace(bar)
            owners.append(i)
    for trace, owner in zip(figure.data, owners, strict=True):
        trace.visible = owner == 0
    buttons = [
        {"label": family, "method": "update", "args": [{"visible": [owner == i for owner in owners]}]}
        for i, family in enumerate(data.families)
    ]
    figure.update_xaxes(anchor="y2")
    figure.update_layout(
        **layout_of(560),
        barmode="relative",
        bargap=0,
        yaxis={"title": "charge", "domain": [0.52, 1]},
        yaxis2={"title": "added per step", "domain": [0, 0.44], "exponentformat": "e"},
        updatemenus=[
            {"buttons": buttons, "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.17}
        ]
        if len(buttons) > 1
        else [],
    )
    return figure


def thinned(count: int, limit: int = POINTS) -> np.ndarray:
    """At most `limit` positions out of `count`, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite values, NaN without any."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def layers_figure(data: RunData) -> Any:
    """Every symmetry against the steps as a heat map, with a menu for the quantity; None without estimates."""
    go: Any = require("plotly.graph_objects", "report")
    present = [k for k in MAPS if k in data.estimates and np.isfinite(data.estimates[k]).any()]
    if not present:
        return None
    rows = list(range(len(data.symmetries)))
    thin = thinned(len(data.estimate_steps), max(COLUMNS, CELLS // (len(rows) * len(present))))
    figure = go.Figure()
    for k in present:
        colours: dict[str, Any] = {"colorscale": "RdBu_r", "zmid": 0.0} if MAPS[k].signed else {"colorscale": "Viridis"}
        figure.add_trace(
            go.Heatmap(
                x=data.estimate_steps[thin],
                y=rows,
                z=_values(data, k, thin).T.astype(np.float32),
                visible=k == present[0],
                hovertemplate="step %{x}<br>%{y}<br>%{z:.3g}<extra></extra>",
                colorbar={"thickness": 12},
                **colours,
            )
        )
    choices = [(MAPS[k].title, [other == k for other in present]) for k in present]
    buttons = [{"label": title, "method": "update", "args": [{"visible": shown}]} for title, shown in choices]
    layout = layout_of(max(300, 110 + 22 * len(rows)))
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1 + 44 / layout["height"], "yanchor": "bottom"}
    labels = {"tickmode": "array", "tickvals": rows, "ticktext": chart_labels(data.symmetries)}
    axis = labels | {"autorange": "reversed", "automargin": True, "showgrid": False}
    figure.update_layout(**layout, yaxis=axis, updatemenus=[menu])
    figure.update_layout(margin={"l": 30, "r": 20, "t": 70, "b": 50}, xaxis_rangemode="nonnegative")
    return figure


def _values(data: RunData, name: str, chosen: np.ndarray) -> np.ndarray:
    """What the heat map shows of a quantity at the chosen estimates, NaN where it is not finite."""
    raw = data.estimates[name][chosen]
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log10(np.abs(raw)) if MAPS[name].log else raw
    return np.where(np.isfinite(values), values, np.nan)


def training_figure(data: RunData, events: list[dict[str, Any]]) -> Any:
    """Loss and learning rate over steps, with a dashed line at each of the first 50 events."""
    go: Any = require("plotly.graph_objects", "report")
    thin, known = thinned(len(data.steps)), np.flatnonzero(np.isfinite(data.loss))
    figure = go.Figure()
    if known.size:
        at = known[thinned(len(known))]
        faint = {"color": CYCLE[5], "width": 1}
        figure.add_scatter(x=data.steps[at], y=data.loss[at], name="loss", line=faint, opacity=0.55)
    rate = {"color": CYCLE[1], "dash": "dot"}
    figure.add_scatter(x=data.steps[thin], y=data.lr[thin], name="learning rate", yaxis="y2", line=rate)
    told = ToldLosses.by(data)
    if len(told.rows) > SMOOTH:
        at, means = told.averages(BINS)
        line = {"color": INK, "width": 2}
        figure.add_scatter(x=data.steps[0] + at, y=means, name="loss, averaged", line=line)
    for event in events[:50]:
        figure.add_vline(x=event["step"], line={"color": "#999", "width": 1, "dash": "dash"})
    axis2 = {"title": "learning rate", "overlaying": "y", "side": "right", "showgrid": False, "rangemode": "tozero"}
    axis2 |= {"tickmode": "auto", "nticks": 6}
    axis = _loss_axis(data.loss[known]) if known.size else {"visible": False}
    figure.update_layout(**layout_of(340), yaxis=axis, yaxis2=axis2)
    figure.update_xaxes(range=[int(data.steps[0]), max(data.steps_made, int(data.steps[0]) + 1)])
    return figure


def _loss_axis(losses: np.ndarray) -> dict[str, Any]:
    """The axis of a loss: logarithmic where all losses are positive and span more than a factor of `SPAN`."""
    low, high = float(losses.min()), float(losses.max())
    return {"title": "loss"} | ({"type": "log", "tickformat": "~g"} if 0 < SPAN * low < high else {})


SPAN = 10.0
"""Largest loss over the smallest from which on the axis is logarithmic."""


def curves_figure(data: RunData, field: str, chosen: np.ndarray, title: str, relative: bool = False) -> Any:
    """One line per chosen symmetry; `relative`: as a multiple of its first known value."""
    go: Any = require("plotly.graph_objects", "report")
    figure, thin, labels = go.Figure(), thinned(len(data.estimate_steps)), chart_labels(data.symmetries)
    for k, i in enumerate(chosen):
        colour = {"color": CYCLE[k % len(CYCLE)], "dash": "solid" if k < len(CYCLE) else "dot"}
        values = data.estimates[field][thin, i]
        known = values[np.isfinite(values) & (values > 0)]
        values = values / known[0] if relative and known.size else values
        figure.add_scatter(x=data.estimate_steps[thin], y=values, name=labels[i], line=colour)
    axis = {"title": title, "tickformat": ".6~g", "nticks": 7}
    figure.update_layout(**layout_of(380 + 20 * (len(chosen) // 2)), yaxis=axis, showlegend=True)
    return figure


def layout_of(height: int) -> dict[str, Any]:
    """The common layout of a figure of so many pixels."""
    return {
        "height": height,
        "template": "plotly_white",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "xaxis": {"title": "step"},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "margin": {"l": 70, "r": 70, "t": 50, "b": 60},
    }
