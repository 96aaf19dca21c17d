"""GradientMoments: second moments of per-sample gradients, contracted on the legs of a model's symmetries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from noetherflow.errors import MomentError
from noetherflow.sgd import SGDConfig
from noetherflow.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """Moments of the per-sample gradient `g_z` over `samples` samples (theory.md sections 1 and 2).

    `second[symmetry]`: one tensor per charge-carrying leg, `E_z[dX dX^T]` in the symmetry's layout, float64, uncentred.
    `mean[parameter]`: `gbar`, the parameter's shape. `squares[parameter]`: entry-wise `E_z[g^2]`, present when measured
    with `entries=True`. `groups`: the same leg moments over disjoint groups of samples, for jackknife errors.
    `fallback`: parameters that no rule covered, measured by `vmap(grad)` or one backward per sample.
    """

    samples: int
    loss: float
    second: Mapping[str, tuple[Tensor, ...]]
    mean: Mapping[str, Tensor]
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    groups: tuple[GradientMoments, ...] = ()
    fallback: tuple[str, ...] = ()

    def batch_grams(self, symmetry: Symmetry, sgd: SGDConfig) -> tuple[Tensor, ...]:
        """`M_leg`: leg Grams of `R_B = Cov[g_B] + gbar gbar^T`, one per charge-carrying leg (theory.md section 1).

        Raises MomentError when the symmetry was not among those measured.
        """
        if symmetry.name not in self.second:
            raise MomentError(f"no moments for symmetry {symmetry.name!r}; measured: {list(self.second)[:8]}")
        means = symmetry.grams({n: self.mean[n].double() for n in symmetry.parameters})
        return tuple(self._batch(s, m.to(s), sgd) for s, m in zip(self.second[symmetry.name], means, strict=True))

    def batch_squares(self, parameter: str, sgd: SGDConfig) -> Tensor:
        """Entry-wise diagonal of `R_B`, the parameter's shape, float64.

        Raises MomentError unless measured with `entries=True`.
        """
        if parameter not in self.squares:
            raise MomentError(
                f"no entry-wise moments for {parameter!r}; measure with gradient_moments(..., entries=True)"
            )
        return self._batch(self.squares[parameter].double(), self.mean[parameter].double().square(), sgd)

    def _batch(self, second: Tensor, mean_square: Tensor, sgd: SGDConfig) -> Tensor:
        """`f Sigma + gbar gbar^T` from the measured `E[g g^T]` and `gbar gbar^T`."""
        noise, mean = self.batch_weights(sgd)
        return (noise[0] + mean[0]) * second + (noise[1] + mean[1]) * mean_square

    def batch_weights(self, sgd: SGDConfig) -> tuple[tuple[float, float], tuple[float, float]]:
        """`(a, b), (c, d)`: `f Sigma = a E[g g^T] + b m` and the true `gbar gbar^T = c E[g g^T] + d m`, `m` measured.

        A data set measured whole (`sgd.dataset_size == samples`) has exactly these moments. Otherwise the measured
        samples stand for a larger population: `Sigma = N/(N-1) (E[gg] - m)`, `gbar gbar^T = m - Sigma/N` (unbiased).
        """
        n, f = self.samples, sgd.covariance_factor
        if sgd.dataset_size == n:
            return (f, -f), (0.0, 1.0)
        if n < 2:
            raise MomentError("one sample has no covariance; measure at least two")
        q = n / (n - 1)
        return (f * q, -f * q), (-q / n, 1 + q / n)

    def leave_one_out(self) -> Iterator[GradientMoments]:
        """The moments without each group in turn, for jackknife errors of anything computed from them."""
        for left_out in self.groups:
            yield merge_moments([g for g in self.groups if g is not left_out])


def merge_moments(parts: list[GradientMoments]) -> GradientMoments:
    """Sample-weighted mean of moments measured on disjoint samples."""
    total = sum(p.samples for p in parts)
    weights = [p.samples / total for p in parts]

    def mix(tensors: list[Tensor]) -> Tensor:
        return sum((w * t for w, t in zip(weights[1:], tensors[1:], strict=True)), weights[0] * tensors[0])

    first = parts[0]
    return GradientMoments(
        samples=total,
        loss=sum(w * p.loss for w, p in zip(weights, parts, strict=True)),
        second={
            name: tuple(mix([p.second[name][i] for p in parts]) for i in range(len(legs)))
            for name, legs in first.second.items()
        },
        mean={name: mix([p.mean[name] for p in parts]) for name in first.mean},
        squares={name: mix([p.squares[name] for p in parts]) for name in first.squares},
        groups=tuple(g for p in parts for g in p.groups),
        fallback=tuple(dict.fromkeys(n for p in parts for n in p.fallback)),
    )
