"""Errors of anything computed from gradient moments: the delete-a-group jackknife."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noetherflow.core.arguments import MOMENTS, expect
from noetherflow.core.progress import watched
from noetherflow.errors import DataError, MomentError

if TYPE_CHECKING:
    from noetherflow.moments.result import GradientMoments

Statistic = Callable[["GradientMoments"], Tensor | float]


def t_quantile(level: float, groups: int) -> float:
    """How many standard errors from as many groups of samples an interval of that level spans on each side.

    Example:
        >>> round(t_quantile(0.95, 16), 2)
        2.13
    """
    from scipy.special import stdtrit

    return float(stdtrit(groups - 1, 0.5 + level / 2))


@dataclass(frozen=True, eq=False)
class Estimate:
    """A statistic of gradient moments: its value, standard error and bias estimate, all of one shape, float64."""

    value: Tensor
    error: Tensor
    bias: Tensor
    groups: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """`value -+ t * error`, `t` of Student's distribution with `groups - 1` degrees of freedom."""
        t = t_quantile(level, self.groups)
        return self.value - t * self.error, self.value + t * self.error

    @property
    def relative(self) -> Tensor:
        """`error / |value|`; infinite where the value is zero, NaN where the error is zero too."""
        return self.error / self.value.abs()

    def __str__(self) -> str:
        if self.value.numel() > 8:
            return f"{tuple(self.value.shape)} values, median relative error {float(self.relative.median()):.2g}"
        pairs = zip(self.value.flatten().tolist(), self.error.flatten().tolist(), strict=True)
        return ", ".join(f"{v:.6g} +- {e:.2g}" for v, e in pairs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": self.value.tolist(),
            "error": self.error.tolist(),
            "bias": self.bias.tolist(),
            "groups": self.groups,
        }


def standard_error(moments: GradientMoments, statistic: Statistic, *, dataset_size: int | None = None) -> Estimate:
    """Value and jackknife error of anything computed from moments: a drift, an equilibrium, any smooth function.

    The error is that of sampling the data, not of SGD's own noise.

    Args:
        moments: measured with `groups` of at least 2.
        statistic: `statistic(moments)` returns a tensor or a number; it is called once per group.
        dataset_size: samples in the data set, if the moments are of some of them; a data set measured whole has no
            error, unless the forward draws random numbers (dropout): then it counts as endless.

    Returns:
        The value with its standard error and bias, float64.

    Raises:
        MomentError: fewer than two groups.
        DataError: `statistic` returns neither a tensor nor a number.

    Example:
        >>> model, x = nn.Linear(3, 2), torch.randn(64, 3)
        >>> syms = nf.declare(model, "diagonal", [("weight", 0)])
        >>> moments = nf.gradient_moments(model, lambda m, b: m(b).square().sum(1), list(x.split(4)), syms)
        >>> estimate = nf.standard_error(moments, lambda m: sum(leg.sum() for leg in m.second[syms[0].name]))
        >>> bool(estimate.error < estimate.value)
        True
    """

    call = "standard_error(moments, statistic)"
    if not hasattr(moments, "groups"):
        raise DataError(f"{call}: moments must be {MOMENTS}, got {type(moments).__name__}")
    expect(call, "statistic", statistic, Callable, "a function of moments")

    def one(m: GradientMoments) -> dict[str, Tensor]:
        return {"": _float64(statistic(m))}

    return jackknife(moments, one(moments), one, dataset_size)[""]


def jackknife(
    moments: GradientMoments,
    values: Mapping[str, Tensor],
    statistics: Callable[[GradientMoments], Mapping[str, Tensor]],
    dataset_size: int | None = None,
) -> dict[str, Estimate]:
    """Errors of `values = statistics(moments)`, from `statistics` of the moments without each group of samples.

    Args:
        moments: in groups of samples.
        values: `statistics(moments)`, which is at hand.
        statistics: a function of moments that gives tensors by name.
        dataset_size: samples in the data set, if the moments are of some of them.

    With groups of `m_j` of `n` samples, `h_j = n / m_j`, estimates `T` from all and `T_j` without group j:
    pseudo-values `P_j = h_j T - (h_j - 1) T_j`, jackknife mean `J = sum_j P_j / h_j`, variance
    `(1/G) sum_j (P_j - J)^2 / (h_j - 1)`, bias `T - J` (Busing, Meijer, van der Leeden 1999). For groups of one size
    this is the usual delete-a-group jackknife. Both shrink by `1 - n / N` for `n` of the `N = dataset_size` samples:
    a data set measured whole has no error, unless the forward draws random numbers (dropout).

    Raises:
        MomentError: fewer than two groups, or groups that hold a part of the samples only.
    """
    count, n = len(moments.groups), sum(g.samples for g in moments.groups)
    if count < 2:
        raise MomentError(
            f"a standard error needs at least 2 groups of samples, got {count}; measure more batches or raise groups="
        )
    if n != moments.samples:
        raise MomentError(
            f"the groups hold {n} of {moments.samples} samples: moments without groups were merged in; measure all "
            "parts with groups="
        )
    endless = dataset_size is None or moments.replicates is not None or moments.conditions.random
    unseen = 1.0 if endless or dataset_size is None else max(0.0, 1 - n / dataset_size)
    if not unseen:
        return {name: Estimate(v, torch.zeros_like(v), torch.zeros_like(v), count) for name, v in values.items()}
    parts = [statistics(m) for m in watched(moments.leave_one_out(), "standard errors, groups left out:", count)]
    h = torch.tensor([n / g.samples for g in moments.groups], dtype=torch.float64, device="cpu")
    return {name: _busing(v, torch.stack([p[name] for p in parts]), h, unseen) for name, v in values.items()}


def _busing(value: Tensor, parts: Tensor, h: Tensor, unseen: float) -> Estimate:
    h = h.view(-1, *(1 for _ in value.shape))
    pseudo = h * value - (h - 1) * parts
    mean = (pseudo / h).sum(0)
    variance = ((pseudo - mean).square() / (h - 1)).mean(0)
    return Estimate(value, (unseen * variance).sqrt(), unseen * (value - mean), len(parts))


def _float64(value: Tensor | float) -> Tensor:
    """A statistic's value as a tensor. Raises DataError for anything else than a tensor or a number."""
    try:
        return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError) as cause:
        raise DataError(
            f"the statistic must return a tensor or a number, got a {type(value).__name__}; join several tensors into "
            "one: torch.cat([t.flatten() for t in tensors])"
        ) from cause


def noise_error(samples: Sequence[int], traces: Tensor) -> float:
    """The largest relative standard error of any leg's `Tr E[g g^T]`, infinite with fewer than four groups.

    `traces` `[groups, legs]`: sums of `Tr g g^T` over the samples of each group, `samples` of them.
    """
    if len(samples) < 4:
        return float("inf")
    counts = torch.tensor(samples, dtype=torch.float64, device="cpu").unsqueeze(1)
    weights, means = counts / counts.sum(), traces.cpu() / counts
    mean = (weights * means).sum(0)
    spread = (weights * (means - mean)).square().sum(0) / (1 - weights.square().sum())
    relative = spread.sqrt() / mean
    return float(relative[mean > 0].max()) if bool((mean > 0).any()) else 0.0
