"""Figures of pages, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from noetherflow.core.shown import Shown
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.errors import require
from noetherflow.report import drawings, style
from noetherflow.report.plots import height_of, plot


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG bytes."""
    buffer = io.BytesIO()
    style.save(figure, buffer, format="png")
    return buffer.getvalue()


def picture(result: Shown, **options: Any) -> bytes:
    """What `nf.plot(result, **options)` draws, as PNG bytes; no figure stays open."""
    pyplot: Any = require("matplotlib.pyplot", "report")
    figure, _ = plot(result, **options)
    try:
        return png(figure)
    finally:
        pyplot.close(figure)


def panel(lines: int, draw: Callable[..., None], *args: Any) -> bytes:
    """One drawing of `drawings.py` alone, high enough for so many lines, as PNG bytes: pages put panels side by side on
    wide screens and below each other on a phone.
    """
    with style.context():
        figure, (ax,) = style.figure(columns=1, width=5.6, height=height_of(lines))
        draw(ax, *args)
        style.fit(figure)
        return png(figure)


def balance_figure(before: Equilibrium, after: Equilibrium, most: int = 12) -> bytes:
    """Draw the imbalance of every coordinate before a move to the equilibrium, and measured again after it.

    Args:
        before: the equilibrium that the model was moved to.
        after: the equilibrium from moments measured at the new place.
        most: symmetries drawn, those farthest from equilibrium.

    Returns:
        A PNG.
    """
    settled = drawings.farthest(before, most)
    with style.context():
        figure, (ax,) = style.figure(columns=1, width=5.6, height=max(3.0, 1.6 + 0.42 * len(settled)))
        drawings.imbalances(ax, settled, [after[s.name] for s in settled])
        ax.set_title("Balance of gradient noise, coordinate by coordinate")
        return png(figure)


def orbit_figure(path: np.ndarray, predicted: np.ndarray, measured_at: np.ndarray, measured: np.ndarray) -> bytes:
    """Draw the trace of the Hessian along the orbit through today's point (0) and the noise equilibrium (1).

    Args:
        path: positions of the prediction, `[n]`.
        predicted: the trace at each of them, `[n]`.
        measured_at: positions of measurements, `[m]`.
        measured: estimates there, one per probe, `[m, probes]`, the same probes at every position; drawn with two
            standard errors.

    Returns:
        A PNG.
    """
    with style.context():
        figure, (ax,) = style.figure(columns=1, width=5.6, height=3.8)
        ax.plot(path, predicted, color=style.THEORY, label="predicted from one measurement today")
        style.dots(ax, measured_at, measured, style.SGD, "measured there (2 s.e. over probes)")
        for at, colour, text in ((0, style.GD, "today"), (1, style.SGD, "noise equilibrium")):
            ax.axvline(at, color=colour, lw=1, ls=":")
            ax.annotate(text, (at, 0.03), xycoords=("data", "axes fraction"), color=colour, ha="center", va="bottom",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
        low, high = min(predicted.min(), measured.mean(-1).min()), max(predicted.max(), measured.mean(-1).max())
        ax.set(xlabel="position on the orbit", ylabel="trace of the Hessian")
        ax.set_ylim(low - 0.35 * (high - low), high + 0.3 * (high - low))
        ax.set_title("Sharpness along the orbit of one function")
        ax.legend(loc="upper center")
        return png(figure)
