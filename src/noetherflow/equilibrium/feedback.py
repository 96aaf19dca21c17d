"""What Adam's average of squares does to its noise equilibrium where it follows the weights' fluctuations (`b2`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from noetherflow.core.adaptive import AdamConfig
from noetherflow.core.arguments import expect_measurement
from noetherflow.core.inputs import LossFn
from noetherflow.core.printing import show
from noetherflow.core.progress import watched
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.curvature import HessianProduct
from noetherflow.equilibrium.orbit import MeasuredOrbit, Point
from noetherflow.equilibrium.preconditioned import roots_of
from noetherflow.errors import DataError
from noetherflow.moments.engine import Meter
from noetherflow.moments.single import single_gradients
from noetherflow.symmetry.arguments import expect_model_and_symmetries
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

LARGEST = 2_000
"""Entries up to which the Hessian is formed and decomposed."""
FLAT = 1e-9
"""Curvature relative to the largest below which a mode neither relaxes nor carries noise: along an orbit, for one."""


@dataclass(frozen=True, eq=False)
class Modes:
    """The stationary fluctuations at one point of the orbit, in the eigenvectors of the preconditioned Hessian.

    Attributes:
        curvature: eigenvalues, `[n]`.
        vectors: columns `D^1/2 q` in coordinates of the weights, `[n, n]`.
        covariance: of the amplitudes of the modes, `[n, n]`.
    """

    curvature: Tensor
    vectors: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, hessian: Tensor, noise: Tensor, steps: Tensor, lr: float, decay: float) -> Modes:
        """The solution of the Lyapunov equation of `x -> x - lr D (H x + noise)`, `steps` the diagonal of `D`."""
        root = steps.sqrt()
        k, q = torch.linalg.eigh(root[:, None] * hessian * root)
        vectors, relax = root[:, None] * q, k + decay
        sums = relax[:, None] + relax - lr * relax[:, None] * relax
        live = k > FLAT * k.max()
        pairs = live[:, None] & live
        noises = vectors.mT @ noise @ vectors
        covariance = torch.where(pairs, lr * noises / torch.where(pairs, sums, 1.0), 0.0)
        return cls(k, vectors, covariance)


@dataclass(frozen=True, eq=False)
class SquareFeedback:
    """The part of the flow that comes from `v` moving along with the weights, anywhere on the orbit.

    With `delta` the fluctuation of the weights and `v` an average over it, `1 / sqrt(v)` of a step is correlated with
    its gradient `H delta`. The preconditioned charge grows by `2 lr sum a theta (H S grad log s)` more per step, `S`
    the stationary covariance with mode `i` weighted by `kap_i = (1 - b2) / ((1 - b2) + b2 lr k_i)`.

    Attributes:
        entries: how many entries of each trainable parameter take part, in order.
        active: which entries of all of them (flat) have gradients; the others stand still.
        theta: the active weights.
        offsets: what is added to each before a symmetry acts (gains stored as `1 + weight`).
        roots: the root mean squares of their gradients.
        hessian: of the mean loss, `[n, n]`.
        noise: covariance of minibatch gradients, `[n, n]`.
        slopes: `d log s_i / d theta_j`, `[n, n]`.
        rates: learning rates over that of `config`.
        config: Adam's settings.

    Source: theory.md section 13, "b2".
    """

    entries: Mapping[str, torch.Size]
    active: Tensor
    theta: Tensor
    offsets: Tensor
    roots: Tensor
    hessian: Tensor
    noise: Tensor
    slopes: Tensor
    rates: Tensor
    config: AdamConfig

    def __str__(self) -> str:
        kap = self.weights()
        return (
            f"v follows the {len(kap)} modes of the fluctuations with weights kap from {show(float(kap.min()))} to "
            f"{show(float(kap.max()))}, at the median {show(float(kap.median()))}; counted at first order in lr"
        )

    __repr__ = __str__

    def weights(self) -> Tensor:
        """`kap` of the modes that relax, at the measured weights, the stiffest first."""
        modes = self.modes(torch.ones_like(self.theta))
        k = modes.curvature.flip(0)
        return self._weights(k[k > FLAT * k.max()])

    def _weights(self, curvature: Tensor) -> Tensor:
        slow, b2 = 1 - self.config.betas[1], self.config.betas[1]
        return slow / (slow + b2 * self.config.lr * curvature.clamp_min(0)) if slow else torch.zeros_like(curvature)

    def modes(self, growth: Tensor) -> Modes:
        """The fluctuations where the weights have grown by these factors."""
        decay = self.config.weight_decay if self.config.decoupled else 0.0
        steps = self.rates / (self.roots / growth + self.config.eps)
        both = growth[:, None] * growth
        return Modes.of(self.hessian / both, self.noise / both, steps, self.config.lr, decay)

    def growth_of_charge(self, growth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each entry adds to the growth of preconditioned charges per step, over the reference learning rate.

        Args:
            growth: by parameter, the factors by which weights have grown along the orbit; 1 where one is missing.

        Returns:
            `2 theta_i (H S grad log s)_i` by parameter.
        """
        grown = self._flat(growth)
        modes = self.modes(grown)
        root = self.roots / grown
        share = root / (root + self.config.eps)
        hessian, slopes = self.hessian / (grown[:, None] * grown), share[:, None] * self.slopes / grown
        followed = self._weights(modes.curvature)[:, None] * modes.covariance
        felt = ((hessian @ modes.vectors) @ followed * (slopes @ modes.vectors)).sum(1)
        out = torch.zeros(len(self.active), dtype=torch.float64)
        out[self.active] = 2 * (self.theta + self.offsets) * grown * felt
        parts = torch.split(out, [shape.numel() for shape in self.entries.values()])
        return {n: part.reshape(shape) for (n, shape), part in zip(self.entries.items(), parts, strict=True)}

    def _flat(self, growth: Mapping[str, Tensor]) -> Tensor:
        ones = {n: torch.ones(shape, dtype=torch.float64) for n, shape in self.entries.items()}
        return torch.cat([(growth.get(n, one) * one).reshape(-1) for n, one in ones.items()])[self.active]

    def refuse_other(self, model: nn.Module, config: Any) -> None:
        """Raises DataError for other settings or a model at other weights than those of the measurement."""
        if config != self.config:
            raise DataError(f"the feedback was measured for {self.config}, not for {config}")
        tensors = tensors_of(model)
        here = [tensors[n].detach().double().cpu().reshape(-1) for n in self.entries if n in tensors]
        if len(here) < len(self.entries) or not torch.equal(torch.cat(here)[self.active], self.theta):
            raise DataError("the feedback was measured at other weights; measure square_feedback(...) again here")


