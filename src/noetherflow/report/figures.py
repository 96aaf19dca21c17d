"""Figures of one model's analysis, as PNG bytes: forecast against trajectory, balance before and after, sharpness."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from noetherflow.errors import require
from noetherflow.report import style


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG bytes."""
    buffer = io.BytesIO()
    style.save(figure, buffer, format="png")
    return buffer.getvalue()


def forecast_figure(
    steps: Sequence[int],
    predicted: Mapping[str, Tensor],
    errors: Mapping[str, Tensor],
    measured: Mapping[str, Tensor] | None = None,
) -> bytes:
    """Draw the norm of every symmetry's charge against steps, with a band of two standard errors.

    Args:
        steps: numbers of steps after the measurement.
        predicted: charges by symmetry, `[len(steps), *symmetry.shape]`.
        errors: their standard errors; a symmetry without them has no band.
        measured: charges of a model trained on; with them, dots beside the lines, and a second panel that compares the
            change of every coordinate.

    Returns:
        A PNG.
    """
    ticker: Any = require("matplotlib.ticker", "report")
    with style.context():
        figure, axes = style.figure(columns=1 if measured is None else 2, width=6.4 if measured is None else 4.6)
        left = axes[0]
        for i, (name, charges) in enumerate(predicted.items()):
            theory = _norms(charges)
            left.plot(steps, theory, color=f"C{i % 10}", label=name if len(predicted) <= 10 else None)
            if name in errors:
                spread = 2 * _norm_error(charges, errors[name])
                left.fill_between(steps, theory - spread, theory + spread, color=f"C{i % 10}", alpha=0.25, linewidth=0)
        left.set(xlabel="SGD steps after the measurement", ylabel="norm of the Noether charge", ylim=(0, None))
        left.xaxis.set_major_locator(ticker.MaxNLocator(6))
        left.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        left.set_title("Forecast charges (band: 2 s.e.)")
        if measured is not None:
            for i, charges in enumerate(measured.values()):
                left.plot(steps, _norms(charges), "o", color=f"C{i % 10}", ms=3.5)
            left.plot([], [], "o", color=style.THEORY, ms=3.5, label="trained")
            left.set_title("Charges: one measurement (line) against training")
            _changes(axes[1], steps, predicted, measured)
        if left.get_legend_handles_labels()[0]:
            left.legend()
        return png(figure)


def _changes(ax: Any, steps: Sequence[int], predicted: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> None:
    """Measured against forecast change of every coordinate over all steps."""
    for i, (name, charges) in enumerate(predicted.items()):
        change = (charges[-1] - charges[0]).flatten().numpy()
        seen = (measured[name][-1] - measured[name][0]).flatten().numpy()
        ax.plot(change, seen, "o", color=f"C{i % 10}", ms=3.5, alpha=0.7)
    ends = [*ax.get_xlim(), *ax.get_ylim()]
    ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color=style.MUTED, lw=1, zorder=0)
    ax.set(xlabel="forecast change of charge", ylabel="measured change of charge")
    ax.set_title(f"Every coordinate after {steps[-1]:,} steps")


def balance_figure(imbalances: Mapping[str, np.ndarray]) -> bytes:
    """Draw one histogram per label (before, after, ...) of the imbalance of every coordinate, `[n]` each; a PNG."""
    with style.context():
        figure, (ax,) = style.figure(columns=1, width=6.4)
        for color, (label, values) in zip((style.GD, style.MUTED, style.SGD), imbalances.items(), strict=False):
            ax.hist(np.log10(np.maximum(values, 1e-17)), np.linspace(-17, 0, 69), color=color, alpha=0.65, label=label)
        ax.set(xlabel="log10 of relative Noether flow |Y - X| / (X + Y)", ylabel="coordinates")
        ax.set_title("Balance of gradient noise, coordinate by coordinate")
        ax.legend()
        return png(figure)


def orbit_figure(path: np.ndarray, predicted: np.ndarray, measured_at: np.ndarray, measured: np.ndarray) -> bytes:
    """Draw the trace of the Hessian along the orbit through today's point (0) and the noise equilibrium (1).

    Args:
        path: positions of the prediction, `[n]`.
        predicted: the trace at each of them, `[n]`.
        measured_at: positions of measurements, `[m]`.
        measured: estimates there, one per probe, `[m, probes]`; drawn with two standard errors.

    Returns:
        A PNG.
    """
    with style.context():
        figure, (ax,) = style.figure(columns=1, width=6.4)
        ax.plot(path, predicted, color=style.THEORY, label="predicted from one measurement at 0")
        style.dots(ax, measured_at, measured, style.SGD, "measured there (2 s.e. over probes)")
        ax.axvline(0, color=style.GD, lw=1)
        ax.axvline(1, color=style.SGD, lw=1)
        top = max(predicted.max(), measured.mean(-1).max())
        ax.annotate("today", (0, top), color=style.GD, ha="right", xytext=(-4, 0), textcoords="offset points")
        ax.annotate("equilibrium", (1, top), color=style.SGD, xytext=(4, 0), textcoords="offset points")
        ax.set(xlabel="position on the orbit, G^s", ylabel="trace of the Hessian", ylim=(0, None))
        ax.set_title("Sharpness along the orbit; the function is the same everywhere")
        ax.legend()
        return png(figure)


def _norms(values: Tensor) -> np.ndarray:
    return np.asarray(values.flatten(1).norm(dim=1))


def _norm_error(values: Tensor, errors: Tensor) -> np.ndarray:
    """Standard error of the norm over independent coordinates, to first order."""
    v, e = values.flatten(1), errors.flatten(1)
    return np.asarray((v * e).norm(dim=1) / v.norm(dim=1).clamp_min(1e-300))
