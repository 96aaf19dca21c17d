"""The gradient noise scale: from which batch size on more samples per step stop helping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noetherflow.core.printing import show, table
from noetherflow.core.settings import SGDConfig
from noetherflow.errors import MomentError
from noetherflow.moments.statistics import jackknife, t_quantile

if TYPE_CHECKING:
    from noetherflow.moments.result import GradientMoments


@dataclass(frozen=True)
class NoiseScale:
    """`B = tr(Sigma) / |gbar|^2` of some parameters: the batch size at which noise and mean gradient are equally long.

    A step with batches of `B` samples makes half the progress of a step with all data. Well below `B` twice the batch
    saves nearly half of the steps, well above nothing.

    Attributes:
        noise: `tr(Sigma)`, the variance of single samples' gradients, summed over entries.
        signal: `|gbar|^2`, free of the sampling noise; it scatters around 0, below it too, where it is very small.
        signal_error: standard error of `signal`, NaN without groups of samples.
        share_error: standard error of `signal / noise`, NaN without groups of samples.
        groups: groups of samples that the errors come from.

    Example:
        >>> NoiseScale(noise=50.0, signal=2.0, signal_error=0.2, share_error=0.004, groups=16).value
        25.0

    Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018; theory.md section 1.
    """

    noise: float
    signal: float
    signal_error: float
    share_error: float
    groups: int

    @property
    def value(self) -> float:
        """`noise / signal` in samples; infinite where no mean gradient can be told from 0."""
        return self.noise / self.signal if self.signal > 0 else math.inf

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Lower and upper end of the interval that holds the noise scale with probability `level`, in samples.

        Taken on `signal / noise`, which stays finite where the mean gradient vanishes; the upper end is infinite there.
        `(nan, nan)` without groups of samples.
        """
        if not self.noise > 0:
            return (0.0, 0.0)
        if math.isnan(self.share_error):
            return (math.nan, math.nan)
        half, share = t_quantile(level, self.groups) * self.share_error, self.signal / self.noise
        return tuple(1 / s if s > 0 else math.inf for s in (share + half, share - half))  # type: ignore[return-value]

    def __str__(self) -> str:
        low, high = self.interval()
        if 0 < low == high < math.inf:
            return f"{show(self.value)} samples (exact for this training set, all of which was measured)"
        ends = f"above {show(low)}" if math.isinf(high) else f"between {show(low)} and {show(high)}"
        return f"{show(self.value)} samples{'' if math.isnan(low) else f' (95 % {ends})'}"

    def to_dict(self) -> dict[str, Any]:
        """The numbers; None for an infinite noise scale."""
        return {**vars(self), "value": self.value if math.isfinite(self.value) else None}


@dataclass(frozen=True)
class NoiseScales:
    """The gradient noise scale of all measured parameters together, and of each layer."""

    total: NoiseScale
    layers: Mapping[str, NoiseScale]

    @property
    def value(self) -> float:
        """Of all parameters, in samples."""
        return self.total.value

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Of all parameters; see `NoiseScale.interval`."""
        return self.total.interval(level)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer, and one for all."""
        return [_row(name, scale) for name, scale in [("all", self.total), *self.layers.items()]]

    def __str__(self) -> str:
        text = f"Gradient noise scale: {self.total}. Batches well below it are mostly noise; beyond it more samples "
        text += "per step buy few steps."
        return "\n".join([text, table(self.rows(), "noise scale")])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {"total": self.total.to_dict(), "layers": {n: s.to_dict() for n, s in self.layers.items()}}


def _row(name: str, scale: NoiseScale) -> dict[str, Any]:
    low, high = scale.interval()
    return {"layer": name, "noise scale": scale.value, "at least": low, "at most": high}


def noise_scales(moments: GradientMoments, dataset_size: int | None = None) -> NoiseScales:
    """The gradient noise scales of what was measured; `GradientMoments.noise_scale` is this.

    Raises:
        MomentError: Hessian moments, or moments without entry-wise squares.
    """
    if moments.kind != "gradient" or not moments.squares:
        raise MomentError(
            "noise_scale() needs gradients measured with entries=True: nf.gradient_moments(model, loss_fn, batches, "
            "syms, entries=True, parameters=[names of what no symmetry touches])"
        )
    draws = SGDConfig(lr=1.0, batch_size=1, dataset_size=dataset_size)
    layers = dict.fromkeys(_layer(name) for name in moments.squares)
    members = {layer: [n for n in moments.squares if _layer(n) == layer] for layer in layers}

    def parts(m: GradientMoments) -> dict[str, Tensor]:
        return _parts(m, draws, members)

    full, errors = parts(moments), {}
    if len(moments.groups) > 1:
        errors = {n: e.error for n, e in jackknife(moments, full, parts, dataset_size).items()}
    found = {n: _scale(v, errors.get(n), len(moments.groups)) for n, v in full.items()}
    return NoiseScales(found.pop(""), found)


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _parts(moments: GradientMoments, draws: SGDConfig, members: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """`(tr Sigma, |gbar|^2, their ratio)` by layer, and of all under the empty name."""
    (a, b), (c, d) = moments.batch_weights(draws)
    out, total = {}, torch.zeros(2, dtype=torch.float64)
    for layer, names in members.items():
        second = sum(float(moments.squares[n].double().sum()) for n in names)
        mean = sum(float(moments.mean[n].double().square().sum()) for n in names)
        pair = torch.tensor([a * second + b * mean, c * second + d * mean], dtype=torch.float64)
        out[layer], total = _with_share(pair), total + pair
    return {**out, "": _with_share(total)}


def _with_share(pair: Tensor) -> Tensor:
    share = pair[1] / pair[0] if bool(pair[0] > 0) else torch.zeros((), dtype=torch.float64)
    return torch.stack([pair[0], pair[1], share])


def _scale(values: Tensor, errors: Tensor | None, groups: int) -> NoiseScale:
    unknown = (math.nan, math.nan, math.nan)
    _, signal_error, share_error = unknown if errors is None else errors.tolist()
    return NoiseScale(float(values[0]), float(values[1]), signal_error, share_error, groups)
