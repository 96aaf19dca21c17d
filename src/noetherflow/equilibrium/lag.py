"""Adam's charges ahead of time, with its average of squares as a second slow variable (theory.md section 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from noetherflow.equilibrium.forecast import states_of, whole_steps
from noetherflow.equilibrium.orbit import MeasuredOrbit
from noetherflow.equilibrium.roots import EntryParts, RootTerm
from noetherflow.equilibrium.terms import EntrySlope
from noetherflow.equilibrium.velocity import ChargeSlope, Generators, OwnSlope, conjugate_gradients


@dataclass(frozen=True, eq=False)
class LaggingTerm:
    """One parameter at a point of the orbit at which `v` is `ratio` times what it was at the start."""

    term: RootTerm
    growth: Tensor
    parts: EntryParts

    @classmethod
    def of(cls, term: RootTerm, elements: Sequence[Tensor], ratio: Tensor) -> LaggingTerm:
        """The term with its weights moved by the elements and its `v` left behind."""
        growth = term.growth(elements)
        return cls(term, growth, term.entries.lagging(growth, ratio))

    def drift(self, out: Generators) -> None:
        """Add the expected change per step of this parameter's part of every charge to `out`."""
        gained = self.parts.noise - self.parts.decay
        for leg in self.term.legs:
            out[leg.symmetry] = out[leg.symmetry] + leg.exponent * leg.collect(gained)

    def charge(self, out: Generators) -> None:
        """Add this parameter's part of every charge to `out`."""
        for leg in self.term.legs:
            out[leg.symmetry] = out[leg.symmetry] + leg.exponent * leg.collect(self.parts.weight)

    def own(self, out: Generators) -> None:
        """Add `sum exponent^2 weight` of every symmetry to `out`."""
        for leg in self.term.legs:
            out[leg.symmetry] = out[leg.symmetry] + leg.exponent**2 * leg.collect(self.parts.weight)

    @property
    def slope(self) -> EntrySlope:
        """The change of the charges under generators, `v` standing still."""
        return EntrySlope(self.term.legs, 2 * self.parts.weight)


def lagging_forecast(orbit: MeasuredOrbit, steps: Sequence[int] | Tensor, square_memory: float) -> dict[str, Tensor]:
    """Preconditioned charges after numbers of steps, `[len(steps), blocks]` by symmetry.

    Two equations are integrated together: the group elements move so that every charge changes as expected at the
    present `v`, and `dv/dk = (1 - b2) (s^2 - v)`, `s^2` the second moment where the weights are by then. The charge of
    a step is that at its own `v`. What the feedback of `v` adds (`with_feedback`) is taken as if `v` had followed
    the motion along the orbit: a `v` too slow for that makes little feedback.

    Args:
        orbit: of `root_orbit`.
        steps: whole, non-negative and increasing.
        square_memory: Adam's `b2`; 0 lets `v` follow at once.

    Raises:
        ValueError: `steps` are not whole, non-negative and increasing.

    Source: theory.md section 13, "Equilibrium (eps = 0)", speed.
    """
    at = list(whole_steps(steps))
    state = LaggingState(orbit, square_memory)
    points = [state.charges(y) for y in states_of(state, at)]
    return {s.name: torch.stack([p[i] for p in points]) for i, s in enumerate(orbit.symmetries)}


@dataclass(frozen=True, eq=False)
class LaggingState:
    """The state of the two equations as one vector: logs of all elements, then for every parameter the log of `v` over
    what it was at the start, on the axes that its legs distinguish.
    """

    orbit: MeasuredOrbit
    square_memory: float

    @property
    def _terms(self) -> list[RootTerm]:
        return [term for term in self.orbit.terms if isinstance(term, RootTerm)]

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """The state at the measured point, and the scale of its numbers."""
        logs = sum(s.blocks for s in self.orbit.symmetries)
        ratios = sum(t.entries.size for t in self._terms) if self.square_memory else 0
        return np.zeros(logs + ratios), np.ones(logs + ratios)

    def unpack(self, state: np.ndarray) -> tuple[list[Tensor], list[LaggingTerm]]:
        """The elements, and every parameter with its `v`."""
        flat = torch.as_tensor(np.array(state))
        sizes = [s.blocks for s in self.orbit.symmetries]
        logs, rest = flat[: sum(sizes)], flat[sum(sizes) :]
        elements = [part.exp() for part in torch.split(logs, sizes)]
        terms = []
        for term in self._terms:
            if self.square_memory:
                ratio, rest = rest[: term.entries.size].reshape(term.entries.shape).exp(), rest[term.entries.size :]
            else:
                ratio = (1 / term.growth(elements).square()).expand(term.entries.shape)
            terms.append(LaggingTerm.of(term, elements, ratio))
        return elements, terms

    def charges(self, state: np.ndarray) -> Generators:
        """The charge of every symmetry."""
        out = self._zeros()
        for term in self.unpack(state)[1]:
            term.charge(out)
        return out

    def velocity(self, state: np.ndarray) -> np.ndarray:
        """The rate of change of the state per step."""
        elements, terms = self.unpack(state)
        added = zip(self.orbit.symmetries, self.orbit.added_drift(elements), strict=True)
        drift, own = [s.combine(tuple(legs)) for s, legs in added], self._zeros()
        for term in terms:
            term.drift(drift)
            term.own(own)
        slope = ChargeSlope(tuple(term.slope for term in terms), tuple(OwnSlope.of(k, torus=True) for k in own))
        rates = conjugate_gradients(slope, drift)
        if self.square_memory:
            tail = state[sum(s.blocks for s in self.orbit.symmetries) :]
            rates = [*rates, *self._of_ratios(terms, torch.as_tensor(np.array(tail)))]
        return torch.cat([r.reshape(-1) for r in rates]).numpy()

    def _of_ratios(self, terms: Sequence[LaggingTerm], tail: Tensor) -> Generators:
        """`d log v / dk = (1 - b2) (s^2 / v - 1)`."""
        out = []
        for term in terms:
            size, shape = term.term.entries.size, term.term.entries.shape
            log, tail = tail[:size].reshape(shape), tail[size:]
            target = (1 / term.growth.square()).expand(shape)
            out.append((1 - self.square_memory) * (target * (-log).exp() - 1))
        return out

    def _zeros(self) -> Generators:
        return [torch.zeros(s.blocks, dtype=torch.float64) for s in self.orbit.symmetries]
