"""Imports point one way, and `import noetherflow` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "noetherflow"

LAYERS = [
    {"errors"},
    {"spd", "sgd", "legs", "host", "printing"},
    {"symmetry"},
    {"symmetry_set"},
    {"discovery", "moments"},
    {"flow", "equilibrium", "sharpness", "closed_form"},
    {"balance", "checkpoint", "motion", "optimizer_state", "monitor"},
    {"analysis", "workloads"},
    {"reproduce", "report"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def part(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "noetherflow":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("noetherflow."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("noetherflow.")}
    return found & LEVEL.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    here = part(path)
    assert here in LEVEL, f"{here} is in no layer: add it to LAYERS and docs/architecture.md"
    wrong = {
        other
        for other in imported_parts(path)
        if other != here and (LEVEL[other] > LEVEL[here] or {other, here} == {"discovery", "moments"})
    }
    assert not wrong, f"{path.relative_to(ROOT)} imports upwards: {sorted(wrong)}"


def test_import_is_light():
    heavy = ["matplotlib", "plotly", "jinja2", "sklearn", "transformers", "peft", "joblib", "dask", "pandas",
             "torch._dynamo", "torch.export._trace", "scipy.integrate", "scipy.optimize", "rich", "typer"]  # fmt: skip
    code = (
        "import sys, torch; before = set(sys.modules); import noetherflow; "
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dir_lists_the_public_names_only():
    import noetherflow

    assert set(dir(noetherflow)) == {*noetherflow.__all__, "__version__"}
