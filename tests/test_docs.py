"""Every Python block of the README and the docs runs; every command shown exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for lang, body in FENCE.findall(page.read_text()) if lang == language]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
@pytest.mark.filterwarnings("default")
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """One namespace a page, in reading order."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for body in blocks(page, "python"):
        exec(compile(body, f"{page.name}", "exec"), namespace)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for language in ("", "bash", "sh", "console"):
            for body in blocks(page, language):
                lines = [line.removeprefix("$ ").strip() for line in body.splitlines()]
                found += [(page.name, line) for line in lines if line.startswith("noetherflow ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_shown_exist(page, line):
    """The subcommand exists and knows every option shown."""
    import typer.main

    from noetherflow.cli.app import app

    group = typer.main.get_command(app)
    words = shlex.split(line.split("#")[0])[1:]
    command = group.commands.get(words[0])
    assert command is not None, f"{page}: no command {words[0]!r}"
    known = {option for parameter in command.params for option in parameter.opts}
    shown = {w.split("=")[0] for w in words[1:] if w.startswith("--")}
    assert shown <= known, f"{page}: {line!r} uses {sorted(shown - known)}"


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z][a-z-]*)", (ROOT / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
