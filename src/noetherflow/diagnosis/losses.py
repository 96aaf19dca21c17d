"""Whether the loss of a run lately stands above the lowest level that it had reached, and what is told of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from noetherflow.core.printing import show
from noetherflow.diagnosis.facts import LossCourse, LossRise
from noetherflow.diagnosis.finding import Evidence, Finding, Severity, in_steps, plain
from noetherflow.monitor.noted import BROKEN, HIGHEST_AT
from noetherflow.monitor.rundata import RunData

SEVERAL = 3.0
"""Times its lowest level from which on a loss that rose is told of."""
REGAINED, MOST = 0.25, 0.5
"""Shares of what the loss had fallen, now lost again: to watch, and to act on."""
CERTAIN = 6.0
"""Standard errors by which the level must have risen: the lowest of many windows lies up to four below by chance."""
LATELY, LEAST = 0.1, 5
"""The last losses are those of a tenth of the steps, and at least five of them."""
LOST_RUN = 1e9
"""Weight of a finding that says that all others are of a lost run."""
UP, SCATTERED = 1.3, 3.0
"""Times its first value at which a loss has gone up, and standard deviations of single losses that explain less."""
NORMAL_MAD = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


def rise_of(steps: np.ndarray, losses: np.ndarray) -> LossRise | None:
    """How far the last losses stand above the lowest level before them; None where they do not, beyond chance.

    Levels are over as many losses as the last tenth of the steps has. They are compared on the scale of logarithms, by
    their means without the largest: there the loss of one minibatch scatters by as much at 0.001 as at 1, and a single
    large one does not count. And as they are, by their medians, for losses that have no logarithm and for those that
    fell by less than `SEVERAL` times. The scatter is that of successive losses, which no slow change enters.

    Args:
        steps: of the losses, rising. `[T]`.
        losses: those that were noted, all finite. `[T]`.

    Example:
        >>> at = np.arange(100)
        >>> risen = rise_of(at, np.where(at < 80, 0.01, 0.08) * (1 + 0.1 * (at % 2)))
        >>> round(risen.level / risen.lowest, 1), risen.step < 80
        (8.0, True)
        >>> rise_of(at, 0.01 * (1 + 0.1 * (at % 2))) is None
        True
    """
    last = int(np.sum(steps >= steps[-1] - LATELY * (steps[-1] - steps[0]))) if len(steps) else 0
    last = max(last, LEAST)
    if len(losses) < 2 * last + 1:
        return None
    found: list[LossRise] = []
    if (losses > 0).all():
        logs = np.log(losses)
        at, low, high, error = _levels(logs, last, _without_largest)
        if high - low > max(math.log(SEVERAL), CERTAIN * error):
            share = (high - low) / (logs[0] - low) if logs[0] > low else math.inf
            found.append(LossRise(math.exp(low), math.exp(high), int(steps[at]), float(share)))
    at, low, high, error = _levels(losses, last, np.median)
    fell = float(losses[0]) - low
    if high - low > max(CERTAIN * error, REGAINED * fell) and fell > CERTAIN * error:
        share = (high - low) / fell
        found.append(LossRise(low, high, int(steps[at]), float(share)))
    return max(found, key=lambda f: f.share, default=None)


def rise_of_all(steps: np.ndarray, noted: np.ndarray, made: int) -> LossRise | None:
    """The same where nearly every loss was noted, from their means and spreads over ten equal stretches of the steps.

    The last stretch is held against the lowest one. The standard error of each mean is that of its own losses, so that
    one large loss does not make a rise.

    Args:
        steps: at which each row of `noted` ends, rising. `[T]`.
        noted: the columns of `NotedLosses`. `[T, 7]`.
        made: steps of the run.

    Example:
        >>> rows = np.array([[100, 2.0, 0.1, 0, 3], *[[100, 0.01, 0.005, 0, 1]] * 8, [100, 0.08, 0.05, 0, 1]])
        >>> found = rise_of_all(np.arange(100, 1100, 100), rows, 1000)
        >>> round(found.level / found.lowest)
        8
    """
    number, mean, spread = noted[:, 0], noted[:, 1], noted[:, 2]
    middle = steps - number / 2
    part = np.clip((middle * PARTS / made).astype(int), 0, PARTS - 1)
    n, total = (np.bincount(part, weights=w, minlength=PARTS) for w in (number, number * mean))
    squares = np.bincount(part, weights=number * (spread**2 + mean**2), minlength=PARTS)
    full = np.flatnonzero(n >= ENOUGH)
    if full.size < 2 or full[-1] != PARTS - 1:
        return None
    level = total[full] / n[full]
    errors = np.sqrt(np.maximum(squares[full] / n[full] - level**2, 0) / n[full])
    low = int(np.argmin(level[:-1]))
    lowest, last, began = float(level[low]), float(level[-1]), float(mean[0])
    gap, fell = last - lowest, began - lowest
    if gap <= CERTAIN * math.hypot(errors[low], errors[-1]) or fell <= 0:
        return None
    share = gap / fell
    several = lowest > 0 and last > SEVERAL * lowest
    if several:
        share = max(share, math.log(last / lowest) / math.log(began / lowest))
    if not (several or share > REGAINED):
        return None
    return LossRise(lowest, last, round((full[low] + 0.5) * made / PARTS), share)


def level_between(begins: float, ends: float, at: np.ndarray, covers: np.ndarray, noted: np.ndarray) -> float:
    """The mean loss of the steps from `begins` to `ends`, NaN where none of them was noted.

    Args:
        begins, ends: of the stretch of steps.
        at: the step at which each row of `noted` ends, rising. `[T]`.
        covers: the steps before that each row stands for. `[T]`.
        noted: the columns of `NotedLosses`, finite. The largest loss of a row does not count, as far as there are more.
            `[T, 7]`.

    Example:
        >>> at, rows = np.array([10, 1000]), np.array([[10, 2.0, 0, 2, 2], [990, 0.5, 0, 0.5, 0.5]])
        >>> level_between(900, 1000, at, rows[:, 0], rows), level_between(0, 20, at, rows[:, 0], rows)
        (0.5, 1.25)
    """
    shared = np.clip(np.minimum(at, ends) - np.maximum(at - covers, begins), 0, None)
    if not shared.sum() > 0:
        return math.nan
    number, mean, highest = noted[:, 0], noted[:, 1], noted[:, 4]
    usual = np.where(number > 2, (number * mean - highest) / np.maximum(number - 1, 1), mean)
    return float(np.average(usual, weights=shared))


PARTS, ENOUGH = 10, 10
"""Stretches of steps whose mean losses are compared, and the losses that one needs at the least."""


def _without_largest(windows: np.ndarray, axis: int) -> np.ndarray:
    """The mean of each window but for its largest value."""
    found: np.ndarray = (windows.sum(axis) - windows.max(axis)) / (windows.shape[axis] - 1)
    return found


def _levels(values: np.ndarray, last: int, level: Callable[..., np.ndarray]) -> tuple[int, float, float, float]:
    """The middle of the window of so many values whose level is lowest, that level, that of the last ones, and the
    standard error of the difference of the two.
    """
    levels = level(sliding_window_view(values, last), axis=1)
    low = int(np.argmin(levels[:-last]))
    jumps = np.abs(np.diff(values[min(low, len(values) // 2) :]))
    scatter = NORMAL_MAD * float(np.median(jumps)) / math.sqrt(2)
    return low + last // 2, float(levels[low]), float(levels[-1]), scatter * math.sqrt(2 / last)


def less_decay(fact: LossCourse, rise: LossRise) -> str:
    """What to try where the loss rises under a weight decay that acts within the run."""
    acts = f"it acts within {in_steps(fact.decay_memory)} here and keeps steps long against the weights"
    trial = f"try a third of the weight decay ({acts}) from a checkpoint of about step {rise.step:,}"
    return f"{trial}; or a lower learning rate"


def rose_late(fact: LossCourse, rise: LossRise) -> Finding:
    """A loss that has left its own minimum.

    Threshold: three times its lowest level, or a quarter of all that it had fallen by, where six standard errors of
    the scatter from minibatch to minibatch do not explain it: to watch. Half of what had been gained, on the scale of
    logarithms or as it is, is to act on: such a run undoes what it did.
    """
    times = f"{plain(rise.level / rise.lowest)} times its" if rise.lowest > 0 else "above its"
    title = f"The loss rises again: lately {show(rise.level)}, {times} lowest level of {show(rise.lowest)} about step "
    title += f"{rise.step:,}; it began at {show(fact.began)}, {in_steps(fact.steps)} ago."
    severity: Severity = "act" if rise.share >= MOST else "watch"
    means = "Training undoes what it had reached. Steps became too long for where it is, by the learning rate or by "
    means += "norms that shrank, or the data or the loss changed."
    advice = "lower the optimiser's learning rate from there on, or go on from a checkpoint of its lowest level"
    if fact.decay_acts:
        advice = less_decay(fact, rise)
    numbers = (
        Evidence("lowest level of the loss", rise.lowest),
        Evidence("its level lately", rise.level),
        Evidence("share of what it had fallen by, lost again", min(rise.share, 1.0)),
    )
    weight = math.log(rise.level / rise.lowest) if rise.lowest > 0 else rise.share
    return Finding("loss-course", "warmup", severity, title, means, advice, "measured", numbers, weight=weight)


def broke(fact: LossCourse) -> Finding:
    """A run whose numbers stopped being finite while its loss was low."""
    before, at = fact.finite_until or 0, fact.broken or 0
    between = max(0, at - before - 1)
    unseen = between > SEEN_BETWEEN
    title = f"Numbers are NaN or infinite from step {at:,} on{', or some steps before' if unseen else ''}; the loss "
    title += f"was about {show(fact.ended)} at step {before:,} and had not risen."
    means = "One batch did it: a NaN or infinite input or label, the logarithm or root of 0, an overflow in float16."
    advice = "look at the data of that step and of the one before; to find it: "
    advice += "torch.autograd.set_detect_anomaly(True), or clip_grad_norm_ with error_if_nonfinite=True; leave out "
    advice += "steps whose gradients are not finite"
    if unseen:
        means = f"The log has no finite loss of the {between:,} steps between: either one batch did it (a NaN input, "
        means += "the logarithm of 0, an overflow), or steps became too long in them."
        advice = "go on from before it with nf.Ledger(..., every=1): where the loss breaks from one step to the next, "
        advice += "look at that step's data; where it climbs first, lower the learning rate"
    numbers = (Evidence("level of the last finite losses", fact.ended), Evidence("not finite at step", float(at)))
    return Finding("loss-course", "warmup", "act", title, means, advice, "measured", numbers, weight=LOST_RUN)


def lapse(fact: LossCourse) -> list[Finding]:
    """A loss that was not finite once, in a run that went on: to watch, for such a batch can end the next run."""
    if fact.lapse is None:
        return []
    title = f"The loss was NaN or infinite at step {fact.lapse:,}, and the weights stayed finite."
    means = "One batch did it, and its step was left out or changed little."
    advice = "look at the data of that step; leave out steps whose loss is not finite"
    numbers = (Evidence("not finite at step", float(fact.lapse)),)
    return [Finding("loss-lapse", "warmup", "watch", title, means, advice, "measured", numbers)]


SEEN_BETWEEN = 2
"""Steps without a finite loss up to which the log tells that the loss had not climbed before it broke."""


@dataclass(frozen=True)
class ToldLosses:
    """The losses that a log tells: rows of `NotedLosses`, the steps at which they end, since the first recorded one.

    Attributes:
        rows: those that are finite, `[T, 5]`.
        at: where each ends, `[T]`.
        steps: of the run.
        first: the first recorded one.
        broken_at: the first step with a loss that was not finite, None without.
        healed: whether a later one was finite.
        most: whether most losses were noted; else each row stands for the steps back to the one before it.
    """

    rows: np.ndarray
    at: np.ndarray
    steps: int
    most: bool
    first: int = 0
    broken_at: int | None = None
    healed: bool = False

    @classmethod
    def by(cls, data: RunData) -> ToldLosses:
        rows, at, first = data.noted, data.steps + 1, int(data.steps[0])
        if data.since is not None:
            rows = np.vstack([rows, [list(data.since.line().values())]])
            at = np.append(at, data.steps_made)
        whole = np.isfinite(rows[:, :MEASURED]).all(axis=1)
        steps = data.steps_made - first
        broken = rows[np.isfinite(rows[:, BROKEN]), BROKEN]
        most = bool(rows[whole, 0].sum() >= MOST_NOTED * steps)
        nan = int(broken[0]) if broken.size else None
        begins = np.concatenate([[first], at[:-1]])[whole]
        healed = nan is not None and bool(((begins > nan) | (rows[whole, HIGHEST_AT] > nan)).any())
        return cls(rows[whole], at[whole] - first, steps, most, first, nan, healed)

    @property
    def finite_until(self) -> int | None:
        """The last step whose loss is known to be finite; None without one."""
        if not len(self.rows):
            return None
        last = int(self.at[-1]) + self.first - 1
        return last if self.broken_at is None or self.healed else min(last, self.broken_at - 1)

    @property
    def highest(self) -> float:
        return float(self.rows[:, 4].max()) if len(self.rows) else math.nan

    @property
    def up_at(self) -> int | None:
        """The step by which the loss had stood at `UP` times its first value or more; None where scatter explains it.

        The scatter is that of single losses on the scale of logarithms: of successive ones, and within rows of several.
        """
        number, mean, spread, lowest, highest = self.rows[:, :MEASURED].T
        if not len(self.rows) or not lowest.min() > 0:
            return None
        jumps = np.abs(np.diff(np.log(mean[number == 1])))
        known = [NORMAL_MAD * np.median(jumps) / math.sqrt(2)] if jumps.size else []
        known += [np.median((spread / mean)[number > 1])] if (number > 1).any() else []
        above = math.log(self.highest / mean[0])
        at = self._step_of(int(highest.argmax()))
        return at if above > max(math.log(UP), SCATTERED * max(known, default=0.0)) else None

    def _step_of(self, row: int) -> int:
        """The step of the largest loss of a row; of logs that do not tell it the step at which the row ends."""
        at = self.rows[row, HIGHEST_AT] if self.rows.shape[1] > HIGHEST_AT else math.nan
        return int(at) if math.isfinite(at) else int(self.at[row])

    def level(self, begins: float, ends: float) -> float:
        """The mean loss between two steps counted from the first recorded one; see `level_between`."""
        covers = self.rows[:, 0] if self.most else np.diff(self.at, prepend=0)
        return level_between(begins, ends, self.at, covers, self.rows)

    def levels(self) -> tuple[float, float, float]:
        """The first loss, the level of the middle fifth of the steps and that of the last tenth; NaN without losses."""
        if not len(self.rows):
            return math.nan, math.nan, math.nan
        middle, ended = self.level(0.4 * self.steps, 0.6 * self.steps), self.level(0.9 * self.steps, self.steps)
        return float(self.rows[0, 1]), middle, ended if math.isfinite(ended) else float(self.rows[-1, 1])

    def ends_over(self, share: float) -> int:
        """How many losses stand as one mean for the last `share` of the steps, where it reaches further back; else 0.

        A ledger that records rarely keeps the losses of the steps since as their mean.
        """
        number = int(self.rows[-1, 0]) if self.most and len(self.rows) else 0
        return number if number > share * self.steps else 0

    def averages(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Middles of at most so many stretches of steps, of five losses each at least, and the mean loss in each."""
        told = np.cumsum(self.rows[:, 0])
        wanted = np.linspace(0, told[-1], min(most, int(told[-1]) // 5) + 1)[1:]
        steps = np.concatenate([[0.0], self.at[np.unique(np.searchsorted(told, wanted - 0.5))]])
        return (steps[1:] + steps[:-1]) / 2, np.array([self.level(a, b) for a, b in pairwise(steps)])

    def rise(self, data: RunData) -> LossRise | None:
        """How the loss left its lowest level, from every loss where most were noted."""
        if self.most:
            return rise_of_all(self.at, self.rows, self.steps)
        known = np.isfinite(data.loss)
        return rise_of(data.steps[known], data.loss[known])


MEASURED = 5
"""The first columns of a row are what its losses were; those behind say at which steps."""
MOST_NOTED = 0.5
"""Share of the steps whose losses must have been noted for means over all to stand for them."""
