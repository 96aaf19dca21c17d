"""The redundancy of a parameter with several axes: a constant on one axis against its inverse on another does nothing.

Rows of `W [out, in]` times 2 and columns divided by 2 give `W` again. So one such constant may be set to 1 without
losing a symmetry, once per parameter (once per slice of a stack of matrices or a grouped convolution). Doing so at the
first chance keeps the equations short. What is left of the redundancy is taken out at the end (`independent.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from noetherflow.discovery.gauges import Array, Bundle, Field


class Redundancy:
    """The bundles of all parameters, and of which the constant is still free to be set to 1."""

    def __init__(self) -> None:
        self.bundles: list[Bundle] = []
        self.of_leaf: dict[str, list[Bundle]] = {}

    def add(self, bundle: Bundle) -> None:
        """Bundles come in order of their atoms."""
        self.bundles.append(bundle)
        self.of_leaf.setdefault(bundle.leaf, []).append(bundle)

    def leaf_of(self, f: Field) -> str:
        """The parameter that a field's atoms belong to, "" if they belong to none or to several axes."""
        found = self._slices(f)
        return found[0].leaf if found else ""

    def fixable(self, f: Field, rest: Sequence[int]) -> bool:
        """Whether the field's constant (one per position along `rest`) may be set to 1 without loss.

        True if no constant of its slices was set before, and another axis of the parameter is still free to take it.
        """
        found = self._slices(f)
        if found is None:
            return False
        bundle, slices = found
        siblings = [b for b in self.of_leaf[bundle.leaf] if b.slices == bundle.slices]
        free = sum(~b.fixed[slices] for b in siblings)
        return bool((~bundle.fixed[slices]).all() and (free >= 2).all() and (not f.spans(rest) or bundle.slices > 1))

    def fix(self, group: Sequence[Field], rest: Sequence[int]) -> bool:
        """Set the constants of a product of fields to 1 if one of them may be; says whether it did.

        A product `r_i c_j k_i` (`i` along `rest`) of which only the dependence on `i` counts has one constant for each
        `i`. If `c_j` is an axis of a parameter with a free constant per `i`, the constants may be taken to be 1.
        """
        spanned = {a for f in group for a in f.spans(rest)}
        for f in group:
            if set(f.spans(rest)) == spanned and self.fixable(f, rest):
                found = self._slices(f)
                assert found is not None
                found[0].fixed[found[1]] = True
                return True
        return False

    def _slices(self, f: Field) -> tuple[Bundle, Array] | None:
        """The bundle that a field's atoms all belong to, and the slices of it that they touch."""
        low, high = int(f.ids.min()), int(f.ids.max())
        k = int(np.searchsorted([b.start for b in self.bundles], low, side="right")) - 1
        if k < 0 or high >= self.bundles[k].start + self.bundles[k].size or low < self.bundles[k].start:
            return None
        bundle = self.bundles[k]
        return bundle, np.unique((f.ids.reshape(-1).numpy() - bundle.start) // (bundle.size // bundle.slices))
