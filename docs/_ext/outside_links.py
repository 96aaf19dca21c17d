"""Links from pages to files of the repository that are no pages: shown as code, since the site does not hold them."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """The text of the link alone, for a target with a path that leaves docs/ or names a source file."""
    target = node.get("reftarget", "")
    path = target.partition("#")[0]
    if node.get("refdomain") != "doc" and not path.startswith("../") and not path.endswith((".py", ".md", "/")):
        return None
    here = env.doc2path(node.get("refdoc", "index"))
    return content if (app.srcdir / here).parent.joinpath(path).exists() else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
