"""Objectives: which point of an orbit is asked for, as the least value of a potential Phi or as equal levels on both
sides of every symmetry.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor

from noetherflow.core.arguments import expect
from noetherflow.core.settings import SGDConfig
from noetherflow.equilibrium.potential import Drift, Potential, refuse_too_few
from noetherflow.errors import DataError, MomentError
from noetherflow.moments.activation import ActivationMoments
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


LevelOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LevelObjective:
    """A named point of every orbit: where the levels of the channels are equal on both sides of every symmetry.

    A channel is one coordinate of a scalar or diagonal symmetry (of general_linear ones the diagonal part is used). It
    has some weights on the `+` side, which are multiplied by its scale, and some on the `-` side, which are divided.
    Without gradients, without data.

    Attributes:
        name: What `noise_equilibrium(..., objective=name)` asks for.
        meaning: One line for tables and command-line help.
        level: `level(rows)` gives one number for each row of absolute weights `[channels, entries]`, twice as large for
            rows that are twice as large: their maximum, their mean, a quantile.
        met: Levels of the activations that the `-` legs read, `[blocks]` by symmetry name, in place of the `+` side.
            Where it is not empty, symmetries without an entry stay.
        share: At the point asked for, `(+ level)^share = (- level)^(1 - share)`.
    """

    name: str
    meaning: str
    level: LevelOf
    met: Mapping[str, Tensor] = field(default_factory=dict)
    share: float = 0.5
    moments: ClassVar[MomentsNeeded] = "none"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise DataError(f"objective {self.name!r}: the share must lie between 0 and 1, got {self.share!r}")

    def of_rows(self, rows: Tensor) -> Tensor:
        """The levels of rows of weights.

        Args:
            rows: `[channels, entries]`, of any sign.

        Raises:
            DataError: The function gave anything else than one finite number of at least 0 for each channel.
        """
        found = self.level(rows.abs())
        if not isinstance(found, Tensor) or tuple(found.shape) != (len(rows),):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(f"objective {self.name!r} must give {len(rows)} levels, one for each row, got {got}")
        if not bool((found.isfinite() & (found >= 0)).all()):
            raise DataError(f"objective {self.name!r} gave levels that are negative or not finite")
        return found


AnyObjective = Objective | LevelObjective
_OBJECTIVES: dict[str, AnyObjective] = {}


def register(objective: AnyObjective) -> None:
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


def level_objective(name: str, *, meaning: str) -> Callable[[LevelOf], LevelOf]:
    """Register a function as an objective that makes levels of channels equal on both sides of every symmetry.

    Args:
        name: Its name.
        meaning: One line for tables and command-line help.

    Returns:
        A decorator for a function `(rows) -> levels`: one number for each row of absolute weights `[channels,
        entries]`, twice as large for rows that are twice as large. The function stays as it is.

    Raises:
        DataError: The name is taken.

    Example:
        >>> @level_objective("mean-size", meaning="equal mean absolute weights of both sides of each channel")
        ... def mean_size(rows):
        ...     return rows.mean(1)
        >>> objective_of("mean-size").meaning
        'equal mean absolute weights of both sides of each channel'

    Source: docs/extend/objective.md.
    """

    def add(function: LevelOf) -> LevelOf:
        register(LevelObjective(name, meaning, function))
        return function

    return add


def smoothing(
    activations: ActivationMoments, alpha: float = 0.5, *, statistic: Literal["largest", "rms"] = "largest"
) -> LevelObjective:
    """The objective that moves large activations into weights, as before activations are quantised (SmoothQuant).

    A channel with activations of level `x`, read by weights of level `w`, gets the scale `w^(1 - alpha) / x^alpha`:
    at `alpha = 0.5` activations and weights end at the same level, a larger one moves more into the weights. Symmetries
    that were not measured stay.

    Args:
        activations: From `nf.activation_moments`; measure the symmetries that are to move, those of norm gains
            (`syms.filter(family="norm-gain")`), as a rule.
        alpha: Between 0 and 1.
        statistic: The level of a channel: its `largest` absolute value, or its root mean square (`rms`).

    Returns:
        What `nf.noise_equilibrium(model, syms, objective=...)` takes.

    Raises:
        DataError: `alpha` is not between 0 and 1, or an unknown statistic.

    Example:
        ```
        gains = syms.filter(family="norm-gain")
        activations = nf.activation_moments(model, batches, gains)
        eq = nf.noise_equilibrium(model, gains, objective=nf.smoothing(activations, alpha=0.5))
        nf.balance_(model, eq)
        ```

    Source: Xiao et al., SmoothQuant: accurate and efficient post-training quantization, 2023, equation 4.
    """
    expect("smoothing(activations, alpha)", "activations", activations, ActivationMoments, "nf.activation_moments(...)")
    if statistic not in ("largest", "rms"):
        raise DataError(f"statistic must be 'largest' or 'rms', got {statistic!r}")
    largest = statistic == "largest"
    met = activations.largest if largest else {n: t.sqrt() for n, t in activations.second.items()}
    meaning = f"activations and the weights that read them, {statistic}, alpha {alpha:g}"
    return LevelObjective("smoothing", meaning, _range if largest else _root_mean_square, met, alpha)


def objectives() -> tuple[AnyObjective, ...]:
    """All known objectives, the library's own first.

    Example:
        >>> [o.name for o in objectives()][:3]
        ['noise+decay', 'noise', 'norm']
    """
    return tuple(_OBJECTIVES.values())


def objective_of(objective: str | AnyObjective) -> AnyObjective:
    """The objective of that name (an objective itself as it is).

    Raises:
        DataError: There is none; the error lists the names.
    """
    if isinstance(objective, AnyObjective):
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
    drift = Drift.of(sgd)
    refuse_too_few(moments, sgd, drift.noise, drift.mean)
    return Potential.of(drift, moments, sgd)


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


def _range(rows: Tensor) -> Tensor:
    return rows.amax(1)


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt()


OF_SGD = ("noise+decay", "noise")
"""Names of the objectives whose minimum is where an optimiser's own steps lead."""

_OWN: tuple[AnyObjective, ...] = (
    Objective("noise+decay", "where gradient noise and weight decay balance", _noise_and_decay),
    Objective("noise", "the same with weight decay left out", _noise),
    Objective("norm", "least norm of the weights; needs no gradients", _norm, moments="none"),
    Objective("fisher", "least trace of the empirical Fisher matrix, E[g g^T]", _fisher),
    Objective("hessian", "least trace of the Hessian, from curvature_moments", _hessian, moments="curvature"),
    LevelObjective("range", "equal largest weights on both sides of each channel (for quantisation); no data", _range),
)
for _own in _OWN:
    register(_own)
