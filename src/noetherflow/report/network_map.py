"""A map of the network: modules down the page, one column per symmetry, a dot where it acts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from noetherflow.core.printing import count
from noetherflow.errors import require
from noetherflow.report import style
from noetherflow.report.labels import chart_labels, without_shared_prefix
from noetherflow.symmetry.symmetry import Symmetry, Translation
from noetherflow.symmetry.symmetry_set import SymmetrySet

Marks = tuple[tuple[int, int], ...]
"""Pairs of a module's number and the sign there: 1 scaled with, -1 scaled against, 0 shifted."""
MANY = 36
"""Modules above which repeated blocks are drawn once."""


@dataclass(frozen=True)
class MapColumn:
    """One symmetry on the map: the sign at each module it acts on (0: a shift), and how often it repeats."""

    family: str
    marks: Marks
    repeats: int = 1


@dataclass(frozen=True)
class NetworkMap:
    """Modules from input to output, and the columns of dots beside them."""

    modules: tuple[str, ...]
    columns: tuple[MapColumn, ...]
    symmetries: int

    @property
    def families(self) -> tuple[str, ...]:
        """The families, each once, in the order of their columns."""
        return tuple(dict.fromkeys(c.family for c in self.columns))


def network_map(syms: SymmetrySet, collapse: bool | None = None) -> NetworkMap:
    """Where every symmetry acts.

    Args:
        syms: the symmetries; modules are ordered as the model lists its parameters.
        collapse: blocks that differ in their numbers only become one, as `h.*`; None does so above `MANY` modules.
    """
    order = list(syms.shapes) or list(syms.parameters)
    used = {p for item in syms.all_items for p in item.parameters}
    modules = _in_order(syms, list(dict.fromkeys(_module(p) for p in order if p in used)))
    if collapse or (collapse is None and len(modules) > MANY):
        return _collapsed(syms, modules)
    return _drawn(syms, modules, Counter(_marks(item, modules, str) for item in syms.all_items))


def _in_order(syms: SymmetrySet, listed: list[str]) -> list[str]:
    """The modules as listed, but every + side of a symmetry before its - side: what produces before what consumes.

    A transformer may list its norms after the layers that they feed.
    """
    before: dict[str, set[str]] = {m: set() for m in listed}
    for item in syms:
        sides = {sign: {_module(leg.parameter) for leg in item.weight_legs if leg.sign == sign} for sign in (1, -1)}
        for consumer in sides[-1] - sides[1]:
            before[consumer] |= sides[1]
    placed: list[str] = []
    waiting = list(listed)
    while waiting:
        ready = (m for m in waiting if not before[m] - set(placed))
        placed.append(chosen := next(ready, waiting[0]))
        waiting.remove(chosen)
    return placed


def _drawn(syms: SymmetrySet, modules: list[str], found: Counter[tuple[str, Marks]]) -> NetworkMap:
    """The map with one column per distinct symmetry, from those of the first layers to those of the last."""
    columns = [MapColumn(family, marks, n) for (family, marks), n in found.items()]
    columns.sort(key=lambda c: (c.marks[0][0], c.marks[-1][0]))
    return NetworkMap(tuple(without_shared_prefix(modules)), tuple(columns), len(syms.all_items))


def _marks(item: Symmetry | Translation, modules: list[str], name: Callable[[str], str]) -> tuple[str, Marks]:
    """The family, and where a symmetry acts with which sign, among modules called by `name`."""
    return item.family, tuple(sorted({(modules.index(name(m)), sign) for m, sign in _signs(item)}))


def _collapsed(syms: SymmetrySet, modules: list[str]) -> NetworkMap:
    patterns = list(dict.fromkeys(map(_pattern, modules)))
    return _drawn(syms, patterns, Counter(_marks(item, patterns, _pattern) for item in syms.all_items))


def _module(parameter: str) -> str:
    """The module of a parameter; a parameter of the model itself stands for itself."""
    return parameter.rpartition(".")[0] or parameter


def _pattern(module: str) -> str:
    """The name with every number as a star: `h.3.attn` is `h.*.attn`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def _signs(item: Symmetry | Translation) -> list[tuple[str, int]]:
    """The modules that a symmetry acts on and the sign there; 0 for a shift."""
    if isinstance(item, Symmetry):
        return [(_module(leg.parameter), leg.sign) for leg in item.weight_legs]
    return [(_module(item.leg.parameter), 0)]


def draw_map(ax: Any, chart: NetworkMap) -> None:
    """Draw the map: filled dots scale with the symmetry, open ones against it, half-filled both; bars are shifts."""
    lines: Any = require("matplotlib.lines", "report")
    colours = dict(zip(chart.families, style.CYCLE * 3, strict=False))
    for x, column in enumerate(chart.columns):
        colour, rows = colours[column.family], [row for row, _ in column.marks]
        ax.plot([x, x], [min(rows), max(rows)], color=colour, lw=1.2, alpha=0.6, zorder=1)
        for row in set(rows):
            signs = {sign for other, sign in column.marks if other == row}
            half = {"fillstyle": "left", "mfcalt": "white"} if signs == {1, -1} else {}
            shape, face = ("_" if signs == {0} else "o"), (colour if 1 in signs else "white")
            ax.plot(x, row, shape, color=colour, mfc=face, mew=1.5, ms=6.5, zorder=2, **half)
        if column.repeats > 1:
            ax.annotate(f"×{column.repeats}", (x, -0.75), ha="center", va="bottom", fontsize=7, color=style.MUTED)
    ax.set_ylim(len(chart.modules) - 0.4, -1.4 if any(c.repeats > 1 for c in chart.columns) else -0.6)
    ax.set_xlim(-0.8, max(len(chart.columns), 4) - 0.2)
    ax.set_yticks(range(len(chart.modules)), chart_labels(chart.modules), fontsize=8)
    ax.set_xticks([])
    collapsed = len(chart.columns) < chart.symmetries
    what = "a column per kind (×n: n alike)" if collapsed else "a column each"
    ax.set_xlabel(f"{count(chart.symmetries, 'symmetry', 'symmetries')}, {what}")
    ax.set_ylabel("modules, from input to output")
    ax.grid(axis="y")
    handles = [lines.Line2D([], [], color=colours[f], marker="o", lw=0, label=f) for f in chart.families]
    seen = {sign for column in chart.columns for _, sign in column.marks}
    kinds = (
        (1, "o", style.MUTED, "scaled with"),
        (-1, "o", "white", "scaled against"),
        (0, "_", style.MUTED, "shifted"),
    )
    marks = [(shape, face, text) for sign, shape, face, text in kinds if sign in seen]
    handles += [lines.Line2D([], [], color=style.MUTED, marker=m, mfc=f, lw=0, label=t) for m, f, t in marks]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.set_title("Which layers share a symmetry")
