"""One operator at a time: the symmetries of small models around it, against the number by hand and the oracle."""

from __future__ import annotations

import pytest

from noetherflow import SymmetrySet
from noetherflow.discovery import find_symmetries
from operator_zoo import OPERATORS


def dimension(syms: SymmetrySet) -> int:
    """`d^2` per GL(d), 1 per scale."""
    return sum(s.blocks if s.is_torus else s.blocks * s.dim**2 for s in syms)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_group_has_the_dimension_counted_by_hand(name: str) -> None:
    case = OPERATORS[name]()
    syms = find_symmetries(case.model, case.inputs)
    assert dimension(syms) == case.dimension, syms
    assert syms.unknown == ()
