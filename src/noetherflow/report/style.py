"""One look for all figures."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from noetherflow.errors import require

SGD = "#1f6fb4"
GD = "#d1495b"
SDE = "#3a9d6e"
OTHER = "#8a6fb0"
ACCENT = "#e08e2b"
THEORY = "#111111"
MUTED = "#8c8c8c"
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#333333")
"""Colours of lines of one kind, apart for every eye (Okabe and Ito)."""

RC = {
    "figure.dpi": 100,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 110,
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "noetherflow",
    "svg.fonttype": "path",
}


def context() -> Any:
    """A context manager in which matplotlib draws in the common style."""
    mpl: Any = require("matplotlib", "report")
    return mpl.rc_context(RC)


def figure(columns: int = 2, rows: int = 1, width: float = 4.6, height: float = 3.5) -> tuple[Any, np.ndarray]:
    """A new figure and its axes `[rows * columns]`; `width` and `height` in inches for one of them.

    No pyplot and no global state: figures can be drawn in threads and are freed like any object.
    """
    figures: Any = require("matplotlib.figure", "report")
    fig = figures.Figure(figsize=(width * columns, height * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False).reshape(-1)


def save(fig: Any, path: Any, **options: Any) -> None:
    """`fig.savefig` in the common style."""
    with context():
        fig.savefig(path, **options)


def band(ax: Any, x: Any, values: Any, color: str, label: str | None = None, **line: Any) -> None:
    """Draw the mean over the last axis of `values` `[len(x), seeds]` as a line, with a band of two standard errors."""
    v = np.asarray(values, dtype=float)
    mean = v.mean(-1)
    error = v.std(-1, ddof=1) / np.sqrt(v.shape[-1]) if v.shape[-1] > 1 else np.zeros_like(mean)
    ax.plot(x, mean, color=color, label=label, **line)
    ax.fill_between(x, mean - 2 * error, mean + 2 * error, color=color, alpha=0.25, linewidth=0)


def dots(ax: Any, x: Any, values: Any, color: str, label: str | None = None, marker: str = "o", **kwargs: Any) -> None:
    """Draw the mean over the last axis of `values` `[len(x), seeds]` as dots, with bars of two standard errors."""
    v = np.asarray(values, dtype=float)
    error = 2 * v.std(-1, ddof=1) / np.sqrt(v.shape[-1]) if v.shape[-1] > 1 else None
    ax.errorbar(
        x, v.mean(-1), error, color=color, label=label, marker=marker, linestyle="none", ms=5, capsize=2, **kwargs
    )


def tidy(fig: Any) -> None:
    """Readable labels on logarithmic axes: round ticks where fewer than two decades are shown, no minor labels."""
    ticker: Any = require("matplotlib.ticker", "report")
    for ax in fig.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            if axis.get_scale() != "log":
                continue
            span = max(limits) / min(limits)
            if span < 80:
                few = ticker.MaxNLocator(5, steps=(1, 2, 5, 10))
                axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if span > 8 else few)
                axis.set_major_formatter(ticker.FuncFormatter(lambda value, position: f"{value:g}"))
            axis.set_minor_formatter(ticker.NullFormatter())


def legend_on_top(ax: Any) -> None:
    """A legend at the top of the axes, whose upper limit is raised until it covers no curve."""
    low, high = ax.get_ylim()
    for columns, size in ((2, 8.5), (2, 7), (1, 7)):
        legend = ax.legend(loc="upper left", ncols=columns, fontsize=size, borderaxespad=0.1, handlelength=1.2,
                           columnspacing=1.0)  # fmt: skip
        ax.figure.draw_without_rendering()
        needed, given = legend.get_window_extent(), ax.get_window_extent()
        if needed.width <= given.width:
            break
    share = min(needed.height / given.height + 0.03, 0.7)
    ax.set_ylim(low, low + (high - low) / (1 - share))


def fit(fig: Any) -> None:
    """Break titles and labels that are wider than their axes into lines: nothing is cut at the figure's edge."""
    texts = [(ax, text, text.get_text()) for ax in fig.axes for text in (ax.xaxis.label, ax._left_title)]
    for _ in range(2):
        fig.draw_without_rendering()
        for ax, text, whole in texts:
            _break(text, whole, 0.92 * ax.get_window_extent().width)


def _break(text: Any, whole: str, room: float) -> None:
    """Set a text to the words of `whole` in lines that fit into so many pixels."""
    text.set_text(whole)
    length = max(map(len, whole.splitlines()), default=0)
    while text.get_window_extent().width > room and length > 12:
        length -= 1
        text.set_text("\n".join(line for part in whole.splitlines() for line in textwrap.wrap(part, length)))
