"""The page of one training run: what moved the charges, how far equilibrium is, in figures and plain words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.core.printing import brief
from noetherflow.diagnosis.balance import FARTHEST_PART
from noetherflow.diagnosis.finding import Diagnosis, plain
from noetherflow.diagnosis.losses import ToldLosses
from noetherflow.diagnosis.of_run import diagnose_run
from noetherflow.monitor.rundata import RunData
from noetherflow.report.labels import chart_labels
from noetherflow.report.page import Figure, Section, write_page
from noetherflow.report.run_figures import (
    INK,
    charges_figure,
    curves_figure,
    finite_mean,
    layers_figure,
    thinned,
    training_figure,
)
from noetherflow.report.verdicts import headline, verdicts
from noetherflow.report.words import CAUSE_NAMES, ESTIMATES

REPORT_NAME = "report.html"
CURVES = 12
FEW = 5
PICTURES = {
    "norms": "norms",
    "decay": "norms",
    "balance": "distance",
    "warmup": "loss",
    "batch": "layers",
    "optimiser": "charges",
    "invariance": "layers",
}
"""Which figure shows what a finding of a topic says."""


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
    diagnosis = diagnose_run(data)
    name = Path(run_dir).resolve().name
    title = f"Training run{'' if name == 'run' else f' {name}'}: {headline(diagnosis)}"
    subtitle = f"{data.header['optimizer']}, started {data.started.replace('T', ' ')}, {data.span}"
    return write_page(path or Path(run_dir) / REPORT_NAME, title, _sections(data, events, diagnosis), subtitle)


def _sections(data: RunData, events: list[dict[str, Any]], diagnosis: Diagnosis) -> list[Section]:
    """Verdicts and the loss, then pictures, then words and tables."""
    found = [
        verdicts(diagnosis, PICTURES, tuple(_facts(data, events))),
        Section("Loss, learning rate and events", _event_text(events), figures=_training(data, events)),
        *_charges(data),
        *_equilibrium(data),
        *_norms(data),
        *_layers(data),
        Section("Summary", "\n\n".join(summary(data, events)), table=_ends(data), folded="all layers at the end"),
    ]
    if events:
        found.append(Section("Events", table=[_event_row(e) for e in events[:200]], folded="events"))
    return found


def _ends(data: RunData) -> list[dict[str, Any]]:
    """The last estimates of every symmetry, the farthest from equilibrium first; weights without a counterweight, of
    which there is a norm and no balance, come last.
    """
    shown = [(k, t) for k, t in ESTIMATES if k in data.estimates and np.isfinite(data.estimates[k][-1]).any()]
    if not shown:
        return []
    key = np.nan_to_num(np.abs(data.estimates[shown[0][0]][-1]))
    names = chart_labels(data.symmetries)
    rows = np.lexsort((-key, data.one_sided))
    what = np.where(data.one_sided, "a norm, no counterweight", "balance of two sides")
    return [
        {"symmetry": names[i], "is of": str(what[i]), **{t: float(data.estimates[k][-1, i]) for k, t in shown}}
        for i in rows
    ]


def summary(data: RunData, events: list[dict[str, Any]]) -> list[str]:
    """The run in plain words, one paragraph per topic."""
    out = [] if data.families else ["No symmetry is watched."]
    for i, family in enumerate(data.families):
        charge, norm = data.family["charge"][:, i], data.family["norm"][:, i]
        end = charge[-1] + data.family["change"][-1, i]
        if not np.isfinite(end):
            out.append(
                f"`{family}`: the charge began at {brief(charge[0])} and is not finite at the end: the run diverged."
            )
            continue
        text = f"`{family}`: the charge went from {brief(charge[0])} to {brief(float(end))}"
        causes = data.causes(i)
        total = sum(abs(v) for v in causes.values())
        if total > 1e-12 * float(np.nan_to_num(np.abs(norm)).max()):
            out.append(f"{text}. {_causes_words(data, causes, float(end - charge[0]))}")
        else:
            out.append(text + ": conserved.")
    return out + _equilibrium_words(data) + _norm_words(data) + _event_words(events)


def _causes_words(data: RunData, causes: dict[str, float], change: float) -> str:
    """Which causes moved a charge by `change`, and from how many steps that is known.

    Where not every step was recorded the causes are estimates. They are told as such, and where they miss the change by
    more than a quarter of it, that they do.
    """
    total = sum(abs(v) for v in causes.values())
    told = [f"{CAUSE_NAMES[k]} {brief(v)}" for k, v in list(causes.items())[:4] if abs(v) > 1e-3 * total]
    text = f"Largest causes: {', '.join(told)}"
    span = int(data.steps[-1] - data.steps[0]) + 1
    if len(data.steps) == span:
        return f"{text}."
    found = sum(causes.values())
    text += f" (estimated from {len(data.steps):,} of {span:,} steps; together {brief(found)} of {brief(change)}"
    far = abs(found - change) > APART * abs(change)
    return text + (": too few steps to tell them apart from what came between)." if far else ").")


APART = 0.25
"""Share of a charge's change by which estimated causes may miss it before that is said."""


