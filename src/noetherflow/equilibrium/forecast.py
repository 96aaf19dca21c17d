"""Charges ahead of time: the exact ODE of the Noether flow along the orbit (theory.md section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.equilibrium import stabilised
from noetherflow.equilibrium.orbit import MeasuredOrbit
from noetherflow.equilibrium.terms import FactorTerm, LegTerm, SampleTerm

DENSE = 500
"""Largest state for which a dense Jacobian is kept."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """Charges by symmetry, `[len(steps), *symmetry.shape]`, with standard errors where the moments allow them."""

    steps: tuple[int, ...]
    charges: dict[str, Tensor]
    errors: dict[str, Tensor]
    joint: bool

    def rows(self) -> list[dict[str, Any]]:
        """One row per step and symmetry: the norm of the charge and of its error."""
        return [
            {
                "step": k,
                "symmetry": name,
                "charge": float(torch.linalg.vector_norm(c[i])),
                "error": float(torch.linalg.vector_norm(self.errors[name][i])) if name in self.errors else None,
            }
            for name, c in self.charges.items()
            for i, k in enumerate(self.steps)
        ]

    def __str__(self) -> str:
        how = "all symmetries together" if self.joint else "each symmetry with the others held"
        sure = "; +-: standard error of the measurement" if self.errors else ""
        lines = [
            f"charge (norm) after that many steps, {how}{sure}",
            f"{'symmetry':<40}" + self._cells(self.steps, ","),
        ]
        for name, charge in self.charges.items():
            lines.append(f"{name:<40}" + self._cells([float(c.norm()) for c in charge], ".4g"))
            if name in self.errors:
                lines.append(f"{'':<37}+- " + self._cells([float(e.norm()) for e in self.errors[name]], ".2g"))
        return "\n".join(lines)

    __repr__ = __str__

    @staticmethod
    def _cells(values: Sequence[float], form: str) -> str:
        return "".join(f"{v:>12{form}}" for v in values)

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "joint": self.joint,
            "charges": {n: c.tolist() for n, c in self.charges.items()},
            "errors": {n: c.tolist() for n, c in self.errors.items()},
        }


def orbit_forecast(orbit: MeasuredOrbit, steps: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Charges by symmetry, `[len(steps), *symmetry.shape]`: `dC/dk = E[C' - C]` integrated along the orbit.

    Raises ValueError unless `steps` are non-negative and increasing.
    """
    at = [int(k) for k in steps]
    if not at or at[0] < 0 or any(b <= a for a, b in pairwise(at)):
        raise ValueError(f"steps must be non-negative and increasing, got {at[:10]}")
    return _integrate(orbit, at)


def _integrate(orbit: MeasuredOrbit, steps: list[int]) -> dict[str, Tensor]:
    layout = _Layout(orbit)
    points = [here.at(elements) for here, elements in map(layout.unpack, _states(layout, steps))]
    return {
        s.name: torch.stack([s.combine(tuple(k for k, _ in p.pairs[i])) for p in points])
        for i, s in enumerate(orbit.symmetries)
    }


def _states(layout: _Layout, steps: list[int]) -> list[np.ndarray]:
    """By LSODA to 1e-7, whose memory is the square of the state's; beyond DENSE numbers by `stabilised` to 1e-5."""
    start, scales = layout.start()
    if steps[-1] == 0:
        return [start]
    if start.size > DENSE:
        return stabilised.integrate(layout.velocity, start, steps, 1e-5, 1e-7 * scales)
    from scipy.integrate import solve_ivp

    run = solve_ivp(
        lambda _, y: layout.velocity(y), (0, steps[-1]), start, "LSODA", t_eval=steps, rtol=1e-7, atol=1e-9 * scales
    )
    if not run.success:
        raise ArithmeticError(f"orbit ODE: {run.message}; forecast fewer steps")
    return list(run.y.T)


