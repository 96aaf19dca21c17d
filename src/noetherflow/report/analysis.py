"""The page of one analysis: what was found, what flows, where it settles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from noetherflow.analysis import Analysis
from noetherflow.core.optimizers import described
from noetherflow.core.printing import brief, count, legend, transposed
from noetherflow.discovery import CertificateRow
from noetherflow.equilibrium.flow import EXPLAINED
from noetherflow.report import curves, drawings
from noetherflow.report.figures import panel, picture
from noetherflow.report.labels import more_legs
from noetherflow.report.page import Figure, Section, write_page
from noetherflow.report.verdicts import headline, verdicts

MOST = 24
"""Symmetries drawn in one picture; the tables have all."""
PICTURES = {
    "norms": "drifts",
    "decay": "drifts",
    "balance": "imbalance",
    "batch": "drifts",
    "optimiser": "forecast",
}
"""Which figure shows what a finding of a topic says."""


def write_analysis(path: str | os.PathLike[str], analysis: Analysis, title: str) -> Path:
    """Write an analysis as one HTML file that needs no network.

    Args:
        path: the file.
        analysis: what `nf.analyze` returned.
        title: what was analysed.

    Returns:
        The path written.

    Raises:
        MissingExtraError: without matplotlib or jinja2.
    """
    found = [verdicts(analysis.diagnosis, PICTURES, tuple(_facts(analysis))), *analysis_sections(analysis)]
    return write_page(path, f"{title}: {headline(analysis.diagnosis)}", found, subtitle=_subtitle(analysis))


def _subtitle(analysis: Analysis) -> str:
    return f"Analysis of one measurement: {described(analysis.sgd)}; moments of {analysis.moments.samples:,} samples"


def _facts(analysis: Analysis) -> list[tuple[str, Any]]:
    return [
        ("loss", float(analysis.moments.loss)),
        ("symmetries", len(analysis.symmetries)),
        ("independent charges", analysis.symmetries.n_charges()),
        *([] if analysis.unanswered else _drift_facts(analysis)),
    ]


def _drift_facts(analysis: Analysis) -> list[tuple[str, Any]]:
    """How far from its equilibrium the model is, and what moves it."""
    return [
        ("largest imbalance", float(analysis.equilibrium.imbalance_now)),
        ("drift by the mean gradient", f"{analysis.flow.regime.mean_share:.0%}"),
    ]


def analysis_sections(analysis: Analysis, prefix: str = "") -> list[Section]:
    """The cards of the page: symmetries, the flow with its forecast, the equilibrium, and the certificate.

    Args:
        analysis: what to show.
        prefix: put before the names of figures, where a page holds several analyses.
    """
    names = [row.name for row in analysis.certificate.rows]
    return [
        Section(
            "Symmetries",
            f"{analysis.symmetries.n_charges():,} independent Noether charges, found in the traced graph and checked "
            "numerically in float64: outputs and per-sample gradients before and after random group elements.",
            table=analysis.symmetries.summary(),
            notes=legend("family", "blocks", "charges"),
            figures=[Figure(picture(analysis.symmetries), "A row per layer, a column per symmetry.", f"{prefix}map")],
        ),
        *_drift_sections(analysis, prefix),
        Section(
            "Certificate",
            str(analysis.certificate).splitlines()[0].capitalize() + ".",
            table=[_certificate_row(r) for r in analysis.certificate.rows],
            notes="; ".join(filter(None, [legend("outputs changed by", "gradients off by"), more_legs(names)])),
        ),
    ]


def _drift_sections(analysis: Analysis, prefix: str) -> list[Section]:
    """The flow and where it settles; why they are not known where that is so."""
    if analysis.unanswered:
        return [Section("Noether flow and noise equilibrium", f"{u.title} {u.advice}") for u in analysis.unanswered]
    return [
        Section(
            "Noether flow",
            "What moves the charges, how long they take, and where one measurement says that they go.",
            table=transposed(analysis.rows()),
            notes=legend(*EXPLAINED),
            figures=_flow_figures(analysis, prefix),
        ),
        Section(
            "Noise equilibrium",
            _settling(analysis),
            table=[_equilibrium_row(r) for r in analysis.equilibrium.rows()],
            notes=legend("finite, one-sided, degenerate", "largest factor", "imbalance"),
            figures=_equilibrium_figures(analysis, prefix),
        ),
    ]


def _certificate_row(row: CertificateRow) -> dict[str, Any]:
    return {
        "symmetry": row.name,
        "family": row.family,
        "verdict": row.verdict,
        "outputs changed by": row.outputs,
        "gradients off by": row.gradients,
        "eps": row.eps,
        "note": row.note,
    }


def _equilibrium_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "symmetry": row["symmetry"],
        "family": row["family"],
        "class": row["class"],
        "largest factor": row["largest_change"],
        "imbalance": row["imbalance_now"],
        "imbalance after the move": row["imbalance"],
        "reason": row["reason"],
    }


def _flow_figures(analysis: Analysis, prefix: str) -> list[Figure]:
    rows = drawings.fastest(analysis.flow.details, MOST)
    forecast = curves.drawn_forecast(analysis.flow)
    return [
        Figure(
            panel(len(rows), drawings.drifts, rows, analysis.flow.regime),
            "Drift of the charges, by cause.",
            f"{prefix}drifts",
        ),
        Figure(panel(len(rows), drawings.times, rows), "Relaxation times.", f"{prefix}times"),
        Figure(panel(10, curves.forecast, forecast, 8), "Forecast from one measurement.", f"{prefix}forecast"),
    ]


def _equilibrium_figures(analysis: Analysis, prefix: str) -> list[Figure]:
    settled = drawings.farthest(analysis.equilibrium, MOST)
    if not settled:
        return []
    away, moves = panel(len(settled), drawings.imbalances, settled), panel(len(settled), drawings.factors, settled)
    return [
        Figure(away, "Every coordinate that has an equilibrium.", f"{prefix}imbalance"),
        Figure(moves, "What the move to the equilibrium multiplies.", f"{prefix}factors"),
    ]


def _settling(analysis: Analysis) -> str:
    """What became of the search for the equilibrium."""
    found = analysis.equilibrium
    state = "converged" if found.converged else "did NOT converge"
    return (
        f"The joint {found.objective} equilibrium of {count(len(found.settled), 'symmetry', 'symmetries')}: the search "
        f"{state}. The largest imbalance is {brief(found.imbalance_now)} today and {brief(found.imbalance)} after the "
        "move there, which leaves the function as it is."
    )
