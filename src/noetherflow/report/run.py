"""The page of one training run: what moved the charges, how far equilibrium is, in figures and plain words."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.core.printing import show
from noetherflow.errors import require
from noetherflow.monitor.rundata import RunData
from noetherflow.report.page import Figure, Section, write_page

REPORT_NAME = "report.html"
POINTS = 1500
CELLS = 200_000
COLUMNS = 50
BINS = 100
CURVES = 12
FEW = 5
NAMES = {
    "second_order": "step size and noise",
    "decay": "weight decay",
    "momentum": "momentum memory",
    "preconditioner": "preconditioner",
    "gradient": "gradient (zero for an exact symmetry at one learning rate)",
    "other": "first-order part of the update",
    "outside": "moved between the watched steps, by other hands than this optimiser",
}
COLOURS = {
    "second_order": "#009E73",
    "decay": "#D55E00",
    "momentum": "#0072B2",
    "preconditioner": "#CC79A7",
    "gradient": "#777777",
    "other": "#E69F00",
    "outside": "#8C564B",
}
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#333333"]
MAPS = {
    "distance": ("distance to equilibrium |λ*|", False),
    "steps": ("steps to equilibrium (log10)", True),
    "growth": ("growth by step size and noise, per norm", False),
    "norm": ("norm θᵀ|A|θ (log10)", True),
    "check": ("violation of invariance (log10)", True),
}


def write_run_report(run_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a training run: one interactive HTML file that needs no network.

    Args:
        run_dir: the `run_dir` of the run's ledger.
        path: where to write, `RUN_DIR/report.html` by default.

    Returns:
        The path written.

    Raises:
        DataError: when the folder holds no log with a recorded step.
        MissingExtraError: without plotly or jinja2.
    """
    data = RunData.load(run_dir)
    events = sorted([*data.events, *data.spikes()], key=lambda e: e["step"])
    sections = [
        Section("Summary", "\n\n".join(summary(data, events)), facts=_facts(data, events)),
        *_charges(data),
        *_equilibrium(data),
        *_layers(data),
        *_norms(data),
        Section("Loss, learning rate and events", _event_text(events), figures=_training(data, events)),
    ]
    if events:
        sections.append(Section("Events", table=[_event_row(e) for e in events[:200]]))
    name = Path(run_dir).resolve().name
    subtitle = f"{data.header['optimizer']}, started {data.started.replace('T', ' ')}, {len(data.steps):,} steps"
    return write_page(path or Path(run_dir) / REPORT_NAME, f"Ledger of {name}", sections, subtitle)


def summary(data: RunData, events: list[dict[str, Any]]) -> list[str]:
    """The run in plain words, one paragraph per topic."""
    out = [] if data.families else ["No symmetry is watched."]
    for i, family in enumerate(data.families):
        charge, norm = data.family["charge"][:, i], data.family["norm"][:, i]
        end = charge[-1] + data.family["change"][-1, i]
        if not np.isfinite(end):
            out.append(
                f"`{family}`: the charge began at {show(charge[0])} and is not finite at the end: the run diverged."
            )
            continue
        text = f"`{family}`: the charge went from {show(charge[0])} to {show(float(end))}"
        causes = data.causes(i)
        total = sum(abs(v) for v in causes.values())
        if total > 1e-12 * float(np.nan_to_num(np.abs(norm)).max()):
            main, value = next(iter(causes.items()))
            text += f". Largest cause: {NAMES[main]} ({show(value)} over the recorded steps"
            others = [f"{NAMES[k]} {show(v)}" for k, v in list(causes.items())[1:4] if abs(v) > 1e-3 * total]
            out.append(text + (f"; {', '.join(others)})." if others else ")."))
        else:
            out.append(text + ": conserved.")
    return out + _equilibrium_words(data) + _norm_words(data) + _event_words(events)


