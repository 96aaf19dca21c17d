"""GradientMoments: second moments of per-sample gradients, contracted on the legs of a model's symmetries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from noetherflow.core.printing import count, show, table
from noetherflow.core.rates import BatchDraws
from noetherflow.core.settings import SGDConfig
from noetherflow.core.shown import Shown
from noetherflow.errors import MomentError, SampleNumberError
from noetherflow.moments.conditions import Conditions
from noetherflow.moments.noise_scale import NoiseScales, noise_scales
from noetherflow.moments.packed import LeftOut, PackedTensors, SampleSum
from noetherflow.moments.products import Factors, joined_factors
from noetherflow.moments.sizes import size_of
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

Sampling = Literal["replacement", "independent", "epoch"]
Kind = Literal["gradient", "hessian"]


@dataclass(frozen=True)
class Replicates:
    """How minibatches of `batch_size` (S) were drawn from `dataset_size` (N) samples.

    `sampling` is `replacement` (or fresh data), `independent` for batches without replacement inside each, or `epoch`
    for batches that share no sample. `moving`: the weights changed from batch to batch (a training run).

    Example:
        >>> Replicates(8, None, "replacement").of_mean(4)  # the mean of 4 batches of 8 is that of 32 samples
        0.03125
        >>> Replicates(8, 32, "epoch").of_mean(4)  # all the data: no noise left
        0.0
    """

    batch_size: int
    dataset_size: int | None
    sampling: Sampling
    moving: bool = True

    def of_mean(self, replicates: int) -> float:
        """`v`, where the mean of K replicates has covariance `v Sigma`, Sigma that of one sample.

        The factor `(N - n) / (N - 1) / n` of `n` samples drawn without replacement holds inside a batch, and for
        `epoch` over all batches.
        """
        s, n, drawn = self.batch_size, self.dataset_size, replicates * self.batch_size
        if n is None or self.sampling == "replacement":
            return 1 / drawn
        distinct = drawn if self.sampling == "epoch" else s
        return max(0, n - distinct) / max(1, n - 1) / drawn


@dataclass(frozen=True, eq=False)
class GradientMoments(Shown):
    """Moments of the per-sample gradient `g_z` over `samples` samples (theory.md sections 1 and 2).

    `second[symmetry]`: one tensor per charge-carrying leg, `E_z[dX dX^T]` in the symmetry's layout, float64, uncentred.
    `mean[parameter]`: `gbar`, the parameter's shape. `squares[parameter]`: entry-wise `E_z[g^2]`, present when measured
    with `entries=True`. `groups`: the same over disjoint groups of samples, for jackknife errors; their mean gradients
    and squares are kept in one byte per entry.
    `fallback`: parameters that no rule covered, measured by `vmap(grad)` or one backward per sample.
    `replicates`: set when each "sample" is one minibatch gradient (`minibatch_moments`). `legs[symmetry]`: names of the
    legs, as printed. `unresolved`: symmetries along which samples differ by less than the rounding of the type that
    gradients were summed in, so that their noise is not known. `kind`: `hessian` for `curvature_moments`, whose samples
    are Hessian products, without a loss. `conditions`: how the model ran meanwhile. `factors[parameter]`: the gradients
    of single samples, where a joint equilibrium needs them, present when measured with `for_="equilibrium"`.
    """

    samples: int
    loss: float
    second: Mapping[str, tuple[Tensor, ...]]
    mean: Mapping[str, Tensor]
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    groups: tuple[GradientMoments, ...] = ()
    fallback: tuple[str, ...] = ()
    replicates: Replicates | None = None
    legs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kind: Kind = "gradient"
    unresolved: tuple[str, ...] = ()
    conditions: Conditions = field(default_factory=Conditions)
    factors: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def repeated(self) -> int:
        """How many groups hold the same samples as an earlier one: then standard errors are too small."""
        found = Counter(
            (g.samples, g.loss, *(float(leg.sum()) for legs in g.second.values() for leg in legs))
            for g in self.groups
            if any(bool(leg.any()) for legs in g.second.values() for leg in legs)
        )
        return sum(found.values()) - len(found)

    def batch_grams(self, symmetry: Symmetry, sgd: SGDConfig) -> tuple[Tensor, ...]:
        """Leg Grams of `R_B = Cov[g_B] + gbar gbar^T`, the second moment of a minibatch gradient of `sgd`.

        Returns:
            One tensor per charge-carrying leg, `symmetry.shape`, float64.

        Raises:
            MomentError: the symmetry was not among those measured.

        Source: theory.md section 1.
        """
        if symmetry.name not in self.second:
            raise MomentError(f"no moments for symmetry {symmetry.name!r}; measured: {list(self.second)[:8]}")
        means = symmetry.grams({n: self.mean[n].double() for n in symmetry.parameters})
        return tuple(self._batch(s, m.to(s), sgd) for s, m in zip(self.second[symmetry.name], means, strict=True))

    def _batch(self, second: Tensor, mean_square: Tensor, sgd: SGDConfig) -> Tensor:
        """`f Sigma + gbar gbar^T` from the measured `E[g g^T]` and `gbar gbar^T`."""
        noise, mean = self.batch_weights(sgd)
        return (noise[0] + mean[0]) * second + (noise[1] + mean[1]) * mean_square

    def without_factors(self) -> GradientMoments:
        """The same without single samples' gradients: forecasts from them take minutes, as each sample's is moved."""
        return replace(self, factors={})

    def batch_weights(self, sgd: BatchDraws) -> tuple[tuple[float, float], tuple[float, float]]:
        """Numbers that turn what was measured into noise and mean gradient of a minibatch, free of bias.

        With `m` the measured `gbar gbar^T`: `f Sigma = a E[g g^T] + b m` and the true `gbar gbar^T = c E[g g^T] + d m`.
        `E[g g^T] - m` has mean `(v_1 - v_n) Sigma`, `v_n` of `Replicates.of_mean`, and `m` has mean `gbar gbar^T + v_n
        Sigma`; `n` of `sgd.dataset_size` samples count as minibatches of one in an epoch. Unbiased for every `n`, exact
        for a data set measured whole.

        Returns:
            `(a, b), (c, d)`.

        Raises:
            MomentError: a single replicate, or minibatches that hold all samples.
        """
        drawn = self.replicates or Replicates(1, sgd.dataset_size, "epoch")
        one, v = drawn.of_mean(1), drawn.of_mean(self.samples)
        if one == v:
            unit = "samples" if self.replicates is None else "minibatches"
            raise SampleNumberError(
                "one sample (or minibatches of all samples) has no covariance; measure at least two", 2, unit
            )
        q, f = 1 / (one - v), sgd.covariance_factor
        return (f * q, -f * q), (-v * q, 1 + v * q)

    def noise_scale(self, dataset_size: int | None = None) -> NoiseScales:
        """The gradient noise scale `tr(Sigma) / |gbar|^2` in samples, of all measured parameters and of each layer.

        It needs `entries=True`; parameters without a symmetry count if they were measured too (`parameters=`).

        Args:
            dataset_size: samples in the data set, if it is all there is; None for fresh data.

        Returns:
            `.value` in samples, `.interval()`, `.layers[name]`; print it for a table.

        Raises:
            MomentError: Hessian moments, or moments without entry-wise squares.

        Example:
            >>> model, x = nn.Linear(3, 1), torch.randn(64, 3)
            >>> loss_fn = lambda m, b: (m(b) - b.sum(1, keepdim=True)).square().sum(1)
            >>> none = nf.SymmetrySet(())
            >>> moments = nf.gradient_moments(model, loss_fn, [x], none, entries=True, parameters=["weight", "bias"])
            >>> scale = moments.noise_scale()
            >>> scale.interval()[0] < scale.value < scale.interval()[1]
            True

        Source: McCandlish et al. 2018; theory.md section 1.
        """
        return noise_scales(self, dataset_size)

    def table_rows(self) -> list[dict[str, Any]]:
        """One row per symmetry and leg: the mean squared per-sample gradient there."""
        return [
            {"symmetry": s, "leg": leg, self._quantity: value}
            for s, traces in self._traces().items()
            for leg, value in zip(self._leg_names(s, len(traces)), traces, strict=True)
        ]

    @property
    def _quantity(self) -> str:
        return "mean squared gradient" if self.kind == "gradient" else "Hessian trace"

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """What was measured on how many samples, and a row per symmetry; see `Shown.describe`."""
        groups = count(max(1, len(self.groups)), "group", "groups")
        loss = f", mean loss {self.loss:.6g}" if self.kind == "gradient" else ""
        lines = [f"{count(self.samples, *self._unit())} in {groups}{loss}"]
        lines += [f"by fallback, not by rule: {', '.join(self.fallback)}"] if self.fallback else []
        lines += self._cautions()
        rows = [{"symmetry": s, self._quantity: self._by_leg(s, t)} for s, t in self._traces().items()]
        return "\n".join([*lines, table(rows, *((self._quantity,) if legend else ()))] if rows else lines)

    def _cautions(self) -> list[str]:
        """What takes away from the meaning of the numbers."""
        said = [*self.conditions.caution]
        if self.repeated:
            said.append(
                f"{count(self.repeated, 'group holds', 'groups hold')} the same samples as another: "
                "fed twice, so standard errors are too small"
            )
        if self.unresolved:
            more = " and more" if len(self.unresolved) > 4 else ""
            said.append(
                f"noise below rounding along {', '.join(self.unresolved[:4])}{more}: "
                "samples hardly differ; measure model.double()"
            )
        return said

    def _unit(self) -> tuple[str, str]:
        if self.kind == "hessian":
            return "Hessian product", "Hessian products"
        return ("sample", "samples") if self.replicates is None else ("minibatch", "minibatches")

    def _by_leg(self, symmetry: str, traces: list[float]) -> str:
        names = self._leg_names(symmetry, len(traces))
        return "  ".join(f"{name} {show(value)}" for name, value in zip(names, traces, strict=True))

    def _leg_names(self, symmetry: str, legs: int) -> Sequence[str]:
        return self.legs.get(symmetry) or [f"leg {k}" for k in range(legs)]

    def _traces(self) -> dict[str, list[float]]:
        return {name: [float(trace(leg)) for leg in legs] for name, legs in self.second.items()}

    def to_dict(self) -> dict[str, Any]:
        """Counts, loss and leg traces, without the tensors (`save_moments` keeps those)."""
        return {
            "kind": self.kind,
            "samples": self.samples,
            "loss": self.loss if self.kind == "gradient" else None,
            "groups": len(self.groups),
            "fallback": list(self.fallback),
            "replicates": None if self.replicates is None else asdict(self.replicates),
            "traces": self._traces(),
            "repeated": self.repeated,
            "unresolved": list(self.unresolved),
            "conditions": asdict(self.conditions),
        }

    def leave_one_out(self) -> Iterator[GradientMoments]:
        """The moments without each group in turn, for jackknife errors of anything computed from them.

        `mean` and `squares` of each are computed when they are asked for, and not exactly: groups keep theirs in one
        byte per entry (`packed.py`).
        """
        if len(self.groups) < 2:
            return
        samples = sum(g.samples for g in self.groups)
        for group, rest in zip(self.groups, _without_each([_legs_alone(g) for g in self.groups], ()), strict=True):
            share = group.samples / samples
            yield replace(
                rest,
                mean=LeftOut(self.mean, group.mean, share),
                squares=LeftOut(self.squares, group.squares, share),
            )


def trace(leg: Tensor) -> Tensor:
    """`Tr` of a leg Gram, summed over its blocks; a torus leg holds the diagonal only."""
    return leg.sum() if leg.ndim == 1 else leg.diagonal(dim1=-2, dim2=-1).sum()


def _legs_alone(moments: GradientMoments) -> GradientMoments:
    return replace(moments, mean={}, squares={}, groups=(), factors={})


def _without_each(groups: Sequence[GradientMoments], others: tuple[GradientMoments, ...]) -> Iterator[GradientMoments]:
    """`others` (none or one) merged with all `groups` but one, each in turn.

    By halves, so that nothing is subtracted: where one group holds nearly all of a leg, `total - group` would round.
    """
    if len(groups) == 1:
        yield from others
        return
    half = len(groups) // 2
    for here, there in ((groups[:half], groups[half:]), (groups[half:], groups[:half])):
        yield from _without_each(here, (merge_moments([*others, *there]),))


def merge_moments(parts: list[GradientMoments]) -> GradientMoments:
    """Join moments that were measured on disjoint samples: their sample-weighted mean.

    Args:
        parts: moments of the same symmetries and parameters.

    Returns:
        The moments of all samples, with the groups of all parts.

    Raises:
        MomentError: no parts, parts that measured different things, or moments that hold NaN or inf.
    """
    if not parts:
        raise MomentError("nothing to merge: no moments given")
    kinds = {
        (p.kind, tuple(p.second), tuple(p.mean), tuple(p.squares), p.replicates, frozenset(p.factors)) for p in parts
    }
    if len(kinds) > 1:
        raise MomentError("moments to merge differ in kind, symmetries, parameters, entries, factors or minibatch size")
    total = sum(p.samples for p in parts)
    weights = [p.samples / total for p in parts]

    def mix(tensors: list[Tensor]) -> Tensor:
        return sum(
            (w * t.double() for w, t in zip(weights[1:], tensors[1:], strict=True)), weights[0] * tensors[0].double()
        )

    first = parts[0]
    conditions = reduce(Conditions.joined, (p.conditions for p in parts))
    merged = GradientMoments(
        samples=total,
        loss=sum(w * p.loss for w, p in zip(weights, parts, strict=True)),
        second={
            name: tuple(mix([p.second[name][i] for p in parts]) for i in range(len(legs)))
            for name, legs in first.second.items()
        },
        mean={name: mix([p.mean[name] for p in parts]).to(first.mean[name]) for name in first.mean},
        squares={name: mix([p.squares[name] for p in parts]).to(first.squares[name]) for name in first.squares},
        groups=tuple(g for p in parts for g in p.groups),
        fallback=tuple(dict.fromkeys(n for p in parts for n in p.fallback)),
        replicates=first.replicates,
        legs=first.legs,
        kind=first.kind,
        unresolved=tuple(dict.fromkeys(n for p in parts for n in p.unresolved)),
        conditions=conditions,
        factors=joined_factors([p.factors for p in parts]),
    )
    _refuse_not_finite(merged)
    return merged


def in_groups(parts: Iterable[GradientMoments]) -> GradientMoments:
    """The moments of all samples, with those of each part of them as a group for jackknife errors.

    Args:
        parts: the moments of disjoint samples, taken one by one, so that no two need be in memory at a time.

    Raises:
        MomentError: as `merge_moments`.
    """
    mean, squares = SampleSum(), SampleSum()
    groups: list[GradientMoments] = []
    for part in parts:
        mean.add(part.samples, part.mean)
        squares.add(part.samples, part.squares)
        groups.append(replace(part, mean=PackedTensors.of(part.mean), squares=PackedTensors.of(part.squares)))
    return of_groups(mean.mean(), squares.mean(), groups)


def of_groups(
    mean: Mapping[str, Tensor], squares: Mapping[str, Tensor], groups: list[GradientMoments]
) -> GradientMoments:
    """The moments of all samples, from their exact means and their groups.

    Groups keep their mean gradients and squares in one byte per entry. There are no groups where leaving one out would
    leave less than the two samples (or minibatches) that a covariance takes.

    Raises:
        MomentError: as `merge_moments`.
    """
    legs = merge_moments([_legs_alone(g) for g in groups])
    enough = all(legs.samples - g.samples >= 2 for g in groups)
    merged = replace(legs, mean=mean, squares=squares, groups=tuple(groups) if enough else ())
    _refuse_not_finite(merged)
    return merged


def unresolved(moments: GradientMoments, syms: SymmetrySet) -> tuple[str, ...]:
    """Names of the symmetries along whose legs noise is lost in rounding.

    `E[g g^T]` and `gbar gbar^T` are subtracted for it; where samples differ by less than `4 eps` of their mean squared,
    `eps` that of the type they were summed in, nothing is left but rounding.
    """
    if moments.samples < 2:
        return ()
    sizes = {n: float(size_of(moments.mean[n])) ** 2 for n in {leg.parameter for s in syms for leg in s.weight_legs}}
    found = []
    for s in syms:
        eps = max(torch.finfo(moments.mean[n].dtype).eps for n in s.parameters)
        for second, leg in zip(moments.second[s.name], s.weight_legs, strict=True):
            both = float(trace(second))
            if both > 1.01 * sizes[leg.parameter]:  # of the whole parameter, of which the leg has a part
                continue
            own = float(trace(s.leg_gram(leg, moments.mean[leg.parameter], torch.float64)))
            if own > 0 and both - own < 4 * eps * own:
                found.append(s.name)
                break
    return tuple(found)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or inf: seen from the sum, in one pass, unless that overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _refuse_not_finite(moments: GradientMoments) -> None:
    """Raises MomentError for moments that hold NaN or inf, naming symmetries and parameters."""
    measured = {**moments.second, **{n: (t,) for n, t in [*moments.mean.items(), *moments.squares.items()]}}
    bad = [n for n, parts in measured.items() if not all(map(all_finite, parts))]
    if bad:
        raise MomentError(
            f"gradient moments of {bad[:4]}{' ...' if len(bad) > 4 else ''} are NaN or inf: gradients are not finite, "
            "or their squares overflow. Has training diverged? Scale the loss down or look at the data"
        )
