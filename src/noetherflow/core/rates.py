"""What the settings of all optimisers share: learning rate, weight decay, and how batches are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from noetherflow.errors import DataError

Sampling = Literal["independent", "epoch"]
"""How batches follow each other: each drawn anew, or cut from one shuffled pass over the data after the other."""


class BatchDraws(Protocol):
    """Settings that say how minibatches are drawn: those of every optimiser."""

    @property
    def dataset_size(self) -> int | None:
        """Samples in all, None for fresh data."""

    @property
    def covariance_factor(self) -> float:
        """`f` in `Cov[g_B] = f Sigma`."""


@dataclass(frozen=True)
class Rates:
    """Learning rate and weight decay of one parameter.

    Example:
        >>> Rates(lr=0.1, weight_decay=0.5).decay_per_step
        0.0975
    """

    lr: float
    weight_decay: float

    @property
    def decay_per_step(self) -> float:
        """`lr w (2 - lr w)`: the share of a squared weight that decay alone takes in one step."""
        shrink = self.lr * self.weight_decay
        return shrink * (2 - shrink)


@dataclass(frozen=True)
class GroupRates:
    """A parameter group whose learning rate or weight decay differs from the rest, as torch optimisers have them.

    Args:
        parameters: canonical names of its parameters.
        lr: its learning rate.
        weight_decay: its weight decay; often 0 for biases and gains.

    Raises:
        DataError: a rate is negative or not finite, or decay alone would make the weights grow.

    Example:
        >>> GroupRates(("0.bias",), lr=1e-3, weight_decay=0.0).rates
        Rates(lr=0.001, weight_decay=0.0)
    """

    parameters: tuple[str, ...]
    lr: float
    weight_decay: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        check_rates(self.lr, self.weight_decay)

    @property
    def rates(self) -> Rates:
        """The two numbers without the names."""
        return Rates(self.lr, self.weight_decay)


def check_rates(lr: float, weight_decay: float) -> None:
    """Refuse a learning rate and weight decay that no training can have.

    Raises:
        DataError: `lr` is not positive, `weight_decay` is negative, either is not finite, or their product reaches 2.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(lr) and lr > 0):
        raise DataError(f"lr must be a positive finite number, got {lr!r}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise DataError(f"weight_decay must be finite and >= 0, got {weight_decay!r}")
    if lr * weight_decay >= 2:
        raise DataError(
            f"lr * weight_decay is {lr * weight_decay:g}: from 2 on decay alone makes the weights grow; "
            "lower one of them"
        )


def check_batches(batch_size: int, dataset_size: int | None, replacement: bool, sampling: Sampling) -> None:
    """Refuse batches that cannot be drawn.

    Raises:
        DataError: an empty batch, an unknown way of sampling, epochs or replacement without the size of the data, or a
            batch larger than the data that it is drawn from without replacement.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise DataError(f"batch_size must be a whole number of samples, got {batch_size!r}")
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size!r}")
    if sampling not in get_args(Sampling):
        raise DataError(f"sampling must be one of {', '.join(get_args(Sampling))}, got {sampling!r}")
    if sampling == "epoch" and (replacement or dataset_size is None):
        raise DataError(
            "sampling='epoch' cuts a data set of dataset_size samples into batches without replacement; give "
            "dataset_size=N and leave replacement False"
        )
    if replacement and dataset_size is None:
        raise DataError("replacement=True needs the dataset_size that batches are drawn from; None is fresh data")
    if dataset_size is not None and batch_size > dataset_size and not replacement:
        raise DataError(
            f"batch_size {batch_size} is larger than dataset_size {dataset_size}; "
            "use at most the whole data set as one batch"
        )


def covariance_factor(batch_size: int, dataset_size: int | None, replacement: bool) -> float:
    """`f` in `Cov[g_B] = f Sigma`, `Sigma` the covariance of per-sample gradients (theory.md section 1).

    Args:
        batch_size: samples per batch, `S`.
        dataset_size: samples in all, `N`; None for fresh data.
        replacement: whether a batch may hold a sample twice.

    Returns:
        `1/S`, times `(N-S)/(N-1)` where a batch holds no sample twice.

    Example:
        >>> covariance_factor(4, 10, False), covariance_factor(4, None, False)
        (0.16666666666666666, 0.25)
    """
    if dataset_size is None or replacement:
        return 1.0 / batch_size
    return 0.0 if dataset_size == 1 else (dataset_size - batch_size) / (dataset_size - 1) / batch_size


def batches_per_epoch(batch_size: int, dataset_size: int | None) -> int | None:
    """Minibatches in one pass over the data, the last one perhaps smaller; None for fresh data."""
    return None if dataset_size is None else math.ceil(dataset_size / batch_size)


def rates_by_name(groups: Iterable[GroupRates]) -> Mapping[str, Rates]:
    """The rates of every parameter that a group names.

    Raises:
        DataError: two groups name the same parameter.
    """
    out: dict[str, Rates] = {}
    for group in groups:
        twice = [n for n in group.parameters if n in out]
        if twice:
            raise DataError(f"two parameter groups hold {twice[:3]}; give every parameter one group")
        out |= dict.fromkeys(group.parameters, group.rates)
    return out