@dataclass(frozen=True, eq=False)
class FeedbackOrbit(MeasuredOrbit):
    """An orbit on which gradients also act through `v`; its flow has no potential."""

    feedback: SquareFeedback
    reference: float
    joint: bool

    def at(self, elements: Sequence[Tensor]) -> Point:
        point = super().at(elements)
        pairs = [
            [pulled(decay, noise, more) for (decay, noise), more in zip(own, added, strict=True)]
            for own, added in zip(point.pairs, self.added_drift(elements), strict=True)
        ]
        return Point(pairs, point.norm, None)

    def added_drift(self, elements: Sequence[Tensor]) -> list[list[Tensor]]:
        """By symmetry and leg, at the `v` that the gradients at this point make; not joint: each symmetry moves by
        itself.
        """
        moves = list(zip(self.symmetries, elements, strict=True))
        if self.joint:
            added = self.feedback.growth_of_charge(self._growth(moves))
            return [self._of_legs(s, added) for s, _ in moves]
        return [self._of_legs(m[0], self.feedback.growth_of_charge(self._growth([m]))) for m in moves]

    def _growth(self, moves: Sequence[tuple[Symmetry, Tensor]]) -> dict[str, Tensor]:
        """The factors by which these symmetries' elements make weights grow."""
        growth: dict[str, Tensor] = {}
        for s, element in moves:
            for n in s.parameters:
                if n in self.feedback.entries:
                    one = growth.get(n, torch.ones(self.feedback.entries[n], dtype=torch.float64))
                    growth[n] = s.move(n, one, element)
        return growth

    def _of_legs(self, symmetry: Symmetry, added: Mapping[str, Tensor]) -> list[Tensor]:
        return [self.reference * leg.row_sums(added[leg.parameter]) for leg in symmetry.weight_legs]


