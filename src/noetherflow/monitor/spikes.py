"""Numbers of a run far above what is usual shortly before them."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SPIKE = 10.0
USUAL = 0.9
WINDOW = 50
CHUNK = 8192
"""Times the usual that is a spike; the quantile of the values in a window before that is the usual; windows at once."""


def loss_ratios(rows: np.ndarray) -> np.ndarray:
    """How far the largest loss of each row of `NotedLosses` stands above the level before it, over what is usual.

    Usual is the 90 % quantile of that height over the rows before; and within a row of at least `SEVERAL` losses that
    of its others, so that a log of a few rows tells as well. A row's level leaves its largest loss out. `[T]`.

    Example:
        >>> calm, spike = [50, 1.0, 0.1, 0.8, 1.2, 0, np.nan], [50, 1.1, 0.52, 0.8, 4.6, 0, np.nan]
        >>> bool(loss_ratios(np.array([calm, calm, spike]))[2] > SPIKE)
        True
    """
    number, mean, spread, highest = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 4]
    several = number > 2
    others = np.maximum(number - 1, 1)
    usual = np.where(several, (number * mean - highest) / others, mean)
    level = quantile_before(usual, 0.5)
    ratio = times_usual(np.maximum(highest - level, 0), np.abs(highest - level))
    above = highest - np.maximum(usual, np.concatenate([usual[:1], usual[:-1]]))
    with np.errstate(over="ignore", invalid="ignore"):
        rest = np.sqrt(np.maximum((number * (spread**2 + mean**2) - highest**2) / others - usual**2, 0))
        within = np.maximum(NORMAL_90 * rest, STILL * np.abs(usual))
    told = (number >= SEVERAL) & (within > 0)
    told[:1] = False
    return np.fmax(ratio, np.divide(above, within, out=np.zeros(len(rows)), where=told))


SEVERAL, NORMAL_90, STILL = 20, 1.645, 1e-3
"""Losses from which on a row tells its own scatter; the 90 % quantile of a normal distribution's size; and the share of
a loss that counts as scatter where there is none.
"""


def quantile_before(values: np.ndarray, quantile: float) -> np.ndarray:
    """Quantile (linear) of the finite ones of the `WINDOW` values before each value; NaN at the first ten."""
    out = np.full(len(values), np.nan)
    finite = np.where(np.isfinite(values), values, np.nan)
    windows = sliding_window_view(np.concatenate([np.full(WINDOW, np.nan), finite]), WINDOW)
    for start in range(10, len(values), CHUNK):
        rising = np.sort(windows[start : min(start + CHUNK, len(values))], axis=1)
        last = np.maximum(np.isfinite(rising).sum(axis=1) - 1, 0)
        place = last * quantile
        low = place.astype(int)
        at = np.arange(len(rising))
        below, above = rising[at, low], rising[at, np.minimum(low + 1, last)]
        out[start : start + len(rising)] = below + (above - below) * (place - low)
    return out


def times_usual(values: np.ndarray, usual: np.ndarray | None = None) -> np.ndarray:
    level = quantile_before(values if usual is None else usual, USUAL)
    return np.divide(values, level, out=np.zeros(len(values)), where=level > 0)


def starts(flags: np.ndarray) -> list[int]:
    """Positions that are set and not within `WINDOW` of the last one kept."""
    kept: list[int] = []
    for t in np.flatnonzero(flags):
        if not kept or t - kept[-1] > WINDOW:
            kept.append(int(t))
    return kept
