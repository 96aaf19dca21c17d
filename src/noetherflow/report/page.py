"""One self-contained HTML page from a title and sections of prose, facts, tables and figures; needs no network."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from noetherflow.core.files import write_text
from noetherflow.core.printing import Table, show
from noetherflow.errors import DataError, require


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure of a page.

    Attributes:
        content: a plotly figure, or a PNG as bytes or as the path of a file.
        caption: shown below, and read to those who cannot see the figure.
    """

    content: Any
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """A card of a page; its parts are shown in the order of the attributes.

    Attributes:
        heading: the title of the card, and its entry in the page's navigation.
        prose: text; blank lines part paragraphs, `backquotes` mark code.
        facts: pairs `(label, value)`, shown large.
        table: rows as `{column: value}`.
        figures: below the table.
    """

    heading: str
    prose: str = ""
    facts: Sequence[tuple[str, Any]] = ()
    table: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Figure] = ()


def write_page(path: str | os.PathLike[str], title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write one HTML file that needs no network; a reader sees the old file or the new one, never half of it.

    Args:
        path: the file; its folder is made if it is missing.
        title: the heading of the page.
        sections: its cards.
        subtitle: a sentence below the title.

    Returns:
        The path written.

    Raises:
        MissingExtraError: without jinja2, or without plotly for plotly figures.
        DataError: for a figure that is neither plotly nor PNG.

    Example:
        >>> from noetherflow.report import Section, write_page
        >>> page = write_page("page.html", "Runs", [Section("Losses", table=[{"run": "a", "loss": 0.5}])])
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, render_page(title, sections, subtitle))
    return target


def render_page(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The HTML text that `write_page` writes. plotly.js is embedded once, and only when a figure needs it."""
    from noetherflow import __version__

    jinja2: Any = require("jinja2", "report")
    markup: Any = require("markupsafe", "report")
    prepared = [_prepare(section, i, markup.Markup) for i, section in enumerate(sections)]
    interactive = any(f["kind"] == "plotly" for s in prepared for f in s["figures"])
    offline: Any = require("plotly.offline", "report") if interactive else None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        resources.files("noetherflow.report").joinpath("page.html.j2").read_text("utf-8")
    )
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=prepared,
        version=__version__,
        plotly=markup.Markup(offline.get_plotlyjs()) if interactive else "",
    )


def _prepare(section: Section, position: int, safe: Any) -> dict[str, Any]:
    return {
        "heading": section.heading,
        "anchor": f"s{position}-" + re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-"),
        "paragraphs": [_paragraph(p, safe) for p in re.split(r"\n\s*\n", section.prose.strip()) if p],
        "facts": [(label, show(value)) for label, value in section.facts],
        "table": safe(Table.of(section.table).html()) if section.table else "",
        "figures": [_figure(f, f"plot-{position}-{j}", safe) for j, f in enumerate(section.figures)],
    }


def _paragraph(text: str, safe: Any) -> Any:
    pieces = re.split(r"`([^`]+)`", " ".join(text.split()))
    marked = [safe("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(pieces)]
    return safe("").join(marked)


def _figure(figure: Figure, name: str, safe: Any) -> dict[str, Any]:
    content = figure.content
    base = {"id": name, "caption": figure.caption, "alt": figure.caption or "figure"}
    if hasattr(content, "to_plotly_json"):
        payload = content.to_json().replace("</", "<\\/").replace("<!--", "\\u003c!--")
        return base | {"kind": "plotly", "payload": safe(payload)}
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    if not data.startswith(b"\x89PNG"):
        raise DataError(f"figure {figure.caption or name!r} is neither a plotly figure nor a PNG")
    return base | {"kind": "png", "payload": "data:image/png;base64," + base64.b64encode(data).decode()}
