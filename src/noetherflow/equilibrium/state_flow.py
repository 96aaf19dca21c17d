"""The Noether flow of a training run from its optimiser's state alone: no data, no loss, no backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.core.host import on_host
from noetherflow.core.printing import table, transposed
from noetherflow.equilibrium.averages import Averages, AveragingLaw, OptimizerAverages, read_averages
from noetherflow.equilibrium.state_estimate import FlowEstimate, LegOrbit, Source, estimate, scaled_sums
from noetherflow.equilibrium.state_invariance import StateInvariance, refuse_broken, state_invariance
from noetherflow.equilibrium.state_matrix import matrix_flow
from noetherflow.equilibrium.state_sums import LegSums, independent_entries, leg_sums
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

EPS_MATTERS = 1e-3
"""Share of Adam's `eps` in a leg's part of the charge from which on the leg is summed anew along its orbit."""
EXPLAINED = ("preconditioned charge", "drift per step: noise", "persistence", "imbalance", "relaxation (steps)", "–")
"""Names of `printing.MEANING` that the table of families needs."""


@dataclass(frozen=True, eq=False)
class StateFlow:
    """The flow of every symmetry that an optimiser's state determines.

    Attributes:
        details: one `StateDrift` per symmetry.
        law: how the optimiser steps, as read from its state.
        lr: the learning rate that charges are scaled by, the largest of its parameter groups.
        steps: optimiser steps made, None where the state does not say.
        excluded: symmetries without an answer, with the reason.
    """

    details: tuple[StateDrift, ...]
    law: AveragingLaw
    lr: float
    steps: int | None
    excluded: Mapping[str, str]

    def __getitem__(self, name: str) -> StateDrift:
        for detail in self.details:
            if detail.name == name:
                return detail
        raise KeyError(f"no symmetry named {name!r}; names: {[d.name for d in self.details][:20]}")

    def rows(self) -> list[dict[str, Any]]:
        """One row per symmetry."""
        return [d.row() for d in self.details]

    def families(self) -> list[dict[str, Any]]:
        """One row per family of symmetries, in the words of `printing.MEANING`."""
        names = dict.fromkeys(d.family for d in self.details)
        return [_family([d for d in self.details if d.family == name]) for name in names]

    def assumptions(self) -> list[str]:
        """What the numbers rest on, one sentence each."""
        out = [
            "'from momentum' holds for any gradients; one snapshot of it scatters, average several",
            "equilibria are those of the function as it is now, every symmetry with the others held",
        ]
        out += self._tested()
        b2 = self.law.square_memory
        if b2 is None:
            return [*out, "Nesterov's state leaves up to 10 % of the noise open"] if self.law.nesterov else out
        slow = f"{round(1 / (1 - b2)):,} steps"
        out.append("'from squares' takes gradients as uncorrelated from step to step (persistence 1)")
        out.append(
            f"v averages {slow}: it must be slow against the fluctuations of the weights (without curvature it is "
            "unknown whether it is) and fast against training; near b2 = 0.95 or below equilibria are off by factors"
        )
        if self.steps is not None and self.steps * (1 - b2) < 1:
            out.append(f"after {self.steps:,} steps v still averages over the whole run, early gradients included")
        return out

    def _tested(self) -> list[str]:
        """What the test of the state against the symmetries found."""
        open_ = [d.name for d in self.details if d.invariance.outcome == "undecided"]
        closed = [d.invariance.resolved for d in self.details if d.invariance.outcome == "holds"]
        out = []
        if closed:
            out.append(
                "the loss has these symmetries: theta^T A m is what the optimiser's own steps make of it; a penalty or "
                f"a detached branch that moves charges by more than {100 * max(closed):.0f} % of all that pushes them "
                "would have shown, a smaller one would not"
            )
        if open_:
            more = f" and {len(open_) - 1:,} more" if len(open_) > 1 else ""
            out.append(
                f"whether the loss has {open_[0]}{more} cannot be decided from this state: it is taken to, and a "
                "penalty inside it would be in the drift unseen"
            )
        return out

    def __str__(self) -> str:
        what = {"sgd": "SGD with momentum", "adam": "Adam", "rmsprop": "RMSprop"}[self.law.kind]
        when = "" if self.steps is None else f" after {self.steps:,} steps"
        lines = [f"Noether flow from the state of {what}{when}, lr {self.lr:g}"]
        lines += [table(transposed(self.families()), *EXPLAINED) if self.details else "(no symmetry)"]
        lines += [f"  assumed: {a}" for a in self.assumptions()]
        for why in dict.fromkeys(self.excluded.values()):
            names = [n for n, reason in self.excluded.items() if reason == why]
            more = "" if len(names) == 1 else f" and {len(names) - 1:,} more"
            lines.append(f"excluded: {names[0]}{more}: {why}")
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers and lists, for files."""
        return {
            "optimizer": vars(self.law),
            "lr": self.lr,
            "steps": self.steps,
            "assumptions": self.assumptions(),
            "excluded": dict(self.excluded),
            "symmetries": [d.to_dict() for d in self.details],
        }


