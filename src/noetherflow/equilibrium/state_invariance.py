"""The free test of an optimiser's state against symmetries: what `theta^T A m` may be if the loss obeys them.

A symmetric loss has `theta_t^T A g_t = 0` at every step, so `theta^T A m`, `m` the average of gradients, is made by
the optimiser's own steps alone. With `theta' = (1 - lr w) theta - lr d m` and `m' = b m + (1 - b) g` (SGD: `b m + g`)
it is, for the weights after the step that wrote the state, exactly

    theta'^T A m = - sum_{k >= 0} c^k lr Q_{t-k},   c = b (1 - lr w),   Q = sum_i a_i d_i m_i^2 .

The term `k = 0` is in the state; the others are as large as it, give or take what the squared average changed within
its own memory of `1 / (1 - b)` steps. Two numbers say whether that can be: by what factor the squared averages must
have changed for the symmetry to hold, and how far the coordinates scatter about the best such change, against the
scatter of averages of few numbers. Adam's `v` remembers what gradients were, so that both decide there. After SGD
gradients may have changed coordinate by coordinate, and the second leaves it undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from noetherflow.equilibrium.averages import Averages, AveragingLaw, OptimizerAverages
from noetherflow.equilibrium.state_sums import entries_of_whole, independent_entries
from noetherflow.errors import DataError
from noetherflow.symmetry.leg import Leg, accumulation_dtype
from noetherflow.symmetry.symmetry import Symmetry

CHANGE = {"adam": 2.0, "sgd": 2.5}
"""By what factor squared averages may have been larger within their memory, by kind of optimiser: gradients seldom fall
faster, and Adam's `v` remembers when they have.
"""
SCATTER = {"holds": 3.0, "broken": 6.0}
"""Mean squared deviation of coordinates, in units of what averages of few numbers scatter, up to which a symmetry
holds, and from which on it is broken.
"""
RARE = 0.02
"""Probability with which the squared average of a symmetric loss may by chance be so small now as to be mistaken."""
LARGEST = 3.0
"""The largest change of the squared average of all coordinates together that `scatter` takes out."""
EXACT = 0.05
"""Part of a step's own size that may be left of `theta^T A m + lr Q` where there is no past."""
Outcome = Literal["holds", "broken", "undecided"]


@dataclass(frozen=True)
class StateInvariance:
    """Whether an optimiser's state is that of a loss with one symmetry.

    Attributes:
        outcome: `broken` where no history that is likely makes the state that of a symmetric loss; `undecided` where
            an unlikely one does, or the optimiser keeps no average of gradients.
        factor: by how much squared averages must have been larger than now within their memory; at least 1.
        allowed: the largest such factor that passes; where the averages hold few independent numbers it is large.
        scatter: mean squared deviation of coordinates from such a change, in units of what is expected.
        resolved: a violation that changes drifts by this part of all that pushes the charges would have been seen.
    """

    outcome: Outcome
    factor: float
    allowed: float
    scatter: float
    resolved: float


@dataclass(frozen=True, eq=False)
class _History:
    """The past terms of one symmetry, per coordinate.

    Attributes:
        lags: `sum_{k = 1}^{t - 1} c^k`, how many past terms the average holds.
        value: what `- sum_k c^k lr Q` of the past is for a symmetric loss, read off the state, over `sum_k c^k`.
        plus, minus: the sizes of `lr Q` of `+` and `-` legs, from the average now and from `v`.
        last_plus, last_minus: the same from the average now alone.
        variance: of `value` about these, for averages of few numbers.
        noise: rounding of `value`.
        slack: weight decay in the average, the whole of it, for a run so young that the average lacks a part.
    """

    lags: float
    value: Tensor
    plus: Tensor
    minus: Tensor
    last_plus: Tensor
    last_minus: Tensor
    variance: Tensor
    noise: Tensor
    slack: Tensor


