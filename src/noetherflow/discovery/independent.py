"""Coordinates that move the parameters like a combination of others: each motion is reported once.

Scaling one axis of a parameter by a constant is the same as scaling another axis by it. So different coordinates can be
one motion: the output and the input axis of a depthwise kernel, or, in `(A B) * (C D)`, all rows of the product against
all its columns, which the two inner scales `A B` and `C D` give already.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from noetherflow.discovery.coordinates import Coordinates
from noetherflow.discovery.gauges import Array, Bundle
from noetherflow.discovery.linear_system import Roots, solve_system


def repeated(coordinates: Coordinates, bundles: list[Bundle], candidates: Array, others: Array) -> Array:
    """Which candidates to leave out so that what is left is independent.

    Args:
        coordinates: what each coordinate moves.
        bundles: the atoms of all parameter axes.
        candidates: coordinates that may be left out, the first ones rather.
        others: coordinates that stay, but count.

    Returns:
        The candidates that are combinations of later ones, of others and of nothing at all.
    """
    unknowns = np.r_[candidates, others]
    rows = sp.csr_array(sp.hstack([_moves(coordinates, bundles, unknowns), _nothing(bundles)]))
    rows = sp.csr_array(sp.hstack([sp.csr_array((rows.shape[0], 1)), rows]))
    count = rows.shape[1]
    # Unknown 0 is the zero of the system. Earlier candidates are expressed by later ones: they stay free to the last.
    late = (count - np.arange(count)) * 10**9
    free = solve_system(Roots.apart(count), rows, late).free - 1
    return candidates[free[free < candidates.size]]


def _moves(coordinates: Coordinates, bundles: list[Bundle], chosen: Array) -> sp.csr_array:
    """`[atoms, chosen]`: by which power each coordinate scales each row of a parameter."""
    place = np.full(coordinates.count, -1, dtype=np.int64)
    place[chosen] = np.arange(chosen.size)
    column = place[coordinates.owner]
    inside = column >= 0
    data = (coordinates.power[inside], (coordinates.atom[inside], column[inside]))
    return sp.coo_array(data, shape=(_size(bundles), chosen.size)).tocsr()


def _nothing(bundles: list[Bundle]) -> sp.csr_array:
    """`[atoms, motions]`: motions that act as nothing, a constant on one axis (of one slice) against another axis."""
    row, column, value, count = [], [], [], 0
    first: dict[str, Bundle] = {}
    for bundle in bundles:
        base = first.setdefault(bundle.leaf, bundle)
        if base is bundle or base.slices != bundle.slices:
            continue
        for owner, sign in ((base, 1.0), (bundle, -1.0)):
            slices = np.arange(owner.size) // (owner.size // owner.slices)
            row.append(owner.start + np.arange(owner.size))
            column.append(count + slices)
            value.append(np.full(owner.size, sign))
        count += bundle.slices
    if not row:
        return sp.csr_array((_size(bundles), 0))
    data = (np.concatenate(value), (np.concatenate(row), np.concatenate(column)))
    return sp.coo_array(data, shape=(_size(bundles), count)).tocsr()


def _size(bundles: list[Bundle]) -> int:
    return max((b.start + b.size for b in bundles), default=0)
