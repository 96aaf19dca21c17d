"""How norms and other estimates went in a run, from its log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from noetherflow.diagnosis.facts import NormHistory, Turn
from noetherflow.diagnosis.logits import LogitGrowth
from noetherflow.monitor.rundata import RunData
from noetherflow.symmetry.heads import QUERY_KEY

RECENT, PART = 5, 0.25
"""Estimates whose median stands for the present, for single ones scatter with the minibatch: so many of the last part
of the steps, and at least one.
"""


def present(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Which of the values, estimated at the steps `at`, stand for the present: positions of known ones.

    Example:
        >>> present(np.array([1.0, 2.0, np.nan, 3.0]), np.array([0, 90, 95, 100])).tolist()
        [1, 3]
    """
    known = np.flatnonzero(np.isfinite(values))[-RECENT:]
    if not known.size:
        return known
    since = at[known[-1]] - PART * (at[known[-1]] - at[0])
    return known[at[known] >= since]


def recent(data: RunData, column: str, symmetry: int) -> float:
    """The median of the last known estimates of one symmetry, NaN without any."""
    if column not in data.estimates:
        return float("nan")
    values = data.estimates[column][:, symmetry]
    known = values[present(values, data.estimate_steps)]
    return float(np.median(known)) if known.size else float("nan")


def turns_of(data: RunData) -> Iterator[Turn]:
    """How far a step turned each scale-invariant weight, by the single steps that were estimated."""
    if "angular" not in data.estimates:
        return
    rates = np.interp(data.estimate_steps, data.steps, data.lr)
    highest = float(np.nanmax(data.lr)) if np.isfinite(data.lr).any() else 0.0
    for name, angles in zip(data.symmetries, data.estimates["angular"].T, strict=True):
        known = np.flatnonzero(np.isfinite(angles))
        if not known.size:
            continue
        last, most = present(angles, data.estimate_steps), known[int(np.argmax(angles[known]))]
        share = float(np.median(rates[last])) / highest if highest > 0 else 1.0
        now = float(np.median(angles[last]))
        yield Turn(name, now, share, float(angles[most]), int(data.estimate_steps[most]))


@dataclass(frozen=True)
class Span:
    """The first and the last known value of a quantity, the steps between them, and at which step the first was."""

    first: float
    last: float
    steps: float
    start: float

    @property
    def factor(self) -> float:
        return self.last / self.first


def span_of(values: np.ndarray, at: np.ndarray) -> Span | None:
    """From the values known at the steps `at`; None with fewer than two."""
    known = np.flatnonzero(np.isfinite(values) & (values > 0))
    if known.size < 2:
        return None
    first, last = known[0], known[-1]
    return Span(float(values[first]), float(values[last]), float(at[last] - at[first]), float(at[first]))


def norms_of(data: RunData) -> Iterator[NormHistory]:
    """The norms of scale-invariant weights, with what they did to the effective learning rate."""
    if "norm" not in data.estimates or "effective_lr" not in data.estimates:
        return
    rate = np.interp(data.estimate_steps, data.steps, data.lr) if len(data.steps) else np.zeros(0)
    for i in np.flatnonzero(data.one_sided):
        with np.errstate(divide="ignore", invalid="ignore"):
            plain = data.estimates["effective_lr"][:, i] / rate
        found = norm_history(data.symmetries[i], data.estimates["norm"][:, i], plain, data.estimate_steps)
        if found is not None:
            yield found


def norm_history(name: str, norm: np.ndarray, plain: np.ndarray, at: np.ndarray) -> NormHistory | None:
    """From the squared norms and the effective learning rates over the learning rates, estimated at the steps `at`.

    The latter are not known where the learning rate was 0, as at the start of a warmup. They are a power of the norm,
    the same at all steps: so the norms of those steps tell them. None with fewer than two estimates.
    """
    whole, part = span_of(norm, at), span_of(plain, at)
    within = span_of(np.where(np.isfinite(plain) & (plain > 0), norm, np.nan), at)
    if whole is None or part is None or within is None:
        return None
    moved = math.log(within.factor)
    if whole.start == within.start or abs(moved) < TOO_STILL:
        found = NormHistory(name, within.factor, part.factor, part.steps, part.start)
    else:
        power = math.log(part.factor) / moved
        found = NormHistory(name, whole.factor, whole.factor**power, whole.steps, whole.start)
    return _with_peak(found, norm, at)


def _with_peak(history: NormHistory, squares: np.ndarray, at: np.ndarray) -> NormHistory:
    """The same with where the squared norm was largest since its beginning."""
    known = np.isfinite(squares) & (squares > 0) & (at >= history.start)
    peak = int(np.argmax(np.where(known, squares, -np.inf)))
    return replace(history, peak=float(squares[peak] / squares[known][0]), peak_step=float(at[peak]))


TOO_STILL = 1e-3
"""Change of a norm's logarithm below which it does not tell the power that the effective learning rate goes with."""


def logits_of(data: RunData) -> Iterator[LogitGrowth]:
    """Squared query and key norms of each attention layer, and the spread of logits that they give by themselves."""
    if "norm" not in data.estimates:
        return
    for i, symmetry in enumerate(data.header["symmetries"]):
        span = span_of(data.estimates["norm"][:, i], data.estimate_steps)
        if symmetry.get("family") in QUERY_KEY and span:
            shape = symmetry["shape"]
            width = 2 * shape[0] if len(shape) == 1 else shape[0] * shape[1]
            spread = span.last / (2 * width)
            yield LogitGrowth(symmetry["name"], None, span.factor, spread, span.steps, measured=True)


def layers_of(data: RunData) -> Iterator[NormHistory]:
    """The norms of all layers, symmetric or not; those that began at 0 have no factor."""
    for name, values in zip(data.layers, data.layer.get("norm", np.zeros((0, 0))).T, strict=False):
        if span := span_of(values, data.estimate_steps):
            whole = NormHistory(name, span.factor**2, 1 / span.factor, span.steps, span.start)
            yield _with_peak(whole, values**2, data.estimate_steps)