def _equilibrium_words(data: RunData) -> list[str]:
    if data.estimates and not data.header.get("equilibrium", "distance" in data.estimates):
        return ["The noise equilibrium is not predicted for this optimiser: the theory covers SGD with momentum."]
    if "distance" not in data.estimates:
        return []
    two_sided = ~data.one_sided
    distance, steps = data.estimates["distance"][-1], data.estimates["steps"][-1]
    known = np.flatnonzero(two_sided & np.isfinite(distance))
    if not known.size:
        return []
    far, near = known[np.argmax(distance[known])], known[np.argmin(distance[known])]

    def place(i: int, word: str) -> str:
        return f"`{data.symmetries[i]}` is {word} its noise equilibrium (|λ*| = {show(float(distance[i]))})"

    text = f"At the end {place(near, 'nearest to')}"
    text += f"; {place(far, 'farthest from')}." if near != far else "."
    slow = steps[known][np.isfinite(steps[known])]
    if slow.size:
        text += f" With the present noise and learning rate the way there takes {show(float(np.median(slow)))} steps"
        text += " (median over layers; until the distance has fallen to 37 %)."
    return [text]


def _norm_words(data: RunData) -> list[str]:
    if not data.estimates or not data.one_sided.any():
        return []
    norm = data.estimates["norm"][:, data.one_sided]
    ratio = np.sqrt(norm[-1] / norm[0])
    names = np.array(data.symmetries)[data.one_sided]
    if not np.isfinite(ratio).all():
        return []
    most = int(np.argmax(np.abs(np.log(ratio))))
    text = f"The norm of `{names[most]}` changed by a factor of {show(float(ratio[most]))}"
    if len(names) > 1:
        text += f", the most of {len(names)} scale-invariant weights (factors {show(float(ratio.min()))} to "
        text += f"{show(float(ratio.max()))})"
    words = data.header.get("effective_lr", "")
    return [text + (f"; {words}." if words else ".")]


def _event_words(events: list[dict[str, Any]]) -> list[str]:
    counts = {kind: sum(e["event"] == kind for e in events) for kind in dict.fromkeys(e["event"] for e in events)}
    if not counts:
        return ["No spikes, skipped steps or other events."]
    return ["Events: " + ", ".join(f"{n} × {kind}" for kind, n in counts.items()) + "."]


def _facts(data: RunData, events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.abs(data.family["residual"] / data.family["norm"]))
    facts: list[tuple[str, Any]] = [
        ("steps", int(data.steps[-1]) + 1),
        ("families", len(data.families)),
        ("symmetries", len(data.symmetries)),
        ("largest residual / norm", float(ratio.max(initial=0))),
    ]
    if "check" in data.estimates:
        facts.append(("largest violation of invariance", float(np.nan_to_num(data.estimates["check"]).max(initial=0))))
    if np.isfinite(data.loss).any():
        facts.append(("last loss", float(data.loss[np.isfinite(data.loss)][-1])))
    return facts + [("events", len(events))]


def _charges(data: RunData) -> list[Section]:
    if not data.families:
        return []
    return [
        Section(
            "Charges and what moves them",
            "Above: the charge `C = θᵀAθ`, summed over the symmetries of one family. Below: what one step adds to it, "
            "split exactly into its causes and averaged over bins of steps. Choose the family with the buttons.",
            figures=[Figure(charges_figure(data), "Charge and its drift per step, by cause.")],
        )
    ]


def charges_figure(data: RunData) -> Any:
    """Charge over steps and, below, the mean drift per step in bins, stacked by cause; buttons choose the family."""
    go: Any = require("plotly.graph_objects", "report")
    thin = _thin(len(data.steps))
    edges = np.unique(np.linspace(0, len(data.steps), min(BINS, len(data.steps)) + 1).astype(int))
    centres = [float(data.steps[a:b].mean()) for a, b in itertools.pairwise(edges)]
    figure = go.Figure()
    owners: list[int] = []
    for i, _ in enumerate(data.families):
        line = {"color": "#1c2430", "width": 2}
        charge = data.family["charge"][thin, i]
        figure.add_trace(go.Scatter(x=data.steps[thin], y=charge, name="charge C", line=line, showlegend=False))
        owners.append(i)
        for name in data.causes(i):
            entry = data.family[name][:, i]
            means = [finite_mean(entry[a:b]) for a, b in itertools.pairwise(edges)]
            bar = go.Bar(x=centres, y=means, name=NAMES[name], marker_color=COLOURS[name], yaxis="y2", legendrank=1)
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
        **_layout(560),
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


