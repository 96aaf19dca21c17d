"""Charges ahead of time: the exact ODE of the Noether flow along the orbit (theory.md section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from noetherflow.core import spd
from noetherflow.core.printing import count, show
from noetherflow.core.shown import Shown
from noetherflow.equilibrium import stabilised
from noetherflow.equilibrium.charge_flow import norm_of
from noetherflow.equilibrium.comparison import Comparison, Recorded, SignedSum, added, compared, recorded_rows
from noetherflow.equilibrium.orbit import MeasuredOrbit
from noetherflow.equilibrium.regime import Regime, few_samples
from noetherflow.equilibrium.sample_terms import FactorTerm, SampleTerm
from noetherflow.equilibrium.terms import LegTerm
from noetherflow.equilibrium.velocity import orbit_velocity
from noetherflow.errors import DataError
from noetherflow.moments.statistics import t_quantile

DENSE = 500
"""Largest state for which a dense Jacobian is kept."""
EVALUATIONS = 20_000
"""Most evaluations of the flow for one forecast of a small state; a few hundred are usual. Large ones: `stabilised`."""


@dataclass(frozen=True, eq=False)
class Forecast(Shown):
    """Charges ahead of time.

    Attributes:
        steps: Numbers of steps after the measurement.
        charges: By symmetry, `[len(steps), *symmetry.shape]`.
        errors: Their standard errors, where the moments allow them.
        joint: All symmetries move together; else each with the others held.
        regime: The share of the mean gradient in the drift, and how many steps it lasts: forecasts beyond are not
            valid.
        samples: Samples (or minibatches) measured.
        groups: Groups of samples that the errors come from; their t distribution has one degree of freedom less.
        families: The family of each symmetry, by name.
        asked: The last step asked for, where the flow changes so fast that the forecast ended before; else 0.
        preconditioned: The charges are those of an adaptive optimiser, each squared weight times the root mean square
            of its gradient.
    """

    steps: tuple[int, ...]
    charges: dict[str, Tensor]
    errors: dict[str, Tensor]
    joint: bool
    regime: Regime
    samples: int = 0
    groups: int = 0
    families: Mapping[str, str] = field(default_factory=dict)
    asked: int = 0
    preconditioned: bool = False

    @property
    def valid(self) -> tuple[bool, ...]:
        """For every step, whether the measured gradients last that long, and as long as momentum takes them to."""
        return tuple(k == 0 or (k <= self.regime.horizon and self.regime.constant) for k in self.steps)

    def interval(self, name: str, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the interval of one symmetry's charges that holds the truth with probability `level`.

        By Student's t of the groups of samples: at 16 groups 2.13 standard errors on each side for 95 %, not 1.96.
        Sampling of the data only: what changes during training is not in it.

        Raises:
            KeyError: No symmetry of that name has errors.
        """
        half = t_quantile(level, self.groups) * self.errors[name]
        return self.charges[name] - half, self.charges[name] + half

    def rows(self) -> list[dict[str, Any]]:
        """One row per step and symmetry: the norm of the charge and of its error, and whether the step is `valid`."""
        return [
            {
                "step": k,
                "symmetry": name,
                "charge": norm_of(c[i]),
                "error": norm_of(self.errors[name][i]) if name in self.errors else None,
                "valid": valid,
            }
            for name, c in self.charges.items()
            for i, (k, valid) in enumerate(zip(self.steps, self.valid, strict=True))
        ]

    def compare(self, ledger: Recorded, *, start: int | None = None) -> Comparison:
        """These charges beside those of a training that was watched; `print` and `plot()` show both.

        Args:
            ledger: The `nf.Ledger` of the training. With `detail="symmetry"` (or finer) symmetries are compared one by
                one, else their sums by family.
            start: The step of the ledger before which the moments were measured; its first recorded one by default.

        Returns:
            Forecast and measured charges at every step of the forecast that the ledger recorded; the others are listed
            (`Comparison.left_out`).

        Raises:
            DataError: The ledger has recorded none of these steps, or rows that are needed are neither in its memory
                nor in a log, or the forecast is of preconditioned charges and the ledger keeps none.
        """
        by = "family" if ledger.detail == "family" else "symmetry"
        rows = recorded_rows(ledger, by, max(start or 0, 0), self.preconditioned)
        found = compared(by, self._signed_sums(by), rows, start)
        doubtful = {k for k, valid in zip(self.steps, self.valid, strict=True) if not valid}
        steps = tuple(sorted(doubtful & {c.step for c in found.charges}))
        return replace(found, not_valid=steps, why=self._why_not_valid() if steps else ())

    def _signed_sums(self, by: str) -> list[SignedSum]:
        """The sum of the charge's coordinates (for general_linear the trace) by symmetry or family at each step."""
        sums: dict[str, list[SignedSum]] = {}
        for name, charge in self.charges.items():
            error = self.errors.get(name)
            for i, k in enumerate(self.steps):
                spread = float("nan") if error is None else float(_diagonal(error[i]).norm())
                key = name if by == "symmetry" else self.families.get(name, "")
                sums.setdefault(key, []).append(SignedSum(key, k, float(_diagonal(charge[i]).sum()), spread))
        return [total for own in sums.values() for total in added(own)]

    def table_rows(self) -> list[dict[str, Any]]:
        """`rows()`."""
        return self.rows()

    def _sentence(self) -> str:
        """What is forecast, and where most happens."""
        what = f"forecast of {count(len(self.charges), 'charge', 'charges')} over {self.steps[-1]:,} steps"
        if not self.charges:
            return what
        norms = {n: (norm_of(c[0]), norm_of(c[-1])) for n, c in self.charges.items()}
        name = max(norms, key=lambda n: abs(norms[n][1] - norms[n][0]))
        return f"{what}; most happens to {name}: {show(norms[name][0])} -> {show(norms[name][1])}"

    def describe(self, *, verbose: bool = False, legend: bool = True) -> str:
        """A sentence and the norms of the charges after so many steps; see `Shown.describe`."""
        how = "all symmetries together" if self.joint else "each symmetry with the others held"
        sure = "; +-: standard error of the measurement" if self.errors else ""
        heads = [f"{k:,}" + ("" if valid else "*") for k, valid in zip(self.steps, self.valid, strict=True)]
        lines = [
            self._sentence(),
            f"charge (norm) after that many steps, {how}{sure}",
            f"{'symmetry':<40}" + "".join(f"{head:>12}" for head in heads),
        ]
        for name, charge in self.charges.items():
            lines.append(f"{name:<40}" + self._cells([norm_of(c) for c in charge], ".4g"))
            if name in self.errors:
                lines.append(f"{'':<37}+- " + self._cells([norm_of(e) for e in self.errors[name]], ".2g"))
        return "\n".join([*lines, *self.regime.lines(verbose), *self._cautions()])

    def _why_not_valid(self) -> tuple[str, ...]:
        """Why the mean gradient does not last as long as the forecast takes it to."""
        return tuple(self.regime.cautions or [self.regime.advice])

    def _cautions(self) -> list[str]:
        out = [] if all(self.valid) else [f"* not valid: {text}" for text in self._why_not_valid()]
        if self.asked:
            out.append(
                f"STOPPED at step {self.steps[-1]:,} of {self.asked:,}: the flow changes too fast to be followed "
                "further in reasonable time; forecast fewer steps, or measure again further on"
            )
        return out + (few_samples(self.samples) if self.errors else [])

    @staticmethod
    def _cells(values: Sequence[float], form: str) -> str:
        return "".join(f"{v:>12{form}}" for v in values)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples' own numbers, ready for JSON."""
        return {
            "steps": list(self.steps),
            "valid": list(self.valid),
            "asked": self.asked or self.steps[-1],
            "joint": self.joint,
            "regime": self.regime.to_dict(),
            "charges": {n: c.tolist() for n, c in self.charges.items()},
            "errors": {n: c.tolist() for n, c in self.errors.items()},
        }


