"""The redundancy of a parameter with several axes: a constant on one axis against its inverse on another does nothing.

Rows of `W [out, in]` times 2 and columns divided by 2 give `W` again. So one such constant may be set to 1 without
losing a symmetry, once per parameter (once per slice of a stack of matrices or a grouped convolution). Doing so at the
first chance keeps the equations short. What is left of the redundancy is taken out at the end (`independent.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noetherflow.discovery.gauges import Array, Bundle, Field


@dataclass(frozen=True, eq=False)
class _Condition:
    """What was set to 1: the product of the constants of a parameter's axes to these powers, in these slices."""

    powers: Array
    slices: Array


class Redundancy:
    """The bundles of all parameters, and which of their constants were set to 1."""

    def __init__(self) -> None:
        self.bundles: list[Bundle] = []
        self.of_leaf: dict[str, list[Bundle]] = {}
        self._conditions: dict[str, list[_Condition]] = {}

    def add(self, bundle: Bundle) -> None:
        """Bundles come in order of their atoms."""
        self.bundles.append(bundle)
        self.of_leaf.setdefault(bundle.leaf, []).append(bundle)

    def leaf_of(self, f: Field) -> str:
        """The parameter that a field's atoms belong to, "" if they belong to none or to several axes."""
        found = self._slices(f)
        return found[0].leaf if found else ""

    def fixable(self, f: Field, rest: Sequence[int]) -> bool:
        """Whether the field's constant (one per position along `rest`) may be set to 1 without loss."""
        return self._condition([f], f, rest) is not None

    def fix(self, group: Sequence[Field], rest: Sequence[int]) -> bool:
        """Set the constants of a product of fields to 1 if one of them may be; says whether it did.

        A product `r_i c_j k_i` (`i` along `rest`) of which only the dependence on `i` counts has one constant for each
        `i`. If `c_j` is an axis of a parameter with a free constant per `i`, the constants may be taken to be 1.
        """
        spanned = {a for f in group for a in f.spans(rest)}
        for f in group:
            condition = self._condition(group, f, rest) if set(f.spans(rest)) == spanned else None
            if condition is not None:
                self._conditions.setdefault(self.leaf_of(f), []).append(condition)
                return True
        return False

    def _condition(self, group: Sequence[Field], f: Field, rest: Sequence[int]) -> _Condition | None:
        """What setting the group's constants to 1 says of the parameter of `f`, None if something would be lost.

        The constants of a parameter's axes may change as long as their product does not (the parameter stays). A
        condition loses nothing if it is neither that product nor follows from it and from earlier conditions.
        """
        found = self._slices(f)
        if found is None or (f.spans(rest) and found[0].slices == 1):
            return None
        bundle, slices = found
        siblings = [b for b in self.of_leaf[bundle.leaf] if b.slices == bundle.slices]
        powers = np.zeros(len(siblings))
        for g in group:
            other = self._slices(g)
            if other is None or other[0].leaf != bundle.leaf:
                continue
            if not np.array_equal(other[1], slices) or g.spans(rest) != f.spans(rest):
                return None
            powers[siblings.index(other[0])] += g.exponent
        if all(_independent(powers, before) for before in self._before(bundle.leaf, slices)):
            return _Condition(powers, slices)
        return None

    def _before(self, leaf: str, slices: Array) -> list[list[Array]]:
        """The earlier conditions of every slice, each list once."""
        conditions = self._conditions.get(leaf, [])
        applies = np.array([np.isin(slices, c.slices) for c in conditions], dtype=bool).reshape(
            len(conditions), slices.size
        )
        patterns = np.unique(applies.T, axis=0)
        return [[c.powers for c, on in zip(conditions, pattern, strict=True) if on] for pattern in patterns]

    def _slices(self, f: Field) -> tuple[Bundle, Array] | None:
        """The bundle that a field's atoms all belong to, and the slices of it that they touch."""
        low, high = int(f.ids.min()), int(f.ids.max())
        k = int(np.searchsorted([b.start for b in self.bundles], low, side="right")) - 1
        if k < 0 or high >= self.bundles[k].start + self.bundles[k].size or low < self.bundles[k].start:
            return None
        bundle = self.bundles[k]
        return bundle, np.unique((f.ids.reshape(-1).numpy() - bundle.start) // (bundle.size // bundle.slices))


def _independent(powers: Array, before: Sequence[Array]) -> bool:
    """Whether a condition follows neither from the fixed product of all constants nor from earlier conditions."""
    known = np.stack([np.ones_like(powers), *before])
    return bool(np.linalg.matrix_rank(np.vstack([known, powers])) > np.linalg.matrix_rank(known))
