"""Names and colours of what moves a charge: one for all pages, figures and the live view."""

from __future__ import annotations

CAUSE_NAMES = {
    "second_order": "step size and noise",
    "decay": "weight decay",
    "momentum": "momentum memory",
    "preconditioner": "preconditioner",
    "gradient": "gradient (0 if exact)",
    "other": "first-order part of the update",
    "outside": "moved by other hands",
}
CAUSE_COLOURS = {
    "second_order": "#009E73",
    "decay": "#D55E00",
    "momentum": "#0072B2",
    "preconditioner": "#CC79A7",
    "gradient": "#777777",
    "other": "#E69F00",
    "outside": "#8C564B",
}
ESTIMATES = (
    ("norm", "norm"),
    ("distance", "|λ*|"),
    ("steps", "steps to go"),
    ("growth", "growth/step"),
    ("angular", "angle/step"),
    ("check", "violation"),
)
"""Estimates shown by symmetry, with the heading of each."""