def _thin(count: int, limit: int = POINTS) -> np.ndarray:
    """At most `limit` positions out of `count`, evenly spaced from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite values, NaN without any."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _equilibrium(data: RunData) -> list[Section]:
    chosen = np.flatnonzero(~data.one_sided)
    if "distance" not in data.estimates:
        return []
    distance = data.estimates["distance"][:, chosen]
    known = np.flatnonzero(np.isfinite(distance).any(axis=1))
    if not known.size:
        return []
    order = chosen[np.argsort(-np.nan_to_num(distance[known[-1]]))][:CURVES]
    note = f" The {CURVES} farthest of {chosen.size} are drawn; the heat map has all." if chosen.size > CURVES else ""
    return [
        Section(
            "Distance to the noise equilibrium",
            "The median over coordinates of `|λ*|`: by how much (in log scale) a layer must still be rescaled against "
            "its partner to reach the noise equilibrium, from the running gradient noise."
            f"{note} {_spacing(data.estimate_steps)}",
            figures=[Figure(_curves(data, "distance", order, "|λ*|"), "Distance to equilibrium per layer.")],
        )
    ]


def _layers(data: RunData) -> list[Section]:
    if not data.estimates:
        return []
    go: Any = require("plotly.graph_objects", "report")
    figure, buttons = go.Figure(), []
    present = [k for k in MAPS if k in data.estimates and np.isfinite(data.estimates[k]).any()]
    if not present:
        return []
    rows = list(range(len(data.symmetries)))
    thin = _thin(len(data.estimate_steps), max(COLUMNS, CELLS // (len(rows) * len(present))))
    for k in present:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(np.abs(data.estimates[k][thin])) if MAPS[k][1] else data.estimates[k][thin]
        values = np.where(np.isfinite(values), values, np.nan)
        figure.add_trace(
            go.Heatmap(
                x=data.estimate_steps[thin],
                y=rows,
                z=values.T.astype(np.float32),
                colorscale="Viridis",
                visible=k == present[0],
                hovertemplate="step %{x}<br>%{y}<br>%{z:.4g}<extra></extra>",
            )
        )
        buttons.append(
            {"label": MAPS[k][0], "method": "update", "args": [{"visible": [other == k for other in present]}]}
        )
    layout = _layout(max(300, 110 + 22 * len(rows)))
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1 + 44 / layout["height"], "yanchor": "bottom"}
    labels = {"tickmode": "array", "tickvals": rows, "ticktext": _labels(data.symmetries)}
    figure.update_layout(
        **layout, yaxis=labels | {"autorange": "reversed", "automargin": True, "showgrid": False}, updatemenus=[menu]
    )
    figure.update_layout(margin={"l": 30, "r": 20, "t": 70, "b": 50}, xaxis_rangemode="nonnegative")
    return [
        Section(
            "Layers over time",
            f"Every symmetry against the steps; choose the quantity with the menu. {_spacing(data.estimate_steps)}",
            figures=[Figure(figure, "One row per symmetry.")],
        )
    ]


def _spacing(steps: np.ndarray) -> str:
    """How far apart the estimates are, and what to do about too few."""
    text = "One estimate"
    if len(steps) > 1:
        text = f"{len(steps):,} estimates, {int(np.median(np.diff(steps))):,} steps apart"
    few = ": few for a course in time; a smaller `estimate_every` of the ledger gives more" if len(steps) < FEW else ""
    return f"{text} (`Ledger(..., estimate_every=...)`){few}."


def _norms(data: RunData) -> list[Section]:
    chosen = np.flatnonzero(data.one_sided)
    if not data.estimates or not chosen.size:
        return []
    figures = [Figure(_curves(data, "norm", chosen[:CURVES], "‖W‖²", log=True), "Squared norms.")]
    if np.isfinite(data.estimates["angular"]).any():
        rotation = _curves(data, "angular", chosen[:CURVES], "radians per step")
        thin = _thin(len(data.estimate_steps))
        predicted = np.array([finite_mean(row) for row in data.estimates["angular_predicted"][thin][:, chosen]])
        if (np.nan_to_num(predicted) > 0).any():
            line = {"dash": "dash", "color": "#1c2430"}
            rotation.add_scatter(x=data.estimate_steps[thin], y=predicted, name="rotational equilibrium", line=line)
        figures.append(Figure(rotation, "Angular update per step; dashed: the prediction at stationary norm."))
    return [
        Section(
            "Scale-invariant weights",
            "Weights in front of a normalisation: their norm has no counterweight, grows by `uᵀu` per step, and sets "
            "the effective learning rate.",
            figures=figures,
        )
    ]


def _training(data: RunData, events: list[dict[str, Any]]) -> list[Figure]:
    go: Any = require("plotly.graph_objects", "report")
    thin, known = _thin(len(data.steps)), np.flatnonzero(np.isfinite(data.loss))
    figure = go.Figure()
    if known.size:
        at = known[_thin(len(known))]
        figure.add_scatter(x=data.steps[at], y=data.loss[at], name="loss", line={"color": PALETTE[0]})
    rate = {"color": PALETTE[1], "dash": "dot"}
    figure.add_scatter(x=data.steps[thin], y=data.lr[thin], name="learning rate", yaxis="y2", line=rate)
    for event in events[:50]:
        figure.add_vline(x=event["step"], line={"color": "#999", "width": 1, "dash": "dash"})
    axis2 = {"title": "learning rate", "overlaying": "y", "side": "right", "showgrid": False, "rangemode": "tozero"}
    axis2 |= {"tickmode": "auto", "nticks": 6}
    figure.update_layout(**_layout(340), yaxis={"title": "loss"}, yaxis2=axis2)
    return [Figure(figure, "Loss and learning rate; dashed lines mark events.")]


def _curves(data: RunData, field: str, chosen: np.ndarray, title: str, log: bool = False) -> Any:
    go: Any = require("plotly.graph_objects", "report")
    figure, thin, labels = go.Figure(), _thin(len(data.estimate_steps)), _labels(data.symmetries)
    for k, i in enumerate(chosen):
        colour = {"color": PALETTE[k % len(PALETTE)], "dash": "solid" if k < len(PALETTE) else "dot"}
        values = data.estimates[field][thin, i]
        figure.add_scatter(x=data.estimate_steps[thin], y=values, name=labels[i], line=colour)
    axis = {"title": title} | ({"type": "log", "dtick": "D2"} if log else {})
    figure.update_layout(**_layout(380 + 20 * (len(chosen) // 2)), yaxis=axis, showlegend=True)
    return figure


def _layout(height: int) -> dict[str, Any]:
    return {
        "height": height,
        "template": "plotly_white",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "xaxis": {"title": "step"},
        "legend": {"orientation": "h", "y": -0.16, "x": 0},
        "margin": {"l": 70, "r": 70, "t": 50, "b": 60},
    }


def _labels(names: list[str]) -> list[str]:
    """The names without the dotted prefix that all their paths share, shortened."""
    paths = [word.split(".")[:-1] for name in names for word in name.split() if word[0].isalnum()]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    prefix = ".".join([*(level[0] for level in shared), ""])
    return [_short(" ".join(word.removeprefix(prefix) for word in name.split())) for name in names]


def _short(name: str, limit: int = 48) -> str:
    """Long names keep their beginning and end."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-limit // 2 :]}"


def _event_text(events: list[dict[str, Any]]) -> str:
    return "Dashed lines mark the first 50 events." if len(events) > 50 else ""


def _event_row(event: dict[str, Any]) -> dict[str, Any]:
    details = {k: v for k, v in event.items() if k not in ("kind", "step", "event")}
    text = ", ".join(f"{k.replace('_', ' ')}: {show(v)}" for k, v in details.items())
    return {"step": event["step"], "event": event["event"], "details": text}