class _Layout:
    """The state of the ODE: logs of torus elements, square roots of the leg Grams of GL symmetries, and matrices of GL
    symmetries that need per-sample gradients.

    Roots of Grams stay bounded where a GL direction recedes and its matrix does not.
    """

    def __init__(self, orbit: MeasuredOrbit) -> None:
        self.orbit = orbit
        sampled = {i for term in orbit.terms if isinstance(term, SampleTerm | FactorTerm) for i, _ in term.symmetries}
        self.logs = [i for i, s in enumerate(orbit.symmetries) if s.is_torus]
        self.matrices = [i for i, s in enumerate(orbit.symmetries) if not s.is_torus and i in sampled]
        self.carried = [
            j
            for j, term in enumerate(orbit.terms)
            if isinstance(term, LegTerm) and not term.torus and term.symmetry not in sampled
        ]

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """The state at the measured point and the scale of each of its numbers."""
        symmetries = self.orbit.symmetries
        values = [torch.zeros(symmetries[i].shape, dtype=torch.float64) for i in self.logs]
        values += [symmetries[i].identity() for i in self.matrices]
        scales = [torch.ones_like(v) for v in values]
        for term in self._carried_terms(self.orbit):
            roots = [spd.sqrtm(term.weight), spd.sqrtm(term.noise)]
            values += roots
            scales += [torch.full_like(g, float(g.abs().max()) or 1.0) for g in roots]
        return _pack(values), _pack(scales)

    def _carried_terms(self, orbit: MeasuredOrbit) -> list[LegTerm]:
        return [t for j, t in enumerate(orbit.terms) if j in set(self.carried) and isinstance(t, LegTerm)]

    def unpack(self, state: np.ndarray) -> tuple[MeasuredOrbit, list[Tensor]]:
        """The orbit with carried Grams put in, and the elements (the identity where Grams are carried)."""
        symmetries = self.orbit.symmetries
        elements = [s.identity() for s in symmetries]
        rest = torch.as_tensor(np.array(state))
        for i in [*self.logs, *self.matrices]:
            size = elements[i].numel()
            value, rest = rest[:size].reshape(symmetries[i].shape), rest[size:]
            elements[i] = value.exp() if symmetries[i].is_torus else value
        terms = list(self.orbit.terms)
        for j, (weight, noise) in zip(self.carried, self._roots(rest), strict=True):
            term = self.orbit.terms[j]
            assert isinstance(term, LegTerm)
            terms[j] = replace(term, weight=weight @ weight.mT, noise=noise @ noise.mT)
        return replace(self.orbit, terms=tuple(terms)), elements

    def _roots(self, tail: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Factors `F` of the carried Grams `F F^T`, from the end of the state."""
        shapes = [t.weight.shape for t in self._carried_terms(self.orbit) for _ in range(2)]
        parts = [p.reshape(n) for p, n in zip(tail.split([n.numel() for n in shapes]), shapes, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def velocity(self, state: np.ndarray) -> np.ndarray:
        """The state's rate of change: `dF = +-A F` for the roots of the Grams, `dG = A G`, `dlog p = A`."""
        here, elements = self.unpack(state)
        generators = orbit_velocity(here, elements)
        rates = [generators[i] for i in self.logs] + [generators[i] @ elements[i] for i in self.matrices]
        head = sum(r.numel() for r in rates)
        for term, roots in zip(self._carried_terms(here), self._roots(torch.as_tensor(state[head:])), strict=True):
            a = term.exponent * generators[term.symmetry]
            rates += [a @ roots[0], -a @ roots[1]]
        return _pack(rates)


def orbit_velocity(orbit: MeasuredOrbit, elements: Sequence[Tensor]) -> list[Tensor]:
    """Generators `A` (symmetric for GL) with `dC[A] = E[C' - C]` for all symmetries at the point `elements`.

    The map `A -> dC[A]` is symmetric and positive semi-definite: solved by conjugate gradients, preconditioned by each
    symmetry's own slope.
    """
    point = orbit.at(elements)
    drift = [
        s.combine(tuple(m for _, m in pairs)) - orbit.potential.norm * s.combine(tuple(k for k, _ in pairs))
        for s, pairs in zip(orbit.symmetries, point.pairs, strict=True)
    ]
    own = [
        torch.stack([leg.exponent**2 * k for leg, (k, _) in zip(s.weight_legs, pairs, strict=True)]).sum(0)
        for s, pairs in zip(orbit.symmetries, point.pairs, strict=True)
    ]
    bases = [None if s.is_torus else torch.linalg.eigh(k) for s, k in zip(orbit.symmetries, own, strict=True)]

    def slope(generators: list[Tensor]) -> list[Tensor]:
        out = [torch.zeros_like(g) for g in generators]
        for term in orbit.terms:
            term.slope(elements, generators, out)
        return out

    def precondition(residual: list[Tensor]) -> list[Tensor]:
        return [
            _divide(r, 2 * k) if basis is None else _lyapunov(basis, r)
            for r, k, basis in zip(residual, own, bases, strict=True)
        ]

    return _conjugate_gradients(slope, precondition, drift)


def _lyapunov(basis: Any, right: Tensor) -> Tensor:
    """Symmetric `A` with `A K + K A = right`, `K = V diag(k) V^T`; zero where `k_i + k_j` is rounding in its block."""
    k, v = basis
    slopes = k.unsqueeze(-1) + k.unsqueeze(-2)
    return v @ _divide(v.mT @ right @ v, slopes, 1e-12 * slopes.abs().amax((-2, -1), keepdim=True)) @ v.mT


def _divide(a: Tensor, b: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """`a / b`, zero where `|b| <= rounding`."""
    small = b.abs() <= rounding
    return torch.where(small, torch.zeros_like(a), a / torch.where(small, torch.ones_like(b), b))


def _conjugate_gradients(apply: Any, precondition: Any, right: list[Tensor], tolerance: float = 1e-11) -> list[Tensor]:
    x = [torch.zeros_like(b) for b in right]
    r, z = right, precondition(right)
    p, rz = z, _dot(right, z)
    stop = tolerance**2 * rz
    for _ in range(1000):
        if rz <= stop or rz <= 0:
            break
        q = apply(p)
        step = rz / _dot(p, q)
        x = [a + step * b for a, b in zip(x, p, strict=True)]
        r = [a - step * b for a, b in zip(r, q, strict=True)]
        z = precondition(r)
        rz, last = _dot(r, z), rz
        p = [a + (rz / last) * b for a, b in zip(z, p, strict=True)]
    return x


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def _pack(values: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([v.reshape(-1) for v in values]).numpy() if values else np.zeros(0)
