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
    return _render("report.md.j2", path, summary, paper=_stored(paper), paper_failing=_failing(paper))


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


def _stored(folder: Path | None) -> dict[str, str]:
    """Per experiment id: claims that hold and processor time of an earlier run, or its estimated time."""
    if folder is None:
        return {}
    out = {}
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text())
        if path.name == "estimates.json":
            out.update({name: f"not run; about {_duration(s)} (estimate)" for name, s in stored.items()})
        else:
            held = sum(v["holds"] for v in stored["verdicts"])
            out[stored["id"]] = f"{held} of {len(stored['verdicts'])} hold, {_duration(stored['seconds'])}"
    return out


def _failing(folder: Path | None) -> list[tuple[str, Verdict]]:
    """Experiment id and verdict of every claim that failed in an earlier run."""
    if folder is None:
        return []
    runs = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p.name != "estimates.json"]
    return [(r["id"], Verdict.from_dict(v)) for r in runs for v in r["verdicts"] if not v["holds"]]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
