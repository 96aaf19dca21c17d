"""The flow of one symmetry: its charge, the parts of its drift, and where and how fast it settles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noetherflow.errors import MomentError
from noetherflow.moments.statistics import t_quantile


@dataclass(frozen=True, eq=False)
class ChargeFlow:
    """The flow of one symmetry; tensors in the layout `symmetry.shape`, changes per step.

    Attributes:
        name, family, kind: Of the symmetry.
        charge: Today's charge, signed.
        decay, noise, step_size: The parts of `E[C' - C]`.
        error: Standard error of `noise + step_size`, None without groups of samples.
        groups: How many groups the error comes from.
        feedback: Adam's only, where it was measured and given: what the charge gains because `v` follows the
            fluctuations of the weights, a fourth part of `E[C' - C]`; None where it is not counted.
        equilibrium: The charge at which this symmetry's flow stops with the others held; today's on coordinates
            without one.
        finite: Which coordinates (torus) or blocks (general_linear) have a finite equilibrium, `[blocks]`.
        relaxation_steps: Steps in which a small deviation of a coordinate (torus) or of the slowest direction of a
            block falls by e near the equilibrium, `[blocks]`; 0 where not finite.
        imbalance: Relative Noether flow, `[blocks]`; of a matrix over the directions that have an equilibrium.
        reason: Why not all coordinates or directions have an equilibrium; empty where they do.
    """

    name: str
    family: str
    kind: str
    charge: Tensor
    decay: Tensor
    noise: Tensor
    step_size: Tensor
    error: Tensor | None
    equilibrium: Tensor
    finite: Tensor
    relaxation_steps: Tensor
    imbalance: Tensor
    groups: int = 0
    feedback: Tensor | None = None
    reason: str = ""

    @property
    def drift(self) -> Tensor:
        """`E[C' - C]` per step."""
        known = self.decay + self.noise + self.step_size
        return known if self.feedback is None else known + self.feedback

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the interval of the drift that holds the truth with probability `level`, by
        Student's t of the groups of samples.

        Raises:
            MomentError: There are no errors: the moments have no groups.
        """
        if self.error is None:
            raise MomentError(f"the drift of {self.name!r} has no error: measure moments in at least two groups")
        half = t_quantile(level, self.groups) * self.error
        return self.drift - half, self.drift + half

    def phase(self, steps: float) -> str:
        """`fast` if every finite coordinate relaxes within `steps` of training, `slow` if none does, else `mixed`;
        `none` without a finite coordinate (theory.md section 7).
        """
        within = self.relaxation_steps[self.finite] <= steps
        if not len(within):
            return "none"
        if bool(within.all()):
            return "fast"
        return "mixed" if bool(within.any()) else "slow"

    def row(self) -> dict[str, Any]:
        """Norms over the coordinates, beside them the signed sums (for general_linear the trace) of charge and
        drift, and the median and largest relaxation time; the equilibrium over the finite ones (None where nothing
        is finite).
        """
        times = self.relaxation_steps[self.finite]
        return {
            "symmetry": self.name,
            "family": self.family,
            "kind": self.kind,
            "charge": norm_of(self.charge),
            "equilibrium_charge": norm_where([(self.equilibrium, self.finite)]),
            "decay": norm_of(self.decay),
            "noise": norm_of(self.noise),
            "step_size": norm_of(self.step_size),
            **({} if self.feedback is None else {"feedback": norm_of(self.feedback)}),
            "drift": norm_of(self.drift),
            "charge_sum": signed_sum(self.charge),
            "drift_sum": signed_sum(self.drift),
            "drift_error": None if self.error is None else norm_of(self.error),
            "imbalance": largest(self.imbalance, self.finite),
            "relaxation_steps": float(times.median()) if times.numel() else None,
            "slowest_relaxation": float(times.max()) if times.numel() else None,
            "without_equilibrium": int((~self.finite).sum()),
        }

    def to_dict(self) -> dict[str, Any]:
        values = ("charge", "equilibrium", "decay", "noise", "step_size", "finite", "relaxation_steps", "imbalance")
        return {
            "symmetry": self.name,
            "family": self.family,
            "kind": self.kind,
            **{v: getattr(self, v).tolist() for v in values},
            **({} if self.feedback is None else {"feedback": self.feedback.tolist()}),
            "error": None if self.error is None else self.error.tolist(),
            "reason": self.reason,
        }


def largest(imbalance: Tensor, finite: Tensor) -> float | None:
    """The largest imbalance, None where nothing has an equilibrium; a matrix may have one in some directions only."""
    worst = float(imbalance.max()) if imbalance.numel() else 0.0
    return worst if worst > 0 or bool(finite.any()) else None


def norm_of(values: Tensor) -> float:
    """The norm over all coordinates, also of numbers whose squares are beyond the range of float64.

    Example:
        >>> f"{norm_of(torch.tensor([3e200, 4e200], dtype=torch.float64)):.3g}"
        '5e+200'
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest * float(torch.linalg.vector_norm(values / largest)) if largest else 0.0


def signed_sum(values: Tensor) -> float:
    """The sum over coordinates, for general_linear the trace: positive where the + side is the larger."""
    return float((values.diagonal(dim1=-2, dim2=-1) if values.ndim == 3 else values).sum())


def flat(parts: Iterable[Tensor]) -> Tensor:
    """All numbers of all tensors in one."""
    return torch.cat([p.flatten() for p in parts])


def norm_where(parts: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """The norm of `values[finite]` over all `(values, finite)`, None where nothing is finite."""
    chosen = flat(values[finite] for values, finite in parts)
    return norm_of(chosen) if chosen.numel() else None
