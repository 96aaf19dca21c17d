"""What one optimiser step does to the norm of one weight, from its measured gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from noetherflow.core.optimizers import Settings
from noetherflow.core.settings import SGDConfig
from noetherflow.equilibrium.potential import Drift


@dataclass(frozen=True)
class Step:
    """What a step does to the square of one weight's norm, `-2 along + grown`, decay apart, and how long it is.

    With momentum all three are those of a full buffer. Its steps hang together, so that fluctuations along the weight
    add up: `grown` is then more than the squared length `square` of one step.
    """

    along: float
    grown: float
    square: float

    @classmethod
    def of(cls, settings: Settings, name: str, weight: Tensor, mean: Tensor, squares: Tensor) -> Step:
        """From the mean gradient and mean squared per-sample gradients of a parameter, entry by entry.

        SGD with momentum `m`, minibatch noise `s^2` and mean gradient `g`: `along = lr <W, g> / (1 - m)`,
        `grown = (lr / (1 - m))^2 (s^2 + g^2)` (theory.md section 4) and, of independent noise, `square = lr^2 (s^2 /
        (1 - m^2) + g^2 / (1 - m)^2)`. Under Adam and Lion every entry moves by `lr`.
        """
        rates = settings.rates(name)
        noise = settings.covariance_factor * (squares - mean.square())
        if not isinstance(settings, SGDConfig):
            size = (noise + mean.square()).sqrt().clamp_min(1e-12)
            square = rates.lr**2 * weight.numel()
            return cls(rates.lr * float((weight * mean / size).sum()), square, square)
        own = of_parameter(settings, name)
        m, drift = own.momentum, Drift.of(own).noise
        scattered, steady = float(noise.sum()), float(mean.square().sum())
        square = rates.lr**2 * scattered / (1 - m**2) + own.effective_lr**2 * steady
        return cls(own.effective_lr * float((weight * mean).sum()), drift * (scattered + steady), square)


def of_parameter(settings: SGDConfig, name: str) -> SGDConfig:
    """The settings of one parameter alone: groups have rates of their own."""
    rates = settings.rates(name)
    return replace(settings, lr=rates.lr, weight_decay=rates.weight_decay, groups=())
