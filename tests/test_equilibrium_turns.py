"""Joint solves in turns: half of the symmetries in closed form while the other half is searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow.equilibrium.alternate import HalvedOrbit, Halves, alternating, halves_of, minimise_in_turns
from noetherflow.equilibrium.orbit import FramedOrbit, MeasuredOrbit, blank_pairs, sizes_now
from noetherflow.equilibrium.parts import minimise_in_parts
from noetherflow.equilibrium.potential import Potential
from noetherflow.equilibrium.sample_terms import FactorTerm, SampleTerm
from noetherflow.equilibrium.solve import Classes, StepLimits, classify, drives, minimise, worst_of
from noetherflow.equilibrium.terms import EntryTerm, LegTerm, OrbitTerm
from noetherflow.errors import MomentError
from noetherflow.moments import Factors
from noetherflow.symmetry.overlap import leg_coordinates, stiffness

POTENTIAL = Potential(norm=0.3, second=1.0, mean=0.5)
ROWS, COLUMNS = 5, 18
SHAPES = {"w": (ROWS, COLUMNS), "gain": (ROWS,), "out": (2, 6)}


def leg(parameter: str, rows: Sequence[int], sign: int, axis: int, dim: int = 1, power: float = 1.0) -> nf.Leg:
    return nf.Leg(parameter, np.array(rows).reshape(-1, dim, 1), sign, (axis,), power=power)


def attention() -> tuple[nf.Symmetry, ...]:
    """The gains of a norm on the rows of a query-key-value weight; two heads of three on its columns."""
    return (
        nf.Symmetry(
            "qk", "attention-qk", "general_linear", (leg("w", range(6), 1, 1, 3), leg("w", range(6, 12), -1, 1, 3))
        ),
        nf.Symmetry("gain", "norm-gain", "diagonal", (leg("w", range(ROWS), 1, 0), leg("gain", range(ROWS), -1, 0))),
        nf.Symmetry(
            "vo", "attention-vo", "general_linear", (leg("w", range(12, 18), 1, 1, 3), leg("out", range(6), -1, 1, 3))
        ),
    )


def factor_term(symmetries: Sequence[nf.Symmetry], rng: torch.Generator, spread: float = 1.0) -> FactorTerm:
    """`w` with gradients of four samples of five tokens, rows and columns of unequal size."""
    factors = Factors(*(torch.randn(4, 5, d, generator=rng).double() for d in (ROWS, COLUMNS)))
    scale = torch.randn(COLUMNS, generator=rng).mul(spread).exp().double()
    theta = torch.randn(ROWS, COLUMNS, generator=rng).double() * scale
    return FactorTerm("w", tuple(enumerate(symmetries)), theta, factors.dense().mean(0), POTENTIAL, factors)


def attention_orbit() -> MeasuredOrbit:
    """Its orbit: `w` by factors, the other two parameters by Grams."""
    symmetries, rng = attention(), torch.Generator().manual_seed(3)
    terms: list[OrbitTerm] = [factor_term(symmetries, rng)]
    for i, position in ((1, 1), (2, 1)):
        s = symmetries[i]
        at = s.weight_legs[position]
        k, m = (s.leg_gram(at, torch.randn(SHAPES[at.parameter], generator=rng), torch.float64) for _ in range(2))
        if not s.is_torus:
            k, m = k + torch.eye(3), m + torch.eye(3)
        terms.append(LegTerm(i, position, at.exponent, s.is_torus, k, m))
    return MeasuredOrbit(symmetries, POTENTIAL, tuple(terms))


def torus(name: str, *legs: nf.Leg) -> nf.Symmetry:
    return nf.Symmetry(name, "rescaling", "diagonal", legs)


def chain(length: int) -> tuple[tuple[nf.Symmetry, ...], dict[str, tuple[int, ...]]]:
    """Hidden layers of three units: each weight is moved by the units before and after it."""
    own = tuple(torus(f"h{i}", leg(f"w{i}", range(3), 1, 0), leg(f"w{i + 1}", range(3), -1, 1)) for i in range(length))
    return own, {f"w{i}": (3, 3) for i in range(length + 1)}


def entry_orbit(symmetries: Sequence[nf.Symmetry], shapes: dict[str, tuple[int, ...]]) -> MeasuredOrbit:
    """An orbit of parameters with random squares of weights and of gradients, very unequal ones."""
    rng = torch.Generator().manual_seed(1)
    terms = [
        EntryTerm(legs, *(torch.randn(legs[0].view, generator=rng).double().mul(2).exp() for _ in range(2)))
        for legs in leg_coordinates(symmetries, shapes).values()
    ]
    return MeasuredOrbit(tuple(symmetries), Potential(1.0, 1.0, 0.0), tuple(terms))


def limits_of(symmetries: Sequence[nf.Symmetry], shapes: dict[str, tuple[int, ...]]) -> StepLimits:
    alone = tuple(stiffness(leg_coordinates([s], shapes), [s])[0] for s in symmetries)
    return StepLimits(alone, tuple(stiffness(leg_coordinates(symmetries, shapes), symmetries)))


def classes_of(orbit: MeasuredOrbit) -> list[Classes]:
    pairs = orbit.at([s.identity() for s in orbit.symmetries]).pairs
    return [classify(s, *drives(s, p, orbit.potential), 1e-12) for s, p in zip(orbit.symmetries, pairs, strict=True)]


def halves(orbit: MeasuredOrbit, alone: Sequence[Tensor]) -> Halves | None:
    return halves_of(orbit.symmetries, range(len(orbit.symmetries)), alternating(orbit.terms), alone)


def stretches(orbit: MeasuredOrbit, logs: Sequence[Tensor]) -> list[Tensor]:
    """`G^T G`, which the minimum determines."""
    return [
        (2 * a).exp() if s.is_torus else torch.matrix_exp(2 * a) for s, a in zip(orbit.symmetries, logs, strict=True)
    ]


def cases() -> list[tuple[str, MeasuredOrbit, StepLimits, Halves]]:
    symmetries, shapes = chain(5)
    return [
        ("attention", attention_orbit(), limits_of(attention(), SHAPES), Halves((1,), (0, 2))),
        ("chain", entry_orbit(symmetries, shapes), limits_of(symmetries, shapes), Halves((1, 3), (0, 2, 4))),
    ]


@pytest.mark.parametrize(("orbit", "limits", "expected"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_in_turns_is_the_minimum_of_all_at_once(orbit: MeasuredOrbit, limits: StepLimits, expected: Halves) -> None:
    found = halves(orbit, limits.alone)
    assert found == expected
    frame, classes = tuple(s.identity() for s in orbit.symmetries), classes_of(orbit)
    halved = HalvedOrbit(orbit, found, alternating(orbit.terms), frame, tuple(classes), limits.alone)
    turns, at_once = minimise_in_turns(halved), minimise(orbit, classes, limits)
    assert turns.converged
    assert at_once.converged
    assert turns.evaluations < at_once.evaluations
    for a, b in zip(stretches(orbit, turns.logs), stretches(orbit, at_once.logs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    there = orbit.at([s.exp(a) for s, a in zip(orbit.symmetries, turns.logs, strict=True)])
    assert turns.point.norm == pytest.approx(there.norm, rel=1e-12)
    assert turns.point.trace == pytest.approx(there.trace, rel=1e-12)
    for own, wanted in zip(turns.point.pairs, there.pairs, strict=True):
        for a, b in zip([t for pair in own for t in pair], [t for pair in wanted for t in pair], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_entries_alone_are_solved_at_once_and_factors_in_turns() -> None:
    """A sweep in turns over entries costs twice one of all at once, and saves less than half of the sweeps."""
    for name, orbit, limits, _ in cases():
        classes = classes_of(orbit)
        found = minimise_in_parts(FramedOrbit(orbit, tuple(s.identity() for s in orbit.symmetries)), classes, limits)
        at_once = minimise(orbit, classes, limits)
        assert (found.evaluations == at_once.evaluations) == (name == "chain")


def test_no_point_near_the_minimum_has_a_smaller_phi() -> None:
    """The minimum by itself, without the other solver: Phi rises along random directions from it."""
    orbit, limits = attention_orbit(), limits_of(attention(), SHAPES)
    found = minimise_in_parts(
        FramedOrbit(orbit, tuple(s.identity() for s in orbit.symmetries)), classes_of(orbit), limits
    )
    rng = torch.Generator().manual_seed(5)

    def phi(logs: Sequence[Tensor]) -> float:
        point = orbit.at([s.exp(a) for s, a in zip(orbit.symmetries, logs, strict=True)])
        return 0.5 * (POTENTIAL.norm * point.norm + point.trace)

    for _ in range(20):
        move = [1e-3 * torch.randn(a.shape, generator=rng).double() for a in found.logs]
        move = [m if m.ndim == 1 else (m + m.mT) / 2 for m in move]
        assert phi([a + m for a, m in zip(found.logs, move, strict=True)]) > phi(found.logs)


def test_a_start_elsewhere_leads_to_the_same_minimum_and_none_allowed_stays() -> None:
    orbit, limits = attention_orbit(), limits_of(attention(), SHAPES)
    framed, classes = FramedOrbit(orbit, tuple(s.identity() for s in orbit.symmetries)), classes_of(orbit)
    best = minimise_in_parts(framed, classes, limits)
    rng = torch.Generator().manual_seed(6)
    start = [0.3 * torch.randn(a.shape, generator=rng).double() for a in best.logs]
    start = [m if m.ndim == 1 else (m + m.mT) / 2 for m in start]
    again = minimise_in_parts(framed, classes, limits, start=start)
    warm = minimise_in_parts(framed, classes, limits, start=best.logs, tolerance=1e-6)
    stays = minimise_in_parts(framed, classes, limits, start=start, max_iterations=0)
    assert (warm.evaluations, stays.evaluations) == (1, 1)
    assert all(bool((a == b).all()) for a, b in zip(stays.logs, start, strict=True))
    for a, b in zip(stretches(orbit, best.logs), stretches(orbit, again.logs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_symmetries_that_do_not_fall_into_two_halves() -> None:
    triangle = (
        torus("a", leg("u", range(2), 1, 0), leg("x", range(2), -1, 1)),
        torus("b", leg("u", range(2), -1, 1), leg("v", range(2), 1, 0)),
        torus("c", leg("v", range(2), -1, 1), leg("x", range(2), 1, 0)),
    )
    shapes = dict.fromkeys("uvx", (2, 2))
    assert halves(entry_orbit(triangle, shapes), limits_of(triangle, shapes).alone) is None
    assert halves(entry_orbit(triangle[:2], shapes), limits_of(triangle[:2], shapes).alone) == Halves((0,), (1,))
    itself = torus("self", leg("u", range(2), 1, 0), leg("u", range(2), 1, 1))
    other = torus("other", leg("u", range(2), -1, 0))
    both = (itself, other)
    assert halves(entry_orbit(both, shapes), limits_of(both, shapes).alone) is None
    uneven = (torus("a", leg("u", range(2), 1, 0), leg("x", range(2), -1, 0, power=2.0)), triangle[1])
    assert halves(entry_orbit(uneven, shapes), limits_of(uneven, shapes).alone) is None
    lone = triangle[:1]
    assert halves(entry_orbit(lone, shapes), limits_of(lone, shapes).alone) is None


def test_per_sample_gradients_and_legs_on_common_columns_are_solved_at_once() -> None:
    orbit, limits = attention_orbit(), limits_of(attention(), SHAPES)
    term = orbit.terms[0]
    assert isinstance(term, FactorTerm)
    dense = SampleTerm("w", term.symmetries, term.theta, term.mean, POTENTIAL, term.factors.dense())
    assert halves(replace(orbit, terms=(dense, *orbit.terms[1:])), limits.alone) is None
    channels = torus("columns", leg("w", range(3), 1, 1), leg("gain", range(3), -1, 0))
    symmetries = (*attention(), channels)
    crossed = factor_term(symmetries, torch.Generator().manual_seed(3))
    assert {frozenset({0}), frozenset({3})} <= crossed.meetings
    alone = limits_of(symmetries, SHAPES).alone
    assert halves(MeasuredOrbit(symmetries, POTENTIAL, (crossed,)), alone) is None


@pytest.mark.parametrize("standing", [frozenset({0, 2}), frozenset({1})])
def test_a_part_with_symmetries_that_stand_has_the_grams_of_the_whole(standing: frozenset[int]) -> None:
    orbit, rng = attention_orbit(), torch.Generator().manual_seed(4)
    elements = [s.random_element(0.5, rng) for s in orbit.symmetries]
    again = [s.random_element(0.5, rng) for s in orbit.symmetries]
    again = [elements[i] if i in standing else e for i, e in enumerate(again)]
    for term in alternating(orbit.terms):
        kept = term.holding(elements, standing)
        for place in (elements, again):
            expected, found = blank_pairs(orbit.symmetries), blank_pairs(orbit.symmetries)
            sizes = term.add(place, expected)
            assert kept.free(place, found) == pytest.approx(sizes, rel=1e-12)
            kept.held(place, found)
            for own, wanted in zip(found, expected, strict=True):
                for a, b in zip(own, wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_noise_and_sizes_now_are_those_at_the_identity() -> None:
    orbit = attention_orbit()
    here = [s.identity() for s in orbit.symmetries]
    point = orbit.at(here)
    assert sizes_now(orbit) == pytest.approx((point.norm, point.trace), rel=1e-12)
    assert sizes_now(FramedOrbit(orbit, tuple(here))) == pytest.approx((point.norm, point.trace), rel=1e-12)
    term = orbit.terms[0]
    assert isinstance(term, FactorTerm)
    dense = SampleTerm("w", term.symmetries, term.theta, term.mean, POTENTIAL, term.factors.dense())
    for found in (term.noise_now(), dense.noise_now()):
        assert set(found) == {(0, 0), (0, 1), (1, 0), (2, 0)}
        for (i, j), noise in found.items():
            torch.testing.assert_close(noise, point.pairs[i][j][1], rtol=1e-11, atol=1e-11)


def test_a_drive_below_zero_in_either_half_is_refused_by_name() -> None:
    """`h0` is solved in closed form, `h1` searched; a huge noise keeps `h0`'s own drive positive in the second case."""
    symmetries, shapes = chain(3)
    for place, noise, name in ((0, 0.0, "h0"), (1, 1e9, "h1")):
        orbit = entry_orbit(symmetries, shapes)
        classes, limits = classes_of(orbit), limits_of(symmetries, shapes)
        first, wrong = orbit.terms[0], orbit.terms[place]
        assert isinstance(first, EntryTerm)
        assert isinstance(wrong, EntryTerm)
        first.noise.add_(noise)
        wrong.weight[0].sub_(1e8)
        with pytest.raises(MomentError, match=f"{name}.*measure more samples"):
            minimise_in_parts(FramedOrbit(orbit, tuple(s.identity() for s in symmetries)), classes, limits)


@pytest.mark.parametrize(("orbit", "limits", "expected"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])
@pytest.mark.parametrize("sweeps", [0, 1, 2])
def test_what_is_told_of_an_unfinished_solve_is_true_where_it_stopped(
    orbit: MeasuredOrbit, limits: StepLimits, expected: Halves, sweeps: int
) -> None:
    """Leg Grams, sizes and the largest imbalance, against the whole orbit at the logs that were reached."""
    classes = classes_of(orbit)
    frame = tuple(s.identity() for s in orbit.symmetries)
    halved = HalvedOrbit(orbit, expected, alternating(orbit.terms), frame, tuple(classes), limits.alone)
    stopped = minimise_in_turns(halved, max_iterations=sweeps)
    assert not stopped.converged
    there = orbit.at([s.exp(a) for s, a in zip(orbit.symmetries, stopped.logs, strict=True)])
    assert stopped.imbalance > 1e-6
    assert stopped.imbalance == pytest.approx(worst_of(orbit.symmetries, classes, there, orbit.potential), rel=1e-6)
    assert stopped.point.norm == pytest.approx(there.norm, rel=1e-9)
    assert stopped.point.trace == pytest.approx(there.trace, rel=1e-9)
