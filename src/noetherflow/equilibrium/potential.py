"""How SGD weighs decay, gradient noise and the mean gradient: the drift of a charge and the potential Phi.

The one place where momentum, the sampling of minibatches and weight decay enter: flow, equilibrium, forecast and ledger
all read their coefficients here.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from noetherflow.core.optimizers import Settings
from noetherflow.core.settings import SGDConfig
from noetherflow.errors import DataError, MomentError, SampleNumberError
from noetherflow.moments.result import GradientMoments

LegPair = tuple[Tensor, Tensor]
ROUNDING = 1e-12
"""Share by which rounding may make samples seem too few that are just enough."""
Number = TypeVar("Number", float, np.ndarray)
"""One setting, or an array with one per parameter."""


def decay_rate(lr: Number, weight_decay: Number, momentum: Number) -> Number:
    """The share of a charge that weight decay takes per step: `lr w (2 - lr w) / (1 - m)`.

    Exact without momentum; with momentum to leading order in `lr w`.

    Example:
        >>> round(decay_rate(0.1, 0.01, 0.0), 9)
        0.001999

    Source: theory.md sections 3 and 4.
    """
    rate: Number = lr * weight_decay * (2 - lr * weight_decay) / (1 - momentum)
    return rate


def noise_rate(lr: Number, momentum: Number) -> Number:
    """What one unit of minibatch noise, uncorrelated from step to step, adds to a charge: `lr^2 / (1 - m)^2`.

    Heavy ball and Nesterov have the same one. Source: theory.md section 4.
    """
    rate: Number = lr**2 / (1 - momentum) ** 2
    return rate


def mean_rate(lr: Number, momentum: Number, nesterov: Number) -> Number:
    """What one unit of squared mean gradient adds to a charge per step.

    The mean gradient is the same from step to step, so that momentum counts it more than noise: `lr^2 (1 + m) /
    (1 - m)^3`, for Nesterov (`nesterov` 1, else 0) `lr^2 (1 - m + 2 m^2) / (1 - m)^3`. At `m = 0.9` that is 19 times
    what noise of the same size adds.

    Source: theory.md section 4.
    """
    rate: Number = lr**2 * (1 + momentum - nesterov * 2 * momentum * (1 - momentum)) / (1 - momentum) ** 3
    return rate


def state_drive(update: Number, cross: Number, lr: Number, momentum: Number, nesterov: Number) -> Number:
    """What noise and mean gradient add to a charge per step, read off the optimiser's own momentum buffer.

    Nothing needs to be known about how gradients are correlated (mean gradient, epochs, anything): because
    `theta^T A g = 0` for each gradient, `q = theta^T A b` of the buffer `b` obeys `q' = m (q - lr u^T A b)`, and the
    changes of the charge over a run sum to `lr^2 sum_t (u^T A u + 2 k u^T A b)` with `k = m / (1 - m)`, for Nesterov
    `k = m^2 / (1 - m)`, up to terms at both ends of the run.

    Args:
        update: `u^T A u`, the charge of the step `u = (theta - theta') / lr` that the buffer makes: `b` itself for
            heavy ball, `g + m b` for Nesterov.
        cross: `u^T A b`, the same as `update` for heavy ball.
        lr: Learning rate.
        momentum: `m`.
        nesterov: 1 for Nesterov momentum, else 0.

    Returns:
        The drift per step. PyTorch's buffer contains the decayed gradients `g + w theta`; then what decay takes is
        exactly `2 lr w / (1 - m)` of the charge.

    Source: theory.md section 4.
    """
    memory = 2 * momentum / (1 - momentum) * (1 - nesterov * (1 - momentum))
    drive: Number = lr**2 * (update + memory * cross)
    return drive


def epoch_factor(momentum: float, batches: int, *, nesterov: bool = False, lr_curvature: float = 0.0) -> float:
    """The drift by gradient noise under shuffled epochs, over that under independent batches.

    The batches of one epoch share no sample, so their noise sums to zero: two of them are correlated by
    `-1 / (batches - 1)`. Without momentum that does not matter. Momentum adds up the gradients of `1 / (1 - m)` steps,
    whose noise cancels in part: at `m = 0.9` and 8 batches per epoch three quarters of it. To leading order in lr

    `1 - 2 m / ((n - 1) (1 - m)) [1 - (1 - m^n) / (n (1 - m))]`, for Nesterov `1 - m + m` times that.

    A curvature `k` returns the weights to where they were, and forgets within `(1 - m) / (lr k)` steps or one
    oscillation of the heavy ball: of the correlations inside an epoch fewer survive, and the factor rises towards 1.
    It matters from `lr k` of about `(1 - m) / n` on. The formula is exact for a quadratic loss of curvature `k`;
    where the noise meets several curvatures, each leg's factor lies between those of the smallest and the largest.

    Args:
        momentum: `m`.
        batches: Batches per epoch, `n`.
        nesterov: Nesterov momentum.
        lr_curvature: `lr k`; 0 gives the leading order, a lower bound for small `lr k`.

    Returns:
        The factor, between 0 and about 1.

    Example:
        >>> round(epoch_factor(0.9, 8), 3), round(epoch_factor(0.9, 8, lr_curvature=0.002), 3)
        (0.259, 0.268)

    Source: theory.md section 4.
    """
    if batches < 2:
        return 1.0
    m, h = momentum, lr_curvature
    one, two = ((1 + m) * (1 - h), -m * (1 - h)) if nesterov else (1 + m - h, -m)
    white = _buffer_covariance(one, two, batches)
    lags = np.arange(1, batches)
    together = -(1 - lags / batches) / (batches - 1)
    at_0 = white[0] + 2 * together @ white[lags]
    at_1 = white[1] + together @ (white[lags + 1] + white[lags - 1])
    return float(_buffer_drive(at_0, at_1, m, nesterov) / _buffer_drive(white[0], white[1], m, nesterov))


def _buffer_covariance(one: float, two: float, lags: int) -> np.ndarray:
    """Autocovariance at lags `0..lags` of `b_t = one b_(t-1) + two b_(t-2) + x_t - x_(t-1)`, `x` white of variance 1.

    That is the momentum buffer on a quadratic loss, whose gradient is `x` plus curvature times the weights.
    """
    out = np.zeros(lags + 1)
    out[0] = 2 / ((1 + two) * (1 - two + one))
    out[1] = (one * out[0] - 1) / (1 - two)
    for j in range(2, lags + 1):
        out[j] = one * out[j - 1] + two * out[j - 2]
        if abs(out[j]) + abs(out[j - 1]) < 1e-17 * out[0]:
            break
    return out


def _buffer_drive(at_0: float, at_1: float, momentum: float, nesterov: bool) -> float:
    """`state_drive` at lr 1 from the buffer's autocovariance at lags 0 and 1: Nesterov's step is `(1 + m) b - m b'` of
    the buffers after and before.
    """
    m = momentum
    if not nesterov:
        return state_drive(at_0, at_0, 1.0, m, 0.0)
    update = ((1 + m) ** 2 + m * m) * at_0 - 2 * m * (1 + m) * at_1
    return state_drive(update, (1 + m) * at_0 - m * at_1, 1.0, m, 1.0)


@dataclass(frozen=True)
class Drift:
    """`E[C' - C] = -decay C + noise D(f Sigma) + mean D(gbar gbar^T)` per step (theory.md sections 3 and 4)."""

    decay: float
    noise: float
    mean: float

    @classmethod
    def of(cls, sgd: SGDConfig) -> Drift:
        """The coefficients of an SGD configuration, by `decay_rate`, `noise_rate`, `mean_rate` and `epoch_factor`.

        Exact without momentum; with momentum to leading order in lr, once `1 / (1 - m)` steps are made.

        Raises:
            DataError: `sgd` is not an SGDConfig.

        Example:
            >>> Drift.of(SGDConfig(lr=0.1, batch_size=8, momentum=0.5)).noise
            0.04000000000000001
        """
        if not isinstance(sgd, SGDConfig):
            raise DataError(f"sgd must be nf.SGDConfig(lr=..., batch_size=...), got {reprlib.repr(sgd)}")
        if sgd.groups:
            raise DataError("groups with rates of their own have no one drift; give SGDConfig(...) without groups")
        noise = noise_rate(sgd.lr, sgd.momentum)
        if sgd.sampling == "epoch" and sgd.batches_per_epoch is not None:
            noise *= epoch_factor(
                sgd.momentum,
                sgd.batches_per_epoch,
                nesterov=sgd.nesterov,
                lr_curvature=sgd.lr * sgd.curvature,
            )
        return cls(
            decay_rate(sgd.lr, sgd.weight_decay, sgd.momentum),
            noise,
            mean_rate(sgd.lr, sgd.momentum, float(sgd.nesterov)),
        )


@dataclass(frozen=True)
class Potential:
    """`Phi = 1/2 (norm ||theta||^2 + second Tr E[g g^T] + mean Tr gbar gbar^T)` on the measured moments.

    `E[g g^T]` and `gbar` are what was measured on the samples; how much of it is noise and how much mean gradient is in
    the coefficients. The Noether flow goes down Phi along the orbit, the noise equilibrium is its minimum.
    """

    norm: float
    second: float
    mean: float

    @classmethod
    def of(cls, drift: Drift, moments: GradientMoments, sgd: SGDConfig) -> Potential:
        """The potential whose slope along the orbit is the drift.

        Raises:
            MomentError: The moments are of a single sample, or of minibatches that hold all samples.
        """
        (a, b), (c, d) = moments.batch_weights(sgd)
        return cls(drift.decay, drift.noise * a + drift.mean * c, drift.noise * b + drift.mean * d)

    @property
    def needs_gradients(self) -> bool:
        """False where Phi is the norm of the weights alone."""
        return self.second != 0 or self.mean != 0

    def drive(self, second: Tensor, mean_square: Tensor) -> Tensor:
        """`M` of a leg: its measured `E[g g^T]` and `gbar gbar^T` weighed as in Phi, float64."""
        return self.second * second.double() + self.mean * mean_square.double()


def refuse_too_few(moments: GradientMoments, draws: Settings, noise: float, mean: float) -> None:
    """Refuse moments of so few samples that what they tell of the noise is the error of the mean gradient.

    The squared mean gradient of `n` samples is known up to noise `v Sigma`, `v` about `1 / n`. An optimiser with memory
    counts the mean gradient `mean / noise` times (19 times at a momentum or a b1 of 0.9), and where that is more than
    all the noise of a minibatch, sums over few entries come out negative or many times too large. All samples of a data
    set are always enough, where samples are measured and not minibatches of it.

    Args:
        moments: measured ones.
        draws: settings of the optimiser.
        noise: what one unit of minibatch noise adds to a charge per step.
        mean: what one unit of the squared mean gradient adds.

    Raises:
        SampleNumberError: too few samples; it names how many it takes.
        MomentError: a batch holds all samples, so that there is no noise.

    Source: theory.md sections 4 and 13.
    """
    (a, _), (c, _) = moments.batch_weights(draws)
    if noise * a * (1 + ROUNDING) + mean * c >= 0:
        return
    if not draws.covariance_factor:
        raise MomentError(
            f"batches of {draws.batch_size} hold all samples, so there is no gradient noise, and no equilibrium of "
            "it; give the batch size of the training, or all its data"
        )
    enough = -mean * c / (noise * a) * moments.samples if a and noise else math.inf
    unit, there = ("samples", draws.dataset_size) if moments.replicates is None else ("minibatches", None)
    needed = math.ceil(min(enough, there or math.inf) * (1 - ROUNDING))
    memory = f"momentum {draws.momentum:g}" if isinstance(draws, SGDConfig) else f"b1 {draws.betas[0]:g}"
    raise SampleNumberError(
        f"moments of {moments.samples} {unit} cannot tell the mean gradient from noise at batch size "
        f"{draws.batch_size} and {memory}; measure at least {needed} {unit}",
        needed,
        unit,
    )
