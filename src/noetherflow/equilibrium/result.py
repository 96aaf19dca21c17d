"""Equilibrium: where every symmetry of a model settles, in a printable form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from noetherflow.core.printing import assumed, count, grouped, show, table
from noetherflow.core.shown import Shown
from noetherflow.equilibrium.regime import Regime
from noetherflow.equilibrium.verdict import Class
from noetherflow.symmetry.symmetry_set import SymmetrySet


@dataclass(frozen=True, eq=False)
class Settled:
    """One symmetry at the equilibrium.

    Attributes:
        name, family, kind: Of the symmetry.
        element: Moves the model there, in the layout `symmetry.shape`; the identity on coordinates without a finite
            equilibrium. A general_linear element `G` is as good as `R G` for any rotation `R`.
        classification: `finite`; `one-sided`: nothing holds the norm back (all legs scale the same way, no decay);
            `degenerate`: some coordinates have no finite equilibrium; `ill-conditioned`: general_linear factors too
            stretched for their Grams to tell.
        charge_now, charge: The charge today, and predicted at `element`.
        weight_grams, noise_grams: Predicted leg Grams `K` and `M` there, empty where nothing moves.
        imbalance_now, imbalance: Relative Noether flow today and left at `element`, per coordinate or block.
        finite: True for the coordinates (torus) or blocks (general_linear) that have an equilibrium, `[blocks]`.
        reason: Why not all of them have one, or why digits are lost; empty where all is well.
        log_error: Standard error of `1/2 log(G^T G)` (`log element` of a torus), entry by entry.
        eps: The normalisation constant that makes the symmetry only approximate, where there is one; charge and
            imbalance are then those for `eps = 0`.
    """

    name: str
    family: str
    kind: str
    element: Tensor
    classification: Class
    charge_now: Tensor
    charge: Tensor
    weight_grams: tuple[Tensor, ...]
    noise_grams: tuple[Tensor, ...]
    imbalance_now: Tensor
    imbalance: Tensor
    finite: Tensor
    reason: str = ""
    log_error: Tensor | None = None
    eps: float | None = None

    @property
    def largest_change(self) -> float:
        """The largest factor, or its inverse, by which the element stretches any direction."""
        e = self.element
        spectrum = e if e.ndim == 1 else torch.linalg.svdvals(e)
        return float(spectrum.abs().log().abs().max().exp())

    def row(self) -> dict[str, Any]:
        return {
            "symmetry": self.name,
            "family": self.family,
            "kind": self.kind,
            "class": self.classification,
            "largest_change": self.largest_change,
            "imbalance_now": float(self.imbalance_now.max()),
            "imbalance": float(self.imbalance.max()),
            "not_finite": (~self.finite).nonzero().flatten().tolist(),
            "reason": self.reason,
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.row(),
            "element": self.element.tolist(),
            "charge_now": self.charge_now.tolist(),
            "charge": self.charge.tolist(),
            "log_error": None if self.log_error is None else self.log_error.tolist(),
            "eps": self.eps,
        }


EXPLAINED = ("finite, one-sided, degenerate", "largest factor", "imbalance")
"""Names of `printing.MEANING` that the table of an equilibrium needs."""


@dataclass(frozen=True, eq=False)
class Equilibrium(Shown):
    """The joint equilibrium of a model's symmetries under one objective; printing it shows a table by family.

    Attributes:
        objective: The one asked for, `noise` where there is no decay to add.
        settled: One Settled per symmetry; `eq["0 -> 2"]` finds it by name.
        imbalance_now, imbalance: The largest relative Noether flow today and at the equilibrium, over all coordinates
            that have one.
        iterations: Sweeps over all symmetries.
        evaluations: How often the leg Grams were formed (or measured).
        converged: The imbalance is below the tolerance asked for.
        joint: All symmetries move together; else each with the others held.
        norm_now, norm: Squared norm of the moved parameters.
        trace_now, trace: `Tr M` of the moved parameters, weighed as in the objective, so that their ratio is the
            fall of the noise (or curvature) part; None where the model was measured again instead.
        symmetries: Those that the equilibrium is of; `excluded` lists the others.
        regime: Share of the mean gradient in the drift and how long it lasts; None for objectives without an optimiser.
        assumptions: What the answer rests on beyond the noise regime, a sentence each.
        cautions: What takes away from the answer by how the moments were measured, a sentence each: batch norms in
            evaluation mode, arithmetic too coarse to notice a penalty inside the loss.
        solved_at: The charges `theta^T A theta` of the weights it was solved at, by symmetry, whatever the optimiser.
    """

    objective: str
    settled: tuple[Settled, ...]
    imbalance_now: float
    imbalance: float
    iterations: int
    evaluations: int
    converged: bool
    joint: bool
    norm_now: float
    norm: float
    trace_now: float | None
    trace: float | None
    symmetries: SymmetrySet
    regime: Regime | None = None
    assumptions: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    solved_at: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Settled:
        for item in self.settled:
            if item.name == name:
                return item
        raise KeyError(f"no symmetry named {name!r}; names: {[s.name for s in self.settled][:20]}")

    def __iter__(self) -> Iterator[Settled]:
        return iter(self.settled)

    @property
    def excluded(self) -> dict[str, str]:
        """Symmetries left out, with the reason."""
        return dict(self.symmetries.excluded)

    @property
    def elements(self) -> dict[str, Tensor]:
        """Group element by symmetry name."""
        return {s.name: s.element for s in self.settled}

    def rows(self) -> list[dict[str, Any]]:
        """One row per symmetry."""
        return [s.row() for s in self.settled]

    def table_rows(self) -> list[dict[str, Any]]:
        """`rows()`."""
        return self.rows()

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """Whether and how far, a table by family, and why some never settle; see `Shown.describe`."""
        state = "converged" if self.converged else "NOT converged"
        lines = [
            f"{self.objective} equilibrium of {count(len(self.settled), 'symmetry', 'symmetries')}"
            + ("" if self.joint else " (each alone, the others held)")
            + f": {state} in {count(self.iterations, 'sweep', 'sweeps')}, imbalance {show(self.imbalance_now)} -> "
            + show(self.imbalance),
            table(self._families(), *(EXPLAINED if legend else ())),
        ]
        lines += [] if self.regime is None else [*self.regime.lines(verbose), *self.regime.cautions]
        lines += assumed(self.assumptions, verbose)
        lines += [f"CAUTION: {text}" for text in self.cautions]
        lines += self._approximate()
        for kind in dict.fromkeys(s.classification for s in self.settled if s.reason):
            own = {s.name: s.reason for s in self.settled if s.reason and s.classification == kind}
            lines += grouped(kind, own, verbose)
        lines += grouped("excluded", self.excluded, verbose)
        if not self.converged:
            lines.append("raise max_iterations, or look at the symmetries with the largest imbalance in rows()")
        return "\n".join(lines)

    def _families(self) -> list[dict[str, Any]]:
        """One row per family: how many symmetries of each class, and the largest factor of the move."""
        out = []
        for family in dict.fromkeys(s.family for s in self.settled):
            own = [s for s in self.settled if s.family == family]
            counts = {c: sum(s.classification == c for s in own) for c in self._classes()}
            factor = max(s.largest_change for s in own)
            out.append({"family": family, "symmetries": len(own), **counts, "largest factor": factor})
        return out

    def _classes(self) -> list[str]:
        """The classes to count: the usual three, and what else there is."""
        usual = ("finite", "one-sided", "degenerate")
        return [c for c in get_args(Class) if c in usual or any(s.classification == c for s in self.settled)]

    def _approximate(self) -> list[str]:
        """One line on the symmetries that a normalisation's eps breaks, where they move."""
        own = [s for s in self.settled if s.eps is not None and s.largest_change > 1]
        if not own:
            return []
        worst = max(own, key=lambda s: s.largest_change)
        return [
            f"{count(len(own), 'symmetry is', 'symmetries are')} only approximate ({worst.name}: eps {worst.eps:g}): "
            "their charges and imbalance are those for eps 0, and moving them changes the outputs. Measured again "
            f"after the move they are off by about {worst.largest_change**2:.2g} times what nf.certify finds gradients "
            f"off by for {worst.name}; leave them in place with approximate=False"
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "regime": None if self.regime is None else self.regime.to_dict(),
            "assumptions": list(self.assumptions),
            "cautions": list(self.cautions),
            "converged": self.converged,
            "joint": self.joint,
            "imbalance_now": self.imbalance_now,
            "imbalance": self.imbalance,
            "iterations": self.iterations,
            "evaluations": self.evaluations,
            "norm_now": self.norm_now,
            "norm": self.norm,
            "trace_now": self.trace_now,
            "trace": self.trace,
            "excluded": dict(self.excluded),
            "settled": [s.to_dict() for s in self.settled],
        }
