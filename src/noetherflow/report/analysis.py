"""The page of one analysis: what was found, what flows, where it settles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from noetherflow.analysis import Analysis
from noetherflow.core.optimizers import described
from noetherflow.core.printing import legend, transposed
from noetherflow.discovery import CertificateRow
from noetherflow.equilibrium.flow import EXPLAINED
from noetherflow.report.figures import balance_figure, forecast_figure
from noetherflow.report.page import Figure, Section, write_page

HORIZON = 3.0
"""Forecasts run to this many median relaxation times."""


def write_analysis(path: str | os.PathLike[str], analysis: Analysis, title: str) -> Path:
    """Write an analysis as one HTML file that needs no network.

    Args:
        path: the file.
        analysis: what `nf.analyze` returned.
        title: what was analysed; the page is called "Symmetries of TITLE".

    Returns:
        The path written.

    Raises:
        MissingExtraError: without matplotlib or jinja2.
    """
    return write_page(path, f"Symmetries of {title}", analysis_sections(analysis), subtitle=_subtitle(analysis))


def _subtitle(analysis: Analysis) -> str:
    return f"{described(analysis.sgd)}; moments of {analysis.moments.samples:,} samples"


def analysis_sections(analysis: Analysis) -> list[Section]:
    """The cards of the page: symmetries, certificate, the flow with its forecast, and the equilibrium."""
    return [
        Section(
            "Symmetries",
            f"{analysis.symmetries.n_charges():,} independent Noether charges, found in the traced graph and checked "
            "numerically in float64: outputs and per-sample gradients before and after random group elements.\n\n"
            + legend("family", "blocks", "charges"),
            table=analysis.symmetries.summary(),
        ),
        Section(
            "Certificate",
            legend("outputs changed by", "gradients off by"),
            table=[_certificate_row(r) for r in analysis.certificate.rows],
        ),
        Section(
            "Noether flow",
            legend(*EXPLAINED),
            table=transposed(analysis.rows()),
            figures=[Figure(_forecast(analysis), "Forecast from this one measurement.")],
        ),
        Section(
            "Noise equilibrium",
            f"{str(analysis.equilibrium).splitlines()[0]}\n\n"
            + legend("finite, one-sided, degenerate", "largest factor", "imbalance"),
            table=[_equilibrium_row(r) for r in analysis.equilibrium.rows()],
            figures=[
                Figure(_balance(analysis), "Coordinates with a finite equilibrium, now and predicted after the move.")
            ],
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


def _forecast(analysis: Analysis) -> bytes:
    times = np.concatenate([r.relaxation_steps[r.finite].flatten().numpy() for r in analysis.flow.details])
    horizon = int(HORIZON * np.median(times)) if times.size else 10_000
    steps = sorted({int(k) for k in np.linspace(0, max(horizon, 10), 31)})
    forecast = analysis.flow.forecast(steps)
    return forecast_figure(forecast.steps, forecast.charges, forecast.errors)


def _balance(analysis: Analysis) -> bytes:
    pairs = []
    for settled in analysis.equilibrium:
        finite = settled.finite.numpy()
        pairs.append((settled.imbalance_now.numpy()[finite], settled.imbalance.numpy()[finite]))
    now, after = (np.concatenate(values) for values in zip(*pairs, strict=True))
    return balance_figure({"now": now, "after the move, predicted": after})
