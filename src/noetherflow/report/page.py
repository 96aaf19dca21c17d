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
from noetherflow.core.printing import Table, brief, count
from noetherflow.errors import DataError, require
from noetherflow.report.library import plotly_for


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure of a page.

    Attributes:
        content: a plotly figure, or a PNG as bytes or as the path of a file.
        caption: shown below, and read to those who cannot see the figure.
        name: what a `Notice` calls it to link there.
    """

    content: Any
    caption: str = ""
    name: str = ""


@dataclass(frozen=True)
class Notice:
    """A verdict at the top of a page.

    Attributes:
        level: `act`, `watch`, `good` or `open`.
        title: one sentence.
        details: what it means and what to do, a paragraph each.
        small: folded away: how sure it is, the numbers.
        figure: the `name` of the figure that shows it, if the page has one.
        question: what it answers; written above the first of those that follow each other and answer the same.
    """

    level: str
    title: str
    details: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    figure: str = ""
    question: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """A card of a page; its parts are shown in the order of the attributes.

    Attributes:
        heading: the title of the card, and its entry in the page's navigation.
        notices: verdicts.
        facts: pairs `(label, value)`, shown large.
        prose: text; blank lines part paragraphs, `backquotes` mark code.
        code: a program to copy.
        figures: pictures.
        table: rows as `{column: value}`, folded away.
        notes: what the table's columns mean, folded with it.
        folded: what the closed table is called; empty to show it open.
    """

    heading: str
    prose: str = ""
    facts: Sequence[tuple[str, Any]] = ()
    table: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Figure] = ()
    notices: Sequence[Notice] = ()
    code: str = ""
    notes: str = ""
    folded: str = "the numbers as a table"


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
    named = {f.name: f"fig-{f.name}" for section in sections for f in section.figures if f.name}
    prepared = [_prepare(section, i, markup.Markup, named) for i, section in enumerate(sections)]
    drawn = [f.content for s in sections for f in s.figures if hasattr(f.content, "to_plotly_json")]
    plotly = plotly_for(trace.type for figure in drawn for trace in figure.data) if drawn else ""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_resource("page.html.j2"))
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=prepared,
        version=__version__,
        css=markup.Markup(stylesheet()),
        plotly=markup.Markup(plotly),
    )


def stylesheet() -> str:
    """The style of every page: light, dark, on a phone and in print."""
    return _resource("page.css")


def _resource(name: str) -> str:
    return resources.files("noetherflow.report").joinpath(name).read_text("utf-8")


def _prepare(section: Section, position: int, safe: Any, named: Mapping[str, str]) -> dict[str, Any]:
    rows = len(section.table)
    return {
        "heading": section.heading,
        "anchor": f"s{position}-" + re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-"),
        "notices": [_notice(n, safe, named) for n in section.notices],
        "facts": [(label, brief(value)) for label, value in section.facts],
        "paragraphs": _paragraphs(section.prose, safe),
        "code": section.code,
        "figures": [_figure(f, f"plot-{position}-{j}", safe) for j, f in enumerate(section.figures)],
        "table": safe(Table.of(section.table, brief).html()) if section.table else "",
        "folded": f"{section.folded} ({count(rows, 'row', 'rows')})" if section.folded else "",
        "notes": _paragraphs(section.notes, safe),
    }


def _notice(notice: Notice, safe: Any, named: Mapping[str, str]) -> dict[str, Any]:
    return {
        "level": notice.level,
        "question": notice.question,
        "title": _paragraph(notice.title, safe),
        "details": [_paragraph(text, safe) for text in notice.details],
        "small": [_paragraph(text, safe) for text in notice.small],
        "link": named.get(notice.figure, ""),
    }


def _paragraphs(text: str, safe: Any) -> list[Any]:
    return [_paragraph(p, safe) for p in re.split(r"\n\s*\n", text.strip()) if p]


def _paragraph(text: str, safe: Any) -> Any:
    pieces = re.split(r"`([^`]+)`", " ".join(text.split()))
    marked = [safe("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(pieces)]
    return safe("").join(marked)


def _figure(figure: Figure, name: str, safe: Any) -> dict[str, Any]:
    content = figure.content
    anchor = f"fig-{figure.name}" if figure.name else f"fig-{name}"
    base = {"id": name, "anchor": anchor, "caption": figure.caption, "alt": figure.caption or "figure"}
    if hasattr(content, "to_plotly_json"):
        payload = content.to_json().replace("</", "<\\/").replace("<!--", "\\u003c!--")
        return base | {"kind": "plotly", "payload": safe(payload)}
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    if not data.startswith(b"\x89PNG"):
        raise DataError(f"figure {figure.caption or name!r} is neither a plotly figure nor a PNG")
    return base | {"kind": "png", "payload": "data:image/png;base64," + base64.b64encode(data).decode()}
