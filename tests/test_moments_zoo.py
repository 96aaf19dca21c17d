"""Every zoo model against a per-sample autograd loop in float64, on the legs found for it and on every axis."""

from __future__ import annotations

import pytest

from noetherflow import SymmetrySet
from noetherflow.discovery import find_symmetries
from noetherflow.moments import gradient_moments
from reference import moments_by_loop, without_buffers
from test_moments_rules import TOLERANCE, every_axis
from zoo import ZOO

# Recurrent cells keep their weights inside one operator; experts see rows of several samples in an order of their own.
FALLBACK = {"lstm_head": "lstm.", "mixtral": "mlp.experts."}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("name", ZOO)
def test_zoo_model_equals_per_sample_loop(name: str) -> None:
    case = ZOO[name]().double()
    found = without_buffers(find_symmetries(case.model, case.inputs).trainable(case.model))
    syms = SymmetrySet((*found.symmetries, *every_axis(case.model).symmetries), shapes=found.shapes)
    expected = moments_by_loop(case.model, case.loss_fn, [case.batch], syms)
    unused = {n for n, squares in expected.squares.items() if not squares.any()}
    syms = SymmetrySet(tuple(s for s in syms if not unused.intersection(s.parameters)), shapes=syms.shapes)
    assert len(syms) > 0
    for entries in (False, True):
        got = gradient_moments(case.model, case.loss_fn, [case.batch], syms, entries=entries, groups=1)
        part = FALLBACK.get(name)
        assert all(part is not None and part in n for n in got.fallback)
        assert bool(got.fallback) == (part is not None)
        pairs = [(a, b) for s in syms for a, b in zip(got.second[s.name], expected.second[s.name], strict=True)]
        pairs += [(got.squares[n], expected.squares[n]) for n in syms.parameters if entries]
        rounding = 1e-20 * max(float(b.norm()) for _, b in pairs)  # key biases: zero gradient but for rounding
        for a, b in pairs:
            assert float((a - b).norm()) <= TOLERANCE * float(b.norm()) + rounding
