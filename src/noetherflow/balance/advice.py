"""What speaks against balancing a checkpoint, in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import median
from typing import Any

from noetherflow.balance.model import BalanceReport
from noetherflow.core.printing import count
from noetherflow.equilibrium.result import Equilibrium

BALANCED = 0.05
"""Relative Noether flow below which a model is as good as balanced."""
LISTED = 20
"""So many moved tensors are listed one by one; more are put together by layer."""


def against(eq: Equilibrium, report: BalanceReport) -> list[str]:
    """Reasons not to balance, a sentence each; the last one always holds.

    Args:
        eq: where to.
        report: what moved, or would.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        >>> syms = nf.find_symmetries(model, torch.randn(2, 3, dtype=torch.float64))
        >>> eq = nf.noise_equilibrium(model, syms, None, objective="norm")
        >>> report = nf.balance_(model, eq)
        >>> against(nf.noise_equilibrium(model, syms, None, objective="norm"), report)[0]
        'it is balanced already: the largest relative Noether flow is ...'
    """
    lines = []
    if not report.moved:
        lines.append("nothing moves: every symmetry is where it is asked to be, or has no equilibrium")
    elif eq.imbalance_now < BALANCED:
        lines.append(f"it is balanced already: the largest relative Noether flow is {eq.imbalance_now:.1e}")
    elif max(report.moved.values()) < 4 * report.rounding:
        lines.append(f"the move is no larger than the rounding of the stored dtype ({report.rounding:.1e})")
    degenerate = [s for s in eq if s.classification != "finite"]
    if degenerate:
        what = count(len(degenerate), "symmetry has", "symmetries have")
        lines.append(
            f"{what} no finite equilibrium in some or all coordinates (dead units, unused directions, a norm that "
            "nothing holds): those stay as they are"
        )
    if any("optimiser state" in line for line in report.unmoved):
        lines.append("optimiser state is left behind, of the weights as they were: training would not go on from it")
    lines.append(
        "the function stays, so accuracy does not change now; later training seldom gains from it by itself. It helps "
        "where scales matter: quantisation, merging, LoRA factors, learning rates near the edge"
    )
    return lines


def by_layer(moved: Mapping[str, float]) -> list[dict[str, Any]]:
    """The sizes of a move: one row per tensor, or where there are many one per name with its numbers left out.

    Args:
        moved: relative change in norm by tensor.

    Example:
        >>> by_layer({f"layers.{i}.weight": 0.1 * i for i in range(1, 30)})
        [{'tensor': 'layers.*.weight', 'tensors': 29, 'median_change': 1.5, 'largest_change': 2.9000000000000004}]
    """
    if len(moved) <= LISTED:
        return [{"tensor": n, "relative_change": c} for n, c in moved.items()]
    groups: dict[str, list[float]] = {}
    for name, change in moved.items():
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(change)
    return [
        {"tensor": n, "tensors": len(c), "median_change": median(c), "largest_change": max(c)}
        for n, c in groups.items()
    ]
