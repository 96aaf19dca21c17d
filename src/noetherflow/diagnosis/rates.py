"""The learning rates of a run from its log: their mean, the warmup, and what they will be in the steps to come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from noetherflow.core.printing import show
from noetherflow.core.schedule import SAME, Schedule, rates_of, warmup_to
from noetherflow.diagnosis.finding import Evidence, Finding, in_steps, plain
from noetherflow.monitor.rundata import RunData

GUESSED = 0.1
"""Share of the steps made whose rates may be taken from a straight line through the last ones known."""
AGREES = 0.01
"""Share of the largest rate by which those of a log may differ from those of the schedule that its header names."""


@dataclass(frozen=True)
class RunRates:
    """The learning rates of a run.

    Attributes:
        mean: over the steps made, as well as the log tells it.
        warmup: steps over which the rate rose from the start.
        ahead: the rates of the steps still to come, `[steps]`; empty where none are; None where nothing tells them.
        unknown: how many steps, made or to come, have rates that nothing tells; 0 where all are known.
        lowest, highest: of the rates recorded.
    """

    mean: float
    warmup: int
    ahead: np.ndarray | None
    unknown: int
    lowest: float
    highest: float

    def over_all(self, made: int) -> float:
        """The mean over the steps made and those to come, as far as these are known."""
        ahead = np.zeros(0) if self.ahead is None else self.ahead
        return (self.mean * made + float(ahead.sum())) / (made + len(ahead)) if made + len(ahead) else self.mean

    def acting(self, now: float) -> float:
        """How many steps at the rate `now` let noise, which goes by its square, do what the steps to come will do."""
        if self.ahead is None or not now > 0:
            return math.nan
        return float(((self.ahead / now) ** 2).sum())


def run_rates(data: RunData, whole: int, schedule: Schedule | None = None) -> RunRates:
    """What the log of a run of `whole` steps, and a schedule that somebody gives, say of its learning rates.

    Raises:
        DataError: the schedule is none, or does not reach as far.
    """
    made, lr = data.steps_made, data.lr[np.isfinite(data.lr)]
    lowest, highest = (float(lr.min()), float(lr.max())) if lr.size else (math.nan, math.nan)
    told = _told(data)
    line = made - 1 - int(data.steps[-1]) if told is None else 0
    guessed = line if line > GUESSED * made and highest - lowest > SAME * highest else 0
    filled = np.where(np.isfinite(data.lr), data.lr, 1.0)
    mean = mean_rate(data.steps, filled, made) if told is None else told
    ahead = rates_ahead(data, whole, schedule)
    unknown = guessed + (max(0, whole - made) if ahead is None else 0)
    return RunRates(mean, warmup_in(data), ahead, unknown, lowest, highest)


def mean_rate(steps: np.ndarray, lr: np.ndarray, made: int) -> float:
    """The mean learning rate of a run of `made` steps, from those at the recorded steps and straight lines between.

    After the last one the line of the last two goes on, down to 0 and up to the largest one seen.

    Example:
        >>> round(mean_rate(np.array([0, 1, 51]), np.array([1.0, 0.99, 0.49]), 101), 3)
        0.5
    """
    slope = (lr[-1] - lr[-2]) / (steps[-1] - steps[-2]) if len(steps) > 1 else 0.0
    left = max(0, made - 1 - int(steps[-1]))
    known = np.append(steps, steps[-1] + left + 1), np.append(lr, lr[-1] + slope * (left + 1))
    return float(np.mean(np.clip(np.interp(np.arange(steps[0], steps[-1] + left + 1), *known), 0, np.max(lr))))


def _table(data: RunData) -> np.ndarray:
    """The columns of `NotedRates` of every row, a row of its own step alone included, and of the steps since."""
    alone = np.stack([np.ones(len(data.lr)), data.lr, data.lr, data.steps.astype(float), data.lr], axis=1)
    rows = np.where(np.isfinite(data.rates), data.rates, alone) if len(data.rates) else alone
    since = data.rates_since
    return rows if since is None else np.vstack([rows, [list(since.line().values())]])


def _told(data: RunData) -> float | None:
    """The mean rate where the log tells those of all steps since the first recorded one; else None."""
    number, mean = _table(data)[:, :2].T
    if number.sum() < data.steps_made - int(data.steps[0]) or not np.isfinite(mean).all():
        return None
    return float(np.average(mean, weights=number))


def warmup_in(data: RunData) -> int:
    """The steps of the warmup, exact where the log tells the rates of all steps (`schedule.warmup_of`).

    Else linear warmups are taken to be on the line of the last two recorded rates that rise: they reach the largest
    recorded rate where it does.
    """
    rows = _table(data)
    rows = rows[np.isfinite(rows[:, 2])]
    if not len(rows) or not rows[:, 2].max() > 0:
        return 0
    highest, first = float(rows[:, 2].max()), int(data.steps[0])
    at = int(np.argmax(rows[:, 2] >= highest * (1 - SAME)))
    peak, begins = rows[at, 3], float(data.lr[0])
    gap = at > 0 and rows[at, 0] < data.steps[min(at, len(data.steps) - 1)] - data.steps[at - 1]
    if gap:
        before = int(data.steps[at - 1])
        rise = float(data.lr[at - 1] - data.lr[at - 2]) / int(before - data.steps[at - 2]) if at > 1 else begins
        meets = before + (highest - float(data.lr[at - 1])) / rise if rise > 0 else peak
        peak = min(peak, max(before + 1, round(meets)))
    rise = int(peak) - first
    if first or not rise:
        return rise
    known = len(rows) > 1 and (data.steps[1:2] == 1 + rows[1:2, 0] - 1).all()
    second = float(rows[1, 4]) if known else begins + (highest - begins) / rise
    return warmup_to(rise, begins, second)


def rates_ahead(data: RunData, whole: int, schedule: Schedule | None) -> np.ndarray | None:
    """The learning rates of the steps from the last one made to the end of the run; None where nothing tells them.

    They are those of the schedule given; else of the one that the log's header names, if the rates so far agree; else
    the present one, where the header tells of no schedule and the rate never changed.
    """
    made = data.steps_made
    if whole <= made:
        return np.zeros(0)
    if schedule is not None:
        return rates_of(schedule, whole - made, made)[:, 0]
    shape = named_schedule(data.header, whole)
    highest = float(np.nanmax(data.lr)) if np.isfinite(data.lr).any() else 0.0
    if shape is not None and highest > 0:
        at = shape[data.steps]
        peak = highest / at.max() if at.max() > 0 else highest
        if np.allclose(peak * at, data.lr, rtol=0, atol=AGREES * highest):
            return peak * shape[made:]
    still = np.ptp(data.lr) <= SAME * highest if np.isfinite(data.lr).all() else False
    return np.full(whole - made, highest) if still and not data.header.get("scheduled") else None


def named_schedule(header: Mapping[str, Any], whole: int) -> np.ndarray | None:
    """The rates of all steps over the largest, of a schedule that a header names as transformers' Trainer does.

    It needs `schedule` (`constant`, `constant_with_warmup`, `linear` or `cosine`) and, for the last two, `total_steps`.

    Example:
        >>> header = {"schedule": "linear", "warmup_steps": 2, "total_steps": 6}
        >>> named_schedule(header, 6).tolist()
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    name, warm, total = (header.get(key) for key in ("schedule", "warmup_steps", "total_steps"))
    rising = int(warm) if isinstance(warm, int | float) and warm >= 1 else 0
    at = np.arange(whole)
    up = at / rising if rising else np.ones(whole)
    if name in ("constant", "constant_with_warmup"):
        return np.minimum(up, 1.0)
    if name not in ("linear", "cosine") or not isinstance(total, int | float) or total <= rising:
        return None
    done = np.clip((at - rising) / (total - rising), 0, 1)
    down = 1 - done if name == "linear" else 0.5 * (1 + np.cos(np.pi * done))
    return np.where(at < rising, up, down)


GIVE = (
    "give the learning rates: ledger.diagnose(steps=..., schedule=...) or nf.diagnose_run(run, steps=..., "
    "schedule=...); or begin with nf.Ledger(..., notes={'schedule': 'cosine', 'warmup_steps': ..., 'total_steps': ...})"
)


def decay_ahead(decays: list[float], rates: RunRates, made: int, whole: int) -> list[Finding]:
    """What is told of weight decay where the rates of many steps are not known: nothing of them."""
    share = max((d for d in decays if d > 0), default=math.nan)
    if math.isnan(share):
        return []
    taken = 1 - math.exp(-share * made)
    title = f"Not known for the whole run: the learning rates of {in_steps(rates.unknown)} of {whole:,} are not in the "
    title += f"log, and those in it change, from {show(rates.lowest)} to {show(rates.highest)}. "
    title += (
        f"In the {in_steps(made)} made weight decay took {plain(taken)} of the squares that decayed weights began with"
    )
    title += "." if rates.ahead is not None or whole > made else ", if the last rates went on along a straight line."
    numbers = (Evidence("share of squared weights that decay took per step", share),)
    return [Finding("decay-bites", "decay", "open", title, "", GIVE, "open", numbers)]
