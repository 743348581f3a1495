"""Resolves references by the short names that the package's annotations and docstrings use."""

from __future__ import annotations

from typing import Any, cast

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.util.nodes import make_refnode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}


def _resolve(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Returns a link to the only documented name of the package whose last part is that of the reference."""
    if node.get("refdomain") != "py":
        return None
    last = node["reftarget"].rpartition(".")[2]
    objects = cast("PythonDomain", env.domains["py"]).objects
    found = {entry for name, entry in objects.items() if name.rpartition(".")[2] == last and not entry.aliased}
    if len(found) != 1 or not node["reftarget"].startswith((last, "dit_lens.")):
        return None
    (entry,) = found
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content)
