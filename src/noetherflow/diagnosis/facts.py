"""What the rules know: small records of numbers, whether they come from a measurement or from a run's log."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from noetherflow.core.schedule import CONSTANT, RateCourse
from noetherflow.moments.noise_scale import NoiseScales


@dataclass(frozen=True)
class ScaleInvariantNorm:
    """A weight whose scale the loss ignores, for it stands in front of a normalisation.

    Attributes:
        name: of the symmetry.
        norm_square: `|W|^2` now (preconditioned under Adam: only ratios of it are used).
        growth: what gradients add to it per step now, by noise and mean gradient; never negative.
        growth_error: standard error of that, None where unknown.
        decay: the share of it that weight decay takes per step.
        power: how fast growth falls as the norm rises: 2 under SGD (growth goes as `1 / |W|^2`, the effective learning
            rate is `lr / |W|^2`), 1 under Adam (growth constant, effective learning rate `lr / |W|`).
        horizon: steps for which the mean gradient lasts, and with it `growth`.
        later: growth per step from there on, by noise alone.
        course: of the learning rate, at whose largest value growth, decay and horizon are given.
    """

    name: str
    norm_square: float
    growth: float
    growth_error: float | None
    decay: float
    power: int
    horizon: float = math.inf
    later: float = 0.0
    course: RateCourse = CONSTANT

    def norm_factor(self, steps: float) -> float:
        """By which factor `|W|^2` changes in so many steps, the direction of the weight taken as it is.

        With `n = |W|^2`, growth `g` and decay `d` per step: SGD `d(n^2)/dk = 2 g n_0 - 2 d n^2`, Adam `dn/dk = g - d
        n`; both are linear.

        Example:
            >>> ScaleInvariantNorm("w", 1.0, 0.5, None, 0.0, 2).norm_factor(8)  # (1 + 2 * 0.5 * 8)^(1/2)
            3.0

        Source: theory.md section 7.
        """
        raised, gone = 1.0, 0.0
        for number, share, square in self.course.pieces(steps):
            first = min(number, max(0.0, self.horizon - gone) / share) if share > 0 else number
            raised = self._raised(raised, self.growth * square, first, share)
            raised = self._raised(raised, self.later * square, number - first, share)
            gone += number * share
        return float(raised ** (1 / self.power))

    def _raised(self, start: float, growth: float, steps: float, share: float) -> float:
        """The power of the norm that changes linearly, over today's: `start` now, so many steps later at a learning
        rate of `share` of the largest.
        """
        rate, push = self.decay * share * self.power, growth / self.norm_square * self.power
        left = math.exp(-rate * steps)
        return start * left + (push * steps if rate == 0 else push * (1 - left) / rate)

    def learning_rate_factor(self, steps: float) -> float:
        """By which factor the effective learning rate changes in so many steps at a constant learning rate."""
        return float(self.norm_factor(steps) ** (-self.power / 2))

    def farthest(self, steps: float) -> float:
        """The number of steps, of these, after which the norm is farthest from today's.

        At a constant learning rate it rises or falls all the way until the mean gradient is gone, and again from there
        on: two candidates. Under a schedule it is looked for at every twentieth of the steps.
        """
        between = np.linspace(0, steps, 21)[1:].tolist() if self.course.known else []
        return max((min(steps, self.horizon), steps, *between), key=lambda k: abs(math.log(self.norm_factor(k))))

    @property
    def settling(self) -> float:
        """Steps until the norm has come within 37 % of where decay holds it; infinite without decay."""
        return 1 / (self.decay * self.power) if self.decay > 0 else math.inf


@dataclass(frozen=True, eq=False)
class LayerBalance:
    """How far the coordinates of one symmetry (units, heads) stand from their noise equilibrium.

    Attributes:
        name: of the symmetry.
        family: its family.
        part: what a coordinate is: `unit`, `head`, `channel`.
        factors: by which the weights of each coordinate must be stretched on one side and shrunk on the other to be
            there, as the signed logarithm; NaN where there is no equilibrium. `[coordinates]`.
        errors: standard errors of `factors`, NaN where unknown.
        steps: until a small deviation is down to 37 %, median over coordinates; NaN where unknown.
        small: a weight on one of its sides that is much smaller than usual initial ones; empty where none is.
        each: `steps` of each coordinate; empty where only the median is known. `[coordinates]`.
    """

    name: str
    family: str
    part: str
    factors: np.ndarray
    errors: np.ndarray
    steps: float
    small: str = ""
    each: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class PartActivity:
    """How much the units or heads of one layer carry and learn.

    Attributes:
        name: of the symmetry.
        part: what a coordinate is: `unit`, `head`.
        weight: the product of the norms of both sides, the size of what a coordinate contributes. `[coordinates]`.
        gradient: the root of the mean squared gradient on both sides together. `[coordinates]`. NaN where unmeasured.
            Of a layer with an `activation` 1 where a unit passes a gradient on for some sample, else 0.
        activation: through which its units were seen, where no symmetry tells of them; else empty.
        frozen: its weights are not trained.
    """

    name: str
    part: str
    weight: np.ndarray
    gradient: np.ndarray
    activation: str = ""
    frozen: bool = False


@dataclass(frozen=True)
class StepStability:
    """How the learning rate stands to the curvature.

    Attributes:
        lr: the learning rate asked about, the largest of the run.
        load: `lr` over the largest that full-batch steps are stable at here; NaN where it was not measured.
        noisy_load: the same with minibatches, in mean square; NaN where unknown.
        load_later: `load` at the noise equilibrium; NaN where unknown.
        sharpening: by which factor the curvature changes on the way to the noise equilibrium; NaN where unknown.
        needed: steps of a linear warmup that keep the load below 1; None where no length does, NaN where unknown.
        safe: steps that keep the load with minibatches below 1/2, likewise.
        planned: steps of warmup that the run has; None where nobody said.
        started: the optimiser has made steps with these weights.
        replaced: a step is as long as some weight that it changes, so that curvature here says nothing.
        small: the stiffest direction is that of weights much smaller than the others of their layer, which a step
            replaces.
        saddle: the trace of the curvature is not positive, now or at the noise equilibrium: it has no factor.
        remedy: what would measure the curvature where it was not.
        run: steps of the whole run; infinite where nobody said.
        linear: steps of a linear warmup in which noise does as much as in the one planned; NaN where that is linear.
    """

    lr: float
    load: float
    noisy_load: float
    load_later: float
    sharpening: float
    needed: float | None
    safe: float | None
    planned: int | None
    started: bool
    replaced: bool = False
    small: bool = False
    saddle: bool = False
    remedy: str = "nf.diagnose(..., curvature=True) measures it"
    run: float = math.inf
    linear: float = math.nan

    @property
    def counts(self) -> float:
        """The steps that the planned warmup counts as, where it is far from linear."""
        planned = float(self.planned or 0)
        return self.linear if abs(self.linear - planned) > NOT_LINEAR * max(self.linear, 10.0) else planned

    @property
    def stable(self) -> float:
        """The largest learning rate at which full-batch steps are stable."""
        return self.lr / self.load if self.load > 0 else math.inf

    @property
    def held_by_imbalance(self) -> bool:
        """The learning rate is above half of the stable one, and at the noise equilibrium it would be twice as far from
        it, as far as that is known: imbalance makes the curvature that it runs up against.
        """
        return self.load >= NEAR and not self.sharpening > NEAR


NOT_LINEAR = 0.1
"""Share by which what a warmup counts as must differ from its length to count."""


@dataclass(frozen=True)
class PresentSharpness:
    """The largest Hessian eigenvalue today alone, where the noise equilibrium is not known.

    Attributes:
        top: the largest eigenvalue.
        lr: the learning rate asked about.
        limit: `lr * top` at which full-batch steps on a quadratic stop being stable; 2 without momentum.
    """

    top: float
    lr: float
    limit: float

    @property
    def load(self) -> float:
        """The learning rate over the largest stable one with full batches; 0 where the curvature is not positive."""
        return max(0.0, self.lr * self.top / self.limit)

    def __str__(self) -> str:
        stable = f"{self.limit / self.top:.3g}" if self.top > 0 else "not known, for it is not positive"
        return f"largest Hessian eigenvalue now {self.top:.4g}; stable lr below {stable} with full batches"

    def to_dict(self) -> dict[str, float]:
        """All numbers, ready for JSON."""
        return {"top_now": self.top, "lr": self.lr, "limit": self.limit, "load": self.load}


@dataclass(frozen=True)
class NormHistory:
    """What became of the norm of a scale-invariant weight in a run.

    Attributes:
        name: of the symmetry.
        norm_factor: `|W|^2` at the end over the beginning.
        rate_factor: effective learning rate at the end over the beginning, changes of the learning rate taken out.
        steps: between the two.
        start: the step of the first; the ledger's first estimates may be missing, as at a learning rate of 0.
        peak: the largest `|W|^2` over that at the beginning, NaN where only the ends are known.
        peak_step: the step at which it was largest.
    """

    name: str
    norm_factor: float
    rate_factor: float
    steps: float
    start: float = 0.0
    peak: float = math.nan
    peak_step: float = math.nan

    @property
    def falls(self) -> bool:
        """It was larger on the way by more than 2 % of the norm, and has come down since."""
        return self.peak * FALLEN**2 > self.norm_factor

    @property
    def span(self) -> str:
        """From which step to which, in words."""
        return f"from step {self.start:,.0f} to {self.start + self.steps:,.0f}"


@dataclass(frozen=True)
class Turn:
    """How far steps turned one scale-invariant weight, in radians, as far as they were estimated.

    Attributes:
        name: of the symmetry.
        lately: the median of the last estimates.
        rate_share: the learning rate at these estimates over the largest of the run.
        largest: the largest of all.
        at: its step.
    """

    name: str
    lately: float
    rate_share: float = 1.0
    largest: float = 0.0
    at: int = 0


FALLEN = 0.98
"""A norm below this share of its largest is said to fall since."""


@dataclass(frozen=True)
class RunBalance:
    """How far one symmetry stood from its noise equilibrium at the end of a run, as the ledger estimates it.

    Attributes:
        name: of the symmetry.
        median: median over coordinates of the log factor.
        largest: the largest of them.
        steps: until the distance has fallen to 37 %, NaN where unknown.
    """

    name: str
    median: float
    largest: float
    steps: float


@dataclass(frozen=True)
class LossRise:
    """A loss that has left the lowest level that it reached.

    Attributes:
        lowest: that level, a mean over several losses (of their logarithms where they are positive).
        level: the same of the last losses.
        step: about where it was lowest.
        share: of what the loss had fallen by since its start, that much is lost again, in logarithms or as it is.
    """

    lowest: float
    level: float
    step: int
    share: float


@dataclass(frozen=True)
class LossCourse:
    """What the loss and the learning rate did in a run.

    Attributes:
        warmup: steps over which the learning rate rose from its start.
        spikes: steps at which the loss jumped far above its level.
        broken: the first recorded step with numbers that are not finite, None without.
        finite_until: the last step whose loss is known and finite, None where losses were not noted.
        steps: made.
        began, ended: the first loss, and the mean over the last tenth of the steps; NaN where losses were not noted.
        ended_over: how many of the last losses `ended` is the mean of, where these are more than that tenth; else 0.
        middle: the mean loss of the middle fifth of the steps, NaN where unknown.
        highest: the largest loss, NaN where unknown.
        up_at: the step by which it had stood at that, well above the first one; None where it never was beyond scatter.
        diverged: the step from which the run was lost to its end: losses above twice the first one, weights a thousand
            times as large, or numbers that are not finite; None where it was not.
        rise: how the loss left its lowest level; None where it did not.
        dead: lately no gradient reached any watched weight.
        seen: how many losses were noted, where these are less than half of the steps; None where they are not.
        lapse: the first step with a loss that was NaN or infinite while the weights stayed finite; None without.
        decay: the share of squared weights that weight decay takes per step, 0 where there is none or it is not known.
    """

    warmup: int
    spikes: tuple[int, ...]
    broken: int | None
    steps: int
    began: float
    ended: float
    middle: float = math.nan
    highest: float = math.nan
    diverged: int | None = None
    rise: LossRise | None = None
    decay: float = 0.0
    dead: bool = False
    seen: int | None = None
    finite_until: int | None = None
    up_at: int | None = None
    lapse: int | None = None
    ended_over: int = 0

    @property
    def decay_memory(self) -> float:
        """Steps over which weight decay acts; infinite without any."""
        return 1 / self.decay if self.decay > 0 else math.inf

    @property
    def decay_acts(self) -> bool:
        """Weight decay has had three times its memory: 95 % of what squared norms began with is its making."""
        return self.steps >= ACTS * self.decay_memory

    @property
    def broke_calmly(self) -> bool:
        """The run ended in numbers that are not finite, and its loss had not risen before, as far as it is known."""
        known = self.broken is not None and self.finite_until is not None
        return known and self.diverged is not None and self.rise is None

    @property
    def well(self) -> bool:
        """The loss is below a tenth of the first one, or it still falls: 2 % between the middle and the end.

        A loss that has left its lowest level is not well, however low it still is.
        """
        if self.diverged is not None or math.isnan(self.ended) or self.rise is not None:
            return False
        return self.ended <= TRAINED * self.began or self.ended < self.middle - FALLS * abs(self.middle)

    @property
    def stalled(self) -> bool:
        """Losses were noted, and they fall no longer, or never did."""
        return self.diverged is None and not math.isnan(self.ended) and not self.well

    @property
    def slowed(self) -> bool:
        """The loss fell without a spike, and falls no longer: steps may have become too short, and are not too long."""
        calm = not self.spikes and self.broken is None and self.rise is None
        return self.stalled and calm and self.ended <= FELL * self.began


NEAR = 0.5
"""Share of the stable learning rate from which on curvature holds a run down; and of curvature that imbalance makes."""
TRAINED, FALLS, FELL = 0.1, 0.02, 0.95
"""Losses, over the first one, of a run that has learned; their fall in half a run that still learns; and a fall."""
SMALL = 0.1
"""Size of a weight over that of usual initial ones of its shape, below which its first steps give it its size."""
ACTS = 3.0
"""Memories of weight decay after which it has made the norms."""


@dataclass(frozen=True)
class NormTrend:
    """How fast the norm of one weight changes now.

    Attributes:
        name: of the parameter.
        norm_square: `|W|^2` now.
        change: of it per step, by mean gradient, noise and decay.
        step_square: the squared length of a step.
        settles: `|W|` where noise and decay come to rest over `|W|` now, the function held fixed; NaN where unknown.
        unseen: the loss ignores its norm, for a normalisation follows.
        matrix: it is one, no vector of gains.
        usual: the root mean square of its entries over `1 / sqrt(fan in)`, as usual initial weights have it; times
            that of a layer that it trades scale with, where that is above 1.
    """

    name: str
    norm_square: float
    change: float
    step_square: float = 0.0
    settles: float = math.nan
    unseen: bool = False
    matrix: bool = True
    usual: float = 1.0

    @property
    def is_small(self) -> bool:
        """It is much smaller than usual initial weights, as of a layer that begins at zero: steps make it grow."""
        return self.usual < SMALL

    @property
    def step_length(self) -> float:
        """The length of a step over that of the weight, 0 for a weight of zeros."""
        return math.sqrt(self.step_square / self.norm_square) if self.norm_square > 0 else 0.0


@dataclass(frozen=True)
class BatchRegime:
    """How minibatches stand to the gradient noise.

    Attributes:
        batch_size: samples per step.
        scales: gradient noise scales.
        mean_share: the mean gradient's share of what gradients add to the charges.
        horizon: steps for which the measured mean gradient lasts.
        started: the optimiser has made steps.
        dataset_size: samples of the training set, None where it is not known.
        noise_share: covariance of a minibatch gradient over that of fresh batches of its size; 0 for the full batch.
    """

    batch_size: int
    scales: NoiseScales
    mean_share: float
    horizon: float
    started: bool = True
    noise_share: float = 1.0
    dataset_size: int | None = None
