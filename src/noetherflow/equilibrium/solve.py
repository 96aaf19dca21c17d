"""Minimise the convex Phi over all symmetries at once: simultaneous closed-form steps, Anderson-accelerated.

Every sweep takes, for every symmetry from the same point, the closed-form step of theory.md section 5. It needs one
evaluation of the leg Grams and no order or colouring of the symmetries (`alternate.py` uses one where there is one);
Anderson acceleration then gives the speed of a quasi-Newton method. Steps are first those of each symmetry alone; once
one of them has raised Phi they are shortened by the stiffness of all together (`overlap.stiffness`), and such a sweep
never raises Phi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.equilibrium.blocks import GLClasses, TorusClasses, classify_gl, classify_torus
from noetherflow.equilibrium.orbit import Orbit, Point
from noetherflow.equilibrium.potential import Potential
from noetherflow.equilibrium.search import Minimum, Visit, flat, search, unflat
from noetherflow.errors import MomentError
from noetherflow.symmetry.symmetry import Symmetry

Classes = TorusClasses | GLClasses


def drives(symmetry: Symmetry, pairs: Sequence[tuple[Tensor, Tensor]], potential: Potential) -> tuple[Tensor, Tensor]:
    """`X = 1/2 (norm K_plus + M_minus)`, `Y = 1/2 (norm K_minus + M_plus)`, every leg counted `|exponent|` times."""
    x, y = torch.zeros(symmetry.shape, dtype=torch.float64), torch.zeros(symmetry.shape, dtype=torch.float64)
    for leg, (k, m) in zip(symmetry.weight_legs, pairs, strict=True):
        c = abs(leg.exponent) / 2
        shrinking, growing = (potential.norm * k, m) if leg.exponent > 0 else (m, potential.norm * k)
        x, y = x + c * shrinking, y + c * growing
    return (x, y) if symmetry.is_torus else (spd.symmetric(x), spd.symmetric(y))


def classify(symmetry: Symmetry, x: Tensor, y: Tensor, tolerance: float) -> Classes:
    return classify_torus(x, y) if symmetry.is_torus else classify_gl(x, y, tolerance)


def imbalance(symmetry: Symmetry, classes: Classes, x: Tensor, y: Tensor) -> Tensor:
    """Relative Noether flow `|Y - X| / (|X| + |Y|)` over the finite coordinates (torus) or blocks (GL), else 0:
    `[blocks]`. NaN where a drive is.
    """
    if symmetry.is_torus:
        flow, scale = (y - x).abs(), x.abs() + y.abs()
        return torch.where(classes.finite & (scale != 0), flow / scale, torch.zeros_like(flow))
    q = classes.finite
    x, y = q @ x @ q, q @ y @ q
    scale = torch.linalg.matrix_norm(x) + torch.linalg.matrix_norm(y)
    flow = torch.linalg.matrix_norm(y - x)
    return torch.where(scale != 0, flow / scale, torch.zeros_like(flow))


@dataclass(frozen=True, eq=False)
class StepLimits:
    """By what closed-form steps are divided, per symmetry and block, `[blocks]`.

    Attributes:
        alone: exact where a symmetry moves by itself.
        together: no step of all symmetries at once raises Phi. Example: two symmetries of exponent 1 on the same
            entries have `alone` 1 and `together` 2.
    """

    alone: tuple[Tensor, ...]
    together: tuple[Tensor, ...]

    def of(self, members: Sequence[int]) -> StepLimits:
        """The limits of some of the symmetries."""
        return StepLimits(tuple(self.alone[i] for i in members), tuple(self.together[i] for i in members))


def elements_of(symmetries: Sequence[Symmetry], logs: Sequence[Tensor]) -> list[Tensor]:
    """`G = exp(log)`, vectors for tori and symmetric positive matrices for GL."""
    return [s.exp(a) for s, a in zip(symmetries, logs, strict=True)]


def logs_of(symmetries: Sequence[Symmetry], elements: Sequence[Tensor]) -> list[Tensor]:
    """`1/2 log(G^T G)`, the same for `G` and any rotation of it; `elements_of` backwards."""
    return [e.log() if s.is_torus else _log_of_stretch(e) for s, e in zip(symmetries, elements, strict=True)]


def _log_of_stretch(element: Tensor) -> Tensor:
    _, w, v = torch.linalg.svd(element)
    log: Tensor = (v.mT * w.log().unsqueeze(-2)) @ v
    return log


def minimise(
    orbit: Orbit,
    classes: Sequence[Classes],
    limits: StepLimits,
    *,
    start: Sequence[Tensor] | None = None,
    tolerance: float = 1e-11,
    max_iterations: int = 500,
    memory: int = 10,
) -> Minimum:
    """The joint minimiser of Phi over the finite coordinates, from `start` (logs; default the identity).

    Stops when the relative Noether flow of every symmetry is below `tolerance`, or when it no longer falls.
    """
    logs = [torch.zeros(s.shape, dtype=torch.float64) for s in orbit.symmetries] if start is None else list(start)
    sweeps = _AtOnce(orbit, tuple(classes), limits, limits.alone)
    return search(sweeps, flat(logs), tolerance, max_iterations, memory)


@dataclass(frozen=True, eq=False)
class _AtOnce:
    """One closed-form step of every symmetry, all from the same point, divided by `kappa`."""

    orbit: Orbit
    classes: tuple[Classes, ...]
    limits: StepLimits
    kappa: tuple[Tensor, ...]

    @property
    def safe(self) -> bool:
        return self.kappa is self.limits.together

    def shortened(self) -> _AtOnce:
        return replace(self, kappa=self.limits.together)

    def visit(self, at: Tensor, last: Visit | None) -> Visit:
        orbit = self.orbit
        logs = unflat(at, orbit.symmetries)
        point = orbit.at(elements_of(orbit.symmetries, logs))
        worst = worst_of(orbit.symmetries, self.classes, point, orbit.potential)
        return Visit(logs, point, merit_of(orbit.potential, point), worst)

    def image(self, visit: Visit) -> Tensor:
        """Raises MomentError for a symmetry whose drives are not positive on its finite coordinates."""
        new, elements = [], elements_of(self.orbit.symmetries, visit.logs)
        for s, c, k, g, pairs in zip(
            self.orbit.symmetries, self.classes, self.kappa, elements, visit.point.pairs, strict=True
        ):
            new.append(step_of(s, c, k, g, drives(s, pairs, self.orbit.potential)))
            refuse_unfinished(s, new[-1])
        return flat(new)


def merit_of(potential: Potential, point: Point) -> float:
    """Phi up to a constant, NaN where it is not known."""
    if point.trace is None:
        return float("nan")
    return 0.5 * (potential.norm * point.norm + point.trace)


def worst_of(symmetries: Sequence[Symmetry], classes: Sequence[Classes], point: Point, potential: Potential) -> float:
    """The largest imbalance, infinite where it is not a number."""
    worst = 0.0
    for s, c, pairs in zip(symmetries, classes, point.pairs, strict=True):
        flow = imbalance(s, c, *drives(s, pairs, potential)).max()
        worst = max(worst, float(flow.nan_to_num(nan=torch.inf)))
    return worst


def step_of(symmetry: Symmetry, classes: Classes, kappa: Tensor, element: Tensor, xy: tuple[Tensor, Tensor]) -> Tensor:
    """The log of the element after one closed-form step from `element` under the drives `xy`, divided by `kappa`; not
    finite where the drives are not positive on the finite coordinates.
    """
    if isinstance(classes, TorusClasses):
        return element.log() + _torus_step(classes, *xy) / (4 * kappa)
    return _gl_log(classes, *xy, kappa, element)


def refuse_unfinished(symmetry: Symmetry, log: Tensor) -> None:
    """Raises MomentError for a step that is not finite."""
    if not bool(torch.isfinite(log).all()):
        raise MomentError(
            f"symmetry {symmetry.name!r}: an estimated second moment is not positive or not finite on the way to the "
            f"equilibrium; {_remedy(symmetry)}"
        )


def _remedy(symmetry: Symmetry) -> str:
    """What to do about drives that are not positive; for general_linear, stretched factors are the usual cause."""
    more = "measure more samples (for curvature_moments, more probes)"
    if symmetry.is_torus:
        return more
    return (
        "its factors may be ill-conditioned: orthogonalise them, nf.balance_(model, nf.noise_equilibrium(model, "
        "syms, None, "
        f"objective='norm'), example_inputs=...), and measure there, or pass remeasure=; else {more}"
    )


def _torus_step(classes: TorusClasses, x: Tensor, y: Tensor) -> Tensor:
    """`log(y / x)` on finite coordinates, 0 elsewhere; not finite unless both are positive."""
    ratio = torch.where(x > 0, y / x, torch.full_like(x, torch.nan))
    return torch.where(classes.finite, ratio.log(), torch.zeros_like(x))


def _gl_log(classes: GLClasses, x: Tensor, y: Tensor, kappa: Tensor, element: Tensor) -> Tensor:
    """`1/2 log(G^T P^(1/kappa) G)`, `P` the closed form; NaN unless `X` and `Y` are positive on the finite part."""
    try:
        shortened = spd.spectral(finite_gl_step(classes, x, y), partial(torch.pow, exponent=1 / kappa[:, None]))
        return spd.logm(element.mT @ shortened @ element) / 2
    except torch.linalg.LinAlgError:
        return torch.full_like(x, torch.nan)


def finite_gl_step(classes: GLClasses, x: Tensor, y: Tensor) -> Tensor:
    """`P` of the closed form inside the finite subspace, the identity outside: `[blocks, n, n]`."""
    q = classes.finite
    outside = torch.eye(q.shape[-1], dtype=q.dtype) - q
    rank = GLClasses.rank(q).clamp_min(1)[:, None, None]

    def padded(a: Tensor) -> Tensor:
        inner = q @ a @ q
        level = inner.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] / rank
        return inner + torch.where(level > 0, level, torch.ones_like(level)) * outside

    p = spd.geometric_mean(padded(x), padded(y))
    return spd.symmetric(q @ p @ q + outside)
