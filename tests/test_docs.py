"""Every Python block of the README and the docs runs; every command shown exists."""

from __future__ import annotations

import doctest
import inspect
import linecache
import pkgutil
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import noetherflow
from noetherflow import Translation, discovery
from noetherflow.symmetry import declare

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]\d+)?")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


REGISTRIES = [
    ("noetherflow.equilibrium.objective", "_OBJECTIVES"),
    ("noetherflow.discovery.rules.base", "RULES"),
    ("noetherflow.discovery.shift_rules.base", "SHIFT_RULES"),
    ("noetherflow.balance.state_rules", "_RULES"),
    ("noetherflow.monitor.rule", "_RULES"),
    ("noetherflow.moments.rules.registry", "RULES"),
    ("noetherflow_paper.experiment", "_REGISTERED"),
]


@pytest.fixture(autouse=True)
def registries_as_they_were():
    """What examples register is gone after them: other tests of the process know nothing of it."""
    held = [getattr(pkgutil.resolve_name(module), name) for module, name in REGISTRIES]
    before = [dict(registry) for registry in held]
    yield
    for registry, entries in zip(held, before, strict=True):
        registry.clear()
        registry.update(entries)


def blocks(page: Path, language: str) -> list[str]:
    return [body for lang, body in FENCE.findall(page.read_text()) if lang == language]


def outputs(page: Path) -> list[tuple[str, str | None]]:
    """Python blocks, each with the text block that follows it at once: what it prints."""
    text = page.read_text()
    fences = list(FENCE.finditer(text))
    follows = [b[1] == "text" and not text[a.end() : b.start()].strip() for a, b in pairwise(fences)]
    return [
        (fence[2], fences[i + 1][2] if i < len(follows) and follows[i] else None)
        for i, fence in enumerate(fences)
        if fence[1] == "python"
    ]


def assert_prints(printed: str, shown: str) -> None:
    """The same words; numbers to 1 %, or both at the level of rounding."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    for a, b in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        got, expected = (float(n.replace(",", "")) for n in (a, b))
        assert got == pytest.approx(expected, rel=1e-2, abs=1e-9), f"{a} instead of {b} in\n{printed}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.filterwarnings("default")
def test_python_blocks_run_and_print_what_is_shown(page, tmp_path, monkeypatch, capsys):
    """One namespace a page, in reading order; the source of its functions can be read, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for number, (body, shown) in enumerate(outputs(page)):
        capsys.readouterr()
        name = f"<{page.stem} {number}>"
        monkeypatch.setitem(linecache.cache, name, (len(body), None, body.splitlines(keepends=True), name))
        exec(compile(body, name, "exec", dont_inherit=True), namespace)
        if shown is not None:
            assert_prints(capsys.readouterr().out, shown)


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


def test_every_family_in_the_coverage_table_has_a_sentence():
    text = (ROOT / "docs" / "coverage.md").read_text()
    explained = set(re.findall(r"^- \*\*([\w-]+)\*\*", text, re.MULTILINE))
    found = set(re.findall(r"([\w-]+) (?:scalar|diagonal|GL\(\d+\)) x\d+", text))
    assert {*found, *get_args(get_type_hints(Translation)["family"])} <= explained
    found_in = Path(discovery.__file__).parent.rglob("*.py")
    source = "".join(path.read_text() for path in found_in) + inspect.getsource(declare)
    assert all(f'"{name}"' in source for name in explained), "a family that no code names"


SOURCE = Path(noetherflow.__file__).parent.parent
WITH_EXAMPLES = sorted(path for path in SOURCE.glob("noetherflow*/**/*.py") if ">>> " in path.read_text())
MODULES = [".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for path in WITH_EXAMPLES]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("default")
def test_examples_in_docstrings_run_and_print_what_is_shown(name, tmp_path, monkeypatch):
    """With `torch`, `nn` and `nf` at hand, as a reader has them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = pkgutil.resolve_name(name)
    known = {"torch": torch, "nn": torch.nn, "nf": noetherflow}
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs=known)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in tests:
        said: list[str] = []
        assert not runner.run(example, out=said.append).failed, "".join(said)
