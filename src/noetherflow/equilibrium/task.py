"""One joint solve: the question, the orbit of the symmetries that move, and the errors of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from noetherflow.core.settings import SGDConfig
from noetherflow.core.tensors import tensors_of
from noetherflow.equilibrium.blocks import TorusClasses, gl_frame
from noetherflow.equilibrium.conditioning import machine_epsilon
from noetherflow.equilibrium.feedback import SquareFeedback
from noetherflow.equilibrium.objective import OF_SGD, Objective
from noetherflow.equilibrium.orbit import (
    FramedOrbit,
    MeasuredOrbit,
    Orbit,
    Remeasure,
    RemeasuredOrbit,
    Samples,
    orbit_of,
    separate_orbits,
)
from noetherflow.equilibrium.parts import minimise_in_parts
from noetherflow.equilibrium.potential import LegPair, Potential
from noetherflow.equilibrium.regime import Regime, regime_of
from noetherflow.equilibrium.search import Minimum
from noetherflow.equilibrium.solve import Classes, StepLimits, drives, elements_of, logs_of
from noetherflow.equilibrium.start import Start
from noetherflow.errors import MomentError
from noetherflow.moments.result import GradientMoments
from noetherflow.moments.statistics import jackknife
from noetherflow.symmetry.overlap import leg_coordinates, stiffness
from noetherflow.symmetry.symmetry import Symmetry
from noetherflow.symmetry.symmetry_set import SymmetrySet

TOLERANCE = 1e-11
"""Relative Noether flow at which a minimum from one measurement counts as converged."""


@dataclass(frozen=True)
class SolveOptions:
    """How to solve; `noise_equilibrium` explains each of them.

    Raises:
        ValueError: `recede` outside (0, 1], or negative `max_iterations`.
    """

    joint: bool = True
    remeasure: Remeasure | None = None
    samples: Samples | None = None
    tolerance: float | None = None
    max_iterations: int = 500
    recede: float = 1.0
    errors: bool = False
    feedback: SquareFeedback | None = None

    def __post_init__(self) -> None:
        if not 0 < self.recede <= 1:
            raise ValueError(f"recede must lie in (0, 1], got {self.recede!r}")
        if self.max_iterations < 0:
            raise ValueError(f"max_iterations must be at least 0, got {self.max_iterations!r}")


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked: which point of which orbits, under which potential, from which measurement."""

    symmetries: SymmetrySet
    moments: GradientMoments
    sgd: SGDConfig | None
    objective: Objective
    potential: Potential
    options: SolveOptions

    def with_moments(self, moments: GradientMoments) -> Question:
        """The same question for moments of another point or other samples."""
        return replace(self, moments=moments, potential=self.objective.potential(moments, self.sgd))

    @property
    def samples(self) -> Samples | None:
        """Per-sample gradients: those given, else the factors that were measured with the moments."""
        return self.moments.factors or None if self.options.samples is None else self.options.samples

    @property
    def regime(self) -> Regime | None:
        """The regime of the drift, for the objectives that SGD's settings enter."""
        if self.sgd is None or self.objective.name not in OF_SGD:
            return None
        return regime_of(tuple(self.symmetries), self.moments, self.sgd)


@dataclass(frozen=True, eq=False)
class Task:
    """The symmetries that move, the orbit they span (seen from a frame) and how far steps may go."""

    starts: tuple[Start, ...]
    orbit: FramedOrbit
    limits: StepLimits
    tolerance: float
    max_iterations: int

    @classmethod
    def of(cls, model: nn.Module, starts: Sequence[Start], question: Question) -> Task:
        """The task of a model whose symmetries stand at `starts`; those without a finite direction stay out.

        Raises:
            MomentError: The moments do not determine the orbit.
        """
        movers = tuple(s for s in starts if s.moves)
        symmetries, options = [s.symmetry for s in movers], question.options
        orbit = _orbit(model, symmetries, question)
        tolerance = options.tolerance
        if tolerance is None:
            rounding = 8 * machine_epsilon(model, symmetries) if isinstance(orbit, RemeasuredOrbit) else 0.0
            tolerance = max(TOLERANCE, rounding)
        frame = tuple(_frame(s, options.recede) for s in movers)
        limits = _limits(model, symmetries, options.joint)
        return cls(movers, FramedOrbit(orbit, frame), limits, tolerance, options.max_iterations)

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The symmetries that move."""
        return self.orbit.symmetries

    @property
    def classes(self) -> list[Classes]:
        """Which directions of each of them are finite."""
        return [s.classes for s in self.starts]

    def solve(self) -> Minimum:
        """The joint minimum of Phi."""
        return minimise_in_parts(
            self.orbit, self.classes, self.limits, tolerance=self.tolerance, max_iterations=self.max_iterations
        )

    def elements(self, logs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Group elements by symmetry, as seen from the weights, of the solver's logs."""
        found = self.orbit.unframed(elements_of(self.symmetries, logs))
        return {s.name: e for s, e in zip(self.symmetries, found, strict=True)}

    def pairs(self, minimum: Minimum) -> dict[str, list[LegPair]]:
        """`(K, M)` of the legs at the minimum, by symmetry."""
        return {s.name: p for s, p in zip(self.symmetries, minimum.point.pairs, strict=True)}


