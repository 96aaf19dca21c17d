"""The flow of a run as read off its optimiser's state: numbers by symmetry and family, printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noetherflow.core.printing import assumed, table, transposed
from noetherflow.equilibrium.averages import AveragingLaw
from noetherflow.equilibrium.charge_flow import norm_of, signed_sum
from noetherflow.equilibrium.state_estimate import FlowEstimate
from noetherflow.equilibrium.state_invariance import StateInvariance
from noetherflow.equilibrium.turning import turning

EXPLAINED = ("preconditioned charge", "drift per step: noise", "persistence", "imbalance", "relaxation (steps)", "–")
"""Names of `printing.MEANING` that the table of families needs."""
OF_SGD = ("charge", "drift per step", "imbalance", "relaxation (steps)", "–")
"""The same for SGD, whose charge is the plain one."""
PLAIN = {
    "preconditioned charge": "charge",
    "drift per step: noise, from momentum": "drift per step: noise",
    "drift per step: noise, from squares": "",
    "persistence (median)": "",
}
"""What SGD's table calls these rows; the empty ones, for which SGD keeps no average, are left out."""


@dataclass(frozen=True, eq=False)
class StateFlow:
    """The flow of every symmetry that an optimiser's state determines.

    Attributes:
        details: one `StateDrift` per symmetry.
        law: how the optimiser steps, as read from its state.
        lr: the learning rate that charges are scaled by, the largest of its parameter groups.
        steps: optimiser steps made, the most of all snapshots; None where the state does not say.
        snapshots: how many states were averaged; with several, errors are those of the mean, from their scatter.
        excluded: symmetries without an answer, with the reason.
        coded: averages are stored in 8 bits.
    """

    details: tuple[StateDrift, ...]
    law: AveragingLaw
    lr: float
    steps: int | None
    snapshots: int
    excluded: Mapping[str, str]
    coded: bool = False

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
        rows = [_family([d for d in self.details if d.family == name]) for name in names]
        if self.law.kind != "sgd":
            return rows
        return [{PLAIN.get(n, n): v for n, v in row.items() if PLAIN.get(n, n)} for row in rows]

    def assumptions(self) -> list[str]:
        """What the numbers rest on, one sentence each."""
        several = f"this is the mean of {self.snapshots}, with errors from their scatter"
        out = [
            "'from momentum' holds for any gradients; one snapshot of it scatters, "
            + (several if self.snapshots > 1 else "average several"),
            "equilibria are those of the function as it is now, every symmetry with the others held",
        ]
        out += turning(d.charge for d in self.details)
        if self.coded:
            out.append("averages are stored in 8 bits, whose rounding is in every number")
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

    def _explained(self) -> tuple[str, ...]:
        return OF_SGD if self.law.kind == "sgd" else EXPLAINED

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

    def describe(self, *, verbose: bool = False) -> str:
        """What `print` shows; `verbose`: what the numbers rest on in full sentences, one a line."""
        what = {"sgd": "SGD with momentum", "adam": "Adam", "rmsprop": "RMSprop"}[self.law.kind]
        when = "" if self.steps is None else f" after {self.steps:,} steps"
        many = "" if self.snapshots == 1 else f", mean of {self.snapshots} snapshots"
        lines = [f"Noether flow from the state of {what}{when}, lr {self.lr:g}{many}"]
        lines += [table(transposed(self.families()), *self._explained()) if self.details else "(no symmetry)"]
        tested = self._tested()
        rests = assumed([a for a in self.assumptions() if a not in tested], verbose)
        lines += [f"  {line}" for line in (*tested, *rests)]
        for why in dict.fromkeys(self.excluded.values()):
            names = [n for n, reason in self.excluded.items() if reason == why]
            more = "" if len(names) == 1 else f" and {len(names) - 1:,} more"
            lines.append(f"excluded: {names[0]}{more}: {why}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers and lists, for files."""
        return {
            "optimizer": vars(self.law),
            "lr": self.lr,
            "steps": self.steps,
            "snapshots": self.snapshots,
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
            "charge": norm_of(self.charge),
            "decay": norm_of(self.decay),
            "noise_from_squares": None if self.from_squares is None else norm_of(self.from_squares.noise),
            "noise_from_momentum": None if self.from_momentum is None else norm_of(self.from_momentum.noise),
            "noise_error": norm_of(best.error),
            "drift": norm_of(best.drift),
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


def _family(details: list[StateDrift]) -> dict[str, Any]:
    """One family: the norm of its charge, signed sums of the parts of the drift, medians where there is a value."""
    best = [d.best for d in details]
    times = torch.cat([b.relaxation_steps[b.finite] for b in best])
    held = [d.persistence.flatten() for d in details if d.persistence is not None]
    squares = [signed_sum(d.from_squares.noise) for d in details if d.from_squares is not None]
    momentum = [signed_sum(d.from_momentum.noise) for d in details if d.from_momentum is not None]
    errors = [d.from_momentum.error.flatten() for d in details if d.from_momentum is not None]
    return {
        "family": details[0].family,
        "symmetries": len(details),
        "coordinates": sum(len(b.finite) for b in best),
        "preconditioned charge": norm_of(torch.cat([d.charge.flatten() for d in details])),
        "drift per step: weight decay": sum(signed_sum(d.decay) for d in details),
        "drift per step: noise, from squares": sum(squares) if squares else None,
        "drift per step: noise, from momentum": sum(momentum) if momentum else None,
        "+- of that": norm_of(torch.cat(errors)) if errors else None,
        "drift per step: sum": sum(signed_sum(b.drift) for b in best),
        "persistence (median)": float(torch.cat(held).median()) if held else None,
        "imbalance": max(float(b.imbalance.max()) for b in best),
        "relaxation (steps)": float(times.median()) if times.numel() else None,
        "coordinates without equilibrium": sum(int((~b.finite).sum()) for b in best),
    }


def _listed(found: FlowEstimate) -> dict[str, Any]:
    """The estimate with lists in place of tensors."""
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(found).items()}
