"""What one optimiser step does to the norm of one weight: by its measured gradients, and by weight decay."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.optimizers import Settings
from noetherflow.core.settings import SGDConfig


@dataclass(frozen=True)
class Step:
    """What one step from an empty momentum buffer does to a weight: `-2 along + square` to its square, decay apart, and
    `square` is the squared length of the step.

    Later steps under momentum depend on how long gradients point one way, which one measurement does not tell. (Where a
    full buffer of the same gradient would have made a step of 1.1 times the weight, the first was 0.15 of it and the
    longest of 25 was 0.2.)
    """

    along: float
    square: float

    @classmethod
    def of(cls, settings: Settings, name: str, weight: Tensor, mean: Tensor, squares: Tensor) -> Step:
        """From the mean gradient and mean squared per-sample gradients of a parameter, entry by entry.

        SGD with minibatch noise `s^2` and mean gradient `g`: `along = lr <W, g>`, `square = lr^2 (s^2 + g^2)`
        (theory.md section 4). Under Adam and Lion every entry moves by `lr`.
        """
        lr = settings.rates(name).lr
        second = settings.covariance_factor * (squares - mean.square()) + mean.square()
        if isinstance(settings, SGDConfig):
            return cls(lr * float((weight * mean).sum()), lr**2 * float(second.sum()))
        return cls(lr * float((weight * mean / second.sqrt().clamp_min(1e-12)).sum()), lr**2 * weight.numel())


def of_parameter(settings: SGDConfig, name: str) -> SGDConfig:
    """The settings of one parameter alone: groups have rates of their own."""
    rates = settings.rates(name)
    return replace(settings, lr=rates.lr, weight_decay=rates.weight_decay, groups=())


def decay_share(settings: Settings, parameter: str) -> float:
    """What weight decay takes of a squared weight per step, `2 lr w` (with momentum `m` over `1 - m`).

    0 for Adam's coupled decay, whose share depends on the gradients.

    Example:
        >>> decay_share(SGDConfig(lr=0.1, batch_size=8, weight_decay=0.01, momentum=0.9), "any")
        0.02
    """
    rates = settings.rates(parameter)
    if isinstance(settings, AdamConfig) and not settings.decoupled:
        return 0.0
    memory = 1 - settings.momentum if isinstance(settings, SGDConfig) else 1.0
    return round(2 * rates.lr * rates.weight_decay / memory, 15)
