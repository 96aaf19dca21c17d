"""The gallery `index.html` and the report `docs/reproduction.md`: two templates over the same finished runs."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noetherflow.errors import require
from noetherflow.reproduce.differences import DIFFERENCES
from noetherflow.reproduce.experiment import Verdict

if TYPE_CHECKING:
    from noetherflow.reproduce.runner import Summary


def write_gallery(summary: Summary) -> Path:
    """One self-contained page in `summary.out`: figures embedded, no script, nothing fetched."""
    images = {f.experiment.id: _embedded(summary.out / f"{f.experiment.id}.png") for f in summary.finished}
    return _render("gallery.html.j2", summary.out / "index.html", summary, images=images)


def write_markdown(summary: Summary, path: Path, paper: Path | None = None) -> Path:
    """Every claim with predicted, measured ± standard error and verdict, what is not in the paper, and its effect.

    `paper`: the folder of a run at paper scale, shown beside (only experiments that finished there; with processor
    seconds of the others if it holds an `estimates.json`, id -> seconds).
    """
    told, failing = _earlier(paper)
    return _render("report.md.j2", path, summary, paper=told, paper_failing=failing)


def _render(template: str, path: Path, summary: Summary, **more: Any) -> Path:
    from noetherflow.reproduce.runner import versions, write_atomically

    jinja2: Any = require("jinja2", "report")
    source = files("noetherflow.reproduce").joinpath(template).read_text(encoding="utf-8")
    html = template.startswith("gallery")
    environment = jinja2.Environment(autoescape=html, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = lambda text: text.replace("|", "\\|")
    shown = {
        d.number: [(f.experiment.id, v) for f in summary.finished for v in f.verdicts if v.difference == d.number]
        for d in DIFFERENCES
    }
    page = environment.from_string(source).render(
        summary=summary, versions=versions(), differences=DIFFERENCES, shown=shown, **more
    )
    write_atomically(path, page)
    return path


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _earlier(folder: Path | None) -> tuple[dict[str, str], list[tuple[str, Verdict]]]:
    """An earlier run: per experiment id the claims that hold and its processor time (or the estimated time), and id and
    verdict of every claim that failed.
    """
    stored = {p.name: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))} if folder is not None else {}
    estimates = stored.pop("estimates.json", {})
    told = {name: f"not run; about {_duration(s)} (estimate)" for name, s in estimates.items()}
    failing = []
    for run in stored.values():
        failed = [Verdict.from_dict(v) for v in run["verdicts"] if not v["holds"]]
        count = len(run["verdicts"])
        told[run["id"]] = f"{count - len(failed)} of {count} hold, {_duration(run['seconds'])}"
        failing += [(run["id"], v) for v in failed]
    return told, failing


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
