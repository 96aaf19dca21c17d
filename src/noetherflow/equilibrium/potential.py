"""How SGD weighs decay, gradient noise and the mean gradient: the drift of a charge and the potential Phi."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

from torch import Tensor

from noetherflow.core.settings import SGDConfig
from noetherflow.errors import DataError
from noetherflow.moments.result import GradientMoments


@dataclass(frozen=True)
class Drift:
    """`E[C' - C] = -decay C + noise D(f Sigma) + mean D(gbar gbar^T)` per step (theory.md sections 3 and 4)."""

    decay: float
    noise: float
    mean: float

    @classmethod
    def of(cls, sgd: SGDConfig) -> Drift:
        """Exact without momentum. With momentum `m`, to leading order in lr and stationary in `1/(1-m)` steps:

        `decay = 2 lr w / (1-m)`, `noise = lr^2 / (1-m)^2`, and because the mean gradient persists from step to step,
        `mean = lr^2 (1+m) / (1-m)^3`, for Nesterov `lr^2 (1 - m + 2 m^2) / (1-m)^3`.

        Raises DataError for anything but an SGDConfig.
        """
        if not isinstance(sgd, SGDConfig):
            raise DataError(f"sgd must be nf.SGDConfig(lr=..., batch_size=...), got {reprlib.repr(sgd)}")
        m, lr, rest = sgd.momentum, sgd.lr, 1 - sgd.momentum
        persistence = (1 - m + 2 * m * m if sgd.nesterov else 1 + m) / rest**3
        decay = lr * sgd.weight_decay * (2 - lr * sgd.weight_decay) / rest
        return cls(decay, lr**2 / rest**2, lr**2 * persistence)


@dataclass(frozen=True)
class Potential:
    """`Phi = 1/2 (norm ||theta||^2 + second Tr E[g g^T] + mean Tr gbar gbar^T)` on the measured moments."""

    norm: float
    second: float
    mean: float

    @classmethod
    def of(cls, drift: Drift, moments: GradientMoments, sgd: SGDConfig) -> Potential:
        (a, b), (c, d) = moments.batch_weights(sgd)
        return cls(drift.decay, drift.noise * a + drift.mean * c, drift.noise * b + drift.mean * d)

    def drive(self, second: Tensor, mean_square: Tensor) -> Tensor:
        return self.second * second.double() + self.mean * mean_square.double()


LegPair = tuple[Tensor, Tensor]
