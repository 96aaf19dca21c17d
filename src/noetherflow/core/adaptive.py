"""The settings of Adam-like and sign-like optimisers that the noise equilibrium depends on (theory.md section 13)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from noetherflow.core.rates import (
    GroupRates,
    Rates,
    Sampling,
    batches_per_epoch,
    check_batches,
    check_rates,
    covariance_factor,
    rates_by_name,
)
from noetherflow.errors import DataError


class _AveragingConfig:
    """What the settings of Adam and Lion share; the fields are those of the records below."""

    lr: float
    batch_size: int
    betas: tuple[float, float]
    weight_decay: float
    dataset_size: int | None
    replacement: bool
    sampling: Sampling
    groups: tuple[GroupRates, ...]

    def __post_init__(self) -> None:
        check_rates(self.lr, self.weight_decay)
        check_batches(self.batch_size, self.dataset_size, self.replacement, self.sampling)
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))
        object.__setattr__(self, "groups", tuple(self.groups))
        if not all(0 <= b < 1 for b in self.betas):
            raise DataError(f"betas must lie in [0, 1), got {self.betas!r}")
        rates_by_name(self.groups)

    @cached_property
    def _by_name(self) -> Mapping[str, Rates]:
        return rates_by_name(self.groups)

    def rates(self, parameter: str) -> Rates:
        """Learning rate and weight decay of one parameter by its canonical name."""
        return self._by_name.get(parameter, Rates(self.lr, self.weight_decay))

    @property
    def covariance_factor(self) -> float:
        """`f` in `Cov[g_B] = f * Sigma` (theory.md section 1)."""
        return covariance_factor(self.batch_size, self.dataset_size, self.replacement)

    @property
    def batches_per_epoch(self) -> int | None:
        """Minibatches in one pass over the data, the last one perhaps smaller; None for fresh data."""
        return batches_per_epoch(self.batch_size, self.dataset_size)


@dataclass(frozen=True)
class AdamConfig(_AveragingConfig):
    """`theta <- (1 - lr w) theta - lr m / (sqrt(v) + eps)`: Adam, AdamW and RMSprop as torch has them.

    `m` and `v` are running means of the minibatch gradient and of its square, with rates `betas` and, after the first
    steps, total weight 1. Adam's equilibrium does not depend on `betas[0]`; it needs `v` to be slow, `betas[1]` near 1.

    Args:
        lr: learning rate.
        batch_size: samples per minibatch; it matters, since `v` measures the gradient of the minibatch.
        betas: `(b1, b2)`; RMSprop with smoothing `alpha` is `(0, alpha)`.
        eps: added to `sqrt(v)`.
        weight_decay: torch's `weight_decay`.
        decoupled: decay acts on the weights (AdamW); False adds it to the gradients (Adam's `weight_decay`).
        dataset_size: the number of samples if that is all there is, None for fresh data.
        sampling: `independent` batches, or shuffled passes over the data set (`epoch`).
        replacement: batches of a finite data set are drawn with replacement.
        groups: parameters whose learning rate or weight decay differs.

    Raises:
        DataError: a rate outside its range, a batch larger than the data, a parameter in two groups.

    Example:
        >>> adamw = AdamConfig(lr=1e-3, batch_size=32, weight_decay=0.1, groups=(GroupRates(("bias",), 1e-3, 0.0),))
        >>> adamw.rates("bias").weight_decay, adamw.rates("weight").weight_decay
        (0.0, 0.1)

    Source: theory.md section 13.
    """

    lr: float
    batch_size: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    dataset_size: int | None = None
    sampling: Sampling = "independent"
    replacement: bool = False
    groups: tuple[GroupRates, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise DataError(f"eps must be finite and >= 0, got {self.eps!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, for files."""
        return asdict(self)


@dataclass(frozen=True)
class LionConfig(_AveragingConfig):
    """`theta <- (1 - lr w) theta - lr sign(b1 m + (1 - b1) g)`, then `m <- b2 m + (1 - b2) g`: Lion.

    Args:
        lr: learning rate.
        batch_size: samples per minibatch.
        betas: `(b1, b2)` of the two averages.
        weight_decay: decoupled weight decay.
        dataset_size: the number of samples if that is all there is, None for fresh data.
        sampling: `independent` batches, or shuffled passes over the data set (`epoch`).
        replacement: batches of a finite data set are drawn with replacement.
        groups: parameters whose learning rate or weight decay differs.

    Raises:
        DataError: a rate outside its range, a batch larger than the data, a parameter in two groups.

    Example:
        >>> round(LionConfig(lr=1e-4, batch_size=32).correlation_sum, 1)
        45.9

    Source: theory.md section 13, "Others"; it assumes that the entries of minibatch gradients are Gaussian, and that
        the averages are short against the time in which weights relax (docs/adaptive.md, "Where it ends").
    """

    lr: float
    batch_size: int
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    dataset_size: int | None = None
    sampling: Sampling = "independent"
    replacement: bool = False
    groups: tuple[GroupRates, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, for files."""
        return asdict(self)

    @property
    def gain(self) -> float:
        """What a mean gradient moves a step by, times the root mean square of the minibatch gradient: the sign of a
        Gaussian average with standard deviation `a s` answers with `sqrt(2 / pi) / (a s)`.

        Example:
            >>> round(LionConfig(lr=1e-4, batch_size=32).gain, 2)
            6.73
        """
        b1, b2 = self.betas
        return math.sqrt(2 / math.pi / ((1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)))

    @property
    def correlation_sum(self) -> float:
        """`beta`: the sum over all lags of the correlation between the signs of two steps.

        The sign of a Gaussian average has correlation `(2 / pi) arcsin rho_k` at lag `k`, `rho_k` the correlation of
        the averaged gradients. 1 for signs that are independent from step to step.
        """
        b1, b2 = self.betas
        if b1 == 0:
            return 1.0
        lags = max(2, math.ceil(math.log(1e-14) / math.log(b2))) if b2 else 2
        past = torch.arange(lags, dtype=torch.float64, device="cpu")
        head, tail = 1 - b1, b1 * (1 - b2) * b2**past
        own = head**2 + float(tail.square().sum())
        later = torch.cat([tail, tail.new_zeros(1)])
        rho = (head * later[:-1] + b2 ** (past + 1) * float(tail.square().sum())) / own
        return 1.0 + 2 * float((2 / math.pi * rho.asin()).sum())
