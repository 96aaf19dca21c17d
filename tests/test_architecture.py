"""Imports point one way, hidden ones included, and `import noetherflow` stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
LIBRARY, PAPER = SOURCE / "noetherflow", SOURCE / "noetherflow_paper"

LAYERS = ["errors", "core", "symmetry", "discovery moments", "equilibrium", "balance", "monitor",
          "diagnosis measured", "analysis workloads extend", "report", "cli", "__main__"]  # fmt: skip
"""Folders and modules of the library from the bottom up; those of one line never import each other."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
MODULES = sorted(p for p in LIBRARY.rglob("*.py") if p != LIBRARY / "__init__.py")
DOTTED = re.compile(r"noetherflow(_paper)?(\.\w+)+(:\w+)?")


def place(path: Path) -> str:
    """The folder or module of the first level that a file belongs to."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of this distribution that a file imports, inside functions and by strings included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            found.add(node.value.partition(":")[0])
    return {name for name in found if name.partition(".")[0] in ("noetherflow", "noetherflow_paper")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(LIBRARY)))
def test_imports_point_down(path):
    here = place(path)
    assert here in LEVEL, f"{here} is in no layer: add it to LAYERS and docs/architecture.md"
    there = {name.split(".")[1] for name in imported(path) if name.startswith("noetherflow.")}
    wrong = {other for other in there & LEVEL.keys() - {here} if LEVEL[other] >= LEVEL[here]}
    assert not wrong, f"{path.relative_to(SOURCE)} imports upwards: {sorted(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(LIBRARY)))
def test_the_library_does_not_know_the_paper(path):
    assert not {name for name in imported(path) if name.startswith("noetherflow_paper")}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def f():\n    from noetherflow.report import page", {"noetherflow.report", "noetherflow.report.page"}),
        ("import noetherflow_paper.runner as r", {"noetherflow_paper.runner"}),
        ("load('noetherflow_paper.cli:reproduce')", {"noetherflow_paper.cli"}),
        ("x = 'a sentence on noetherflow.report'; import torch", set()),
    ],
)
def test_hidden_imports_are_seen(tmp_path, code, names):
    (tmp_path / "module.py").write_text(code)
    assert imported(tmp_path / "module.py") == names


def test_import_module_serves_the_public_names_alone():
    users = [p for p in SOURCE.rglob("*.py") if "import_module" in p.read_text()]
    assert users == [LIBRARY / "__init__.py"]


def test_a_class_name_exists_once():
    classes = [
        (node.name, path)
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    homes = {name: [str(p.relative_to(SOURCE)) for n, p in classes if n == name] for name, _ in classes}
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


def test_import_is_light():
    heavy = ["matplotlib", "plotly", "jinja2", "sklearn", "transformers", "peft", "joblib", "dask", "pandas",
             "torch._dynamo", "torch.export._trace", "scipy.integrate", "scipy.optimize", "rich", "typer",
             "noetherflow_paper"]  # fmt: skip
    code = (
        "import sys, torch; before = set(sys.modules); import noetherflow; "
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dir_lists_the_public_names_only():
    import noetherflow

    assert set(dir(noetherflow)) == {*noetherflow.__all__, "__version__"}


def test_every_public_name_is_there():
    import noetherflow

    assert all(getattr(noetherflow, name) is not None for name in noetherflow.__all__)


LONGEST, MOST = 60, 8
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[tuple[Path, Function, str]]:
    """Every function of a file with its docstring; an `__init__` without one has that of its class."""
    tree = ast.parse(path.read_text())
    owners = {f: c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for f in c.body}
    return [
        (path, node, ast.get_docstring(node) or (ast.get_docstring(owners[node]) if node in owners else "") or "")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


FUNCTIONS = [found for path in sorted(SOURCE.rglob("*.py")) for found in functions(path)]


def parameters(node: Function) -> int:
    """How many parameters a function has, without `self` or `cls`."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def told(path: Path, node: Function) -> str:
    return f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"


def lines_of_code(node: Function) -> int:
    """Lines from `def` to the end without the docstring."""
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    return (node.end_lineno or 0) - node.lineno + 1 - documented * ((first.end_lineno or 0) - first.lineno + 1)


def test_functions_can_be_read_in_a_minute():
    long = [told(p, n) for p, n, _ in FUNCTIONS if lines_of_code(n) > LONGEST]
    assert not long, f"over {LONGEST} lines, take them apart: {long}"


def is_operator_rule(node: Function) -> bool:
    """A gauge rule takes the arguments of its operator, however many these are."""
    return any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "rule" for d in node.decorator_list)


def test_many_parameters_have_a_reason():
    many = [
        told(p, n)
        for p, n, docstring in FUNCTIONS
        if parameters(n) > MOST and "parameters" not in docstring and not is_operator_rule(n)
    ]
    assert not many, f"over {MOST} parameters without a reason in the docstring (name 'parameters' there): {many}"


LAZY = {"scipy", "safetensors", "rich", "torch", "fcntl"}
"""Packages that may be imported inside functions: slow to import, or not there on every system."""
LAZY_FACES = ("noetherflow/cli/", "noetherflow_paper/cli.py")
"""Where the library's own modules may be: `noetherflow --help` must not wait for them."""
VERSION = "noetherflow/report/page.py"
"""Takes `__version__` from the package, which the package defines after its imports."""


def test_imports_stand_at_the_top_but_for_slow_ones():
    wrong = []
    for path, node, _ in FUNCTIONS:
        here = path.relative_to(SOURCE).as_posix()
        for inner in ast.walk(node):
            if not isinstance(inner, ast.Import | ast.ImportFrom):
                continue
            names = [inner.module or ""] if isinstance(inner, ast.ImportFrom) else [a.name for a in inner.names]
            own = {name for name in names if name.startswith("noetherflow")}
            roots = {name.partition(".")[0] for name in names} - {"noetherflow", "noetherflow_paper"}
            if (own and not here.startswith(LAZY_FACES) and here != VERSION) or roots - LAZY:
                wrong.append(f"{told(path, node)} imports {names}")
    assert not wrong, f"imports inside functions: {wrong}"
