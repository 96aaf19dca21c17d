"""Links of the README and the docs: files and headings exist, outside places are listed."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")


def links(text: str) -> list[str]:
    """The targets of all links and pictures outside code."""
    return LINK.findall(CODE.sub("`code`", FENCED.sub("", text)))


def anchors(text: str) -> set[str]:
    """The names by which the headings of a page are linked to, as GitHub and myst form them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", FENCED.sub("", text), re.MULTILINE):
        plain = re.sub(r"[`*_]|\[|\]\([^)]*\)", "", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


def broken(page: Path) -> list[str]:
    """The links of a page to files or headings that are not there."""
    text, out = page.read_text(), []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            out.append(f"{target}: no such file")
        elif heading and file.suffix == ".md" and heading not in anchors(file.read_text()):
            out.append(f"{target}: no such heading, there are {sorted(anchors(file.read_text()))}")
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_outside_links_are_secure_and_only_to_places_known_here() -> None:
    """No test asks the network. Whoever adds a place looks at it and lists it."""
    places = {urlparse(t).netloc for page in PAGES for t in links(page.read_text()) if re.match(r"[a-z]+:", t)}
    schemes = {urlparse(t).scheme for page in PAGES for t in links(page.read_text()) if re.match(r"[a-z]+:", t)}
    assert schemes == {"https"}
    assert places == OUTSIDE


OUTSIDE: set[str] = {"arxiv.org"}


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` of c, d\n\n[x](#a-b-of-c-d) [y](#nowhere) ![z](gone.png) [w](https://arxiv.org)\n`[v](no)`\n"
    )
    assert [line.split(":")[0] for line in broken(page)] == ["#nowhere", "gone.png"]
