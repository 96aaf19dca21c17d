"""A claim of an experiment, judged: predicted against measured, with its error, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

Relation = Literal["equals", "above", "below"]

ERRORS = 3.0
"""A two-sided claim without a registered tolerance holds when it is off by fewer standard errors than this."""

Kind = Literal["identity", "one-sided", "two-sided"]


@dataclass(frozen=True)
class Verdict:
    """One claim, judged: `measured +- error` (standard error over seeds) against `predicted`.

    A two-sided claim (`equals`) holds when `|z| < 3`, `z = (measured - predicted) / error`. Where theory leaves out
    terms of the learning rate's `order` and beyond, `z` is that of the limit eta -> 0, extrapolated from several rates
    (`extrapolated`). Where there is no theory of the deviation, or nothing random (`error` 0), a `tolerance` decides:
    the whole interval `measured +- 2 error` must lie within it (absolute, or relative to `predicted` when
    `relative`), and `reason` says where it comes from; it is registered, that is, written into the module before the
    seeds it judges were first run. One-sided claims (`above`, `below`) hold when the whole interval lies beyond
    `predicted`, then a threshold. Not-a-number never holds.

    Attributes:
        claim: what is claimed, unique within the experiment.
        predicted: the value of theory, or the threshold.
        measured: the value found.
        error: its standard error; 0 where nothing random enters.
        tolerance: 0 to judge by standard errors.
        relation: two-sided (`equals`) or one-sided.
        relative: whether the tolerance is relative.
        analysis: why the claim fails, when it does.
        difference: the difference from the print that it demonstrates (`differences.py`), 0 for none.
        identity: exact by construction (two computations of one thing): listed apart and not counted.
        reason: where a tolerance comes from.
        statement: id of the statement that it tests (`statements.py`), where it is not the experiment's own.
        order: the power of the learning rate with which the deviation from theory vanishes; 0 to judge at this rate.
    """

    claim: str
    predicted: float
    measured: float
    error: float = 0.0
    tolerance: float = 0.0
    relation: Relation = "equals"
    relative: bool = True
    analysis: str = ""
    difference: int = 0
    identity: bool = False
    reason: str = ""
    statement: str = ""
    order: int = 0

    def extrapolated(self, coarser: Mapping[float, Verdict]) -> Verdict:
        """The claim in the limit eta -> 0, from this verdict and those at larger learning rates.

        The deviation `d` from theory is taken for a polynomial in the rate that begins with the power `order` and has
        as many terms as there are larger rates: with one of them `d` is in proportion to `eta^order`, with two it is
        `a eta^order + b eta^(order + 1)`. Its value at 0 is a sum of the deviations with fixed weights
        (`limit_weights`); independent errors add up in squares with the same weights. The sum is put on top of this
        rate's prediction. `d` is relative to the prediction where `relative`, as predictions too may differ between
        the rates, and `measured - predicted` otherwise.

        Args:
            coarser: by factor, the larger rate over this rate, the same claim judged there.

        Example:
            >>> fine = Verdict("norm", predicted=1.0, measured=1.01, error=0.001, order=1)
            >>> rough = Verdict("norm", predicted=1.0, measured=1.02, error=0.001, order=1)
            >>> round(fine.extrapolated({2: rough}).measured, 6)
            1.0
        """
        at = {1.0: self, **coarser}
        relative = self.relative and all(v.predicted for v in at.values())
        scales = [abs(v.predicted) if relative else 1.0 for v in at.values()]
        off = [(v.measured - v.predicted) / scale for v, scale in zip(at.values(), scales, strict=True)]
        errors = [v.error / scale for v, scale in zip(at.values(), scales, strict=True)]
        weights = limit_weights(tuple(at), self.order)
        told = [f"at {f:g} times the rate {d:+.3g}" for f, d in sorted(zip(at, off, strict=True), reverse=True)[:-1]]
        return replace(
            self,
            measured=self.predicted + scales[0] * sum(w * d for w, d in zip(weights, off, strict=True)),
            error=scales[0] * math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))),
            analysis=f"Deviation {', '.join(told)}, at the rate {off[0]:+.3g}. {self.analysis}".strip(),
        )

    @property
    def kind(self) -> Kind:
        """`identity`, or whether theory predicts a value (`two-sided`) or a threshold (`one-sided`)."""
        if self.identity:
            return "identity"
        return "two-sided" if self.relation == "equals" else "one-sided"

    @property
    def z(self) -> float:
        """Standard errors between measurement and prediction; nan for what is not two-sided or has no error."""
        if self.kind != "two-sided" or not self.error:
            return math.nan
        return (self.measured - self.predicted) / self.error

    @property
    def holds(self) -> bool:
        if not all(math.isfinite(v) for v in (self.predicted, self.measured, self.error)):
            return False
        reach = 2 * self.error
        if self.relation == "above":
            return self.measured - reach > self.predicted
        if self.relation == "below":
            return self.measured + reach < self.predicted
        if self.error and not self.tolerance:
            return abs(self.z) < ERRORS
        allowed = self.tolerance * (abs(self.predicted) if self.relative else 1.0)
        return abs(self.measured - self.predicted) + reach <= allowed

    @property
    def criterion(self) -> str:
        """The prediction as text: `= 0.6`, `= 0.6 within 3 %`, `> 10`."""
        if self.relation != "equals":
            return f"{'>' if self.relation == 'above' else '<'} {self.predicted:.4g}"
        if not self.tolerance:
            return f"{self.predicted:.5g}" + (", eta -> 0" if self.order else "")
        allowed = f"{100 * self.tolerance:.3g} %" if self.relative else f"{self.tolerance:.2g}"
        return f"{self.predicted:.5g} within {allowed}"

    @property
    def found(self) -> str:
        """The measurement as text: `0.598 ± 0.002`."""
        return f"{self.measured:.5g} ± {self.error:.2g}" if self.error else f"{self.measured:.5g}"

    @property
    def deviation(self) -> str:
        """`z` as text, empty where there is none: `-1.3`."""
        return f"{self.z:+.1f}" if math.isfinite(self.z) else ""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "holds": self.holds, "criterion": self.criterion}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`."""
        return cls(**{f.name: stored[f.name] for f in fields(cls)})

    def __str__(self) -> str:
        mark = "holds" if self.holds else "FAILS"
        z = f" (z {self.deviation})" if self.deviation else ""
        return f"[{mark}] {self.claim}: measured {self.found}, predicted {self.criterion}{z}"