UNKNOWN = StateInvariance("undecided", *[float("nan")] * 4)
"""Of an optimiser that keeps no average of gradients, or one of preconditioned gradients."""


def state_invariance(symmetry: Symmetry, reads: Sequence[OptimizerAverages]) -> StateInvariance:
    """Test one symmetry on the averages of an optimiser, at one step or at several of one run.

    Args:
        symmetry: torus or general_linear, of which the diagonal generators are tested.
        reads: the averages of all its parameters, one record per step; several tell smaller violations.

    Returns:
        The outcome with the numbers that it rests on.

    Source: theory.md section 13, "The state identity".
    """
    law = reads[0].law
    states = [{n: read.by_name[n] for n in symmetry.parameters} for read in reads]
    if law.kind == "rmsprop" or any(leg.buffer for leg in symmetry.legs) or any(map(_lacks_mean, states)):
        return UNKNOWN
    past = _mean_history(symmetry, states, law)
    if not past.lags:
        return _without_past(past)
    factor, surely = (_factor(past, margin) for margin in (past.noise, past.noise + past.slack))
    chance = 1.0 if law.kind == "adam" else _low_chance(symmetry, states)
    allowed, scatter = CHANGE[law.kind] * chance, _scatter(past)
    decides = law.kind == "adam" and not past.slack.any()
    schedule = max(_schedule(state, law) for state in states)
    outcome: Outcome = "holds" if factor <= allowed and scatter <= SCATTER["holds"] else "undecided"
    if surely > allowed * schedule or (decides and scatter > SCATTER["broken"] * schedule**2):
        outcome = "broken"
    return StateInvariance(outcome, factor, allowed, scatter, _resolved(past, law, allowed))


def refuse_broken(symmetries: Mapping[str, StateInvariance], law: AveragingLaw) -> None:
    """Refuse a state that is not that of a loss with the symmetries.

    Raises:
        DataError: names the worst symmetry, the numbers and the remedies.
    """
    broken = {n: t for n, t in symmetries.items() if t.outcome == "broken"}
    if not broken:
        return
    name, test = max(broken.items(), key=lambda item: item[1].factor / item[1].allowed)
    others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    memory = max(1, round(1 / (1 - law.memory)))
    raise DataError(
        f"symmetry {name!r}{others}: theta^T A m of the optimiser's state is not what its steps make of it for a loss "
        f"with this symmetry. Squared averages would have to have been {test.factor:.3g} times larger within the last "
        f"{memory} steps (up to {test.allowed:.3g} passes). If the loss breaks the symmetry (an L2 or activation "
        "penalty inside it, a detached branch), take the penalty out (weight decay belongs in the optimiser) or leave "
        f"the symmetry out: syms.without({{{name!r}: 'broken by the loss'}}). If the weights are not those of the step "
        "that wrote the state, or the learning rate was cut or the gradients collapsed within these steps, use a later "
        "state"
    )


def _without_past(past: _History) -> StateInvariance:
    """Where the average holds the last gradient alone nothing is left open but rounding."""
    size = float((past.plus + past.minus).sum())
    left, surely = (
        float((past.value.abs() - margin).clamp_min(0).sum()) for margin in (past.noise, past.noise + past.slack)
    )
    outcome: Outcome = "broken" if surely > EXACT * size else "undecided" if left > EXACT * size else "holds"
    return StateInvariance(outcome, 1 + left / size if size > 0 else 1.0, 1 + EXACT, 0.0, 2 * EXACT)


def _lacks_mean(averages: Mapping[str, Averages]) -> bool:
    return any(a.mean is None for a in averages.values())


def _lags(law: AveragingLaw, steps: int | None) -> float:
    """How many past terms an average holds; all of them where the state does not say how old it is."""
    b = law.memory
    return b / (1 - b) * (1 if steps is None else 1 - b ** max(steps - 1, 0))