def _orbit(model: nn.Module, symmetries: Sequence[Symmetry], question: Question) -> Orbit:
    options, moments, potential = question.options, question.moments, question.potential
    if not options.joint:
        return separate_orbits(model, symmetries, moments, potential, question.samples)
    return orbit_of(model, symmetries, moments, potential, samples=question.samples, remeasure=options.remeasure)


def _frame(start: Start, recede: float) -> Tensor:
    """The element from which the solve starts: the identity for tori, `gl_frame` for general_linear."""
    if isinstance(start.classes, TorusClasses):
        return start.symmetry.identity()
    return gl_frame(start.classes, start.x, start.y, recede)


def _limits(model: nn.Module, symmetries: Sequence[Symmetry], joint: bool) -> StepLimits:
    shapes = {n: tuple(t.shape) for n, t in tensors_of(model).items()}
    alone = tuple(stiffness(leg_coordinates([s], shapes), [s])[0] for s in symmetries)
    return StepLimits(alone, tuple(stiffness(leg_coordinates(symmetries, shapes), symmetries)) if joint else alone)


def log_errors(model: nn.Module, task: Task, minimum: Minimum, question: Question) -> dict[str, Tensor]:
    """Standard errors of `logs_of` the elements, by symmetry: the solve repeated without each group of samples.

    Every solve starts from the full minimum. Infinite for torus coordinates that have no finite equilibrium without one
    of the groups.

    Raises:
        MomentError: The moments have no groups, or do not determine the orbit by themselves.
    """
    _refuse_errors(question.moments, task.orbit.orbit)

    def logs(part: GradientMoments) -> Mapping[str, Tensor]:
        return _logs_without(model, task, minimum, question.with_moments(part))

    hessian = question.objective.moments == "curvature"
    size = None if question.sgd is None or hessian else question.sgd.dataset_size
    found = jackknife(question.moments, _named_logs(task, minimum.logs), logs, size)
    return {n: torch.where(e.error.isnan(), torch.inf, e.error) for n, e in found.items()}


def _logs_without(model: nn.Module, task: Task, minimum: Minimum, question: Question) -> dict[str, Tensor]:
    """Logs of the elements by the moments of `question`; NaN where a coordinate loses its equilibrium."""
    symmetries = task.symmetries
    orbit = FramedOrbit(_orbit(model, symmetries, question), task.orbit.frame)
    pairs = orbit.at([s.identity() for s in symmetries]).pairs
    xy = [drives(s, p, orbit.potential) for s, p in zip(symmetries, pairs, strict=True)]
    left = [_left_finite(c, x, y) for c, (x, y) in zip(task.classes, xy, strict=True)]
    found = _named_logs(task, minimise_in_parts(orbit, left, task.limits, start=minimum.logs, tolerance=1e-6).logs)
    for s, before, after in zip(symmetries, task.classes, left, strict=True):
        found[s.name][before.finite != after.finite] = torch.nan
    return found


def _named_logs(task: Task, logs: Sequence[Tensor]) -> dict[str, Tensor]:
    elements = task.elements(logs)
    return dict(zip(elements, logs_of(task.symmetries, list(elements.values())), strict=True))


def _left_finite(classes: Classes, x: Tensor, y: Tensor) -> Classes:
    """The classes of a torus without the coordinates whose drives are not positive."""
    return replace(classes, finite=classes.finite & (x > 0) & (y > 0)) if isinstance(classes, TorusClasses) else classes


def _refuse_errors(moments: GradientMoments, orbit: Orbit) -> None:
    if len(moments.groups) < 2:
        raise MomentError("errors=True needs moments measured in at least two groups")
    if not isinstance(orbit, MeasuredOrbit) or orbit.needs_samples:
        raise MomentError(
            "errors=True needs an equilibrium that moments alone determine: samples= and remeasure= carry no groups; "
            "leave errors out, or solve with joint=False"
        )