def limit_weights(rates: Sequence[float], order: int) -> tuple[float, ...]:
    """Weights that give a polynomial's value at 0 from its values at `rates`.

    The polynomial has a constant and the powers `order`, `order + 1`, ..., as many as there are rates beyond the first.

    Example:
        >>> [round(w, 6) for w in limit_weights([1, 2], order=1)]
        [2.0, -1.0]
        >>> [round(w, 6) for w in limit_weights([1, 2, 4], order=1)]
        [2.666667, -2.0, 0.333333]
    """
    powers = np.array([0, *range(order, order + len(rates) - 1)])
    values = np.asarray(rates, dtype=float) ** powers[:, None]
    return tuple(float(w) for w in np.linalg.solve(values, np.eye(len(rates))[0]))


def _mean_and_error(values: Any) -> tuple[float, float]:
    """Mean and standard error over independent seeds; a number is exact (error 0), a single seed has error nan."""
    v = np.asarray(values, dtype=float)
    if v.ndim == 0:
        return float(v), 0.0
    v = v.reshape(-1)
    return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else math.nan


def from_seeds(claim: str, predicted: float, values: Any, tolerance: float = 0.0, **judged: Any) -> Verdict:
    """A verdict whose measurement is the mean of `values`, one per independent seed; `judged`: fields of `Verdict`."""
    mean, error = _mean_and_error(np.reshape(values, -1))
    return Verdict(claim, float(predicted), mean, error, tolerance, **judged)


def from_ratio(claim: str, predicted: float, over: Any, under: Any, tolerance: float = 0.0, **judged: Any) -> Verdict:
    """`mean(over) / mean(under)` with error `|ratio| sqrt((error / mean)^2 of over + the same of under)`.

    Each side: one value per seed, independent of the other side's, or a number (exact). Not-a-number over a zero mean.
    `judged`: fields of `Verdict`.
    """
    (a, da), (b, db) = _mean_and_error(over), _mean_and_error(under)
    b = b or math.nan
    return Verdict(claim, float(predicted), a / b, math.hypot(da / b, a * db / b**2), tolerance, **judged)


def from_difference(
    claim: str, predicted: float, first: Any, second: Any, tolerance: float = 0.0, **judged: Any
) -> Verdict:
    """`mean(first) - mean(second)` with error `sqrt(error_first^2 + error_second^2)`; the sides as in `from_ratio`."""
    (a, da), (b, db) = _mean_and_error(first), _mean_and_error(second)
    return Verdict(claim, float(predicted), a - b, math.hypot(da, db), tolerance, **judged)


def from_counts(
    claim: str,
    threshold: float,
    successes: int,
    trials: int,
    relation: Literal["above", "below"] = "above",
    **judged: Any,
) -> Verdict:
    """`successes / trials` with `2 error` its distance to the one-sided 97.5 % Clopper-Pearson bound.

    The bound is the lower one for `above`, the upper one for `below`. Not-a-number for no trials.
    """
    from scipy.stats import binomtest

    if trials == 0:
        return Verdict(claim, threshold, math.nan, math.nan, relation=relation, **judged)
    low, high = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    share = successes / trials
    reach = share - low if relation == "above" else high - share
    return Verdict(claim, threshold, share, float(reach) / 2, relation=relation, **judged)


def from_resampling(
    claim: str,
    predicted: float,
    values: Any,
    statistic: Callable[[np.ndarray], float],
    tolerance: float = 0.0,
    **judged: Any,
) -> Verdict:
    """`statistic(values)`, values `[seeds, ...]`, and its standard deviation over 400 bootstrap samples of the seeds.

    For what is not a mean: a spread, a median. For a maximum the error is a rough one: resampling never exceeds it.
    """
    v = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(len(v), size=(400, len(v)))
    error = float(np.std([statistic(v[i]) for i in drawn]))
    return Verdict(claim, float(predicted), float(statistic(v)), error, tolerance, **judged)