def _mean_history(symmetry: Symmetry, states: Sequence[Mapping[str, Averages]], law: AveragingLaw) -> _History:
    """The mean over states of the past of every coordinate."""
    parts = [_history(symmetry, state, law) for state in states]
    lags = max(p.lags for p in parts)
    names = [f.name for f in fields(_History) if f.name != "lags"]
    mean = {n: torch.stack([getattr(p, n) for p in parts]).mean(0) for n in names}
    return _History(lags, **mean | {"variance": mean["variance"] / len(parts)})


def _history(symmetry: Symmetry, averages: Mapping[str, Averages], law: AveragingLaw) -> _History:
    """The past of every coordinate; where there is none (`lags` 0), `value` in units of one step.

    The weights may be those before the step that wrote the state: then the term of that step is not in `theta^T A m`.
    """
    lags = _lags(law, next(iter(averages.values())).steps)
    count, zero = lags or 1.0, torch.zeros(symmetry.blocks * symmetry.dim, dtype=torch.float64)
    total = _LegTerms(*[zero] * len(fields(_LegTerms)))
    sides = {1: total, -1: total}
    for leg in symmetry.weight_legs:
        one = _leg_terms(symmetry, leg, averages[leg.parameter], law)
        sides[leg.sign] = sides[leg.sign].plus(one)
    up, down = sides[1], sides[-1]
    value, last = (down.cross - down.decay) - (up.cross - up.decay), up.now - down.now
    value = torch.where((value - last).abs() < value.abs(), value - last, value) / count
    noise = 6 * (up.rounding + down.rounding).sqrt() / count
    slack = (up.decay - down.decay).abs() / count
    variance = up.variance + down.variance + noise.square() + slack.square()
    return _History(lags, value, up.size, down.size, up.now, down.now, variance, noise, slack)