@dataclass(frozen=True, eq=False)
class StateDrift:
    """The flow of one symmetry; tensors in its layout, changes per step.

    Attributes:
        name: of the symmetry.
        family: its family.
        kind: its group.
        legs: `+parameter` or `-parameter`, one per leg.
        charge: preconditioned, `sum_i a_i (lr / lr_i) (s_i + eps) theta_i^2` for Adam, `theta^T A theta` for SGD.
        decay: what weight decay takes of it per step.
        from_squares: the flow from the average of squares, None for SGD and general_linear.
        from_momentum: the flow from the average of gradients, None for RMSprop without momentum.
        persistence: by leg, the second over the first; 1 where gradients are uncorrelated, above 1 where a mean
            gradient carries the weights, below 1 where shuffled epochs take back what they gave. `[legs, blocks]`.
        entries: by leg, how many independent numbers the average of gradients holds. `[legs, blocks]`.
        invariance: whether the state is that of a loss with this symmetry; it cannot be decided for RMSprop.
    """

    name: str
    family: str
    kind: str
    legs: tuple[str, ...]
    charge: Tensor
    decay: Tensor
    from_squares: FlowEstimate | None
    from_momentum: FlowEstimate | None
    persistence: Tensor | None
    entries: Tensor | None
    invariance: StateInvariance

    @property
    def best(self) -> FlowEstimate:
        """The estimate that holds for any gradients, where there is one."""
        found = self.from_momentum or self.from_squares
        assert found is not None
        return found

    def row(self) -> dict[str, Any]:
        """Norms over the coordinates, medians and largest values."""
        best = self.best
        times, held = best.relaxation_steps[best.finite], self.persistence
        return {
            "symmetry": self.name,
            "family": self.family,
            "kind": self.kind,
            "charge": _norm(self.charge),
            "decay": _norm(self.decay),
            "noise_from_squares": None if self.from_squares is None else _norm(self.from_squares.noise),
            "noise_from_momentum": None if self.from_momentum is None else _norm(self.from_momentum.noise),
            "noise_error": _norm(best.error),
            "drift": _norm(best.drift),
            "persistence": None if held is None else float(held.median()),
            "imbalance": float(best.imbalance.max()),
            "relaxation_steps": float(times.median()) if times.numel() else None,
            "without_equilibrium": int((~best.finite).sum()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Every coordinate, as lists."""
        plain = {n: getattr(self, n) for n in ("charge", "decay", "persistence", "entries")}
        estimates = {n: getattr(self, n) for n in ("from_squares", "from_momentum")}
        return {
            "symmetry": self.name,
            "family": self.family,
            "kind": self.kind,
            "legs": list(self.legs),
            "loss": vars(self.invariance),
            **{n: None if t is None else t.tolist() for n, t in plain.items()},
            **{n: None if e is None else _listed(e) for n, e in estimates.items()},
        }


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
            `state_dict()` gave.
        lr: learning rate to use in place of the stored ones, where a schedule has taken them to 0.
        weights: the weights by canonical name where the model has none (on the meta device).

    Returns:
        The flow by symmetry, printable; `flow[name].from_momentum.element` moves the weights to the equilibrium.

    Raises:
        DataError: another optimiser, options outside the theory, no state yet, a learning rate of 0.
        CheckpointError: a saved state whose parameters cannot be identified beyond doubt.

    Example:
        >>> import noetherflow as nf
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        >>> for _ in range(5):
        ...     net(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        >>> flow = state_flow(net, nf.find_symmetries(net, (torch.randn(2, 3),)), optimizer)
        >>> flow.details[0].charge.shape
        torch.Size([4])

    Source: theory.md section 13.
    """
    syms = syms.trainable(model)
    read = read_averages(model, optimizer, lr)
    if weights is not None:
        read = read.with_weights(weights)
    reasons = {s.name: why for s in syms if (why := _why_not(s, read)) is not None}
    syms = syms.without(reasons)
    reference = max(a.rates.lr for a in read.by_name.values())
    tests = {s.name: state_invariance(s, (read,)) for s in syms}
    refuse_broken(tests, read.law)
    details = tuple(_drift(s, read, reference, tests[s.name]) for s in syms)
    return StateFlow(details, read.law, reference, read.steps, dict(syms.excluded))


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


def _drift(symmetry: Symmetry, read: OptimizerAverages, lr: float, test: StateInvariance) -> StateDrift:
    return (_torus_flow if symmetry.is_torus else _matrix_drift)(symmetry, read, lr, test)


def _torus_flow(symmetry: Symmetry, read: OptimizerAverages, lr: float, test: StateInvariance) -> StateDrift:
    """The flow of one scalar or diagonal symmetry."""
    law, averages = read.law, {n: read.by_name[n] for n in symmetry.parameters}
    legs = leg_sums(symmetry, averages, law, lr)
    orbit = _leg_orbit(symmetry, averages, law, lr, legs)
    entries = None
    if legs[0].held is not None:
        entries = torch.stack([independent_entries(g, averages[g.parameter]) for g in symmetry.weight_legs])
    counts = torch.ones(len(legs), symmetry.blocks, dtype=torch.float64) if entries is None else entries

    def flow(source: Source) -> FlowEstimate | None:
        if legs[0].noise(source) is None:
            return None
        return estimate(legs, orbit, law, source, list(_relative_errors(counts, law, source, read.steps)))

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


def _leg_orbit(
    symmetry: Symmetry, averages: Mapping[str, Averages], law: AveragingLaw, lr: float, legs: tuple[LegSums, ...]
) -> LegOrbit:
    """The sums elsewhere: powers of the element, or summed anew over the entries of the legs where `eps` counts."""
    anew = [i for i, leg in enumerate(legs) if float(leg.eps_share.max()) >= EPS_MATTERS]
    if symmetry.self_coupled or not anew:
        return LegOrbit(partial(scaled_sums, legs, law), 1e-10)

    def at(element: Tensor) -> Sequence[LegSums]:
        moved = list(scaled_sums(legs, law, element))
        for i, sums in zip(anew, leg_sums(symmetry, averages, law, lr, element, only=anew), strict=True):
            moved[i] = sums
        return moved

    wide = all(a.theta.dtype == torch.float64 for a in averages.values())
    return LegOrbit(at, 1e-10 if wide else 1e-5)


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


def _matrix_drift(symmetry: Symmetry, read: OptimizerAverages, lr: float, test: StateInvariance) -> StateDrift:
    """The flow of one general_linear symmetry under SGD."""
    found = matrix_flow(symmetry, {n: read.by_name[n] for n in symmetry.parameters}, read.law, lr)
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


def _family(details: list[StateDrift]) -> dict[str, Any]:
    """One family: norms over all its coordinates, medians over those that have a value."""
    best = [d.best for d in details]
    times = torch.cat([b.relaxation_steps[b.finite] for b in best])
    held = [d.persistence.flatten() for d in details if d.persistence is not None]
    squares = [d.from_squares.noise.flatten() for d in details if d.from_squares is not None]
    momentum = [d.from_momentum.noise.flatten() for d in details if d.from_momentum is not None]
    errors = [d.from_momentum.error.flatten() for d in details if d.from_momentum is not None]
    return {
        "family": details[0].family,
        "symmetries": len(details),
        "coordinates": sum(len(b.finite) for b in best),
        "preconditioned charge": _norm(torch.cat([d.charge.flatten() for d in details])),
        "drift per step: weight decay": _norm(torch.cat([d.decay.flatten() for d in details])),
        "drift per step: noise, from squares": _norm(torch.cat(squares)) if squares else None,
        "drift per step: noise, from momentum": _norm(torch.cat(momentum)) if momentum else None,
        "+- (one snapshot)": _norm(torch.cat(errors)) if errors else None,
        "persistence (median)": float(torch.cat(held).median()) if held else None,
        "imbalance": max(float(b.imbalance.max()) for b in best),
        "relaxation (steps)": float(times.median()) if times.numel() else None,
        "coordinates without equilibrium": sum(int((~b.finite).sum()) for b in best),
    }


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _listed(found: FlowEstimate) -> dict[str, Any]:
    """The estimate with lists in place of tensors."""
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(found).items()}