def with_feedback(
    orbit: MeasuredOrbit, feedback: SquareFeedback | None, reference: float, *, joint: bool = True
) -> MeasuredOrbit:
    """The same orbit with the feedback, if there is one; `reference`: the learning rate that scales charges."""
    if feedback is None:
        return orbit
    return FeedbackOrbit(orbit.symmetries, orbit.potential, orbit.terms, feedback, reference, joint)


def refuse_feedback_of_others(feedback: SquareFeedback | None, settings: Any) -> None:
    """Raises DataError for a feedback with the settings of another optimiser than Adam."""
    if feedback is not None and not isinstance(settings, AdamConfig):
        raise DataError(f"feedback= is of Adam's average of squares; the settings are {type(settings).__name__}")


def pulled(decay: Tensor, noise: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """`(D, N)` of a leg with some more growth, or less of it counted as decay, so that both stay positive."""
    return decay + (-more).clamp_min(0), noise + more.clamp_min(0)


def square_feedback(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    syms: SymmetrySet,
    config: AdamConfig,
    *,
    samples: int = 2_000,
) -> SquareFeedback:
    """Measure how `v` follows the fluctuations of a small model, for `feedback=` of flow and equilibrium.

    Every trainable entry takes part. That takes one Hessian product and two measurements of second moments per entry,
    so at most 2,000 of them; for larger models `square_memory` says whether the feedback matters.

    Args:
        model: near a minimum, where the function is to be taken as fixed; left as it is.
        loss_fn: `loss_fn(model, batch)` gives one loss per sample, `[batch]`.
        batches: the data.
        syms: the symmetries that the equilibrium is asked for.
        config: Adam's settings.
        samples: so many single gradients make the covariance of the noise.

    Returns:
        The feedback anywhere on the orbit of these weights.

    Raises:
        DataError: too many entries, another optimiser's settings, or an unusable loss.

    Example:
        >>> import noetherflow as nf
        >>> net, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)).double(), torch.randn(64, 3).double()
        >>> syms, squared = nf.find_symmetries(net, x), lambda model, batch: model(batch).square().sum(1)
        >>> adam = nf.AdamConfig(lr=1e-3, batch_size=8, betas=(0.9, 0.99))
        >>> feedback = nf.square_feedback(net, squared, [x], syms, adam)
        >>> sum(shape.numel() for shape in feedback.entries.values())
        11

    Source: theory.md section 13, "b2".
    """
    call = "square_feedback(model, loss_fn, batches, syms, config)"
    expect_model_and_symmetries(call, model, syms)
    expect_measurement(call, model, loss_fn, batches)
    if not isinstance(config, AdamConfig):
        raise DataError(f"v is Adam's: config must be nf.AdamConfig(...), got {type(config).__name__}")
    return _Probe.of(copy.deepcopy(model), loss_fn, list(batches), syms, config).feedback(samples)


@dataclass(frozen=True, eq=False)
class _Probe:
    """A copy of the model whose weights are moved, and what is measured on it."""

    model: nn.Module
    loss_fn: LossFn
    data: list[Any]
    parameters: Mapping[str, Tensor]
    offsets: Mapping[str, float]
    meter: Meter
    config: AdamConfig

    @classmethod
    def of(cls, model: nn.Module, loss_fn: LossFn, data: list[Any], syms: SymmetrySet, config: AdamConfig) -> _Probe:
        """Raises DataError for more than `LARGEST` trainable entries."""
        tensors = tensors_of(model)
        own = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad and t.numel()}
        size = sum(t.numel() for t in own.values())
        if size > LARGEST:
            raise DataError(
                f"{size:,} trainable entries are too many to decompose their Hessian (at most {LARGEST:,}): "
                "nf.square_memory(...) says by two numbers whether v is slow enough"
            )
        offsets = {n: o for s in syms for n, o in s.offsets.items()}
        meter = Meter(model, loss_fn, syms, entries=True, parameters=tuple(own))
        return cls(model, loss_fn, data, own, offsets, meter, config)

    def flat(self, parts: Mapping[str, Tensor]) -> Tensor:
        """All trainable entries in order, float64."""
        return torch.cat([parts[n].detach().double().cpu().reshape(-1) for n in self.parameters])

    def roots(self) -> Tensor:
        """Root mean squares of all minibatch gradient entries at the weights of the copy."""
        return self.flat(roots_of(self.meter.measure(self.data), self.config))

    def write(self, flat: Tensor) -> None:
        """Give the copy these weights."""
        parts = torch.split(flat, [p.numel() for p in self.parameters.values()])
        with torch.no_grad():
            for p, part in zip(self.parameters.values(), parts, strict=True):
                p.copy_(part.reshape(p.shape))

    def noise(self, samples: int) -> Tensor:
        """The covariance of minibatch gradients over all entries, from single gradients."""
        single = single_gradients(self.model, tuple(self.parameters), self.loss_fn, self.data, samples)
        flat = torch.cat([g.double().cpu().flatten(1) for g in single.values()], dim=1)
        return self.config.covariance_factor * torch.cov(flat.mT)

    def hessian(self, active: Tensor) -> Tensor:
        """Of the mean loss, between active entries."""
        product = HessianProduct(self.model, self.loss_fn, self.data)
        rows = [torch.from_numpy(product.flat(e)) for e in np.eye(len(active))[active.numpy()]]
        plain = torch.stack(rows)[:, active]
        return (plain + plain.mT) / 2

    def feedback(self, samples: int) -> SquareFeedback:
        """Everything at the weights as they are."""
        theta, roots = self.flat(self.parameters), self.roots()
        active = roots > 0
        rates = [torch.full((p.numel(),), self.config.rates(n).lr) for n, p in self.parameters.items()]
        offsets = [torch.full((p.numel(),), self.offsets.get(n, 0.0)) for n, p in self.parameters.items()]
        found = SquareFeedback(
            entries={n: p.shape for n, p in self.parameters.items()},
            active=active,
            theta=theta[active],
            offsets=torch.cat(offsets).double()[active],
            roots=roots[active],
            hessian=self.hessian(active),
            noise=self.noise(samples)[active][:, active],
            slopes=torch.zeros(0),
            rates=torch.cat(rates).double()[active] / self.config.lr,
            config=self.config,
        )
        return replace(found, slopes=self.slopes(theta, found))

    def slopes(self, theta: Tensor, known: SquareFeedback) -> Tensor:
        """`d log s_i / d theta_j` by differences over one standard deviation of every mode to both sides: kinks, as of
        a relu, count as far as the fluctuations cross them.
        """
        modes, active = known.modes(torch.ones_like(known.theta)), known.active
        sizes = modes.covariance.diagonal().clamp_min(0).sqrt()
        sizes = torch.where(sizes > 0, sizes, sizes[sizes > 0].mean() if bool((sizes > 0).any()) else 1.0)
        columns = []
        for j in watched(range(len(sizes)), "feedback of the average of squares, modes:", len(sizes)):
            sides = []
            for side in (1, -1):
                moved = theta.clone()
                moved[active] += side * sizes[j] * modes.vectors[:, j]
                self.write(moved)
                sides.append(self.roots()[active].log())
            columns.append((sides[0] - sides[1]) / (2 * sizes[j]))
        self.write(theta)
        slopes: Tensor = torch.stack(columns, dim=1) @ torch.linalg.inv(modes.vectors)
        return slopes