def _diagonal(values: Tensor) -> Tensor:
    """The coordinates that a signed sum adds up: all of a torus, the diagonals of general_linear matrices."""
    return values.diagonal(dim1=-2, dim2=-1).flatten() if values.ndim == 3 else values


def whole_steps(steps: Sequence[int] | Tensor) -> tuple[int, ...]:
    """The steps as integers.

    Raises:
        DataError: They are not a sequence of whole, non-negative, increasing numbers. (It is a ValueError.)
    """
    try:
        at = [float(k) for k in steps]
    except (TypeError, ValueError) as cause:
        raise DataError(f"steps must be a sequence of whole numbers, forecast([0, 100]), got {steps!r:.80}") from cause
    if not at or at[0] < 0 or any(b <= a for a, b in pairwise(at)) or not all(k.is_integer() for k in at):
        raise DataError(f"steps must be whole, non-negative and increasing, got {at[:10]}")
    return tuple(int(k) for k in at)


class TooFast(Exception):
    """A forecast without one group of samples did not reach the last step."""


def all_reached(charges: dict[str, Tensor], steps: Sequence[int]) -> dict[str, Tensor]:
    """The charges of a forecast that reached every step. Raises TooFast for one that ended before."""
    if any(len(c) < len(steps) for c in charges.values()):
        raise TooFast
    return charges


