"""The loop of all joint solves: a map whose fixed point is the minimum of Phi, Anderson-accelerated and safeguarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from noetherflow.core.progress import watched
from noetherflow.equilibrium.orbit import Point
from noetherflow.symmetry.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where the solver stopped: logs of the group elements, the last point and how it got there."""

    logs: list[Tensor]
    point: Point
    imbalance: float
    iterations: int
    evaluations: int
    converged: bool


@dataclass(frozen=True, eq=False)
class Visit:
    """What was found at one point on the way.

    Attributes:
        logs: Logs of the elements of all symmetries there.
        point: The leg Grams there.
        merit: Phi up to a constant, NaN where it is not known.
        worst: The largest imbalance, infinite where it is not a number.
    """

    logs: list[Tensor]
    point: Point
    merit: float
    worst: float


V = TypeVar("V", bound=Visit)


class Sweeps(Protocol[V]):
    """A map of logs, as one vector, whose fixed point is the minimum."""

    @property
    def safe(self) -> bool:
        """Whether the map never raises Phi."""

    def visit(self, at: Tensor, last: V | None) -> V:
        """Evaluate at these logs; `last`: the visit before."""

    def image(self, visit: V) -> Tensor:
        """Where the map sends the point of a visit. Raises MomentError where it has no image."""

    def shortened(self) -> Sweeps[V]:
        """A map with the same fixed point that is safe."""


def search(sweeps: Sweeps[V], at: Tensor, tolerance: float, max_iterations: int, memory: int = 10) -> Minimum:
    """The fixed point of `sweeps`, from the logs `at`.

    A proposal that raises Phi is taken back, and the safe map is used from then on. Ends when the imbalance is below
    `tolerance`, or when it no longer falls.
    """
    history = Anderson(memory)
    best: Minimum | None = None
    last: V | None = None
    retreat: V | None = None
    stalled = evaluations = 0
    merit = float("inf")
    for iteration in watched(range(max_iterations + 1), "noise equilibrium, sweeps:", max_iterations):
        visit = sweeps.visit(at, last)
        evaluations += 1
        worst = visit.worst
        better = visit.merit <= merit + 1e-9 * abs(merit) or worst < 0.9 * _of(best)
        if retreat is not None and not better:
            sweeps = sweeps.shortened()
            at, last, retreat = sweeps.image(retreat), retreat, None
            history = Anderson(memory)
            continue
        if best is None or worst < best.imbalance:
            stalled = 0 if best is None or worst < 0.9 * best.imbalance else stalled + 1
            best = Minimum(visit.logs, visit.point, worst, iteration, evaluations, worst <= tolerance)
        else:
            stalled += 1
        if worst <= tolerance or stalled > 3 * memory:
            break
        merit = min(merit, visit.merit) if visit.merit == visit.merit else merit
        plain = sweeps.image(visit)
        proposal = history.propose(at, plain)
        retreat = None if proposal is plain and sweeps.safe else visit
        at, last = proposal, visit
    assert best is not None
    return Minimum(best.logs, best.point, best.imbalance, iteration, evaluations, best.imbalance <= tolerance)


def _of(best: Minimum | None) -> float:
    return float("inf") if best is None else best.imbalance


class Anderson:
    """Type-II Anderson mixing of a fixed-point map, on flat vectors; keeps `memory - 1` differences of each kind."""

    def __init__(self, memory: int) -> None:
        self.differences = memory - 1
        self.last: tuple[Tensor, Tensor] | None = None
        self.steps: list[Tensor] = []
        self.moves: list[Tensor] = []

    def propose(self, point: Tensor, image: Tensor) -> Tensor:
        """The next point given that the map sends `point` to `image`; `image` itself while there is no history."""
        residual = image - point
        if self.last is not None:
            self.steps = [*self.steps, residual - self.last[0]][-self.differences :]
            self.moves = [*self.moves, image - self.last[1]][-self.differences :]
        self.last = (residual, image)
        if not self.steps:
            return image
        columns = torch.stack(self.steps, dim=1)
        mixing = torch.linalg.lstsq(columns, residual[:, None], rcond=1e-12, driver="gelsd").solution
        proposal = image.clone()
        for weight, move in zip(mixing.flatten().tolist(), self.moves, strict=True):
            proposal.sub_(move, alpha=weight)
        return proposal if bool(torch.isfinite(proposal).all()) else image


def flat(logs: Sequence[Tensor]) -> Tensor:
    return torch.cat([a.reshape(-1) for a in logs]) if logs else torch.zeros(0, dtype=torch.float64)


def unflat(flat: Tensor, symmetries: Sequence[Symmetry]) -> list[Tensor]:
    sizes = [int(torch.Size(s.shape).numel()) for s in symmetries]
    return [part.reshape(s.shape) for part, s in zip(torch.split(flat, sizes), symmetries, strict=True)]
