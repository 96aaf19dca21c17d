"""Objectives: which point of an orbit is asked for, as the coefficients of the convex potential Phi it minimises."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from noetherflow.core.settings import SGDConfig
from noetherflow.equilibrium.potential import Drift, Potential, samples_needed
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.result import GradientMoments

MomentsNeeded = Literal["gradient", "curvature", "none"]
PotentialOf = Callable[[GradientMoments, SGDConfig | None], Potential]


@dataclass(frozen=True)
class Objective:
    """A named point of every orbit: the minimum of `Phi = 1/2 (norm ||theta||^2 + second Tr E[g g^T] + mean Tr gbar
    gbar^T)`, whose three coefficients `potential(moments, sgd)` gives.

    Attributes:
        name: What `noise_equilibrium(..., objective=name)` asks for.
        meaning: One line for tables and command-line help.
        potential: The coefficients, from the moments and the optimiser settings (None where none are given).
        moments: Which moments it needs: `gradient`, `curvature` (from `curvature_moments`) or `none`.
    """

    name: str
    meaning: str
    potential: PotentialOf
    moments: MomentsNeeded = "gradient"

    def coefficients(self, moments: GradientMoments, sgd: SGDConfig | None) -> Potential:
        """The potential, made sure to be convex along every orbit.

        Raises:
            DataError: the function gave no Potential, coefficients that are not finite or all 0, or a Phi that is not
                convex: `norm`, `second` and `second + mean` must not be negative, since `E[g g^T]` is at least `gbar
                gbar^T`.
        """
        found = self.potential(moments, sgd)
        if not isinstance(found, Potential):
            raise DataError(
                f"objective {self.name!r} must give a Potential(norm=..., second=..., mean=...), got {found!r:.80}; "
                "these three quadratic terms are all that a measurement of second moments determines on an orbit"
            )
        numbers = (found.norm, found.second, found.mean)
        if not all(map(math.isfinite, numbers)) or not any(numbers):
            raise DataError(f"objective {self.name!r} needs finite coefficients that are not all 0, got {found}")
        if min(found.norm, found.second, found.second * (1 + 1e-9) + found.mean) < 0:
            raise DataError(
                f"objective {self.name!r} has no minimum: norm, second and second + mean must not be negative, got "
                f"{found}"
            )
        if self.moments == "none" and (found.second or found.mean):
            raise DataError(f"objective {self.name!r} is registered with moments='none' but weighs gradients: {found}")
        return found


_OBJECTIVES: dict[str, Objective] = {}


def register(objective: Objective) -> None:
    """Make an objective known by its name.

    Raises:
        DataError: The name is taken.
    """
    if objective.name in _OBJECTIVES:
        raise DataError(f"an objective {objective.name!r} exists already; choose another name")
    _OBJECTIVES[objective.name] = objective


def objective(name: str, *, meaning: str, moments: MomentsNeeded = "gradient") -> Callable[[PotentialOf], PotentialOf]:
    """Register a function as an objective of `nf.noise_equilibrium(..., objective=name)`.

    Args:
        name: Its name.
        meaning: One line for tables and command-line help.
        moments: What it needs: `gradient` (`nf.gradient_moments`), `curvature` (`nf.curvature_moments`) or `none`.

    Returns:
        A decorator for a function `(moments, sgd) -> Potential`: the coefficients of the potential whose minimum on the
        orbit is asked for; `sgd` is None where no optimiser settings are given. The function stays as it is.

    Raises:
        DataError: The name is taken, or `moments` is none of the three words.

    Example:
        >>> @objective("light-noise", meaning="least noise plus a hundredth of the norm")
        ... def light_noise(moments, sgd):
        ...     return Potential(norm=0.01, second=1.0, mean=0.0)
        >>> objective_of("light-noise").meaning
        'least noise plus a hundredth of the norm'

    Source: docs/extend/objective.md.
    """
    if moments not in get_args(MomentsNeeded):
        raise DataError(f"moments must be one of {', '.join(get_args(MomentsNeeded))}, got {moments!r}")

    def add(function: PotentialOf) -> PotentialOf:
        register(Objective(name, meaning, function, moments))
        return function

    return add


def objectives() -> tuple[Objective, ...]:
    """All known objectives, the library's own first.

    Example:
        >>> [o.name for o in objectives()][:3]
        ['noise+decay', 'noise', 'norm']
    """
    return tuple(_OBJECTIVES.values())


def objective_of(objective: str | Objective) -> Objective:
    """The objective of that name (an Objective as it is).

    Raises:
        DataError: There is none; the error lists the names.
    """
    if isinstance(objective, Objective):
        return objective
    if objective in _OBJECTIVES:
        return _OBJECTIVES[objective]
    close = difflib.get_close_matches(str(objective), _OBJECTIVES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(f"objective {objective!r} is not one of {', '.join(_OBJECTIVES)}{hint}")


def _noise_and_decay(moments: GradientMoments, sgd: SGDConfig | None) -> Potential:
    """`E[C' - C] = -dPhi/dlam` per SGD step."""
    if sgd is None:
        raise MomentError("a noise equilibrium needs the optimiser settings: pass sgd=SGDConfig(...)")
    potential = Potential.of(Drift.of(sgd), moments, sgd)
    if potential.second < 0:
        unit = "samples" if moments.replicates is None else "minibatches"
        raise MomentError(
            f"moments of {moments.samples} {unit} cannot tell the mean gradient from noise at batch size "
            f"{sgd.batch_size} and momentum {sgd.momentum:g}; measure at least {samples_needed(moments, sgd)} {unit}"
        )
    return potential


def _noise(moments: GradientMoments, sgd: SGDConfig | None) -> Potential:
    return _noise_and_decay(moments, None if sgd is None else replace(sgd, weight_decay=0.0))


def _norm(moments: GradientMoments, sgd: SGDConfig | None) -> Potential:
    return Potential(norm=1.0, second=0.0, mean=0.0)


def _fisher(moments: GradientMoments, sgd: SGDConfig | None) -> Potential:
    return Potential(norm=0.0, second=1.0, mean=0.0)


def _hessian(moments: GradientMoments, sgd: SGDConfig | None) -> Potential:
    if any(bool(m.any()) for m in moments.mean.values()):
        raise MomentError("objective 'hessian' needs curvature_moments(...), got gradient moments: that is 'fisher'")
    return Potential(norm=0.0, second=1.0, mean=0.0)


for _own in (
    Objective("noise+decay", "where gradient noise and weight decay balance", _noise_and_decay),
    Objective("noise", "the same with weight decay left out", _noise),
    Objective("norm", "least norm of the weights; needs no gradients", _norm, moments="none"),
    Objective("fisher", "least trace of the empirical Fisher matrix, E[g g^T]", _fisher),
    Objective("hessian", "least trace of the Hessian, from curvature_moments", _hessian, moments="curvature"),
):
    register(_own)
