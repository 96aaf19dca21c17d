"""The page scaffold: self-contained, escaped, atomic, plotly at most once."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from noetherflow.core.printing import show
from noetherflow.diagnosis.finding import Diagnosis, Finding, Severity, Topic
from noetherflow.errors import DataError
from noetherflow.report.page import Figure, Notice, Section, render_page, write_page
from noetherflow.report.verdicts import verdicts

go = pytest.importorskip("plotly.graph_objects")

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360f8cfc000000301010018dd8db0"
    "0000000049454e44ae426082"
)


class Balanced(HTMLParser):
    """Collects tags and external references; fails on a wrong nesting."""

    void = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    return parser


def sections() -> list[Section]:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="</script><b>x"))
    return [
        Section("First <part>", "Prose with `code <i>`.\n\nSecond paragraph & more.", facts=[("steps", 12345)]),
        Section("Table", table=[{"name": "a<b", "value": 1.23456}, {"name": "c", "value": None}]),
        Section("Figures", figures=[Figure(figure, "a curve"), Figure(figure), Figure(PNG, 'a "dot"')]),
    ]


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    path = write_page(tmp_path / "deep" / "page.html", "Title & <more>", sections(), subtitle="sub")
    html = path.read_text()
    page = parse(html)
    assert all(r.startswith(("#", "data:")) for r in page.references)
    assert html.count("* plotly.js (cartesian") == 1
    text = " ".join(page.texts)
    for expected in (
        "Title & <more>",
        "First <part>",
        "code <i>",
        "Second paragraph & more.",
        "12,345",
        "a<b",
        "1.23",
    ):
        assert expected in text
    assert "<b>x" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
    payloads = re.findall(r'<script type="application/json" data-plot="([^"]+)">(.*?)</script>', html, flags=re.S)
    assert [name for name, _ in payloads] == ["plot-2-0", "plot-2-1"]
    assert json.loads(payloads[0][1])["data"][0]["name"] == "</script><b>x"
    assert list(tmp_path.glob("deep/.*")) == []


def test_a_verdict_links_to_its_picture_and_tables_are_folded() -> None:
    notices = [
        Notice("act", "Do `this`.", ("It matters.",), ("sure",), "curve"),
        Notice("good", "Fine.", figure="none"),
    ]
    figures = [Figure(PNG, "a dot", "curve")]
    card = Section("v", notices=notices, figures=figures, table=[{"a": 0.0000221}], notes="what a is", code="x = 1 < 2")
    html = render_page("t", [card])
    page = parse(html)
    assert page.references.count("#fig-curve") == 1
    assert '<figure id="fig-curve"' in html
    assert "#fig-none" not in page.references
    text = " ".join(page.texts)
    for expected in ("It matters.", "x = 1 < 2", "the numbers as a table (1 row)", "what a is", "2.21 × 10⁻⁵"):
        assert expected in text
    assert html.index("<details><summary>the numbers") < html.index("<table>")
    unfolded = render_page("t", [Section("v", table=[{"a": 1}], folded="")])
    assert "<details>" not in unfolded


def test_page_without_plotly_figures_is_small() -> None:
    html = render_page("t", [Section("only", figures=[Figure(PNG, "dot")])])
    parse(html)
    assert len(html) < 20_000
    assert "Plotly" not in html


@pytest.mark.parametrize(("trace", "part"), [("Scatter", 0.4), ("Heatmap", 0.4), ("Scatter3d", 1.1)])
def test_a_page_holds_no_more_of_plotly_than_its_figures_need(trace: str, part: float) -> None:
    figure = go.Figure(getattr(go, trace)())
    html = render_page("t", [Section("only", figures=[Figure(figure, "dot")])])
    parse(html)
    assert 1_000_000 < len(html) < part * len(get_plotlyjs())
    assert trace.lower() in html


def test_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, "old", [Section("kept")])
    with pytest.raises(DataError, match="neither a plotly figure nor a PNG"):
        write_page(path, "new", [Section("bad", figures=[Figure(b"GIF89a", "wrong")])])
    assert "kept" in path.read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12345.678, "12,346"),
        (1e-9, "1.000e-09"),
        (float("nan"), "–"),
        (None, "–"),
        (True, "yes"),
        (7, "7"),
    ],
)
def test_numbers_for_people(value: object, text: str) -> None:
    assert show(value) == text


def test_verdicts_stand_under_their_questions_and_names_are_spelled_out() -> None:
    def found(rule: str, topic: Topic, severity: Severity) -> Finding:
        return Finding(rule, topic, severity, f"`a (+2) [scale]` says {rule}.", "It matters.", "Do it.", "sure")

    findings = [found("one", "decay", "act"), found("two", "norms", "watch"), found("three", "decay", "watch")]
    members = {"a (+2) [scale]": ("a", "h.0.o", "h.1.o")}
    html = render_page("t", [verdicts(Diagnosis.of("a model", findings, members), {})])
    order = ("Which norms grow?", "says two", "Does weight decay bite?", "says one", "says three")
    places = [html.index(text) for text in order]
    assert places == sorted(places)
    assert html.count("Does weight decay bite?") == 1
    assert "h.0-1.o" in html