def _equilibrium_words(data: RunData) -> list[str]:
    if data.estimates and not data.header.get("equilibrium", "distance" in data.estimates):
        covered = "the theory covers SGD with momentum, Adam, AdamW and RMSprop (not centered)"
        return [f"The noise equilibrium is not predicted for this optimiser: {covered}."]
    if "distance" not in data.estimates:
        return []
    two_sided = ~data.one_sided
    distance, steps = data.estimates["distance"][-1], data.estimates["steps"][-1]
    known = np.flatnonzero(two_sided & np.isfinite(distance))
    if not known.size:
        return []
    far, near = known[np.argmax(distance[known])], known[np.argmin(distance[known])]

    def place(i: int) -> str:
        return f"`{data.symmetries[i]}` (a factor of {plain(float(np.exp(distance[i])))})"

    single = data.estimates["distance_max"][-1]
    most = known[np.argmax(np.nan_to_num(single[known]))]
    text = (
        f"At the end the {FARTHEST_PART} from its noise equilibrium is one of `{data.symmetries[most]}`, by a factor "
    )
    text += f"of {plain(float(np.exp(single[most])))}."
    if near != far:
        text += f" By the median of each pair of layers that trade scale {place(near)} is nearest to it, {place(far)} "
        text += "farthest."
    slow = steps[known][np.isfinite(steps[known])]
    if slow.size:
        text += f" With the present noise and learning rate the way there takes {brief(float(np.median(slow)))} steps"
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
    text = f"The norm of `{names[most]}` changed by a factor of {brief(float(ratio[most]))}"
    if len(names) > 1:
        text += f", the most of {len(names)} scale-invariant weights (factors {brief(float(ratio.min()))} to "
        text += f"{brief(float(ratio.max()))})"
    words = data.header.get("effective_lr", "")
    return [text + (f"; {words}." if words else ".")]


def _event_words(events: list[dict[str, Any]]) -> list[str]:
    counts = {kind: sum(e["event"] == kind for e in events) for kind in dict.fromkeys(e["event"] for e in events)}
    if not counts:
        return ["No spikes, skipped steps or other events."]
    return ["Events: " + ", ".join(f"{n} × {kind}" for kind, n in counts.items()) + "."]


def _facts(data: RunData, events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = []
    told = ToldLosses.by(data)
    ends = told.level(0, told.steps / 20), told.level(0.95 * told.steps, told.steps)
    number = told.ends_over(0.05)
    names = "loss, first 5 %", f"loss, mean of the last {number:,} steps" if number else "loss, last 5 %"
    facts += [(name, level) for name, level in zip(names, ends, strict=True) if np.isfinite(level)]
    facts += [("steps made", data.steps_made), ("symmetries watched", len(data.symmetries)), ("events", len(events))]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.abs(data.family["residual"] / data.family["norm"]))
    facts.append(("largest unexplained change", float(ratio.max(initial=0))))
    return facts


def _charges(data: RunData) -> list[Section]:
    if not data.families:
        return []
    return [
        Section(
            "Charges and what moves them",
            "Above: the charge `C = θᵀAθ`, summed over the symmetries of one family. Below: what one step adds to it, "
            "split exactly into its causes and averaged over bins of steps. Choose the family with the buttons.",
            figures=[Figure(charges_figure(data), "Charge and its drift per step, by cause.", "charges")],
        )
    ]


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
            figures=[
                Figure(curves_figure(data, "distance", order, "|λ*|"), "Distance to equilibrium per layer.", "distance")
            ],
        )
    ]


def _layers(data: RunData) -> list[Section]:
    figure = layers_figure(data) if data.estimates else None
    if figure is None:
        return []
    return [
        Section(
            "Layers over time",
            f"Every symmetry against the steps; choose the quantity with the menu. {_spacing(data.estimate_steps)}",
            figures=[Figure(figure, "One row per symmetry.", "layers")],
        )
    ]


def _spacing(steps: np.ndarray) -> str:
    """How far apart the estimates are, and what to do about too few."""
    text = "One estimate"
    if len(steps) > 1:
        apart = np.diff(steps)
        usual = int(np.median(apart[:-1])) if len(apart) > 1 else int(apart[0])
        text = f"{len(steps):,} estimates, {usual:,} steps apart"
        text += ", the last at the end" if apart[-1] < usual else ""
    few = ": few for a course in time; a smaller `estimate_every` of the ledger gives more" if len(steps) < FEW else ""
    return f"{text} (`Ledger(..., estimate_every=...)`){few}."


def _norms(data: RunData) -> list[Section]:
    chosen = np.flatnonzero(data.one_sided)
    if not data.estimates or not chosen.size:
        return []
    curves = curves_figure(data, "norm", chosen[:CURVES], "‖W‖² (1 at the start)", relative=True)
    figures = [Figure(curves, "Squared norms, as multiples of those at the start.", "norms")]
    if np.isfinite(data.estimates["angular"]).any():
        rotation = curves_figure(data, "angular", chosen[:CURVES], "radians per step")
        thin = thinned(len(data.estimate_steps))
        predicted = np.array([finite_mean(row) for row in data.estimates["angular_predicted"][thin][:, chosen]])
        if (np.nan_to_num(predicted) > 0).any():
            line = {"dash": "dash", "color": INK}
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
    known = bool(np.isfinite(data.loss).any())
    what = "Loss and learning rate" if known else "Learning rate (no losses were noted: ledger.note(loss) keeps them)"
    caption = f"{what}; dashed lines mark events."
    return [Figure(training_figure(data, events), caption, "loss")]


def _event_text(events: list[dict[str, Any]]) -> str:
    return "Dashed lines mark the first 50 events." if len(events) > 50 else ""


def _event_row(event: dict[str, Any]) -> dict[str, Any]:
    details = {k: v for k, v in event.items() if k not in ("kind", "step", "event")}
    text = ", ".join(f"{k.replace('_', ' ')}: {brief(v)}" for k, v in details.items())
    return {"step": event["step"], "event": event["event"], "details": text}
