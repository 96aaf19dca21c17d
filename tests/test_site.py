"""The documentation site builds without a warning, has every page, and asks no server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import noetherflow as nf

DOCS = Path(__file__).parent.parent / "docs"
SCRIPTS = sorted((DOCS.parent / "examples" / "gallery").glob("plot_*.py"))


def test_every_page_is_in_the_contents() -> None:
    """A page that no table of contents names is one that nobody finds."""
    listed = set(re.findall(r"^([a-z_/A-Z*]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in DOCS.rglob("*.md") if "_build" not in p.parts}
    lost = {p for p in pages - {"index"} if not any(fnmatch(p, pattern) for pattern in listed)}
    assert lost == set()


def test_gallery_scripts_open_with_a_question() -> None:
    assert len(SCRIPTS) >= 5
    for path in SCRIPTS:
        title, line, _, question = path.read_text().splitlines()[1:5]
        assert set(line) == {"="}
        assert len(line) == len(title)
        assert "?" in question, path.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_gallery_scripts_run_without_a_warning(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MPLBACKEND": "agg"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "GALLERY": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'(?:src|rel="stylesheet" href)="https?:', page.read_text()), page
    assert "<math" in (tmp_path / "equations.html").read_text()


def test_the_citation_names_the_present_version() -> None:
    text = (DOCS.parent / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(nf.__version__)}$", text, re.MULTILINE)
    assert "preferred-citation" in text
