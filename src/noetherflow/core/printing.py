"""Numbers and tables for people, and the one vocabulary of their columns."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

MEANING = {
    "family": "kind of symmetry, explained in docs/coverage.md",
    "blocks": "numbers, GL matrices or shifts that act independently",
    "charges": "independent Noether charges",
    "outputs changed by": "relative change under a random group element, in float64",
    "gradients off by": "the same for per-sample gradients, against what the symmetry predicts",
    "mean squared gradient": "E |g|^2 of per-sample gradients g by parameter, + and - the sides of the symmetry",
    "Hessian trace": "of the mean loss over the weights of a parameter, + and - the sides of the symmetry",
    "noise scale": "tr(noise covariance) / |mean gradient|^2 in samples; at least, at most: 95 % interval",
    "charge": "norm of C = squared weights on the + side minus the - side",
    "preconditioned charge": "norm of the charge with each weight over its step size: Adam's (s + eps) theta^2",
    "drift per step: noise": "by gradients, 'from squares' (v) if uncorrelated, 'from momentum' (m) in any case",
    "persistence": "'from momentum' over 'from squares': above 1 a mean gradient carries, below 1 epochs take back",
    "drift per step": "expected change of C by decay, noise and the step along the mean gradient, summed over its "
    "coordinates with their signs; norm: of the sum, coordinate by coordinate",
    "equilibrium charge": "where the drift is 0",
    "imbalance": "largest relative Noether flow, 0 at equilibrium, at most 1",
    "relaxation (steps)": "until a small deviation is down to 37 %, median",
    "finite, one-sided, degenerate": "settles, norm grows for ever, parts do not settle",
    "largest factor": "by which the move stretches or shrinks weights",
    "–": "no equilibrium",
}
"""What each column says. One quantity has one name, in every table of the library."""
WIDTH = 110
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def legend(*names: str) -> str:
    """`name: meaning; ...` of the columns of a table."""
    return "; ".join(f"{name}: {MEANING[name]}" for name in names)


@dataclass(frozen=True)
class Table:
    """A table ready to be drawn: named columns of finished cells. `text` and `html` draw it; the terminal's coloured
    drawing is `core.terminal.rich_table`.

    Attributes:
        names: the heading of every column.
        numeric: whether a column holds numbers; these stand to the right, text to the left.
        rows: the cells of every row, as `show` writes them.

    Example:
        >>> print(Table.of([{"family": "rescaling", "charge": 1234.5}, {"family": "gated", "charge": None}]).text())
        family     charge
        rescaling   1,234
        gated           –
    """

    names: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], written: Callable[[Any], str] | None = None) -> Table:
        """The table of rows given as `{column: value}`; a row without some column shows a dash there.

        Args:
            rows: one mapping a row.
            written: how a value is written; `show` by default.
        """
        write = written or show
        names = tuple(dict.fromkeys(name for row in rows for name in row))
        numeric = tuple(not any(isinstance(row.get(name), str) for row in rows) for name in names)
        return cls(names, numeric, tuple(tuple(write(row.get(name)) for name in names) for row in rows))

    def text(self) -> str:
        """Aligned columns, two spaces apart, one line a row."""
        columns = list(zip(self.names, *self.rows, strict=True))
        padded = [
            [cell.rjust(width) if number else cell.ljust(width) for cell in column]
            for column, number in zip(columns, self.numeric, strict=True)
            for width in [max(map(len, column))]
        ]
        return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))

    def html(self) -> str:
        """A `<table>` element; cells of numbers have the class `number`."""
        classes = [' class="number"' if number else "" for number in self.numeric]

        def line(tag: str, cells: Sequence[str]) -> str:
            return "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

        body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in self.rows)
        return f"<table>\n<thead><tr>{line('th', self.names)}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def table(rows: Sequence[Mapping[str, Any]], *explained: str) -> str:
    """The rows as an aligned text table, and below it, indented, what the columns `explained` mean.

    Args:
        rows: one mapping `{column: value}` a row.
        explained: names out of `MEANING`; without any there is no legend.

    Returns:
        Several lines of text; the last ones are the legend, broken at `WIDTH` characters.
    """
    return "\n".join([*Table.of(rows).text().splitlines(), *legend_lines(*explained)])


def legend_lines(*names: str) -> list[str]:
    """The legend of the columns `names` as indented lines of at most `WIDTH` characters; none for no names."""
    return textwrap.wrap(legend(*names), WIDTH, initial_indent="  ", subsequent_indent="  ")


def grouped(what: str, reasons: Mapping[str, str], verbose: bool = False) -> list[str]:
    """One line per reason for which things were left out, with the names of the first three.

    Reasons that differ only in names and numbers (words with a dot or a digit) count as one.

    Args:
        what: the word at the start of each line, as "excluded".
        reasons: by the name of each thing, why it was left out.
        verbose: one line per thing instead.

    Example:
        >>> print(*grouped("excluded", {f"{i} -> out": f"frozen parameter {i}.weight" for i in range(5)}), sep="\\n")
        excluded: 5 (0 -> out, 1 -> out, 2 -> out and 2 more): frozen parameter …
    """
    alike: dict[str, list[str]] = {}
    for name, why in reasons.items():
        alike.setdefault(re.sub(r"\S*[.\d]\S*\w", "…", why), []).append(name)
    lines = []
    for why, names in alike.items():
        if verbose or len(names) == 1:
            lines += [f"{what}: {name}: {reasons[name]}" for name in names]
            continue
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        lines.append(f"{what}: {len(names):,} ({', '.join(names[:3])}{more}): {why}")
    return lines


def assumed(sentences: Sequence[str], verbose: bool = False) -> list[str]:
    """What numbers rest on: one line with the first words of each sentence; `verbose`: every sentence in a line.

    Example:
        >>> print(*assumed(["gradients stay as they are: near a minimum", "v is slow (1,000 steps)"]), sep="\\n")
        assumed: gradients stay as they are; v is slow (in full: describe(verbose=True))
    """
    if verbose or not sentences:
        return [f"assumed: {text}" for text in sentences]
    first = "; ".join(re.split(r"[:;(]|, ", text, maxsplit=1)[0].strip() for text in sentences)
    return [f"assumed: {first} (in full: describe(verbose=True))"]


def transposed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per key and one column per row, headed by each row's first value."""
    first, *names = rows[0] if rows else ("",)
    return [{first: name, **{r[first]: r[name] for r in rows}} for name in names]


def count(number: int, one: str, many: str) -> str:
    """`1 symmetry`, `2 symmetries`."""
    return f"{number:,} {one if number == 1 else many}"


def brief(value: Any) -> str:
    """A number for a page: three significant digits, powers of ten as such; anything else as `show`.

    Example:
        >>> brief(0.0000221), brief(1234.5), brief(0.98765), brief("exact")
        ('2.21 × 10⁻⁵', '1,230', '0.988', 'exact')
    """
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return show(value)
    size = abs(value)
    if 1e-3 <= size < 1e6:
        rounded = float(f"{value:.3g}")
        return f"{rounded:,.0f}" if size >= 100 else f"{rounded:g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g} × 10{str(int(exponent)).translate(RAISED)}"


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