@dataclass(frozen=True, eq=False)
class _LegTerms:
    """Sums over the entries of one leg by coordinate, times the size of its exponent: `theta m`, `lr d m^2` now, weight
    decay that `m` holds, the size of `lr d m^2` to compare with, the squared rounding of the first, and the variance of
    the size.
    """

    cross: Tensor
    now: Tensor
    decay: Tensor
    size: Tensor
    rounding: Tensor
    variance: Tensor

    def plus(self, other: _LegTerms) -> _LegTerms:
        """The sums over both."""
        return _LegTerms(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def _leg_terms(symmetry: Symmetry, leg: Leg, averages: Averages, law: AveragingLaw) -> _LegTerms:
    """The terms of one leg, one after the other: parameters may be large."""
    assert averages.mean is not None
    theta = symmetry.positions({averages.name: averages.theta.detach()})[averages.name]
    given = [theta, averages.mean] + ([] if averages.square is None else [averages.square])
    found = leg.sums_by_piece(lambda *pieces: _terms(averages, law, *pieces), given)
    weight, cross, squares, now, size = (abs(leg.exponent) * sums.double().cpu().reshape(-1) for sums in found)
    fine = max(torch.finfo(t.dtype).eps for t in (averages.theta, averages.mean) if t.is_floating_point())
    rounding = fine**2 * abs(leg.exponent) * squares
    held = 0.0 if law.decoupled else averages.rates.weight_decay
    held *= averages.mean_total if law.kind == "adam" else 1 / (1 - law.memory)
    variance = size.square() * 2 / independent_entries(leg, averages)
    return _LegTerms(cross, now, held * weight, size, rounding, variance)


def _terms(
    averages: Averages, law: AveragingLaw, theta: Tensor, mean: Tensor, square: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Entry by entry `theta^2`, `theta m`, its square, and `_steps`."""
    theta, mean = accumulation_dtype(theta), accumulation_dtype(mean)
    product = theta * mean
    return theta.square(), product, product.square(), *_steps(averages, law, mean, square)


def _steps(averages: Averages, law: AveragingLaw, mean: Tensor, square: Tensor | None) -> tuple[Tensor, Tensor]:
    """`lr d m^2` of every entry now, and the size to compare its past with.

    For Adam the size is at least what uncorrelated gradients of `v`'s size make of the average, so that an average that
    is small by chance, or has just become so, is not mistaken. Nesterov's last step is not in the state.
    """
    lr = averages.rates.lr
    now = mean.square().mul_(lr / averages.mean_total)
    if square is not None:
        root = (accumulation_dtype(square) / averages.square_total).sqrt_().add_(law.eps or 0.0)
        now = torch.where(root > 0, now.div_(root), torch.zeros((), dtype=now.dtype))
        return now, torch.maximum(now, root.mul_(lr * (1 - law.memory) / (1 + law.memory)))
    if law.nesterov:
        return torch.zeros_like(now), now * (law.memory + (1 - law.memory**2) ** 0.5)
    return now, now


def _factor(past: _History, noise: Tensor) -> float:
    """The least `G >= 1` with `sum_j |value_j| = sum_j (G M_j - m_j / G)`, `M` and `m` the larger and the smaller
    side: each side may have been between `1 / G` and `G` times what it is now.
    """
    x = float((past.value.abs() - noise).clamp_min(0).sum())
    large = float(torch.maximum(past.plus, past.minus).sum())
    small = float(torch.minimum(past.plus, past.minus).sum())
    if x == 0:
        return 1.0
    return max(1.0, (x + (x * x + 4 * large * small) ** 0.5) / (2 * large)) if large > 0 else float("inf")


def _scatter(past: _History) -> float:
    """The mean square of what is left of `value / sqrt(variance)` when each side has changed by the factor between 0
    and `LARGEST` that fits best, the sizes from `v` and from the average now each by their own.
    """
    from scipy.optimize import lsq_linear

    sides = (past.last_plus, -past.last_minus, past.plus, -past.minus)
    columns = torch.stack([side for side in sides if bool(side.any())] or [past.plus], 1)
    width = past.variance.clamp_min(1e-300).sqrt()
    free = len(width) - columns.shape[1]
    if free < 1:
        return 0.0
    fitted = lsq_linear((columns / width[:, None]).numpy(), (past.value / width).numpy(), (0, LARGEST))
    return float(2 * fitted.cost / free)


def _low_chance(symmetry: Symmetry, states: Sequence[Mapping[str, Averages]]) -> float:
    """How much larger than now the mean square may be where the present one, of `n` independent numbers, is unusually
    small by chance.
    """
    from scipy.stats import chi2

    counts = [[entries_of_whole(g, state[g.parameter]) for state in states] for g in symmetry.weight_legs]
    n = max(sum(own) for own in counts)
    return float(n / chi2.ppf(RARE, n)) if n < 1e6 else 1.0


def _schedule(averages: Mapping[str, Averages], law: AveragingLaw) -> float:
    """How much larger the learning rate may have been within the memory under a schedule, from its initial value: for
    a linear or cosine one after a known number of steps, any where that is not known.
    """
    widest = 1.0
    for a in averages.values():
        if a.initial_lr is None or a.initial_lr <= a.rates.lr:
            continue
        ratio = a.initial_lr / a.rates.lr
        slope = ratio if a.steps is None else 1.6 * ratio / max(a.steps, 1) / (1 - law.memory)
        widest = max(widest, min(ratio, 1 + slope))
    return widest


def _resolved(past: _History, law: AveragingLaw, allowed: float) -> float:
    """The drift of a violation at the nearer of the two limits, `2 lr |theta^T A m|`, over the gross noise
    `lr (1 + b) / (1 - b) (plus + minus)`.
    """
    large = float(torch.maximum(past.plus, past.minus).sum())
    small = float(torch.minimum(past.plus, past.minus).sum())
    if not large:
        return 0.0
    by_factor = allowed * large - small / allowed
    by_scatter = float(past.variance.sqrt().sum()) * SCATTER["holds"] ** 0.5
    b = law.memory
    return float(2 * b / (1 + b) * min(by_factor, by_scatter) / (large + small))
