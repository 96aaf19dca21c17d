"""Rich tables of results; no maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from noetherflow.symmetry_set import SymmetrySet


def out() -> Console:
    """The console for results (standard output)."""
    return Console(highlight=False)


def of_rows(console: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A table with one column per key of the first row."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name, value in rows[0].items() if rows else ():
        table.add_column(name.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(cell(v) for v in row.values()))
    console.print(table)


def transposed(console: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A table with one row per key and one column per row, headed by each row's first value."""
    if not rows:
        return
    names = list(rows[0])
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column(names[0])
    for row in rows:
        table.add_column(cell(row[names[0]]), justify="right")
    for name in names[1:]:
        table.add_row(name, *(cell(row[name]) for row in rows))
    console.print(table)


def cell(value: Any) -> str:
    """A value as a person reads it: 4 significant digits, thousands separated, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value)


def symmetries(console: Console, syms: SymmetrySet, title: str) -> None:
    """What was found, by family; then what was left out and which operators were unknown."""
    rows = syms.summary()
    if rows:
        of_rows(console, rows, f"{title}: {syms.n_charges():,} independent Noether charges")
    else:
        console.print(f"{title}: no continuous symmetry found")
    for name, why in syms.excluded.items():
        console.print(f"excluded {name}: {why}", markup=False)
    for u in syms.unknown:
        console.print(f"unknown operator {u.operator} (x{u.count}) at {u.module or u.node}: its gauges are trivial")
