"""Parts of an orbit solved by themselves, steps that have to be shortened, and weights whose gradients are factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow.equilibrium.blocks import classify_torus
from noetherflow.equilibrium.orbit import FramedOrbit, MeasuredOrbit, blank_pairs
from noetherflow.equilibrium.parts import independent, minimise_in_parts
from noetherflow.equilibrium.potential import Potential
from noetherflow.equilibrium.sample_terms import FactorTerm, SampleTerm
from noetherflow.equilibrium.search import Minimum
from noetherflow.equilibrium.solve import StepLimits, drives, minimise
from noetherflow.equilibrium.terms import EntryTerm
from noetherflow.moments import Factors
from noetherflow.symmetry.overlap import leg_coordinates, stiffness

POTENTIAL = Potential(norm=0.3, second=1.0, mean=0.5)


def torus(name: str, *places: tuple[str, int, int], size: int = 2) -> nf.Symmetry:
    """A diagonal symmetry of `size` coordinates on `(parameter, axis, sign)`."""
    legs = tuple(nf.Leg(n, np.arange(size).reshape(size, 1, 1), sign, (axis,)) for n, axis, sign in places)
    return nf.Symmetry(name, "rescaling", "diagonal", legs)


def entry_orbit(symmetries: Sequence[nf.Symmetry], shapes: dict[str, tuple[int, ...]]) -> MeasuredOrbit:
    """An orbit of parameters with random squares of weights and of gradients."""
    rng = torch.Generator().manual_seed(1)
    terms = [
        EntryTerm(legs, *(torch.rand(legs[0].view, dtype=torch.float64, generator=rng) + 0.01 for _ in range(2)))
        for legs in leg_coordinates(symmetries, shapes).values()
    ]
    return MeasuredOrbit(tuple(symmetries), Potential(1.0, 1.0, 0.0), tuple(terms))


def limits_of(symmetries: Sequence[nf.Symmetry], shapes: dict[str, tuple[int, ...]]) -> StepLimits:
    alone = tuple(stiffness(leg_coordinates([s], shapes), [s])[0] for s in symmetries)
    return StepLimits(alone, tuple(stiffness(leg_coordinates(symmetries, shapes), symmetries)))


def classes_of(orbit: MeasuredOrbit) -> list:
    pairs = orbit.at([s.identity() for s in orbit.symmetries]).pairs
    return [classify_torus(*drives(s, p, orbit.potential)) for s, p in zip(orbit.symmetries, pairs, strict=True)]


def phi(orbit: MeasuredOrbit, minimum: Minimum) -> float:
    return 0.5 * (orbit.potential.norm * minimum.point.norm + minimum.point.trace)


def test_parts_share_no_term_and_reach_the_minimum_of_the_whole() -> None:
    symmetries = [
        torus("a", ("u", 0, 1), ("v", 0, -1)),
        torus("far", ("x", 0, 1), ("y", 0, -1)),
        torus("b", ("v", 1, 1), ("w", 0, -1)),
        torus("far too", ("y", 1, 1), ("z", 1, -1)),
        torus("lone", ("t", 0, 1), ("s", 1, -1)),
    ]
    shapes = dict.fromkeys("uvwxyzts", (2, 2))
    orbit, limits = entry_orbit(symmetries, shapes), limits_of(symmetries, shapes)
    assert independent(orbit) == [(0, 2), (1, 3), (4,)]
    frame = tuple(s.identity() for s in symmetries)
    classes = classes_of(orbit)
    apart = minimise_in_parts(FramedOrbit(orbit, frame), classes, limits)
    whole = minimise(orbit, classes, limits)
    assert apart.converged
    assert whole.converged
    for a, b in zip(apart.logs, whole.logs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert phi(orbit, apart) == pytest.approx(phi(orbit, whole), rel=1e-12)
    assert phi(orbit, apart) < 0.5 * (orbit.at(frame).norm + orbit.at(frame).trace)
    assert [len(p) for p in apart.point.pairs] == [2] * 5


def test_a_symmetry_across_makes_two_parts_one() -> None:
    apart = [torus("a", ("u", 0, 1), ("v", 0, -1)), torus("b", ("x", 0, 1), ("y", 0, -1))]
    shapes = dict.fromkeys("uvxy", (2, 2))
    assert independent(entry_orbit(apart, shapes)) == [(0,), (1,)]
    across = torus("c", ("v", 1, 1), ("x", 1, -1))
    assert independent(entry_orbit([*apart, across], shapes)) == [(0, 1, 2)]


def test_steps_that_raise_phi_are_taken_back_and_shortened() -> None:
    """Four symmetries on all entries of one parameter: each by itself would set them right, all at once overshoot
    threefold and diverge.
    """
    symmetries = [torus(f"axis {a}", ("w", a, 1)) for a in range(4)]
    shapes = {"w": (2, 2, 2, 2)}
    orbit, limits = entry_orbit(symmetries, shapes), limits_of(symmetries, shapes)
    orbit.terms[0].noise.mul_(1e4)
    assert [float(k.max()) for k in limits.together] == [4.0] * 4
    classes = classes_of(orbit)
    before = orbit.at([s.identity() for s in symmetries])
    after = orbit.at([s.exp(a) for s, a in zip(symmetries, _step(orbit, limits.alone), strict=True)])
    assert after.norm + after.trace > 10 * (before.norm + before.trace)
    shorter = orbit.at([s.exp(a) for s, a in zip(symmetries, _step(orbit, limits.together), strict=True)])
    assert shorter.norm + shorter.trace < before.norm + before.trace
    found = minimise(orbit, classes, limits)
    assert found.converged
    logs = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    best = torch.optim.LBFGS(
        [logs], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def value() -> Tensor:
        best.zero_grad()
        growth = torch.exp(sum(logs[a].reshape([2 if k == a else 1 for k in range(4)]) for a in range(4)))
        out = 0.5 * (orbit.terms[0].weight * growth**2 + orbit.terms[0].noise / growth**2).sum()
        out.backward()
        return out

    best.step(value)
    assert phi(orbit, found) == pytest.approx(float(value().detach()), rel=1e-10)


def _step(orbit: MeasuredOrbit, kappa: Sequence[Tensor]) -> list[Tensor]:
    pairs = orbit.at([s.identity() for s in orbit.symmetries]).pairs
    xy = [drives(s, p, orbit.potential) for s, p in zip(orbit.symmetries, pairs, strict=True)]
    return [(y / x).log() / (4 * k) for (x, y), k in zip(xy, kappa, strict=True)]


HEADS = np.array([[[7, 1], [5, 2], [3, 0]], [[8, 11], [6, 10], [4, 9]]])
"""Two blocks of three coordinates with two replicas each, in no order."""
GAINS = np.array([[[4]], [[0]], [[2]]])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_as_factors_are_those_of_every_sample(axis: int, replicas: int) -> None:
    """Symmetries of scattered rows and replicas along both axes, at an element far from the identity."""
    heads = HEADS if replicas == 2 else np.arange(6).reshape(2, 3, 1)
    rows, columns = (13, 5) if axis == 0 else (5, 13)
    gl = nf.Symmetry("heads", "attention-qk", "general_linear", (nf.Leg("w", heads, -1, (axis,)),))
    gains = nf.Symmetry("gains", "norm-gain", "diagonal", (nf.Leg("w", GAINS, 1, (1 - axis,)),))
    rng = torch.Generator().manual_seed(2)
    factors = Factors(*(torch.randn(4, 3, d, generator=rng) for d in (rows, columns)))
    theta = torch.randn(rows, columns, generator=rng)
    symmetries = ((0, gl), (1, gains))
    elements = [s.random_element(0.7, rng) for _, s in symmetries]
    mean = factors.dense().mean(0)
    term = FactorTerm("w", symmetries, theta, mean, POTENTIAL, factors)
    dense = SampleTerm("w", symmetries, theta.double(), mean.double(), POTENTIAL, factors.to(torch.float64).dense())
    expected = blank_pairs([gl, gains])
    traces = dense.add(elements, expected)
    for found_by in (term, term.unpacked()):
        out = blank_pairs([gl, gains])
        assert found_by.add(elements, out) == pytest.approx(traces, rel=1e-6)
        for own, wanted in zip(out, expected, strict=True):
            for a, b in zip(own[0], wanted[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert term.theta is theta
    assert not torch.allclose(dense.theta, term.unpacked()._moved(theta, elements))