def orbit_forecast(orbit: MeasuredOrbit, steps: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Charges by symmetry, `[reached, *symmetry.shape]`: `dC/dk = E[C' - C]` integrated along the orbit.

    Returns:
        The charges at the first `reached` of the steps: all of them, unless the flow changes too fast (`states_of`).

    Raises:
        DataError: `steps` are not whole, non-negative and increasing, or not even the first was reached.
    """
    return _integrate(orbit, list(whole_steps(steps)))


def _integrate(orbit: MeasuredOrbit, steps: list[int]) -> dict[str, Tensor]:
    flow = _OrbitState(orbit)
    points = [here.at(elements) for here, elements in map(flow.unpack, states_of(flow, steps))]
    return {
        s.name: torch.stack([s.combine(tuple(k for k, _ in p.pairs[i])) for p in points])
        for i, s in enumerate(orbit.symmetries)
    }


class SlowState(Protocol):
    """A state vector with its rate of change per step."""

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """The state at the measured point and the scale of each of its numbers."""

    def velocity(self, state: np.ndarray) -> np.ndarray:
        """The rate of change."""


def states_of(flow: SlowState, steps: list[int]) -> list[np.ndarray]:
    """The states after the given steps: by LSODA to 1e-7, whose memory is the square of the state's; beyond DENSE
    numbers by `stabilised` to 1e-5.

    Returns:
        The states after the first of the steps, as far as the evaluations allowed reach; all of them as a rule.

    Raises:
        DataError: not even the first step was reached, or the equation cannot be solved.
    """
    start, scales = flow.start()
    if steps[-1] == 0:
        return [start]
    try:
        if start.size > DENSE:
            return stabilised.integrate(flow.velocity, start, steps, 1e-5, 1e-7 * scales)
        return _by_lsoda(flow, start, scales, steps)
    except stabilised.Unfinished as cause:
        if cause.found:
            return cause.found
        raise DataError(f"{cause} (not one of the steps {steps[:3]} was reached)") from cause
    except ArithmeticError as cause:
        raise DataError(str(cause)) from cause


def _by_lsoda(flow: SlowState, start: np.ndarray, scales: np.ndarray, steps: list[int]) -> list[np.ndarray]:
    """The states by LSODA. Raises ArithmeticError where it fails, Unfinished after EVALUATIONS evaluations."""
    from scipy.integrate import LSODA

    solver = LSODA(lambda _, y: flow.velocity(y), 0, start, steps[-1], rtol=1e-7, atol=1e-9 * scales)
    found = [start] if steps[0] == 0 else []
    while solver.status == "running":
        message = solver.step()
        if solver.status == "failed" or not np.isfinite(solver.y).all():
            raise stabilised.Unfinished(f"orbit ODE: {message or 'not a finite number'}; forecast fewer steps", found)
        between = solver.dense_output()
        found += [between(k) for k in steps[len(found) :] if k <= solver.t]
        if solver.nfev > EVALUATIONS and len(found) < len(steps):
            raise stabilised.Unfinished(f"orbit ODE: not done after {EVALUATIONS:,} evaluations", found)
    return found


class _OrbitState:
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
        parts = [p.reshape(n) for p, n in zip(torch.split(tail, [n.numel() for n in shapes]), shapes, strict=True)]
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


def _pack(values: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([v.reshape(-1) for v in values]).numpy() if values else np.zeros(0)
