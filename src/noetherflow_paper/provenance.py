"""What numbers depend on: versions, and the code behind an experiment's `compute`."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import noetherflow
from noetherflow.errors import DataError

ROOT = Path(noetherflow.__file__).parent
FACES = frozenset({"cli", "report", "diagnosis"})
"""Folders of the library that compute nothing the experiments use."""
DRAWING = frozenset({"noetherflow.report.style", "noetherflow_paper.experiment", "noetherflow_paper.verdict"})
"""Modules that draw, judge and describe. A change of `experiment.generator` or `plain` needs another folder."""


def versions(device: str = "cpu") -> dict[str, str]:
    """Versions of what the numbers depend on, and the device they are computed on."""
    return {
        "noetherflow": noetherflow.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def merged(several: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Of every name all the versions met, in order: `2.12 / 2.13` where they differ."""
    met: dict[str, dict[str, None]] = {}
    for one in several:
        for name, version in one.items():
            met.setdefault(name, {})[version] = None
    return {name: " / ".join(found) for name, found in met.items()}


def fingerprint(compute: Callable[..., Any], *given: Any) -> str:
    """Changes whenever a recomputation could give another answer: what is `given` (JSON), the code, or torch.

    Comments, layout, docstrings, and what draws, judges or describes (DRAWING) do not count.
    """
    text = json.dumps([*given, source_of(compute), library_digest(ROOT), torch.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def library_digest(root: Path) -> str:
    """A digest of every module below `root` outside FACES."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in FACES:
            digest.update(f"{name.as_posix()}\n{_normal(ast.parse(path.read_text(encoding='utf-8')))}".encode())
    return digest.hexdigest()


@functools.cache
def source_of(compute: Callable[..., Any]) -> str:
    """What `compute` reaches in its module, and the modules of `noetherflow_paper` it uses, directly or not."""
    own = inspect.getmodule(compute)
    others = sorted(_used(own) - DRAWING - {compute.__module__}) if own is not None else []
    texts = [_normal(ast.parse(inspect.getsource(sys.modules[name]))) for name in others]
    try:
        lines, _ = inspect.findsource(compute)
    except OSError as cause:
        raise DataError(
            f"the code of {compute.__qualname__} cannot be read, so it is not known when its results are outdated; "
            "put the experiment into a module file"
        ) from cause
    return "".join([reached("".join(lines), compute.__name__), *texts])


def _used(module: ModuleType) -> set[str]:
    """Names of the modules of `noetherflow_paper` whose functions or classes `module` holds, and so on."""
    found: set[str] = set()
    left = [module]
    while left:
        held = {inspect.getmodule(value) for value in vars(left.pop()).values()}
        new = {m for m in held if m is not None and m.__name__.startswith("noetherflow_paper.")}
        left += [m for m in new if m.__name__ not in found | DRAWING]
        found |= {m.__name__ for m in new}
    return found


@functools.cache
def reached(source: str, name: str) -> str:
    """The top-level definitions of `source` that `name` uses, directly or not, in a normal form."""
    tree = ast.parse(source)
    definitions = {defined: node for node in tree.body for defined in _defines(node)}
    found, left = set(), {name}
    while left:
        found |= left
        used = {n.id for d in left for n in ast.walk(definitions[d]) if isinstance(n, ast.Name)}
        left = (used & definitions.keys()) - found
    tree.body = [node for node in tree.body if found & _defines(node)]
    return _normal(tree)


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _normal(tree: ast.Module) -> str:
    """Source text without comments, layout and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)
