"""The gallery `index.html` and `docs/reproduction.md`, both from a finished run."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noetherflow.errors import require

if TYPE_CHECKING:
    from noetherflow.reproduce.runner import Summary


def write_gallery(summary: Summary) -> Path:
    """One self-contained page: figures embedded, no script, nothing fetched."""
    from noetherflow.reproduce.runner import versions, write_atomically

    jinja2: Any = require("jinja2", "report")
    source = files("noetherflow.reproduce").joinpath("gallery.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    images = {f.experiment.id: _embedded(summary.out / f"{f.experiment.id}.png") for f in summary.finished}
    path = summary.out / "index.html"
    write_atomically(path, template.render(summary=summary, images=images, versions=versions()))
    return path


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
