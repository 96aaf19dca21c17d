"""The Noether flow of a training run from its optimiser's state alone: no data, no loss, no backward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.host import on_host
from noetherflow.core.tensors import tensors_of
from noetherflow.core.unwrap import unwrap_optimizer
from noetherflow.equilibrium.averages import AveragingLaw, OptimizerAverages, read_averages
from noetherflow.equilibrium.state_estimate import FlowEstimate, LegOrbit, Source, estimate, scaled_sums
from noetherflow.equilibrium.state_invariance import StateInvariance, refuse_broken, state_invariance
from noetherflow.equilibrium.state_matrix import matrix_flow
from noetherflow.equilibrium.state_result import StateDrift, StateFlow
from noetherflow.equilibrium.state_sums import LegSums, independent_entries, leg_sums, mean_sums
from noetherflow.errors import DataError
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

EPS_MATTERS = 1e-3
"""Share of Adam's `eps` in a leg's part of the charge from which on the leg is summed anew along its orbit."""


@dataclass(frozen=True, eq=False)
class RunSnapshot:
    """Weights and optimiser state of one step of a run.

    Attributes:
        optimizer: what `optimizer.state_dict()` gave.
        weights: the weights by canonical name, after the step that wrote the state.
        lr: learning rate to use in place of the stored ones.
    """

    optimizer: Any
    weights: Mapping[str, Tensor] | None = None
    lr: float | None = None

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunSnapshot:
        """A copy of a running model's weights and of its optimiser's state, to average over later.

        Args:
            model: the model that the optimiser trains.
            optimizer: a living optimiser.
        """
        weights = {n: t.detach().clone() for n, t in tensors_of(model).items()}
        return cls(copy.deepcopy(unwrap_optimizer(optimizer).state_dict()), weights)

    def read(self, model: nn.Module) -> OptimizerAverages:
        """Its averages, with its own weights as the parameters."""
        read = read_averages(model, self.optimizer, self.lr)
        return read if self.weights is None else read.with_weights(self.weights)


@on_host
def state_flow(
    model: nn.Module,
    syms: SymmetrySet,
    optimizer: Any,
    *,
    lr: float | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> StateFlow:
    """The Noether flow of a run, read off its optimiser: where charges go, how fast, and where they settle.

    Adam's and AdamW's averages of gradients and of their squares, or SGD's momentum buffer, hold all that is needed:
    each step leaves the (preconditioned) charge unchanged at first order, and what it adds at second order is a sum
    over entries of the average. It takes seconds, for every scalar and diagonal symmetry, for SGD also for
    general_linear ones.

    Args:
        model: the model as it was saved together with the state; only read.
        syms: its symmetries, `nf.find_symmetries(model, example_inputs)`.
        optimizer: SGD with momentum, Adam, AdamW or RMSprop of torch (maybe wrapped by accelerate), or what its
            `state_dict()` gave; or a list of `RunSnapshot`, whose mean is taken, with errors over them.
        lr: learning rate to use in place of the stored ones, where a schedule has taken them to 0.
        weights: the weights by canonical name where the model has none (on the meta device).

    Returns:
        The flow by symmetry, printable; `flow[name].from_momentum.element` moves the weights to the equilibrium.

    Raises:
        DataError: another optimiser, options outside the theory, no state yet, a learning rate of 0, or a state that is
            not of a loss with these symmetries.
        CheckpointError: a saved state whose parameters cannot be identified beyond doubt.

    Example:
        >>> import noetherflow as nf
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        >>> for _ in range(5):
        ...     loss = net(torch.randn(8, 3)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> flow = state_flow(net, nf.find_symmetries(net, (torch.randn(2, 3),)), optimizer)
        >>> flow.details[0].charge.shape
        torch.Size([4])

    Source: theory.md section 13.
    """
    syms = syms.trainable(model)
    reads = _reads(model, optimizer, lr, weights)
    last = reads[-1]
    syms = syms.without({s.name: why for s in syms if (why := _why_not(s, last)) is not None})
    tests = {s.name: state_invariance(s, reads) for s in syms}
    refuse_broken(tests, last.law)
    details = tuple(_drift(s, reads, tests[s.name]) for s in syms)
    return StateFlow(details, last.law, last.reference_lr, last.steps, len(reads), dict(syms.excluded), last.coded)


def _reads(
    model: nn.Module, optimizer: Any, lr: float | None, weights: Mapping[str, Tensor] | None
) -> list[OptimizerAverages]:
    """The averages of every snapshot.

    Raises:
        DataError: they are not of one run: another optimiser, or other parameters have state.
    """
    if not (isinstance(optimizer, list | tuple) and any(isinstance(o, RunSnapshot) for o in optimizer)):
        return [RunSnapshot(optimizer, weights, lr).read(model)]
    if lr is not None or weights is not None:
        raise DataError("lr= and weights= go with one optimiser; each RunSnapshot has its own")
    reads = [snapshot.read(model) for snapshot in optimizer]
    laws = {read.law for read in reads}
    if len(laws) > 1:
        raise DataError(f"the snapshots are not of one run, their optimisers differ: {sorted(map(str, laws))[:3]}")
    if any(read.by_name.keys() != reads[0].by_name.keys() for read in reads):
        raise DataError("the snapshots are not of one run: their optimisers hold state of different parameters")
    return sorted(reads, key=lambda read: read.steps or 0)


def _why_not(symmetry: Symmetry, read: OptimizerAverages) -> str | None:
    """Why the state says nothing about a symmetry."""
    for name in symmetry.parameters:
        if name not in read.by_name:
            return f"{name}: {read.left_out.get(name, 'not in the optimiser')}"
    if pulled := symmetry.pulled(lambda name: read.by_name[name].rates.weight_decay > 0):
        return pulled
    if symmetry.is_torus:
        return None
    if read.law.kind != "sgd":
        return "Adam's preconditioner does not commute with matrices: no flow of general_linear charges is derived"
    return None


def _drift(symmetry: Symmetry, reads: Sequence[OptimizerAverages], test: StateInvariance) -> StateDrift:
    return (_torus_flow if symmetry.is_torus else _matrix_drift)(symmetry, reads, test)


def _torus_flow(symmetry: Symmetry, reads: Sequence[OptimizerAverages], test: StateInvariance) -> StateDrift:
    """The flow of one scalar or diagonal symmetry."""
    law, states = reads[0].law, [read.of(symmetry.parameters) for read in reads]
    parts = [leg_sums(symmetry, own, law, read.reference_lr) for own, read in zip(states, reads, strict=True)]
    legs = mean_sums(parts)
    orbit = _leg_orbit(symmetry, reads, legs)
    entries = None
    if legs[0].held is not None:
        entries = torch.stack(
            [_sum(independent_entries(g, own[g.parameter]) for own in states) for g in symmetry.weight_legs]
        )
    counts = torch.ones(len(legs), symmetry.blocks, dtype=torch.float64) if entries is None else entries

    def flow(source: Source) -> FlowEstimate | None:
        if legs[0].noise(source) is None:
            return None
        if len(parts) > 1:
            return estimate(legs, orbit, law, source, _errors_over(parts, source))
        return estimate(legs, orbit, law, source, list(_relative_errors(counts, law, source, reads[0].steps)))

    return StateDrift(
        name=symmetry.name,
        family=symmetry.family,
        kind=symmetry.kind,
        legs=tuple(leg.label for leg in symmetry.weight_legs),
        charge=torch.stack([leg.exponent * leg.weight for leg in legs]).sum(0),
        decay=torch.stack([leg.exponent * leg.decay for leg in legs]).sum(0),
        from_squares=flow("squares"),
        from_momentum=flow("momentum"),
        persistence=_persistence(legs),
        entries=entries,
        invariance=test,
    )


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)


def _leg_orbit(symmetry: Symmetry, reads: Sequence[OptimizerAverages], legs: tuple[LegSums, ...]) -> LegOrbit:
    """The sums elsewhere: powers of the element, or summed anew over the entries of the legs where `eps` counts."""
    law, states = reads[0].law, [read.of(symmetry.parameters) for read in reads]
    anew = [i for i, leg in enumerate(legs) if float(leg.eps_share.max()) >= EPS_MATTERS]
    if symmetry.self_coupled or not anew:
        return LegOrbit(partial(scaled_sums, legs, law), 1e-10)

    def at(element: Tensor) -> Sequence[LegSums]:
        moved = list(scaled_sums(legs, law, element))
        parts = [
            leg_sums(symmetry, own, law, read.reference_lr, element, only=anew)
            for own, read in zip(states, reads, strict=True)
        ]
        for i, sums in zip(anew, mean_sums(parts), strict=True):
            moved[i] = sums
        return moved

    wide = all(a.theta.dtype == torch.float64 for own in states for a in own.values())
    return LegOrbit(at, 1e-10 if wide else 1e-5)


def _errors_over(parts: Sequence[Sequence[LegSums]], source: Source) -> list[Tensor]:
    """Relative standard error of each leg's mean noise, from its scatter over snapshots, `[blocks]` each."""
    out = []
    for leg in zip(*parts, strict=True):
        noises = torch.stack([n for own in leg if (n := own.noise(source)) is not None])
        mean = noises.mean(0)
        error = noises.std(0) / len(noises) ** 0.5
        out.append(torch.where(mean > 0, error / mean, torch.zeros_like(mean)))
    return out


def _persistence(legs: tuple[LegSums, ...]) -> Tensor | None:
    """Noise from momentum over noise from squares, by leg; 1 where a leg has no gradient at all."""
    if legs[0].white is None or legs[0].held is None:
        return None
    pairs = [(leg.held, leg.white) for leg in legs if leg.held is not None and leg.white is not None]
    return torch.stack([torch.where(w > 0, h / w, torch.ones_like(h)) for h, w in pairs])


def _relative_errors(entries: Tensor, law: AveragingLaw, source: Source, steps: int | None) -> Tensor:
    """Relative standard error of each leg's noise, `[legs, blocks]`, for Gaussian minibatch gradients.

    A sum of `n` independent squares scatters by `sqrt(2 / n)`; a root mean square over the effective number `k` of
    steps that `v` averages by `sqrt(1 / (2 k n))`.
    """
    if source == "momentum":
        return (2 / entries).sqrt()
    b2 = law.square_memory or 0.0
    share = (1 - b2) / (1 + b2)
    if steps is not None and law.kind == "adam" and b2:
        share *= (1 + b2**steps) / (1 - b2**steps)
    return (share / (2 * entries)).sqrt()


def _matrix_drift(symmetry: Symmetry, reads: Sequence[OptimizerAverages], test: StateInvariance) -> StateDrift:
    """The flow of one general_linear symmetry under SGD."""
    found = matrix_flow(symmetry, reads)
    return StateDrift(
        name=symmetry.name,
        family=symmetry.family,
        kind=symmetry.kind,
        legs=tuple(leg.label for leg in symmetry.weight_legs),
        charge=found.charge,
        decay=found.decay,
        from_squares=None,
        from_momentum=found.estimate,
        persistence=None,
        entries=None,
        invariance=test,
    )
