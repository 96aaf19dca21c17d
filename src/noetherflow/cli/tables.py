"""Rich tables of results; no maths."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from noetherflow.core.printing import Table, legend
from noetherflow.core.terminal import rich_table
from noetherflow.symmetry.symmetry_set import SymmetrySet

PIPED_WIDTH = 240


def out() -> Console:
    """The console for results (standard output); in a pipe or file lines are not cut at 80 characters."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def of_rows(console: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The title on its own line, then a table with one column per key of the rows."""
    console.print(title, style="italic", markup=False, soft_wrap=True)
    console.print(rich_table(Table.of(rows)))


def symmetries(console: Console, syms: SymmetrySet, title: str) -> None:
    """What was found, by family; then what was left out and which operators were unknown."""
    rows = syms.summary()
    if rows:
        of_rows(console, rows, f"{title}: {syms.n_charges():,} independent Noether charges")
        console.print(legend("family", "blocks", "charges"), markup=False)
    else:
        console.print(f"{title}: {syms}", markup=False)
        return
    for name, why in syms.excluded.items():
        console.print(f"excluded {name}: {why}", markup=False)
    for u in syms.unknown:
        text = f"unknown operator {u.operator} (x{u.count}) at {u.module or u.node}: its gauges are trivial"
        console.print(text, markup=False)
