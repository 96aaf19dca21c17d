"""Numbers and tables for people, and the one vocabulary of their columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

MEANING = {
    "family": "kind of symmetry, explained in docs/coverage.md",
    "blocks": "numbers, GL matrices or shifts that act independently",
    "charges": "independent Noether charges",
    "outputs changed by": "relative change under a random group element, in float64",
    "gradients off by": "the same for per-sample gradients, against what the symmetry predicts",
    "mean squared gradient": "E |g|^2 of per-sample gradients g by parameter, + and - the sides of the symmetry",
    "Hessian trace": "of the mean loss over the weights of a parameter, + and - the sides of the symmetry",
    "charge": "norm of C = squared weights on the + side minus the - side",
    "drift per step": "expected change of C by decay, gradient noise and the step along the mean gradient",
    "equilibrium charge": "where the drift is 0",
    "imbalance": "largest relative Noether flow, 0 at equilibrium, at most 1",
    "relaxation (steps)": "until a small deviation is down to 37 %, median",
    "finite, one-sided, degenerate": "settles, norm grows for ever, parts do not settle",
    "largest factor": "by which the move stretches or shrinks weights",
    "–": "no equilibrium",
}
"""What each column says. One quantity has one name, in every table of the library."""
WIDTH = 110


def legend(*names: str) -> str:
    """`name: meaning; ...` of the columns of a table."""
    return "; ".join(f"{name}: {MEANING[name]}" for name in names)


def table(rows: Sequence[Mapping[str, Any]], *explained: str) -> str:
    """Aligned columns, one per key of the first row, text to the left and numbers to the right; below, the `legend` of
    the columns `explained`, indented and broken at `WIDTH`.
    """
    names = list(rows[0]) if rows else []
    columns = [[name, *(show(row.get(name)) for row in rows)] for name in names]
    text = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    padded = [
        [cell.ljust(width) if left else cell.rjust(width) for cell in column]
        for column, left in zip(columns, text, strict=True)
        for width in [max(map(len, column))]
    ]
    lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    return "\n".join([*lines, textwrap.fill(legend(*explained), WIDTH, initial_indent="  ", subsequent_indent="  ")])


def transposed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per key and one column per row, headed by each row's first value."""
    first, *names = rows[0] if rows else ("",)
    return [{first: name, **{r[first]: r[name] for r in rows}} for name in names]


def count(number: int, one: str, many: str) -> str:
    """`1 symmetry`, `2 symmetries`."""
    return f"{number:,} {one if number == 1 else many}"


def show(value: Any) -> str:
    """A number for people: four significant digits, thousands separated; anything else as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or not math.isfinite(value):
            return f"{value:g}"
        if 1000 <= abs(value) < 1e7:
            return f"{value:,.0f}"
        return f"{value:.4g}" if 1e-3 <= abs(value) < 1000 else f"{value:.3e}"
    return str(value)
